"""What the diffusers families share: loading from a folder, attention, prompts."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from deployments.errors import AttentionUnavailable, ModelCorrupt, ModelNotCached
from deployments.pipelines.schedules import check_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from deployments.registry import ModelSpec

_PROMPTS = 64
NO_SAFETY_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


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


def load_pipeline(
    kind: type[DiffusionPipeline], spec: ModelSpec, folder: Path, device: str, **options: Any
) -> Any:
    """A stock pipeline from local safetensors only, on `device`, with the attention asked for.

    Raises:
        ModelNotCached: a component's file is missing.
        ModelCorrupt: a file is truncated or does not fit its network.
        AttentionUnavailable: xformers was asked for and cannot run.
        ConfigError: its scheduler draws noise at every step.
    """
    _quiet()
    _check_files(spec, folder, replaced=options)
    try:
        pipeline: Any = kind.from_pretrained(
            str(folder),
            dtype=getattr(torch, spec.dtype),
            variant=spec.variant,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    except OSError as error:
        raise ModelNotCached(
            f"Model {spec.name} is incomplete: {error}", value=folder, remedy="Fetch it again."
        ) from error
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ModelCorrupt(
            f"The files of {spec.name} do not load: {error}", value=folder
        ) from error
    _check_filled(pipeline, spec, folder)
    pipeline.set_progress_bar_config(disable=True)
    _prepare(pipeline)
    if device != "cpu":
        pipeline.to(device)
    if spec.attention == "xformers":
        _enable_xformers(pipeline, spec)
    return pipeline


def _quiet() -> None:
    """Keep progress bars and advice for notebooks out of a server's log."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _check_files(spec: ModelSpec, folder: Path, replaced: Collection[str]) -> None:
    """Refuse a folder before a library fills its gaps, or calls a truncated file a missing one.

    Args:
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
    """Refuse files that lack a tensor, or a word: a library would make it up and go on.

    By shape, as older files call their tensors by other names, which the libraries know.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            stored = Counter[tuple[int, ...]]()
            for path in (folder / name).glob("*.safetensors"):
                stored.update(_stored_shapes(spec, path))
            missing = Counter(tuple(p.shape) for p in part.parameters()) - stored
            if missing:
                raise ModelCorrupt(
                    f"The {name} of {spec.name} lacks {missing.total()} of its tensors.",
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
    """Hold a stock pipeline against what ours can do; raises ConfigError or ModelCorrupt."""
    check_scheduler(pipeline.scheduler)
    config = pipeline.vae.config
    if config.get("latents_mean") is not None:
        raise ModelCorrupt("The autoencoder shifts its latents by latents_mean: not supported.")
    if not torch.cuda.is_available():
        # Up to a half of the time on a CPU (`make bench-options`); not measured on a GPU.
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
    upcasts = hasattr(pipeline, "upcast_vae") and config.get("force_upcast", True)
    if pipeline.vae.dtype == torch.float16 and upcasts:
        # Once, rather than to float32 and back at every call.
        pipeline.vae.to(torch.float32)


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


class PromptCache:
    """Embeddings of the texts asked for last; every text is encoded alone, so always alike.

    Args:
        encode: embeddings of one text.
    """

    def __init__(self, encode: Callable[[str], tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        self._encode = encode
        self._known: OrderedDict[str, tuple[torch.Tensor, torch.Tensor | None]] = OrderedDict()

    def __call__(self, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(1, 77, D)` embeddings, and `(1, P)` pooled ones where the model has them."""
        found = self._known.pop(text, None) or self._encode(text)
        self._known[text] = found
        if len(self._known) > _PROMPTS:
            self._known.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forget all, because the weights move."""
        self._known.clear()
