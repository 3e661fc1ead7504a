"""A small CLIP tokenizer: byte-level BPE learned from the words our prompts are made of."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

def build_tokenizer(words: str, vocabulary: int) -> CLIPTokenizer:
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
