"""What every family does with the client's picture."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.images import Picture
from deployments.pipelines.area import shrink
from deployments.pipelines.grey import without_tint
from deployments.transparency import scaled

if TYPE_CHECKING:
    from deployments.contract import ImageRequest
    from deployments.engine.row import Pixels


def require_picture(picture: Picture | None) -> Picture:
    """The picture of a task that needs one, which intake guarantees.

    Raises:
        ValueError: there is none.
    """
    if picture is None:
        raise ValueError("This model needs a picture.")
    return picture


def as_asked(picture: Picture, output: Pixels, request: ImageRequest, scale: int) -> Picture:
    """An upscaler's result: of the size that the request asks for, and grey for a grey picture.

    Args:
        picture: as the client sent it.
        output: `scale` times as large, or of the result's size already.
        request: complete.
        scale: of the model.
    """
    size = request.result_size(picture.width_px, picture.height_px, scale)
    rgb, notes = without_tint(shrink(output, *size), picture, request)
    return with_alpha_of(replace(picture, notes=(*picture.notes, *notes)), rgb)


def with_alpha_of(picture: Picture, rgb: Pixels) -> Picture:
    """The result `rgb`, `H x W x 3`, with the alpha and the notes of the client's picture.

    `rgb` holds straight colours, as the model saw them. The alpha is scaled to the result's size.
    """
    alpha = picture.alpha
    if alpha is not None and alpha.shape != rgb.shape[:2]:
        alpha = scaled(alpha, rgb.shape[1], rgb.shape[0])
    return Picture(rgb, alpha, picture.notes)
