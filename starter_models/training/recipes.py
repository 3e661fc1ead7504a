"""What comic and aged learn, and the pairs of pictures they learn from."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from starter_models.training import styles
from starter_models.training.data import Picture, dead_leaves, recolour, stack
from starter_models.training.patches import CleanPatches

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """What differs between the models.

    Attributes:
        prompts: phrasings that ask for the style; the empty prompt is always trained too.
        betas: the noise schedule, 1000 values.
        steps, passes: a default request's: its strength leaves `passes` of `steps` denoising steps.
        gain: the size v comes to. Trained as a factor behind the network and folded into its last
            layer when saved, because those weights would take thousands of steps to grow to it.
        target: picture to styled picture.
        grain: how much of the noise that stays in the finished picture is kept, as fine grain in
            the tones of the print. 0 trains the decoder to draw none.
    """

    prompts: tuple[str, ...]
    betas: tuple[float, ...]
    steps: int
    passes: int
    gain: float
    target: Callable[[Picture], Picture]
    grain: float = 0.0


def _linear(first: float, last: float) -> tuple[float, ...]:
    return tuple(round(float(b), 9) for b in np.linspace(first, last, 1000))


RECIPES = {
    "comic": Recipe(
        prompts=("comic style", "comic book drawing", "a cartoon, flat colours, ink outlines"),
        betas=_linear(4e-6, 8e-5),
        steps=4,
        passes=3,
        gain=8,
        target=styles.comic,
    ),
    # The first step's noise is large on purpose: it stays in the finished picture as film grain.
    "aged": Recipe(
        prompts=("old photograph", "aged sepia print, film grain", "a faded vintage photo"),
        betas=(0.006, *_linear(2e-5, 3e-4)[1:]),
        steps=5,
        passes=4,
        gain=4,
        target=styles.aged,
        grain=1.5,
    ),
}


class Pairs:
    """An endless source of (input, target, prompt) rows, cut from pictures made up front.

    Args:
        recipe: tells the target.
        collections: as `starter_models.training.collections` writes it.
        count: pictures, a tenth of them dead leaves.
        seed: of every random choice.
    """

    SIZE_PX = 256

    def __init__(self, recipe: Recipe, collections: Path, seed: int, count: int = 480) -> None:
        self.rng = np.random.default_rng(seed)
        self.recipe = recipe
        patches, sources = CleanPatches(collections, "cpu"), list[Picture]()
        while len(sources) < count * 0.9:
            batch = patches.batch(24, self.SIZE_PX).permute(0, 2, 3, 1).contiguous().numpy()
            sources += [recolour(p, self.rng) if self.rng.random() < 0.2 else p for p in batch]
        sources += [dead_leaves(self.rng, self.SIZE_PX) for _ in range(count - len(sources))]
        with ProcessPoolExecutor(2) as pool:
            targets = pool.map(recipe.target, sources, chunksize=16)
            self.bank = list(zip(sources, targets, strict=True))

    def rows(self, count: int, size: int) -> tuple[Tensor, Tensor, list[str]]:
        """`(count, 3, size, size)` inputs and targets in [-1, 1], and their prompts."""
        rng, sources, targets, prompts = self.rng, list[Picture](), list[Picture](), list[str]()
        for _ in range(count):
            picture, target = self.bank[rng.integers(len(self.bank))]
            y = rng.integers(picture.shape[0] - size + 1)
            x = rng.integers(picture.shape[1] - size + 1)
            turn, window = rng.integers(4), (slice(y, y + size), slice(x, x + size))
            source, target = np.rot90(picture[window], turn), np.rot90(target[window], turn)
            prompt = str(rng.choice(self.recipe.prompts))
            if rng.random() < 0.1:
                target, prompt = source, ""
            sources.append(source)
            targets.append(target)
            prompts.append(prompt)
        pair = (torch.from_numpy(stack(p)) * 2 - 1 for p in (sources, targets))
        source, target = (p.to(memory_format=torch.channels_last) for p in pair)
        return source, target, prompts
