"""Measure the shipped starter models on kept-out photos, beside plain baselines.

`python -m starter_models.quality --contact-sheet sheet.png` prints one table a task. Targets bind
the mean over the photos; the exit code is 1 if one is missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from PIL import Image, ImageFilter, ImageOps
from rich.console import Console
from rich.table import Table

from deployments.tasks import Task
from starter_models import running
from starter_models.contact_sheet import draw_sheet
from starter_models.measures import (
    centre,
    decibel,
    ellipse,
    everything,
    flat_share,
    grain,
    label,
    off_tint,
    otsu,
    shrunk,
    similarity,
    smooth_quarter,
    spoiled,
    warmth,
)
from starter_models.running import from_image, to_image
from starter_models.training.data import KEPT_OUT, Picture, photo
from starter_models.training.matting import INPUT_PX, composites

if TYPE_CHECKING:
    from collections.abc import Callable

    Values = tuple[float, ...]

SEPIA = (0.393, 0.769, 0.189, 0, 0.349, 0.686, 0.168, 0, 0.272, 0.534, 0.131, 0)


@dataclass(frozen=True)
class Scores:
    """One task's table.

    Attributes:
        title: the task and its targets.
        columns: names of the values.
        rows: values by photo or method; the last row is what the targets bind.
        judge: whether a row of values meets the targets.
    """

    title: str
    columns: tuple[str, ...]
    rows: dict[str, Values]
    judge: Callable[[Values], bool]

    @property
    def passed(self) -> bool:
        return self.judge(list(self.rows.values())[-1])

    def table(self) -> Table:
        table = Table("", *self.columns, "target")
        last = list(self.rows)[-1]
        for name, values in self.rows.items():
            verdict = "" if name != last else "[green]pass" if self.passed else "[red]FAIL"
            table.add_row(
                name, *(f"{v:.2f}" if abs(v) >= 10 else f"{v:.3f}" for v in values), verdict
            )
        return table


def upscale_scores() -> Scores:
    """Photos shrunk by Pillow's bicubic filter, enlarged again."""

    def measure(name: str) -> Values:
        large, small = shrunk(photo(name))
        size = (large.shape[1], large.shape[0])
        plain = [
            decibel(from_image(to_image(small).resize(size, kind)), large)
            for kind in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
        ]
        ours = decibel(running.run(Task.UPSCALE, small), large)
        return (*plain, ours, ours - plain[0], ours - plain[1])

    return Scores(
        "upscale: PSNR in dB; at least 0.5 over bicubic and 0.3 over Lanczos",
        ("bicubic", "Lanczos", "ours", "over bicubic", "over Lanczos"),
        per_photo(measure),
        lambda v: v[3] >= 0.5 and v[4] >= 0.3,
    )


def enhance_scores() -> Scores:
    """Photos spoiled by noise and JPEG, restored."""

    def measure(name: str) -> Values:
        clean = centre(photo(name))
        bad = spoiled(clean)
        kernels = (ImageFilter.GaussianBlur(0.8), ImageFilter.MedianFilter(3))
        plain = [decibel(from_image(to_image(bad).filter(k)), clean) for k in kernels]
        before, after = decibel(bad, clean), decibel(running.run(Task.ENHANCE, bad), clean)
        return (before, *plain, after, after - before)

    return Scores(
        "enhance: PSNR in dB of photos with noise 10/255 and JPEG 20; at least 0.5 gained",
        ("before", "Gaussian blur", "median", "ours", "gained"),
        per_photo(measure),
        lambda v: v[4] >= 0.5,
    )


def background_scores(count: int = 100) -> Scores:
    """Composites of kept-out photos, whose alpha is known."""
    pictures = [photo(name) for name in KEPT_OUT]
    x, truth = composites(np.random.default_rng(0), pictures, count, INPUT_PX, recoloured=False)
    cuts = {"everything": everything, "centre ellipse": ellipse, "Otsu": otsu, "ours": cut_out}
    rows: dict[str, Values] = {}
    for name, cut in cuts.items():
        pairs = [
            (cut(picture.permute(1, 2, 0).numpy()), alpha[0].numpy())
            for picture, alpha in zip(x, truth, strict=True)
        ]
        iou = [((a > 0.5) & (b > 0.5)).sum() / ((a > 0.5) | (b > 0.5)).sum() for a, b in pairs]
        rows[name] = (float(np.mean(iou)), float(np.mean([abs(a - b).mean() for a, b in pairs])))
    title = f"background: {count} composites; IoU at least 0.80"
    return Scores(title, ("IoU", "mean alpha error"), rows, lambda v: v[0] >= 0.8)


def comic_scores() -> Scores:
    """Structure kept, areas flattened."""

    def measure(name: str) -> Values:
        picture = centre(photo(name))
        plain = from_image(
            ImageOps.posterize(to_image(picture).filter(ImageFilter.GaussianBlur(2)), 3)
        )
        ours = running.run(Task.COMIC, picture)
        similar = [similarity(picture, p) for p in (plain, ours)]
        flat = [flat_share(p, blur) for blur in (0, 1.5) for p in (picture, plain, ours)]
        return (*similar, *flat)

    return Scores(
        "comic: SSIM of luminance at least 0.55; share of flat pixels must rise "
        "(beside it, after a blur of 1.5 px: areas flat but for noise)",
        ("SSIM post.", "SSIM ours", "flat input", "flat post.", "flat ours", "blurred input",
         "blurred post.", "blurred ours"),
        per_photo(measure),
        lambda v: v[1] >= 0.55 and v[4] > v[2],
    )  # fmt: skip


def aged_scores() -> Scores:
    """Structure kept, colours drawn to one warm tint, grain added."""

    def measure(name: str) -> Values:
        picture = centre(photo(name))
        plain = from_image(to_image(picture).convert("RGB", SEPIA))
        three = (picture, plain, running.run(Task.AGED, picture))
        similar = [similarity(picture, p) for p in three[1:]]
        smooth = smooth_quarter(picture)
        return (
            *similar,
            warmth(three[2]),
            *map(off_tint, three),
            *(grain(p, smooth) for p in three),
        )

    return Scores(
        "aged: SSIM of luminance at least 0.55; warm (red over blue, /255); chroma off the tint "
        "must fall, grain must rise (both /255)",
        ("SSIM sepia", "SSIM ours", "warmth ours", "off tint input", "off tint sepia",
         "off tint ours", "grain input", "grain sepia", "grain ours"),
        per_photo(measure),
        lambda v: v[1] >= 0.55 and v[2] > 0 and v[5] < v[3] and v[8] > v[6],
    )  # fmt: skip


def main(
    contact_sheet: Annotated[Path | None, typer.Option(help="PNG to write")] = None,
) -> None:
    """Print every table; exit with 1 if a target is missed."""
    console = Console(width=120)
    missed: list[str] = []
    for task, measure in MEASURES.items():
        scores = measure()
        console.print(scores.title)
        console.print(scores.table())
        missed += [] if scores.passed else [task]
    if contact_sheet is not None:
        draw_sheet().save(contact_sheet)
    if missed:
        console.print(f"[red]Below target: {', '.join(missed)}")
        raise typer.Exit(1)


MEASURES: dict[str, Callable[[], Scores]] = {
    "upscale": upscale_scores,
    "enhance": enhance_scores,
    "background": background_scores,
    "comic": comic_scores,
    "aged": aged_scores,
}


def per_photo(measure: Callable[[str], Values]) -> dict[str, Values]:
    """Values by photo, and their mean last."""
    rows = {label(name): measure(name) for name in KEPT_OUT}
    return rows | {"mean": tuple(float(v) for v in np.mean(list(rows.values()), axis=0))}


def cut_out(picture: Picture) -> Picture:
    return running.run(Task.BACKGROUND, picture)[..., 3]


if __name__ == "__main__":
    typer.run(main)
