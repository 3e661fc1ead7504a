"""A small CLIP tokenizer: byte-level BPE learned from the words our prompts are made of."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

_WORDS = """
a an the of in on at by for with without and or no not to from as is are this that photo photograph
picture image portrait painting drawing sketch print film camera lens studio light natural soft hard
warm cold bright dark golden hour shadow highlight contrast colour color colours vivid muted pastel
black white grey sepia tone faded vintage old aged ancient antique retro grain grainy scratched worn
paper comic cartoon manga anime style book strip panel flat ink outline outlines line lines bold
cell shading poster illustration watercolour high low quality sharp detailed detail crisp clean
clear fine texture resolution blurry blur noisy noise jpeg artifacts oversharpened overexposed
person people man woman child face eyes hair skin smile hands young elderly wrinkles beard glasses
cat dog bird horse fish flower tree leaf grass forest mountain river lake sea beach sky cloud sun
moon star city street house building window door car bicycle motorcycle train boat bridge road
food coffee cup table chair room kitchen garden market temple tower castle snow rain fog summer
winter spring autumn morning night day evening red orange yellow green blue purple pink brown
beautiful pretty small large big tiny wide close up front side back top view scene background
foreground landscape nature animal animals object objects product simple complex modern classic
bad anatomy deformed extra ugly wrong text watermark logo signature soft blurry smooth
"""


def build_tokenizer(words: str = _WORDS, vocabulary: int = 900) -> CLIPTokenizer:
    """CLIP's tokenizer class and file format, with about `vocabulary` tokens instead of 49,408.

    Args:
        words: what the merges are learned from.
        vocabulary: 512 tokens are single bytes; a longer word may take several tokens.
    """
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2 - 256,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator([words], trainer)
    learned = json.loads(bpe.to_str())["model"]
    return _clip_tokenizer(learned["merges"])


def _clip_tokenizer(merges: list[tuple[str, str]]) -> CLIPTokenizer:
    """CLIP's vocabulary order: bytes, bytes that end a word, merges, then the two specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"{symbol}</w>" for symbol in alphabet]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    with tempfile.TemporaryDirectory() as folder:
        vocab, rules = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps(vocabulary))
        rules.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
