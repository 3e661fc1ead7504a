"""Measure the shipped starter models on kept-out pictures, beside plain baselines.

`python -m starter_models.quality` prints its tables. Targets bind the last row, the mean; the exit
code is 1 if one is missed. The pictures are three photographs of scikit-image and scikit-learn and
those in `starter_models/judging`, which has the prompts, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageFilter, ImageOps
from rich.console import Console
from rich.table import Table

from deployments.contract import GenerateRequest
from deployments.tasks import Task
from starter_models import adherence, running
from starter_models.measures import (
    centre,
    decibel,
    ellipse,
    enlarged,
    everything,
    flat_share,
    grain,
    label,
    off_tint,
    otsu,
    resaved,
    sharpness,
    shrunk,
    similarity,
    smooth_quarter,
    spoiled,
    warmth,
)
from starter_models.running import from_image, to_image
from starter_models.training.data import Picture, photo
from starter_models.training.judged import JUDGED_PHOTOS, judged_scenes, outlined_photos

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Values = tuple[float, ...]

BLUR = ImageFilter.GaussianBlur(1)
UNSHARP = ImageFilter.UnsharpMask(1, 100, 0)
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
    """Photos shrunk by Pillow's bicubic filter, enlarged again; also from a JPEG of quality 60."""

    def measure(name: str) -> Values:
        large, small = shrunk(photo(name))
        rough = resaved(small, quality=60)
        values: list[float] = []
        for source in (small, rough):
            plain = [decibel(p, large) for p in enlarged(source, large.shape)]
            ours = decibel(running.run(Task.UPSCALE, source), large)
            values += [*plain, ours, ours - plain[0]]
        return tuple(values)

    return Scores(
        "upscale: PSNR in dB; at least 0.9 over bicubic, and no worse than it from a JPEG of "
        "quality 60",
        ("bicubic", "Lanczos", "ours", "over bicubic",
         "JPEG bicubic", "JPEG Lanczos", "JPEG ours", "over bicubic"),
        per_photo(measure),
        lambda v: v[3] >= 0.9 and v[7] >= 0,
    )  # fmt: skip


def perceptual_scores() -> Scores:
    """Photos shrunk and enlarged again by the upscaler that draws texture."""

    def measure(name: str) -> Values:
        large, small = shrunk(photo(name))
        plain, _ = enlarged(small, large.shape)
        named = ("", running.PERCEPTUAL)
        three = [plain, *(running.run(Task.UPSCALE, small, model=model) for model in named)]
        whole = sharpness(to_image(large))
        return (
            *(decibel(p, large) for p in three),
            *(sharpness(to_image(p)) / whole for p in three),
        )

    return Scores(
        f"{running.PERCEPTUAL}: PSNR in dB, at least bicubic's; sharpness (variance of the "
        "Laplacian over the photo's) at least twice that of the default upscaler",
        ("bicubic", "default", "perceptual", "sharpness bicubic", "sharpness default",
         "sharpness perc."),
        per_photo(measure),
        lambda v: v[2] >= v[0] and v[5] >= 2 * v[4],
    )  # fmt: skip


def enhance_scores() -> Scores:
    """Photos spoiled by noise and JPEG, restored; blurred ones; and clean ones, left alone."""

    def measure(name: str) -> Values:
        clean = centre(photo(name))
        bad, soft = spoiled(clean), from_image(to_image(clean).filter(BLUR))
        kernels = (ImageFilter.GaussianBlur(0.8), ImageFilter.MedianFilter(3))
        plain = [decibel(from_image(to_image(bad).filter(k)), clean) for k in kernels]
        before = decibel(bad, clean)
        unsharp = from_image(to_image(soft).filter(UNSHARP))
        kept = running.run(Task.ENHANCE, clean)
        return (
            before,
            *plain,
            decibel(running.run(Task.ENHANCE, bad), clean) - before,
            decibel(unsharp, clean) - decibel(soft, clean),
            decibel(running.run(Task.ENHANCE, soft), clean) - decibel(soft, clean),
            decibel(kept, clean),
            sharpness(to_image(kept)) / sharpness(to_image(clean)),
        )

    return Scores(
        "enhance: PSNR in dB; at least 1.2 gained on noise 10/255 and JPEG 20; gains on a blur of "
        "1 px; a clean photo within 35 dB and at least as sharp (variance of its Laplacian)",
        ("before", "Gaussian", "median", "gained", "unsharp on blur", "gained on blur",
         "clean kept", "sharpness"),
        per_photo(measure),
        lambda v: v[3] >= 1.2 and v[5] > 0 and v[6] >= 35 and v[7] >= 1,
    )  # fmt: skip


def background_scores() -> Scores:
    """Kept-out cut-outs on kept-out photographs, whose alpha is known, and photographs alone."""
    x, truth = judged_scenes()
    rows: dict[str, Values] = {}
    for name, cut in CUTS.items():
        overlaps, kept, errors = list[float](), list[float](), list[float]()
        for picture, alpha in zip(x, truth[:, 0].numpy(), strict=True):
            mask = cut(picture.permute(1, 2, 0).numpy())
            inside, right = mask > 0.5, alpha > 0.5
            errors.append(float(abs(mask - alpha).mean()))
            if right.any():
                overlaps.append(overlap(inside, right))
            else:
                kept.append(float(inside.mean()))
        means = (np.mean(overlaps), np.min(overlaps), np.mean(kept), np.max(kept), np.mean(errors))
        rows[name] = tuple(map(float, means))
    return Scores(
        "background: 40 cut-outs on photographs, IoU at least 0.90; 9 views without a subject, of "
        "which at most 0.02 is kept",
        ("IoU", "worst IoU", "kept of empty", "most kept", "mean alpha error"),
        rows,
        lambda v: v[0] >= 0.9 and v[2] <= 0.02,
    )


def subject_scores() -> Scores:
    """Kept-out photographs whose subject is outlined by hand."""
    photos = outlined_photos()
    rows = {
        label(name): tuple(overlap(cut(picture) > 0.5, right) for cut in CUTS.values())
        for name, (picture, right) in photos.items()
    }
    rows["mean"] = tuple(float(v) for v in np.mean(list(rows.values()), axis=0))
    return Scores(
        f"background: subjects of {len(photos)} photographs, IoU of ours at least 0.75",
        tuple(CUTS),
        rows,
        lambda v: v[-1] >= 0.75,
    )


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
        return (*similar, *flat, float(flat[2] > flat[0]))

    return Scores(
        "comic: SSIM of luminance at least 0.60; share of flat pixels must rise on every photo "
        "(beside it, after a blur of 1.5 px: areas flat but for noise)",
        ("SSIM post.", "SSIM ours", "flat input", "flat post.", "flat ours", "blurred input",
         "blurred post.", "blurred ours", "rises"),
        per_photo(measure),
        lambda v: v[1] >= 0.6 and v[8] == 1,
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


def generate_scores() -> Scores:
    """Pictures from prompts that training kept out, read by a judge that is not the model."""
    kinds: dict[str, list[adherence.Verdict]] = {"one thing": [], "two things": []}
    for prompt in adherence.PROMPTS.read_text(encoding="utf-8").splitlines():
        drawn = running.run(Task.GENERATE, None, GenerateRequest(prompt=prompt))
        kind = "two things" if adherence.read(prompt).relation else "one thing"
        kinds[kind].append(adherence.judge(prompt, drawn))
    kinds["both"] = [verdict for verdicts in kinds.values() for verdict in verdicts]

    def shares(verdicts: list[adherence.Verdict]) -> Values:
        asked = ("right", "count", "colours", "shapes", "places", "background")
        return tuple(float(np.mean([getattr(v, name) for v in verdicts])) for name in asked)

    return Scores(
        "generate: 200 prompts that training kept out; share of pictures in which all is right at "
        "least 0.85",
        ("right", "number of things", "colours", "shapes", "places", "background"),
        {kind: shares(verdicts) for kind, verdicts in kinds.items()},
        lambda v: v[0] >= 0.85,
    )


def main() -> None:
    """Print every table; exit with 1 if a target is missed."""
    console = Console(width=160)
    missed: list[str] = []
    for task, measure in MEASURES.items():
        scores = measure()
        console.print(scores.title)
        console.print(scores.table())
        missed += [] if scores.passed else [task]
    if missed:
        console.print(f"[red]Below target: {', '.join(missed)}")
        raise SystemExit(1)


MEASURES: dict[str, Callable[[], Scores]] = {
    "upscale": upscale_scores,
    running.PERCEPTUAL: perceptual_scores,
    "enhance": enhance_scores,
    "background": background_scores,
    "background of photographs": subject_scores,
    "comic": comic_scores,
    "aged": aged_scores,
    "generate": generate_scores,
}


def per_photo(measure: Callable[[str], Values]) -> dict[str, Values]:
    """Values by photo, and their mean last."""
    rows = {label(name): measure(name) for name in JUDGED_PHOTOS}
    return rows | {"mean": tuple(float(v) for v in np.mean(list(rows.values()), axis=0))}


def overlap(inside: NDArray[np.bool_], right: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((inside & right).sum() / (inside | right).sum())


def cut_out(picture: Picture) -> Picture:
    return running.run(Task.BACKGROUND, picture)[..., 3]


CUTS: dict[str, Callable[[Picture], Picture]] = {
    "everything": everything,
    "centre ellipse": ellipse,
    "Otsu": otsu,
    "ours": cut_out,
}


if __name__ == "__main__":
    main()
