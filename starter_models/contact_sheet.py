"""One picture of every starter model's results on kept-out photos and prompts, to judge by eye."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageOps

from deployments.contract import GenerateRequest
from deployments.tasks import Task
from starter_models import running
from starter_models.measures import SCALE, shrunk, spoiled
from starter_models.running import from_image, to_image
from starter_models.training.data import KEPT_OUT, photo

if TYPE_CHECKING:
    from starter_models.training.data import Picture

COLUMNS = 4
CELL_PX = (300, 216)
DRAWN = (
    "a red star to the left of a blue ring",
    "a yellow heart on a purple background",
    "the sea with a boat at sunset",
    "mountains at noon",
    "hills with a house at night",
    "a desert at dawn",
    "a green circle above an orange square",
    "pink dots on blue",
)


def draw_sheet() -> Image.Image:
    """Two rows a photo, then two of pictures from texts; a cell a result."""
    width, height = CELL_PX
    cells = [cell for name in KEPT_OUT for cell in sheet_cells(photo(name)).items()]
    cells += [(prompt, drawn(prompt)) for prompt in DRAWN]
    rows = len(cells) // COLUMNS
    canvas = Image.new("RGB", (width * COLUMNS, height * rows), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, picture) in enumerate(cells):
        x, y = i % COLUMNS * width, i // COLUMNS * height
        draw.text((x + 3, y + 1), title, fill="black")
        cell = ImageOps.contain(to_image(picture), (width - 4, height - 16))
        canvas.paste(cell, (x + 2, y + 14))
    return canvas


def sheet_cells(picture: Picture) -> dict[str, Picture]:
    """Title and picture of each cell."""
    bad = spoiled(picture)
    _, small = shrunk(picture)
    small = small[: CELL_PX[1] // SCALE, : CELL_PX[0] // SCALE]
    size = (small.shape[1] * SCALE, small.shape[0] * SCALE)
    return {
        "input": picture,
        "background": on_grey(running.run(Task.BACKGROUND, picture)),
        "upscale: bicubic": from_image(to_image(small).resize(size, Image.Resampling.BICUBIC)),
        "upscale: ours": running.run(Task.UPSCALE, small),
        "enhance: input": bad,
        "enhance: ours": running.run(Task.ENHANCE, bad),
        "comic": running.run(Task.COMIC, picture),
        "aged": running.run(Task.AGED, picture),
    }


def drawn(prompt: str) -> Picture:
    return running.run(Task.GENERATE, None, GenerateRequest(prompt=prompt))


def on_grey(cut: Picture) -> Picture:
    """The foreground of an `H x W x 4` cut-out on light grey."""
    return cut[..., :3] * cut[..., 3:] + 0.85 * (1 - cut[..., 3:])
