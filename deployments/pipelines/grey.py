"""Grey pictures stay grey where the task is about no colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from deployments.notes import Code, Note, note

if TYPE_CHECKING:
    from deployments.contract import ImageRequest
    from deployments.engine.row import Pixels
    from deployments.images import Picture


def without_tint(
    rgb: Pixels, picture: Picture, request: ImageRequest
) -> tuple[Pixels, tuple[Note, ...]]:
    """The result `rgb`, `H x W x 3`, with equal channels if the client's picture has them.

    A model tints a grey picture a little. The luma (ITU-R BT.601) of its result stays. Tasks that
    restyle a picture may colour it.

    Returns:
        The pixels, and a note if they were made grey.
    """
    if not request.keeps_grey or not picture.is_grey:
        return rgb, ()
    luma = np.asarray(Image.fromarray(rgb).convert("L"))
    grey = np.repeat(luma[..., None], 3, axis=2)
    return grey, (note(Code.GREY_KEPT, "The picture is grey, and so the result was kept grey."),)
