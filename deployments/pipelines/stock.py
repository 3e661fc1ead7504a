"""Stock diffusers pipelines from local safetensors, checked before and after loading."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from deployments.errors import AttentionUnavailable, ModelCorrupt, ModelNotCached
from deployments.pipelines.networks import first_of
from deployments.pipelines.schedules import check_scheduler

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from deployments.registry import ModelSpec


def read_index(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """The folder's `model_index.json`: `_class_name`, and each component's library and class.

    Raises:
        ModelNotCached: the file is missing.
        ModelCorrupt: it is not JSON, or names no class.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return {**index, "_class_name": str(index["_class_name"])}
    except FileNotFoundError as error:
        raise ModelNotCached(
            f"Model {spec.name} has no model_index.json.",
            value=folder,
            remedy="Point `folder` at a diffusers pipeline folder.",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelCorrupt(
            f"The model_index.json of {spec.name} names no pipeline class.", value=folder
        ) from error


def load_stock(
    kind: type[DiffusionPipeline], spec: ModelSpec, folder: Path, **components: Any
) -> Any:
    """A stock pipeline in host memory, with the attention that the spec names.

    Args:
        kind: its class.
        spec: dtype, variant and attention.
        folder: a diffusers folder; nothing is fetched.
        components: that stand in for the folder's own, or None for those to leave out.

    Raises:
        ModelNotCached: a component's file is missing.
        ModelCorrupt: a file is truncated or does not fit its network.
        AttentionUnavailable: the spec names xformers, which cannot run here.
        ConfigError: its scheduler draws noise that no seed controls.
    """
    _silence_libraries()
    _check_files(spec, folder, replaced=components)
    pipeline = _from_pretrained(kind, spec, folder, components)
    _check_filled(pipeline, spec, folder)
    pipeline.set_progress_bar_config(disable=True)
    _prepare(pipeline)
    if spec.attention == "xformers":
        _enable_xformers(pipeline, spec)
    return pipeline


def load_stable_diffusion(
    plain: type[DiffusionPipeline], xl: type[DiffusionPipeline], spec: ModelSpec, folder: Path
) -> Any:
    """Stable Diffusion without a safety checker, or SDXL without watermarks.

    Args:
        plain: class for a folder of Stable Diffusion 1.x or 2.x.
        xl: class for a folder of SDXL.
        spec: of the model, as `load_stock` takes it.
        folder: whose `model_index.json` says which of the two it is.

    Raises as `load_stock`.
    """
    if "XL" in read_index(spec, folder)["_class_name"]:
        return load_stock(xl, spec, folder, add_watermarker=False)
    unchecked = {"safety_checker": None, "feature_extractor": None}
    return load_stock(plain, spec, folder, **unchecked, requires_safety_checker=False)


def _from_pretrained(
    kind: type[DiffusionPipeline], spec: ModelSpec, folder: Path, components: dict[str, Any]
) -> Any:
    try:
        return kind.from_pretrained(
            str(folder),
            dtype=getattr(torch, spec.dtype),
            variant=spec.variant,
            use_safetensors=True,
            local_files_only=True,
            **components,
        )
    except OSError as error:
        raise ModelNotCached(
            f"Model {spec.name} is incomplete: {error}", value=folder, remedy="Fetch it again."
        ) from error
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ModelCorrupt(
            f"The files of {spec.name} do not load: {error}", value=folder
        ) from error


def _silence_libraries() -> None:
    """Keep progress bars and advice for notebooks out of a server's log."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _check_files(spec: ModelSpec, folder: Path, replaced: Collection[str]) -> None:
    """Refuse an incomplete or damaged folder.

    The libraries would fill some gaps silently, and report a truncated file as a missing one.

    Args:
        spec: names the variant.
        folder: of the model.
        replaced: components that need no files.
    """
    for name, entry in read_index(spec, folder).items():
        needed = isinstance(entry, list) and entry != [None, None] and name not in replaced
        if needed and not any((folder / name).glob("*")):
            raise ModelNotCached(
                f"Model {spec.name} lacks its {name}.", value=folder, remedy="Fetch it again."
            )
    if spec.variant and not any(folder.glob(f"*/*.{spec.variant}*.safetensors")):
        raise ModelNotCached(
            f"Model {spec.name} has no files of variant {spec.variant}.",
            value=folder,
            remedy="Leave out `variant` in the model registry, or fetch those files.",
        )
    for path in folder.glob("*/*.safetensors"):
        _stored_shapes(spec, path)


def _check_filled(pipeline: Any, spec: ModelSpec, folder: Path) -> None:
    """Refuse files that lack a tensor or a token, which the libraries would make up.

    Tensors are compared by shape, because older files have other names for them.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            stored = Counter[tuple[int, ...]]()
            for path in (folder / name).glob("*.safetensors"):
                stored.update(_stored_shapes(spec, path))
            lost: list[str] = []
            for key, tensor in part.named_parameters():
                stored[shape := tuple(tensor.shape)] -= 1
                if stored[shape] < 0:
                    lost.append(f"{key} {shape} is missing")
            if lost:
                raise ModelCorrupt(
                    f"The {name} of {spec.name} lacks {len(lost)} of its tensors, by their shapes:"
                    f" {first_of(lost)}.",
                    value=folder,
                    remedy="Fetch it again.",
                )
        elif isinstance(part, transformers.PreTrainedTokenizerBase):
            encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
            if len(part) != encoder.config.vocab_size:
                raise ModelCorrupt(
                    f"The {name} of {spec.name} is not that of its text encoder.",
                    value=f"{len(part)} tokens for {encoder.config.vocab_size}",
                    remedy="Fetch it again, with every file of the folder.",
                )


def _stored_shapes(spec: ModelSpec, path: Path) -> list[tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            return [tuple(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise ModelCorrupt(
            f"A file of {spec.name} is damaged or cut off: {error}",
            value=path,
            remedy="Fetch it again.",
        ) from error


def _prepare(pipeline: Any) -> None:
    """Check that our engine can run the pipeline, and set the layout and precision of its parts."""
    check_scheduler(pipeline.scheduler)
    config = pipeline.vae.config
    if config.get("latents_mean") is not None:
        raise ModelCorrupt(
            "The autoencoder shifts its latents by latents_mean, which is not supported."
        )
    if not torch.cuda.is_available():
        # Saves up to half of the time on a CPU (docs/engine.md); not measured on a GPU.
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
    upcasts = hasattr(pipeline, "upcast_vae") and config.get("force_upcast", True)
    if pipeline.vae.dtype == torch.float16 and upcasts:
        # Once, because the stock call would cast it to float32 and back every time.
        pipeline.vae.to(torch.float32)


def _enable_xformers(pipeline: Any, spec: ModelSpec) -> None:
    # set_attention_backend() changes no processor of a UNet; only this call does.
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
