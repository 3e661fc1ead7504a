"""From a model's specification to a pipeline that is ready to use."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from deployments.errors import ConfigError, ModelCorrupt
from deployments.gpu.cap import cap_device
from deployments.pipelines.lanes import Lanes
from deployments.settings import enforce_offline
from deployments.store.folder import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.engine.pipeline import AnyPipeline
    from deployments.registry import ModelSpec
    from deployments.settings import Settings
    from deployments.store.cache import Store
    from deployments.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model.

    Attributes:
        pipeline: on its device, or in host memory.
        digest: of its manifest, 16 hex digits.
        device: such as cpu or cuda.
        cap_bytes: what its allocator may reserve of a GPU; None on a CPU.
        lease: keeps its folder from garbage collection until it is closed.
    """

    pipeline: AnyPipeline
    digest: str
    device: str
    cap_bytes: int | None
    lease: ExitStack


def load(
    spec: ModelSpec, digest: str, store: Store, settings: Settings, *, on_host: bool = False
) -> Loaded:
    """Load a model from the store and check every byte of it, without network or pickle.

    The check reads each file once, front to back, and leaves it in the page cache. The weights are
    mapped from there, so that they are not copied in RAM on their way to the device. The network is
    built around the maps beside the check; nothing goes to the device before the check has passed.

    Args:
        spec: which model.
        digest: which content, at least 16 hex digits.
        store: of this node.
        settings: what all models share.
        on_host: leave it in host memory; `Pipeline.to` brings it to the device.

    Raises:
        ModelNotCached: the folder or a file is missing.
        ModelCorrupt: not the published bytes, or files that do not fit the network.
        AttentionUnavailable: the spec names xformers, which cannot run here.
        ConfigError: the settings name CUDA, and there is none.
        GpuTooSmall: the replica's share of the GPU does not hold the weights.
    """
    lease = ExitStack()
    lease.enter_context(store.lease(digest))
    try:
        device = choose_device(settings.device)
        cap_bytes = cap_device(spec.num_gpus, device, spec.name, spec.dtype)
        _check_family(spec, read_manifest(store.folder(spec.name, digest), spec.name))
        pipeline, manifest = _build_and_check(spec, digest, store, settings)
        if device != "cpu" and not on_host:
            pipeline.to(device)
    except BaseException:
        lease.close()
        raise
    return Loaded(pipeline, manifest.short, device, cap_bytes, lease)


def _build_and_check(
    spec: ModelSpec, digest: str, store: Store, settings: Settings
) -> tuple[AnyPipeline, Manifest]:
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
        checking = pool.submit(store.check, spec.name, digest, settings.store.verify)
        try:
            pipeline = build(spec, store.folder(spec.name, digest), settings)
        finally:
            # Its error comes first, because damaged bytes explain why building failed.
            manifest = checking.result()
    return pipeline, manifest


def build(spec: ModelSpec, folder: Path, settings: Settings) -> AnyPipeline:
    """A pipeline in host memory from any folder, without a check of its bytes; raises as `load`."""
    enforce_offline(settings.store.folder)
    torch.set_num_threads(1)  # lanes split the work
    lanes = Lanes(settings.torch_threads if choose_device(settings.device) == "cpu" else 1)
    # Imported here, so that a process loads the libraries of its own family alone.
    family = import_module(f"deployments.pipelines.{spec.family}")
    return family.PIPELINE(spec, folder, lanes)


def choose_device(setting: str) -> str:
    """The torch device for `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: the setting is cuda, and torch finds no CUDA device.
    """
    available = torch.cuda.is_available()
    if setting == "cuda" and not available:
        raise ConfigError(
            "device is cuda, but torch finds no CUDA device.",
            remedy="Use device: auto or cpu, or give the replica num_gpus above 0.",
        )
    return "cuda" if available and setting != "cpu" else "cpu"


def _check_family(spec: ModelSpec, manifest: Manifest) -> None:
    if manifest.family != spec.family:
        raise ModelCorrupt(
            f"{spec.name}@{manifest.short} was published for another pipeline family.",
            value=manifest.family,
            remedy="Choose another digest, or correct `family` in the model registry.",
        )
