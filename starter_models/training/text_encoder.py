"""The text encoder of the text-to-image starter model.

It learns its words before the UNet learns to draw: from the state of its last token, linear layers
must tell which shape of which colour is in which place. A UNet that starts from such states needs
no time to learn what a text means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from starter_models.training import toy_world
from starter_models.training.diffusion import text_config
from starter_models.training.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import CLIPTokenizer

    from starter_models.training.toy_world import Scene

TEXT_DIM = 96
MAX_TOKENS = 77
_COLOURS = ("", *toy_world.COLOURS)
_SHAPES = ("", *toy_world.SHAPES)
_CELLS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
_KINDS = ("", *toy_world.LANDS)
_TIMES = ("", *toy_world.TIMES)
_EXTRAS = ("", *(extra for extras in toy_world.EXTRAS.values() for extra in extras))
_TEXTURES = ("", *toy_world.TEXTURES)
_CLASSES = (
    *(len(_SHAPES), len(_COLOURS)) * len(_CELLS),
    *(4, len(_COLOURS), len(_KINDS), len(_TIMES), len(_EXTRAS), len(_TEXTURES)),
    *(len(_COLOURS), len(_COLOURS)),
)


def tokenizer() -> CLIPTokenizer:
    """A tokenizer whose tokens are the words of the toy world."""
    world = (*toy_world.COLOURS, *toy_world.SHAPES, *toy_world.SIZES, *toy_world.PLACES,
             *toy_world.RELATIONS, *toy_world.LANDS, *toy_world.TIMES, *toy_world.TEXTURES,
             *_EXTRAS, "an and with on background")  # fmt: skip
    return build_tokenizer(" ".join(world), 1200)


def build(vocabulary: int) -> CLIPTextModel:
    """About 300 thousand parameters."""
    return CLIPTextModel(text_config(vocabulary, TEXT_DIM, layers=3))


def encode(words: CLIPTokenizer, encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """`B x 77 x TEXT_DIM`, as the stock pipelines compute it."""
    ids = words(
        list(prompts),
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return encoder(ids)[0]


class Reader(nn.Module):
    """Linear layers that tell the scene from a state of the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.tell = nn.Linear(TEXT_DIM, sum(_CLASSES))

    def loss(self, states: Tensor, scenes: Sequence[Scene]) -> tuple[Tensor, float]:
        """Mean cross entropy over all questions, and the share of scenes told wholly right.

        Args:
            states: `B x TEXT_DIM`.
            scenes: what each row shows.
        """
        right = torch.tensor([_answers(scene) for scene in scenes])
        told = self.tell(states).split(_CLASSES, dim=1)
        losses = [F.cross_entropy(t, right[:, k]) for k, t in enumerate(told)]
        hits = torch.stack([t.argmax(1) == right[:, k] for k, t in enumerate(told)])
        return torch.stack(losses).mean(), float(hits.all(0).float().mean())


def _answers(scene: Scene) -> list[int]:
    at = {thing.cell: thing for thing in scene.told}
    answers: list[int] = []
    for cell in _CELLS:
        thing = at.get(cell)
        answers.append(_SHAPES.index(thing.shape if thing else ""))
        answers.append(_COLOURS.index(thing.colour if thing else ""))
    answers.append(scene.things[0].scale if scene.things else 1)
    answers.append(_COLOURS.index(scene.background))
    answers.append(_KINDS.index(scene.land))
    answers.append(_TIMES.index(scene.time))
    answers.append(_EXTRAS.index(scene.extra))
    answers.append(_TEXTURES.index(scene.texture))
    first, second = scene.colours or ("", "")
    return [*answers, _COLOURS.index(first), _COLOURS.index(second)]
