"""Scenes with a known foreground, composed on the device by the batch.

Real cut-outs, drawings and textured shapes lie on photographs, art and gradients, in matching
light, with soft shadows, before a background that is often out of focus. Then the whole picture is
blurred, made noisy and compressed as a camera would. Every colour is in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starter_models.training.bank import CutOuts
from starter_models.training.damage import adjusted, blurred, compressed, noisy


@dataclass(frozen=True)
class Odds:
    """How often a scene has what.

    Attributes:
        empty: no foreground at all: the right mask is black.
        more: each further object, after the first.
        drawn, textured: the object is a drawing, or a shape cut from a photograph.
        shadow: the object casts one.
        plain, floor: the background is a gradient, or two textures that meet in a horizon.
        distant: something out of focus stands behind, which is not foreground.
    """

    empty: float = 0.16
    more: float = 0.22
    drawn: float = 0.22
    textured: float = 0.14
    shadow: float = 0.5
    plain: float = 0.15
    floor: float = 0.2
    distant: float = 0.12


class Scenes:
    """An endless source of scenes.

    Args:
        stamps, drawings: what is cut out.
        backgrounds: `(N, 3, S, S)` uint8.
        odds: how often what.
    """

    def __init__(
        self, stamps: CutOuts, drawings: CutOuts, backgrounds: Tensor, odds: Odds | None = None
    ) -> None:
        self.stamps, self.drawings, self.backgrounds = stamps, drawings, backgrounds
        self.halves = torch.cat(
            [
                F.avg_pool2d(part.float(), 2).round().to(torch.uint8)
                for part in backgrounds.split(16)
            ]
        )
        self.odds = odds or Odds()
        self.device = backgrounds.device

    @torch.no_grad()
    def batch(self, count: int, size: int, *, damaged: bool = True) -> tuple[Tensor, Tensor]:
        """Pictures `(count, 3, size, size)` and their alphas `(count, 1, size, size)`."""
        picture, alpha = self.background(count, size), self._zeros(count, size)
        full = self._chance(count, 1 - self.odds.empty)
        behind = self._chance(count, self.odds.distant)
        picture = self._add_distant(picture, behind)
        present = full
        for layer in range(3):
            colour, cover = self.objects(count, size, small=layer > 0)
            cover = cover * present
            picture = self._shadowed(picture, cover)
            colour = self._lit(colour, picture, cover)
            picture = picture * (1 - cover) + colour * cover
            alpha = alpha + cover - alpha * cover
            present = present * self._chance(count, self.odds.more)
        picture = adjusted(picture.clamp(0, 1))
        return (self._damage(picture) if damaged else picture), alpha

    def background(self, count: int, size: int) -> Tensor:
        """Backgrounds alone."""
        picture = self._crop(count, size)
        other = self._crop(count, size)
        y, x = self._grid(size)
        height, slope = self._uniform(count, 0.35, 0.8), self._uniform(count, -0.15, 0.15)
        soft = self._uniform(count, 0.004, 0.05)
        below = torch.sigmoid((y - height - slope * (x - 0.5)) / soft)
        floor = below * self._chance(count, self.odds.floor)
        picture = adjusted(picture) * (1 - floor) + adjusted(other) * floor
        plain = self._chance(count, self.odds.plain)
        picture = picture * (1 - plain) + self._gradient(count, size) * plain
        return blurred(picture, odds=0.6, strongest=size / 28)

    def objects(self, count: int, size: int, *, small: bool) -> tuple[Tensor, Tensor]:
        """One object each: colours `(count, 3, size, size)`, covers `(count, 1, size, size)`."""
        kind = torch.rand(count, device=self.device)
        drawn = kind < self.odds.drawn
        colour, cover = self._zeros(count, size, 3), self._zeros(count, size)
        for chosen, bank in ((~drawn, self.stamps), (drawn, self.drawings)):
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                colour[rows], cover[rows] = self._placed(bank, len(rows), size, small=small)
        rows = (kind > 1 - self.odds.textured).nonzero()[:, 0]
        if len(rows):
            colour[rows] = adjusted(self._crop(len(rows), size))
            cover[rows] = self._shape(len(rows), size)
        return colour, cover

    def _placed(
        self, bank: CutOuts, count: int, size: int, *, small: bool
    ) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(bank), (count,), device=self.device)
        largest = self._uniform(count, 0.0, 1.0).flatten()
        side = (0.15 + 0.3 * largest if small else 0.25 + 0.75 * largest.sqrt()) * size
        close = torch.rand(count, device=self.device) < (0 if small else 0.2)
        side = side * torch.where(close, 1.5, 1.0)
        # A stamp enlarged far would be told by its softness.
        side = torch.minimum(side, bank.longest[index] * 1.7).clamp(min=0.12 * size)
        factor = side / bank.longest[index]
        theta = self._affine(count, factor, small=small)
        level = (-factor.log2()).floor().clamp(0, len(bank.levels) - 1).long()
        out = self._zeros(count, size, 4)
        for i, stack in enumerate(bank.levels):
            rows = (level == i).nonzero()[:, 0]
            if len(rows):
                source = stack[index[rows]].float() / 255
                shape = [len(rows), 4, size, size]
                # Every level spans the same picture, in coordinates of -1 to 1.
                spread = theta[rows] * (size / bank.levels[0].shape[-1])
                grid = F.affine_grid(spread, shape, align_corners=False)
                out[rows] = F.grid_sample(source, grid, align_corners=False)
        cover = out[:, 3:]
        colour = out[:, :3] / cover.clamp(min=1e-3)
        # Cut a hair inside for some: a stamp's own fringe would give it away.
        inner = ((_mean3(cover) - 0.45) / 0.5).clamp(0, 1) * (cover > 0.02)
        tight = self._chance(count, 0.5)
        return colour.clamp(0, 1), cover * (1 - tight) + torch.minimum(inner, cover) * tight

    def _affine(self, count: int, factor: Tensor, *, small: bool) -> Tensor:
        """`(count, 2, 3)`: from places of the scene to places of the cut-out, both -1 to 1."""
        turn = torch.randn(count, device=self.device) * 0.18
        any_turn = torch.rand(count, device=self.device) < 0.12
        turn = torch.where(any_turn, torch.rand_like(turn) * math.tau, turn)
        flip = (torch.rand(count, device=self.device) < 0.5).float() * 2 - 1
        aspect = torch.exp(torch.randn(count, device=self.device) * 0.12)
        shear = torch.randn(count, device=self.device) * 0.08
        reach = 0.75 if small else 0.35
        shift = torch.randn(count, 2, device=self.device).clamp(-2.2, 2.2) * reach / 2
        cos, sin = turn.cos() / factor, turn.sin() / factor
        matrix = torch.stack(
            [flip * aspect * cos, flip * aspect * (sin + shear * cos), -sin / aspect, cos / aspect],
            -1,
        ).view(count, 2, 2)
        moved = -(matrix @ shift[..., None])
        return torch.cat([matrix, moved], -1)

    def _shape(self, count: int, size: int) -> Tensor:
        """Random solid shapes: rounded blobs, boxes, and things on a stem."""
        y, x = self._grid(size)
        cx, cy = self._uniform(count, 0.3, 0.7), self._uniform(count, 0.3, 0.7)
        radius = self._uniform(count, 0.12, 0.36)
        turn, ratio = self._uniform(count, 0, math.tau), self._uniform(count, 0.45, 1)
        u = (x - cx) * turn.cos() + (y - cy) * turn.sin()
        v = ((y - cy) * turn.cos() - (x - cx) * turn.sin()) / ratio
        power = torch.where(self._chance(count, 0.4) > 0, 8.0, 2.0)
        angle = torch.atan2(v, u)
        ripple = torch.ones_like(angle)
        for wave in range(2, 8):
            size_of = torch.randn(count, 1, 1, 1, device=self.device) * 0.22 / wave
            ripple = ripple + size_of * torch.cos(wave * angle + self._uniform(count, 0, math.tau))
        distance = (u.abs() ** power + v.abs() ** power) ** (1 / power)
        sharp = self._uniform(count, 0.4, 1.5) / size
        return torch.sigmoid((radius * ripple - distance) / sharp)

    def _crop(self, count: int, size: int) -> Tensor:
        index = torch.randint(len(self.backgrounds), (count,), device=self.device)
        scale = self._uniform(count, 0.35, 1).flatten()
        flip = (torch.rand(count, device=self.device) < 0.5).float() * 2 - 1
        turn = torch.randn(count, device=self.device) * 0.05
        room = 1 - scale
        shift = (torch.rand(count, 2, device=self.device) * 2 - 1) * room[:, None]
        cos, sin = turn.cos() * scale, turn.sin() * scale
        matrix = torch.stack([flip * cos, -flip * sin, sin, cos], -1).view(count, 2, 2)
        theta = torch.cat([matrix, shift[..., None]], -1)
        grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
        out = self._zeros(count, size, 3)
        # Far shrunk, the full size would be jagged, which cut-outs are not.
        far = scale * self.backgrounds.shape[-1] / size > 1.5
        for chosen, stack in ((~far, self.backgrounds), (far, self.halves)):
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                source = stack[index[rows]].float() / 255
                out[rows] = F.grid_sample(
                    source, grid[rows], padding_mode="reflection", align_corners=False
                )
        return out

    def _gradient(self, count: int, size: int) -> Tensor:
        """Studio backdrops: a colour that changes along a line or outwards, lightly cloudy."""
        y, x = self._grid(size)
        turn = self._uniform(count, 0, math.tau)
        along = (x - 0.5) * turn.cos() + (y - 0.5) * turn.sin()
        around = ((x - 0.5) ** 2 + (y - 0.5) ** 2).sqrt()
        round_one = self._chance(count, 0.4)
        ramp = along * (1 - round_one) + around * round_one
        base = torch.rand(count, 1, 1, 1, device=self.device)
        tint = (torch.rand(count, 3, 1, 1, device=self.device) - 0.5) * self._uniform(count, 0, 0.6)
        cloud = torch.randn(count, 1, 5, 5, device=self.device) * self._uniform(count, 0, 0.06)
        cloud = F.interpolate(cloud, size=size, mode="bicubic", align_corners=False)
        return (base + tint + ramp * self._uniform(count, -0.7, 0.7) + cloud).clamp(0, 1)

    def _add_distant(self, picture: Tensor, chosen: Tensor) -> Tensor:
        rows = (chosen.flatten() > 0).nonzero()[:, 0]
        if not len(rows):
            return picture
        size = picture.shape[-1]
        colour, cover = self.objects(len(rows), size, small=True)
        both = torch.cat([colour * cover, cover], 1)
        both = F.interpolate(F.avg_pool2d(both, 16), size=size, mode="bicubic", align_corners=False)
        soft = both[:, 3:].clamp(0, 1)
        picture[rows] = picture[rows] * (1 - soft) + both[:, :3].clamp(0, 1)
        return picture.clamp(0, 1)

    def _shadowed(self, picture: Tensor, cover: Tensor) -> Tensor:
        """The background darkened where the object stands in the light."""
        count, _, size, _ = cover.shape
        low = F.avg_pool2d(cover, 4)
        wide = F.avg_pool2d(low, 9, 1, 4, count_include_pad=False)
        wider = F.avg_pool2d(wide, 15, 1, 7, count_include_pad=False)
        far = self._chance(count, 0.5)
        soft = wide * (1 - far) + wider * far
        shift = (torch.rand(count, 2, 1, device=self.device) - 0.5) * 0.16
        shift[:, 1] = -shift[:, 1].abs()  # light comes from above
        eye = torch.eye(2, device=self.device).repeat(count, 1, 1)
        # Cast on a floor, a shadow is flat.
        eye[:, 1, 1] = self._uniform(count, 1, 2.2).flatten()
        grid = F.affine_grid(
            torch.cat([eye, shift], -1), [count, 1, size, size], align_corners=False
        )
        cast = F.grid_sample(soft, grid, align_corners=False)
        depth = self._uniform(count, 0.15, 0.7) * self._chance(count, self.odds.shadow)
        return picture * (1 - depth * cast)

    def _lit(self, colour: Tensor, picture: Tensor, cover: Tensor) -> Tensor:
        """The object's colours drawn towards the light of its surroundings."""
        area = cover.sum((2, 3), keepdim=True).clamp(min=1)
        own = (colour * cover).sum((2, 3), keepdim=True) / area
        around = picture.mean((2, 3), keepdim=True)
        count = len(colour)
        pull = self._uniform(count, 0, 0.55)
        gain = (1 - pull) + pull * (around + 0.15) / (own + 0.15)
        own_gain = torch.exp(torch.randn(count, 3, 1, 1, device=self.device) * 0.06)
        bright = torch.exp(torch.randn(count, 1, 1, 1, device=self.device) * 0.2)
        y, x = self._grid(colour.shape[-1])
        turn = self._uniform(count, 0, math.tau)
        side = 1 + ((x - 0.5) * turn.cos() + (y - 0.5) * turn.sin()) * self._uniform(count, 0, 0.7)
        return (colour * (gain * own_gain * bright * side).clamp(0.3, 2.5)).clamp(0, 1)

    def _damage(self, picture: Tensor) -> Tensor:
        picture = blurred(picture, odds=0.25, strongest=1.3)
        picture = noisy(picture, odds=0.5, strongest=0.05)
        return compressed(picture, odds=0.5, lowest=35)

    def _grid(self, size: int) -> tuple[Tensor, Tensor]:
        line = (torch.arange(size, device=self.device) + 0.5) / size
        return line.view(1, 1, size, 1), line.view(1, 1, 1, size)

    def _chance(self, count: int, odds: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, device=self.device) < odds).float()

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, device=self.device)

    def _zeros(self, count: int, size: int, channels: int = 1) -> Tensor:
        return torch.zeros(count, channels, size, size, device=self.device)


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
