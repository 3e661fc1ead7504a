"""The table of tasks: everything that the rest of the code knows of a task stands in its row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from deployments.contract import (
    AgedRequest,
    BackgroundRequest,
    ComicRequest,
    EnhanceRequest,
    GenerateRequest,
    ImageRequest,
    SizedRequest,
    UpscaleRequest,
)

if TYPE_CHECKING:
    from typing import Self

    from deployments.provenance import SourceType


@dataclass(frozen=True, slots=True)
class _Row:
    """See the attributes of `Task`."""

    request: type[ImageRequest]
    deployment: str
    route: str
    families: tuple[str, ...]
    scale: int = 1
    needs_picture: bool = True
    source_type: SourceType = "algorithmicallyEnhanced"


class Task(StrEnum):
    """What the service can do. A member is a string: the name that its request class states.

    Attributes:
        request: its request class; ranges and defaults of every parameter.
        deployment: name of its Serve deployment.
        route: path of its HTTP route.
        families: modules of `deployments/pipelines` that can serve it.
        scale: width of the model's result over width of the picture.
        needs_picture: whether a request must bring a picture.
        source_type: what a result says of its origin.
    """

    UPSCALE = _Row(
        UpscaleRequest,
        deployment="Upscale",
        route="/api/v1/images/upscale",
        families=("upscale_diffusion", "upscale_gan"),
        scale=4,
    )
    ENHANCE = _Row(
        EnhanceRequest,
        deployment="Enhance",
        route="/api/v1/images/enhance",
        families=("img2img",),
        source_type="compositeWithTrainedAlgorithmicMedia",
    )
    COMIC = _Row(
        ComicRequest,
        deployment="Comic",
        route="/api/v1/images/style/comic",
        families=("img2img",),
        source_type="compositeWithTrainedAlgorithmicMedia",
    )
    AGED = _Row(
        AgedRequest,
        deployment="Aged",
        route="/api/v1/images/style/aged",
        families=("img2img",),
        source_type="compositeWithTrainedAlgorithmicMedia",
    )
    BACKGROUND = _Row(
        BackgroundRequest,
        deployment="BackgroundRemove",
        route="/api/v1/images/background/remove",
        families=("matting",),
    )
    GENERATE = _Row(
        GenerateRequest,
        deployment="Generate",
        route="/api/v1/images/generate",
        families=("text2img",),
        needs_picture=False,
        source_type="trainedAlgorithmicMedia",
    )

    request: type[ImageRequest]
    deployment: str
    route: str
    families: tuple[str, ...]
    scale: int
    needs_picture: bool
    source_type: SourceType

    def __new__(cls, row: _Row) -> Self:
        name = row.request.task
        member = str.__new__(cls, name)
        member._value_ = name
        member.request = row.request
        member.deployment = row.deployment
        member.route = row.route
        member.families = row.families
        member.scale = row.scale
        member.needs_picture = row.needs_picture
        member.source_type = row.source_type
        return member

    def parameters(self, family: str) -> frozenset[str]:
        """The request fields that a family reads: all of them, unless `_READS` says otherwise."""
        return frozenset(_READS.get(family, self.request).model_fields)


_READS: dict[str, type[ImageRequest]] = {"upscale_gan": SizedRequest}
"""Families that read fewer fields than their task's request has, and the class they read."""
