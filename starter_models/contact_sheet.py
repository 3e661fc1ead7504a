"""One picture of every starter model's results on kept-out photos, to judge by eye."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from starter_models import running
from starter_models.measures import SCALE, centre, shrunk, spoiled
from starter_models.running import from_image, to_image
from starter_models.training.data import KEPT_OUT, photo

if TYPE_CHECKING:
    from collections.abc import Callable

    from starter_models.training.data import Picture

CELL_PX = (240, 180)


def draw_sheet() -> Image.Image:
    """A row a photo, a column a result."""
    width, height = CELL_PX
    rows = [sheet_cells(centre(photo(name))) for name in KEPT_OUT]
    canvas = Image.new("RGB", (width * len(rows[0]), (height + 14) * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        for j, (title, picture) in enumerate(row.items()):
            x, y = j * width, i * (height + 14)
            draw.text((x + 3, y + 1), title, fill="black")
            cell = ImageOps.contain(to_image(picture), (width - 4, height - 2))
            canvas.paste(cell, (x + 2, y + 14))
    return canvas


def sheet_cells(picture: Picture) -> dict[str, Picture]:
    """Title and picture of each cell; a missing model's is blank."""

    def attempt(task: str, run: Callable[[Picture], Picture], source: Picture) -> Picture:
        return run(source) if running.available(task) else np.ones_like(source)

    _, small = shrunk(picture)
    bad = spoiled(picture)
    small = centre(small, 64)[: CELL_PX[1] // SCALE, : CELL_PX[0] // SCALE]
    size = (small.shape[1] * SCALE, small.shape[0] * SCALE)
    plain = to_image(small).resize(size, Image.Resampling.BICUBIC)
    return {
        "input": picture,
        "background": attempt("background", on_grey, picture),
        "upscale: bicubic": from_image(plain),
        "upscale: ours": attempt("upscale", running.run_upscale, small),
        "enhance: input": bad,
        "enhance: ours": attempt("enhance", running.run_enhance, bad),
        "comic": attempt("comic", running.run_comic, picture),
        "aged": attempt("aged", running.run_aged, picture),
    }


def on_grey(picture: Picture) -> Picture:
    """The foreground on light grey."""
    cut = running.run_background(picture)
    return cut[..., :3] * cut[..., 3:] + 0.85 * (1 - cut[..., 3:])
