"""Results as they are kept: a picture, and a document that describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deployments.contract import ImageResult
from deployments.notes import documents, from_documents

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def document_of(result: ImageResult) -> dict[str, Any]:
    """What is kept of a result beside the picture, ready for JSON."""
    return {
        "seed": result.seed,
        "media_type": result.media_type,
        "width_px": result.width_px,
        "height_px": result.height_px,
        "bytes": len(result.image),
        "metadata": {
            "model": result.model,
            "batch_size": result.batch_size,
            "gpu_seconds": result.gpu_seconds,
            "determinism": result.determinism,
            "timings_s": result.timings_s,
            "notes": documents(result.notes),
        },
    }


def result_of(document: Mapping[str, Any], image: bytes) -> ImageResult:
    """The result that a document describes."""
    return ImageResult(
        image=image,
        media_type=document["media_type"],
        width_px=document["width_px"],
        height_px=document["height_px"],
        seed=document["seed"],
        **document["metadata"] | {"notes": from_documents(document["metadata"]["notes"])},
    )


def longest_s(timings_s: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each stage the longest time: the rows of one job run side by side."""
    return {stage: max(one[stage] for one in timings_s) for stage in timings_s[0]}
