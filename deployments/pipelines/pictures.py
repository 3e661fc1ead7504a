"""What every family does with the client's picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.images import Picture
from deployments.transparency import scaled

if TYPE_CHECKING:
    from deployments.engine.row import Pixels


def require_picture(picture: Picture | None) -> Picture:
    """The picture of a task that needs one, which intake guarantees.

    Raises:
        ValueError: there is none.
    """
    if picture is None:
        raise ValueError("This model needs a picture.")
    return picture


def with_alpha_of(picture: Picture, rgb: Pixels) -> Picture:
    """The result `rgb`, `H x W x 3`, with the alpha and the notes of the client's picture.

    `rgb` holds straight colours, as the model saw them. The alpha is scaled to the result's size.
    """
    alpha = picture.alpha
    if alpha is not None and alpha.shape != rgb.shape[:2]:
        alpha = scaled(alpha, rgb.shape[1], rgb.shape[0])
    return Picture(rgb, alpha, picture.notes)
