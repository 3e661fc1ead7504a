"""Scenes with a known foreground, composed on the device by the batch.

Real cut-outs, drawings and textured shapes lie on photographs, art, textures and gradients, in
matching light, with soft shadows, before a background that is often out of focus. Floors that
recede, clouds and blades of grass are there because a network takes them for subjects unless it
saw many. Then the whole picture is blurred, made noisy and compressed as a camera would. Every
colour is in [0, 1].
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
        close, tiny: the first object reaches beyond the frame, or is a small part of it.
        drawn, textured: the object is a drawing, or a shape cut from a photograph.
        painted, hairy: that shape is of smooth colours instead; has hairs.
        shadow: the object casts one.
        plain, wall: the background is a gradient, or a texture.
        even: that gradient is one colour instead, which may be a strong one.
        floor: the background is one above and another below a horizon.
        receding: that floor is a texture seen in perspective.
        planked: such a floor is laid with planks.
        clouds: patches with ragged edges lie on the background.
        blades: blades of grass stand before the background.
        distant: something out of focus stands behind, which is not foreground.
    """

    empty: float = 0.22
    more: float = 0.22
    close: float = 0.35
    tiny: float = 0.12
    drawn: float = 0.25
    textured: float = 0.25
    painted: float = 0.5
    hairy: float = 0.5
    shadow: float = 0.5
    plain: float = 0.25
    even: float = 0.6
    wall: float = 0.2
    floor: float = 0.42
    receding: float = 0.7
    planked: float = 0.4
    clouds: float = 0.15
    blades: float = 0.12
    distant: float = 0.12


class Scenes:
    """An endless source of scenes.

    Args:
        stamps, drawings: what is cut out.
        backgrounds: `(N, 3, S, S)` uint8.
        textures: of the same shape, for walls and floors; None for the backgrounds again.
        odds: how often what.
    """

    def __init__(
        self,
        stamps: CutOuts,
        drawings: CutOuts,
        backgrounds: Tensor,
        *,
        textures: Tensor | None = None,
        odds: Odds | None = None,
    ) -> None:
        self.stamps, self.drawings = stamps, drawings
        if textures is not None:
            backgrounds = torch.cat([backgrounds, textures])
        self.textures = 0 if textures is None else len(textures)
        self.backgrounds = [backgrounds]
        for _ in range(3):
            halves = [F.avg_pool2d(part.float(), 2) for part in self.backgrounds[-1].split(16)]
            self.backgrounds.append(torch.cat([half.round().to(torch.uint8) for half in halves]))
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
        picture = adjusted(self._crop(count, size, walls=self.odds.wall))
        y, x = self._grid(size)
        height, slope = self._uniform(count, 0.15, 0.8), self._uniform(count, -0.15, 0.15)
        soft = self._uniform(count, 0.003, 0.015)
        below = torch.sigmoid((y - height - slope * (x - 0.5)) / soft)
        floor = below * self._chance(count, self.odds.floor)
        other = self._crop(count, size)
        if self.odds.receding:
            far = self._chance(count, self.odds.receding)
            other = torch.lerp(other, self._receding(height, size), far)
        picture = picture * (1 - floor) + adjusted(other) * floor
        plain = self._chance(count, self.odds.plain)
        even = self._chance(count, self.odds.even)
        backdrop = torch.lerp(self._gradient(count, size), self._strong_colour(count), even)
        picture = picture * (1 - plain) + backdrop * plain
        picture = self._clouded(picture, self._chance(count, self.odds.clouds))
        picture = blurred(picture, odds=0.6, strongest=size / 28)
        grown = self._chance(count, self.odds.blades)
        return self._with_blades(picture, grown)

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
            painted = self._chance(len(rows), self.odds.painted)
            cut = adjusted(self._crop(len(rows), size))
            colour[rows] = torch.lerp(cut, self._paint(len(rows), size), painted)
            cover[rows] = self._shape(len(rows), size)
        return colour, cover

    def _placed(
        self, bank: CutOuts, count: int, size: int, *, small: bool
    ) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(bank), (count,), device=self.device)
        largest, kind = self._uniform(count, 0, 1).flatten(), torch.rand(count, device=self.device)
        close = kind < (0 if small else self.odds.close)
        tiny = kind > (1 if small else 1 - self.odds.tiny)
        side = 0.15 + 0.3 * largest if small else 0.25 + 0.75 * largest.sqrt()
        side = torch.where(close, 1 + 1.2 * largest, torch.where(tiny, 0.06 + 0.2 * largest, side))
        # A stamp enlarged far would be told by its softness.
        softest = torch.where(close, 3.0, 1.7) * bank.longest[index]
        side = torch.minimum(side * size, softest).clamp(min=0.06 * size)
        factor = side / bank.longest[index]
        theta = self._affine(factor, small=small, close=close, tiny=tiny)
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

    def _affine(self, factor: Tensor, *, small: bool, close: Tensor, tiny: Tensor) -> Tensor:
        """`(count, 2, 3)`: from places of the scene to places of the cut-out, both -1 to 1."""
        count = len(factor)
        turn = torch.randn(count, device=self.device) * 0.18
        any_turn = torch.rand(count, device=self.device) < 0.12
        turn = torch.where(any_turn, torch.rand_like(turn) * math.tau, turn)
        flip = (torch.rand(count, device=self.device) < 0.5).float() * 2 - 1
        # A model's input is square, whatever the picture was.
        aspect = torch.exp(torch.randn(count, device=self.device) * 0.22)
        shear = torch.randn(count, device=self.device) * 0.08
        reach = 0.75 if small else 0.35
        reach = torch.where(tiny, 0.9, torch.where(close, 0.6, reach))[:, None]
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
        solid = torch.sigmoid((radius * ripple - distance) / sharp)
        hairs = self._hairs(x - cx, y - cy, radius) * self._chance(count, self.odds.hairy)
        return torch.maximum(solid, hairs)

    def _hairs(self, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
        """Up to 24 thin straight hairs that stand out of something of that radius."""
        count, size = len(radius), y.shape[2]
        width = self._uniform(count, 0.4, 1.2) / size
        found = torch.zeros_like(x + y)
        for _ in range(24):
            turn, reach = self._uniform(count, 0, math.tau), self._uniform(count, 0.8, 1.8)
            along = x * turn.cos() + y * turn.sin()
            aside = (y * turn.cos() - x * turn.sin()) / width
            on = (-aside.square()).exp() * ((along > 0) & (along < radius * reach))
            found = torch.maximum(found, on)
        return found * self._uniform(count, 0.3, 1)

    def _chosen(self, count: int, walls: float) -> Tensor:
        """Places of backgrounds, a share of `walls` of them textures."""
        others = len(self.backgrounds[0]) - self.textures
        index = torch.randint(others, (count,), device=self.device)
        if self.textures:
            wall = others + torch.randint(self.textures, (count,), device=self.device)
            index = torch.where(torch.rand(count, device=self.device) < walls, wall, index)
        return index

    def _crop(self, count: int, size: int, *, walls: float = 0.3) -> Tensor:
        index = self._chosen(count, walls)
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
        far = scale * self.backgrounds[0].shape[-1] / size > 1.5
        for chosen, level in ((~far, 0), (far, 1)):
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                out[rows] = self._sampled(level, index[rows], grid[rows])
        return out

    def _receding(self, height: Tensor, size: int) -> Tensor:
        """Floors seen in perspective, from the horizon at `height` of the picture downwards."""
        count = len(height)
        index = self._chosen(count, walls=0.8)
        y, x = self._grid(size)
        # 1 at the bottom of the picture, and 12 times as far away at and above the horizon.
        depth = (1 - height) / (y - height).clamp(min=1e-6).maximum((1 - height) / 12)
        near = torch.exp(self._uniform(count, math.log(0.15), math.log(0.8)))
        across = (x - self._uniform(count, 0.2, 0.8)) * 2 * near * depth
        along = near * depth * self._uniform(count, 0.7, 3)
        turn = self._uniform(count, 0, math.tau)
        u = (across * turn.cos() - along * turn.sin()).expand(count, 1, size, size)
        v = (across * turn.sin() + along * turn.cos()).expand(count, 1, size, size)
        grid = torch.cat([u, v], 1).permute(0, 2, 3, 1)
        texels = near * depth * self.backgrounds[0].shape[-1] / size
        level = texels.log2().clamp(0, len(self.backgrounds) - 1)
        out = self._zeros(count, size, 3)
        for i in range(len(self.backgrounds)):
            weight = (1 - (level - i).abs()).clamp(min=0)
            out += self._sampled(i, index, grid) * weight
        return self._planked(out, u, 2 * near * depth / size)

    def _planked(self, picture: Tensor, across: Tensor, pixel: Tensor) -> Tensor:
        """Some floors laid with planks of unlike brightness, with gaps between them.

        Args:
            picture: `(count, 3, size, size)`.
            across: `(count, 1, size, size)`, the place on the floor at right angles to the planks.
            pixel: of the same shape, how much of that a pixel spans.
        """
        count = len(picture)
        planks = torch.exp(self._uniform(count, math.log(2), math.log(25)))
        place, width = across * planks + self._uniform(count, 0, 100), pixel * planks
        number = place.floor()
        shade = 1 + self._uniform(count, 0, 0.6) * (torch.sin(number * 78.233) * 43758.5).frac()
        gap = self._uniform(count, 0.02, 0.35)
        edge = (place - number - 0.5).abs() - (1 - gap) / 2
        # Where planks are narrower than pixels, their mean is what is seen.
        open_ = torch.where(width < 1, (edge / width.clamp(min=1e-3) + 0.5).clamp(0, 1), gap)
        seen = (1.5 - width).clamp(0, 1)
        dark = torch.rand(count, 3, 1, 1, device=self.device) * self._uniform(count, 0, 0.5)
        planked = picture * (1 + (shade - 1) * seen)
        planked = planked * (1 - open_) + dark * open_
        chosen = self._chance(count, self.odds.planked)
        return (picture * (1 - chosen) + planked * chosen).clamp(0, 1)

    def _sampled(self, level: int, index: Tensor, grid: Tensor) -> Tensor:
        source = self.backgrounds[level][index].float() / 255
        return F.grid_sample(source, grid, padding_mode="reflection", align_corners=False)

    def _with_blades(self, picture: Tensor, chosen: Tensor) -> Tensor:
        """Bent blades of grass, of like colour and slope, that rise from below the picture."""
        rows = (chosen.flatten() > 0).nonzero()[:, 0]
        count, size = len(rows), picture.shape[-1]
        if not count:
            return picture
        y, x = self._grid(size)
        out = picture[rows]
        tint = torch.tensor([1.0, 0.85, 0.5], device=self.device).view(1, 3, 1, 1)
        tint = tint * torch.exp(torch.randn(count, 3, 1, 1, device=self.device) * 0.25)
        tallest, widest = self._uniform(count, 0.3, 1.1), self._uniform(count, 1.5, 7) / size
        lean = torch.randn(count, 1, 1, 1, device=self.device) * 0.3
        for _ in range(int(torch.randint(6, 50, ()))):
            tall = tallest * self._uniform(count, 0.4, 1)
            up = (1 - y) / tall
            slope = lean + torch.randn(count, 1, 1, 1, device=self.device) * 0.2
            bend = torch.randn(count, 1, 1, 1, device=self.device) * 0.15
            middle = self._uniform(count, -0.2, 1.2) + tall * (slope * up + bend * up**2)
            half = 0.5 * widest * (1 - 0.85 * up)
            cover = ((half - (x - middle).abs()) * size + 0.5).clamp(0, 1) * (up < 1)
            colour = (tint * self._uniform(count, 0.3, 1)).clamp(0, 1)
            out = out * (1 - cover) + colour * cover
        picture[rows] = out
        return picture

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

    def _strong_colour(self, count: int) -> Tensor:
        """`(count, 3, 1, 1)`: white, black, or any, half of whose channels are at an end."""
        strong = (torch.rand(count, 3, 1, 1, device=self.device) * 2 - 0.5).clamp(0, 1)
        kind = self._uniform(count, 0, 1)
        return torch.where(kind < 0.3, 1.0, torch.where(kind < 0.4, 0.0, strong))

    def _paint(self, count: int, size: int) -> Tensor:
        """Smooth colours that change two to eight times across the picture, or hardly at all."""
        field = self._zeros(count, size, 3)
        for places in (3, 6, 10):
            octave = torch.randn(count, 3, places, places, device=self.device) / places**0.5
            field += F.interpolate(octave, size=size, mode="bicubic", align_corners=False)
        return (self._strong_colour(count) + field * self._uniform(count, 0, 0.5)).clamp(0, 1)

    def _clouded(self, picture: Tensor, chosen: Tensor) -> Tensor:
        """Clouds of one pale colour: fractal noise above a threshold."""
        count, _, size, _ = picture.shape
        noise = self._zeros(count, size)
        for places in (4, 8, 16, 32, 64):
            octave = torch.randn(count, 1, places, places, device=self.device) / places**0.8
            noise += F.interpolate(octave, size=size, mode="bicubic", align_corners=False)
        noise = noise / noise.std((1, 2, 3), keepdim=True)
        soft = self._uniform(count, 0.05, 0.8)
        cover = torch.sigmoid((noise - self._uniform(count, -0.2, 1.5)) / soft)
        colour = 1 - torch.rand(count, 3, 1, 1, device=self.device) * self._uniform(count, 0, 0.4)
        return torch.lerp(picture, (colour + 0.05 * noise).clamp(0, 1), cover * chosen)

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
