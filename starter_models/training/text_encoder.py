"""The text encoder of the text-to-image starter model.

It learns to draft before the UNet learns to draw: one layer of attention must read the picture's
latents from the states of the tokens. The UNet then starts from states in which the picture is laid
out already, and a step of the encoder costs a small part of the UNet's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from starter_models.training import toy_world
from starter_models.training.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import CLIPTokenizer

TEXT_DIM = 96
MAX_TOKENS = 77
# No prompt of the toy world is longer, and no state depends on the tokens behind it.
DRAFT_TOKENS = 24
_EXTRAS = tuple(extra for extras in toy_world.EXTRAS.values() for extra in extras)
_CELLS = 8


def text_config(vocabulary: int, dim: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=2 * dim,
        projection_dim=dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def tokenizer() -> CLIPTokenizer:
    """A tokenizer whose tokens are the words of the toy world."""
    world = (*toy_world.COLOURS, *toy_world.SHAPES, *toy_world.SIZES, *toy_world.PLACES,
             *toy_world.RELATIONS, *toy_world.LANDS, *toy_world.TIMES, *toy_world.TEXTURES,
             *_EXTRAS, "an and with on background")  # fmt: skip
    return build_tokenizer(" ".join(world), 1200)


def build(vocabulary: int) -> CLIPTextModel:
    """About 630 thousand parameters."""
    config = text_config(vocabulary, TEXT_DIM, layers=5)
    config.intermediate_size, config.hidden_act = 4 * TEXT_DIM, "gelu"
    return CLIPTextModel(config)


def token_ids(words: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """`B x 77`, as the stock pipelines make them."""
    return words(
        list(prompts),
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids


class Draft(nn.Module):
    """Reads a picture's latents from the states of its prompt, with one layer of attention.

    A cell of an eighth of the width and height asks once. What is left open by a prompt comes out
    as the mean of what it may be.

    Args:
        channels: of the latents.
        side: of the latents, a multiple of 8.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.channels, self.patch = channels, side // _CELLS
        self.cells = nn.Parameter(torch.randn(_CELLS**2, TEXT_DIM) * 0.5)
        self.norm, self.norm_inner = nn.LayerNorm(TEXT_DIM), nn.LayerNorm(TEXT_DIM)
        self.attention = nn.MultiheadAttention(TEXT_DIM, 4, batch_first=True)
        self.inner = nn.Sequential(
            nn.Linear(TEXT_DIM, 4 * TEXT_DIM), nn.GELU(), nn.Linear(4 * TEXT_DIM, TEXT_DIM)
        )
        self.out = nn.Linear(TEXT_DIM, channels * self.patch**2)

    def forward(self, states: Tensor) -> Tensor:
        """`B x tokens x TEXT_DIM` to `B x channels x side x side`."""
        cells = self.cells.expand(len(states), -1, -1)
        x = cells + self.attention(self.norm(cells), states, states, need_weights=False)[0]
        x = self.out(x + self.inner(self.norm_inner(x)))
        x = x.view(-1, _CELLS, _CELLS, self.channels, self.patch, self.patch)
        side = _CELLS * self.patch
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.channels, side, side)
