"""What each diffusion starter model learns, and the pairs of pictures it learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from starter_models.training import styles
from starter_models.training.data import Picture, dead_leaves, recolour, stack, training_photos

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """What differs between the three models.

    Attributes:
        prompts: phrasings that ask for the style; the empty prompt is always trained too.
        betas: the noise schedule, 1000 values.
        start: range of t0 trained on, of 1000.
        gain: the size v comes to. Trained as a factor behind the network and folded into its last
            layer when saved, because those weights would take thousands of steps to grow to it.
        target: picture to styled picture; None means restoration of a degraded one.
    """

    prompts: tuple[str, ...]
    betas: tuple[float, ...]
    start: tuple[int, int]
    gain: float
    target: Callable[[Picture], Picture] | None


def _linear(first: float, last: float) -> tuple[float, ...]:
    return tuple(round(float(b), 9) for b in np.linspace(first, last, 1000))


RECIPES = {
    # Little noise: a refiner works at the clean end of the schedule, and every bit of noise added
    # to a degraded picture has to be taken out again.
    "enhance": Recipe(
        prompts=("", "high quality, sharp, detailed photo", "a photo"),
        betas=_linear(1e-7, 1.25e-5),
        start=(200, 400),
        gain=10,
        target=None,
    ),
    "comic": Recipe(
        prompts=("comic style", "comic book drawing", "a cartoon, flat colours, ink outlines"),
        betas=_linear(4e-6, 8e-5),
        start=(250, 800),
        gain=8,
        target=styles.comic,
    ),
    # The first step's noise is large on purpose: it stays in the finished picture as film grain.
    "aged": Recipe(
        prompts=("old photograph", "aged sepia print, film grain", "a faded vintage photo"),
        betas=(0.006, *_linear(2e-5, 3e-4)[1:]),
        start=(250, 800),
        gain=4,
        target=styles.aged,
    ),
}


class Pairs:
    """An endless source of (input, target, prompt) rows, cut from a bank made up front."""

    def __init__(self, recipe: Recipe, seed: int, bank: int = 160) -> None:
        self.rng = np.random.default_rng(seed)
        self.recipe = recipe
        photos = training_photos()
        self.bank: list[tuple[Picture, Picture]] = []
        for i in range(bank):
            picture = self._square(photos) if i % 4 else dead_leaves(self.rng)
            target = picture if recipe.target is None else recipe.target(picture)
            self.bank.append((picture, target))

    def _square(self, photos: list[Picture], size: int = 256) -> Picture:
        picture = photos[self.rng.integers(len(photos))]
        side = min(size, *picture.shape[:2])
        y = self.rng.integers(picture.shape[0] - side + 1)
        x = self.rng.integers(picture.shape[1] - side + 1)
        crop = picture[y : y + side, x : x + side]
        return recolour(crop, self.rng) if self.rng.random() < 0.4 else crop

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
            if self.recipe.target is None:
                source = self._degrade(source)
            elif rng.random() < 0.15:
                target, prompt = source, ""
            sources.append(source)
            targets.append(target)
            prompts.append(prompt)
        pair = (torch.from_numpy(stack(p)) * 2 - 1 for p in (sources, targets))
        source, target = (p.to(memory_format=torch.channels_last) for p in pair)
        return source, target, prompts

    def _degrade(self, picture: Picture) -> Picture:
        rng = self.rng
        if rng.random() < 0.1:
            return picture
        sigma, quality = rng.uniform(4, 14), int(rng.integers(14, 36))
        return styles.degraded(picture, rng, sigma=sigma, quality=quality)
