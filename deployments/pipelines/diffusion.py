"""What the diffusers families share: loading from a folder, attention, calling, cancelling."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from deployments.errors import AttentionUnavailable, ModelCorrupt, ModelFailed, ModelNotCached

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from deployments.pipelines.base import Pixels, Row
    from deployments.registry import ModelSpec

NO_SAFETY_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def pipeline_class_name(spec: ModelSpec, folder: Path) -> str:
    """The class named by `model_index.json`.

    Raises:
        ModelNotCached: the file is missing.
        ModelCorrupt: it is not JSON, or names no class.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return str(index["_class_name"])
    except FileNotFoundError as error:
        raise ModelNotCached(
            f"Model {spec.name} has no model_index.json.",
            value=folder,
            remedy="Point `folder` at a diffusers pipeline folder.",
        ) from error
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise ModelCorrupt(
            f"The model_index.json of {spec.name} names no pipeline class.", value=folder
        ) from error


def load_pipeline(
    kind: type[DiffusionPipeline], spec: ModelSpec, folder: Path, device: str, **options: Any
) -> Any:
    """A stock pipeline from local safetensors only, on `device`, with the attention asked for.

    Raises:
        ModelNotCached: a component's file is missing.
        ModelCorrupt: a file is truncated or does not fit its network.
        AttentionUnavailable: xformers was asked for and cannot run.
    """
    _quiet()
    try:
        pipeline: Any = kind.from_pretrained(
            str(folder),
            dtype=getattr(torch, spec.dtype),
            variant=spec.variant,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ModelCorrupt(
            f"The files of {spec.name} do not load: {error}", value=folder
        ) from error
    except (OSError, ValueError) as error:
        raise ModelNotCached(
            f"Model {spec.name} is incomplete: {error}", value=folder, remedy="Fetch it again."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if spec.attention == "xformers":
        _enable_xformers(pipeline, spec)
    return pipeline


def _quiet() -> None:
    """Keep progress bars and advice for notebooks out of a server's log."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _enable_xformers(pipeline: Any, spec: ModelSpec) -> None:
    # The only switch that reaches a UNet: set_attention_backend() changes none of its processors.
    if importlib.util.find_spec("xformers") is None:
        reason = "the package is not installed"
    elif not torch.cuda.is_available():
        reason = "it needs a CUDA device"
    else:
        try:
            pipeline.enable_xformers_memory_efficient_attention()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reason = str(error)
        else:
            return
    raise AttentionUnavailable(
        f"Model {spec.name} asks for attention: xformers, but {reason}.",
        remedy="Install the extra `gpu` on a CUDA machine, or use attention: sdpa.",
    )


def generators(rows: Sequence[Row]) -> list[torch.Generator]:
    """One CPU generator a row, so that a row's noise does not depend on its neighbours."""
    return [torch.Generator("cpu").manual_seed(row.seed) for row in rows]


def to_tensor(rows: Sequence[Row]) -> torch.Tensor:
    """The rows' pixels as `(B, 3, H, W)`, float32 in [0, 1]."""
    stacked = torch.from_numpy(np.stack([row.pixels for row in rows]))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 255


def set_images(rows: Sequence[Row], images: Any) -> None:
    """Keep each row's `H x W x 3` float image in [0, 1] and mark the row done."""
    for row, image in zip(rows, images, strict=True):
        row.state = image
        row.done = True


def to_pixels(image: Any) -> Pixels:
    """uint8 pixels of a float image in [0, 1].

    Raises:
        ModelFailed: the image holds NaN or infinity.
    """
    if not np.isfinite(image).all():
        raise ModelFailed(
            "The model gave no valid picture for this request (NaN).",
            remedy="Try another seed, fewer steps or a lower guidance_scale.",
        )
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
