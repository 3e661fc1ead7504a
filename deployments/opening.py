"""A request's files to pixels: what the model sees, and what of it may change."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from deployments import images
from deployments.buckets import fit_mask_to_bucket
from deployments.contract import Img2ImgRequest
from deployments.errors import about
from deployments.masks import masked

if TYPE_CHECKING:
    from deployments.contract import ImageJob, ImageRequest
    from deployments.engine.pipeline import AnyPipeline
    from deployments.engine.row import Pixels
    from deployments.images import Picture


class Opened(NamedTuple):
    """What a request brings, decoded.

    Attributes:
        picture: that the client sent; None for a task that needs none.
        pixels: what the model sees; all of the picture if it is cut into tiles.
        mask: what of the picture may change; None where all may.
        seen_mask: the same of `pixels`.
        background: to lay below the result, if the client sent one.
    """

    picture: Picture | None
    pixels: Pixels
    mask: Pixels | None = None
    seen_mask: Pixels | None = None
    background: Picture | None = None


def open_job(
    job: ImageJob,
    request: ImageRequest,
    pipeline: AnyPipeline,
    *,
    in_tiles: bool,
) -> Opened:
    """Decode what a request brings, and fit it to its model.

    Args:
        job: with the files.
        request: complete.
        pipeline: of the model.
        in_tiles: whether the picture is cut into tiles, so that it keeps its size.

    Raises:
        RequestError: a file is damaged, or the mask does not fit.
    """
    picture = None if job.image is None else images.decode(job.image, images.CHECKED)
    mask = None
    if picture is not None and isinstance(request, Img2ImgRequest) and request.mask is not None:
        file = None if request.mask == "alpha" else _decoded(job.mask or b"", "mask", levels=True)
        picture, mask = masked(picture, file, request)
    if picture is not None and in_tiles:
        return Opened(picture, picture.rgb, mask, mask)
    background = None if job.background is None else _decoded(job.background, "background")
    pixels = pipeline.fit(picture, request)
    if mask is None:
        return Opened(picture, pixels, background=background)
    height, width = pixels.shape[:2]
    return Opened(picture, pixels, mask, fit_mask_to_bucket(mask, (width, height)))


def _decoded(data: bytes, name: str, *, levels: bool = False) -> Picture:
    with about(name):
        return images.decode(data, images.CHECKED, levels=levels)
