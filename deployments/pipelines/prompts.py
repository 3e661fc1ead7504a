"""Embeddings of prompts: as stock pipelines make them, in chunks, and with weights.

Chunks are those of Stable Diffusion web UI (AUTOMATIC1111) without its look for commas
(`comma_padding_backtrack=0`): 75 tokens each, with a start and an end of their own, and their
embeddings stand side by side. An SDXL model gets the pooled embedding of the first chunk.

Weights are those of compel and ComfyUI: a token's embedding moves along the line from that of the
empty text at its place. Web UI multiplies the embedding itself and restores the mean, which fails
for text encoders whose mean is near 0.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from deployments.notes import Code, Note, note
from deployments.prompts import Piece, weighted_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.contract import DiffusionRequest
    from deployments.pipelines.denoiser import Condition

Embeddings: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""`(1, 77 * chunks, D)`, and `(1, P)` pooled ones where the model has them."""
_MOST_KEPT = 64
"""Chunks in the cache."""
_CHUNK = 77
"""Tokens of CLIP's text encoders, with a start and an end."""
_MOST_CHUNKS = 8
"""Some 600 tokens: nearly every prompt of 2000 characters, at an eighth of the attention that a
picture of 512 px pays to itself."""


class Wording(NamedTuple):
    """A text, and how it is read.

    Attributes:
        text: the prompt.
        chunked: whether tokens beyond the model's own limit are read in further chunks.
        weighted: whether brackets are weights.
    """

    text: str
    chunked: bool = False
    weighted: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is read as stock pipelines read it."""
        return not (self.chunked or self.weighted)

    @property
    def most_chunks(self) -> int:
        return _MOST_CHUNKS if self.chunked else 1

    @property
    def pieces(self) -> list[Piece]:
        """Its parts with their weights."""
        return weighted_pieces(self.text) if self.weighted else [Piece(self.text, 1.0)]


def wordings(request: DiffusionRequest) -> tuple[Wording, Wording]:
    """The prompt and the negative prompt of a request."""
    how = request.long_prompt == "chunk", request.prompt_weights
    return Wording(request.prompt, *how), Wording(request.negative_prompt, *how)


class PromptCache:
    """Embeddings of the latest texts, 64 chunks of them. Every text is encoded alone, so that its
    bits never change.

    Args:
        encode: embeddings of one text.
    """

    def __init__(self, encode: Callable[[Wording], Embeddings]) -> None:
        self._encode = encode
        self._known: OrderedDict[Wording, Embeddings] = OrderedDict()

    def __call__(self, wording: Wording) -> Embeddings:
        """The embeddings of a text, from the cache if it was among the latest."""
        embeddings = self._known.pop(wording, None) or self._encode(wording)
        self._known[wording] = embeddings
        kept = sum(text.shape[1] for text, _ in self._known.values())
        while kept > _MOST_KEPT * _CHUNK:
            _, (text, _) = self._known.popitem(last=False)
            kept -= text.shape[1]
        return embeddings

    def clear(self) -> None:
        """Forget all, because the weights move."""
        self._known.clear()


def tokenizers_of(stock: Any) -> list[Any]:
    """A stock pipeline's tokenizers, each of its text encoders in the same order."""
    found = (getattr(stock, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [one for one in found if one is not None]


def encode_in_chunks(stock: Any, wording: Wording) -> Embeddings:
    """Embeddings by a stock pipeline's text encoders, in chunks and with weights.

    Args:
        stock: a diffusers pipeline of CLIP text encoders; those of SDXL models are read at their
            last layer but one.
        wording: what to read.
    """
    encoders = [getattr(stock, name, None) for name in ("text_encoder", "text_encoder_2")]
    is_xl = hasattr(stock, "text_encoder_2")
    found: list[torch.Tensor] = []
    pooled = None
    for tokenizer, encoder in zip(tokenizers_of(stock), filter(None, encoders), strict=True):
        ids, weights = _chunks(tokenizer, wording)
        output = encoder(ids.to(stock.device), output_hidden_states=is_xl)
        if is_xl and output[0].ndim == 2:
            pooled = output[0][:1]
        hidden = output.hidden_states[-2] if is_xl else output[0]
        weighed = _weigh(hidden.float(), weights.to(hidden.device))
        found.append(weighed.to(encoder.dtype).flatten(0, 1)[None])
    return torch.cat(found, dim=-1), pooled


def match_lengths(
    positive: Condition, negative: Condition, empty: torch.Tensor
) -> tuple[Condition, Condition]:
    """Two conditions of one request with the same number of chunks.

    Args:
        positive, negative: as they were encoded.
        empty: `(1, 77, D)` of an empty text, which fills the shorter one up.
    """
    longest = max(positive.text.shape[1], negative.text.shape[1])

    def filled(condition: Condition) -> Condition:
        missing = (longest - condition.text.shape[1]) // empty.shape[1]
        return replace(condition, text=torch.cat([condition.text, *[empty] * missing], dim=1))

    return filled(positive), filled(negative)


def cut_note(name: str, wording: Wording, tokenizers: Sequence[Any]) -> list[Note]:
    """A note if a text has more tokens than the model reads; about the strictest tokenizer.

    Args:
        name: of the parameter.
        wording: what to read.
        tokenizers: of the model.
    """
    longest = (0, 0)
    for tokenizer in tokenizers:
        found = len(_tokens(tokenizer, wording))
        longest = max(longest, (found - _room(tokenizer) * wording.most_chunks, found))
    lost, found = longest
    if lost <= 0:
        return []
    told = f"The model reads {found - lost} tokens of {name}: the last {lost} of {found} were cut."
    if not wording.chunked:
        told += f" long_prompt=chunk reads up to {(found - lost) * _MOST_CHUNKS}."
    return [note(Code.PROMPT_CUT, told)]


def _room(tokenizer: Any) -> int:
    """Tokens of a text that fit a chunk, beside its start and end."""
    return tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()


def _tokens(tokenizer: Any, wording: Wording) -> list[tuple[int, float]]:
    """Every token of a text, with its weight."""
    return [
        (token, weight)
        for text, weight in wording.pieces
        # Not `verbose`: it would log what the note says.
        for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ]


def _chunks(tokenizer: Any, wording: Wording) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(chunks + 1, 77)`, the last of the empty text, and weights `(chunks, 77)`."""
    room, whole = _room(tokenizer), tokenizer.model_max_length
    tokens = _tokens(tokenizer, wording)[: room * wording.most_chunks]
    parts = [tokens[start : start + room] for start in range(0, max(len(tokens), 1), room)]
    ids: list[list[int]] = []
    weights: list[list[float]] = []
    for part in (*parts, []):
        padding = [tokenizer.pad_token_id] * (room - len(part))
        middle = [token for token, _ in part]
        ids.append([tokenizer.bos_token_id, *middle, tokenizer.eos_token_id, *padding])
        factors = [1.0, *[weight for _, weight in part]]
        weights.append(factors + [1.0] * (whole - len(factors)))
    return torch.tensor(ids), torch.tensor(weights[:-1])


def _weigh(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Embeddings `(chunks, 77, D)` with their weights.

    Args:
        hidden: `(chunks + 1, 77, D)`, the last of the empty text.
        weights: `(chunks, 77)`.
    """
    chunks, empty, weights = hidden[:-1], hidden[-1], weights[..., None]
    # Where nothing is weighed, not even rounding changes it.
    return torch.where(weights == 1, chunks, empty + (chunks - empty) * weights)
