"""Two pictures to judge the starter models by eye: what they do well, and where some fail.

`python -m starter_models.contact_sheet` draws both, from photos kept out of training and prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from deployments.contract import GenerateRequest
from deployments.tasks import Task
from starter_models import running
from starter_models.measures import SCALE, shrunk, spoiled
from starter_models.running import from_image, to_image
from starter_models.training.data import photo

if TYPE_CHECKING:
    from starter_models.training.data import Picture

    Cell = tuple[str, Picture]
    """A title, and the picture under it."""

COLUMNS = 4
PICTURE_PX = (296, 200)
TITLE_PX = 14
SHEETS = (Path("docs/contact-sheet.jpg"), Path("starter_models/cards/failures.jpg"))
SHOWN = ("skimage:chelsea.png", "skimage:coffee.png", "judging:nature-Garden.jpg")
DRAWN = (
    "a red star to the left of a blue ring",
    "a yellow heart on a purple background",
    "the sea with a boat at sunset",
    "red and white checks",
    "a blue square on a white background",
    "a desert at dawn",
    "a green circle above an orange square",
    "pink dots on blue",
)
FAILED = {
    "mountains at noon": "two suns",
    "a red star, a blue ring and a green circle": "wrong colours",
    "a small star": "nothing",
}
"""What came of a prompt."""


def main() -> None:
    for path, cells in zip(SHEETS, (successes(), failures()), strict=True):
        drawn_sheet(cells).save(path, quality=85, optimize=True)


def successes() -> list[Cell]:
    """Two rows a photo, then two of pictures from texts."""
    cells = [cell for name in SHOWN for cell in sheet_cells(photo(name)).items()]
    return cells + [(prompt, drawn(prompt)) for prompt in DRAWN]


def failures() -> list[Cell]:
    """Some of what the cards say that their models cannot do."""
    roof, ladybird = photo("sklearn:china.jpg"), photo("judging:nature-LadyBird.jpg")
    _, grass = shrunk(photo("judging:nature-Dune.jpg"))
    grass = middle(grass, PICTURE_PX[0] // SCALE, PICTURE_PX[1] // SCALE)
    textured = running.run(Task.UPSCALE, grass, model=running.PERCEPTUAL)
    return [
        ("a pagoda", roof),
        ("background: its roof and base fade", on_grey(running.run(Task.BACKGROUND, roof))),
        ("a ladybird", ladybird),
        ("background: flowers and leaves, too", on_grey(running.run(Task.BACKGROUND, ladybird))),
        (f"{running.PERCEPTUAL}: fringes of grass", textured),
        *((f"{prompt}: {made}", drawn(prompt)) for prompt, made in FAILED.items()),
    ]


def drawn_sheet(cells: list[Cell]) -> Image.Image:
    """`COLUMNS` cells a row, each with its title."""
    width, height = PICTURE_PX[0] + 4, PICTURE_PX[1] + TITLE_PX + 2
    rows = -(-len(cells) // COLUMNS)
    canvas = Image.new("RGB", (width * COLUMNS, height * rows), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, picture) in enumerate(cells):
        x, y = i % COLUMNS * width, i // COLUMNS * height
        draw.text((x + 3, y + 1), title, fill="black")
        canvas.paste(ImageOps.contain(to_image(picture), PICTURE_PX), (x + 2, y + TITLE_PX))
    return canvas


def sheet_cells(picture: Picture) -> dict[str, Picture]:
    """Title and picture of each cell. What shows in single pixels alone is not scaled down."""
    bad = spoiled(picture)
    better = running.run(Task.ENHANCE, bad)
    _, small = shrunk(picture)
    small = middle(small, PICTURE_PX[0] // SCALE, PICTURE_PX[1] // SCALE)
    size = (small.shape[1] * SCALE, small.shape[0] * SCALE)
    return {
        "input": picture,
        "background": on_grey(running.run(Task.BACKGROUND, picture)),
        "comic": running.run(Task.COMIC, picture),
        "aged": running.run(Task.AGED, picture),
        "bicubic": from_image(to_image(small).resize(size, Image.Resampling.BICUBIC)),
        "upscale-starter": running.run(Task.UPSCALE, small),
        running.PERCEPTUAL: running.run(Task.UPSCALE, small, model=running.PERCEPTUAL),
        "enhance: noise and JPEG, after": halves(
            middle(bad, *PICTURE_PX), middle(better, *PICTURE_PX)
        ),
    }


def middle(picture: Picture, width: int, height: int) -> Picture:
    """A part of that size, in px."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def halves(before: Picture, after: Picture) -> Picture:
    """The left half of one picture and the right half of another."""
    centre = before.shape[1] // 2
    both = np.concatenate([before[:, :centre], after[:, centre:]], axis=1)
    both[:, centre - 1 : centre + 1] = 1
    return both


def drawn(prompt: str) -> Picture:
    return running.run(Task.GENERATE, None, GenerateRequest(prompt=prompt))


def on_grey(cut: Picture) -> Picture:
    """The foreground of an `H x W x 4` cut-out on light grey."""
    return cut[..., :3] * cut[..., 3:] + 0.85 * (1 - cut[..., 3:])


if __name__ == "__main__":
    main()
