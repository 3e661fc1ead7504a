"""`imagen models compile`: from a model in the store to an artefact for this kind of device."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal

from cli.models.session import STARTER, AsJson, Name, RegistryFile, Root, Session, session
from deployments.errors import ConfigError
from deployments.registry import ModelSpec
from deployments.settings import Settings
from deployments.store import compiled
from deployments.store.lockfile import LockedArtefact, Mode, update_lock

if TYPE_CHECKING:
    from deployments.engine.pipeline import AnyPipeline

Device = Literal["auto", "cpu", "cuda"]
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def compile_model(
    name: Name,
    mode: Annotated[
        Mode, typer.Option(help="The whole network, or its repeated blocks: faster to compile")
    ] = "full",
    device: Annotated[Device, typer.Option(help="Where to compile, and what for")] = "auto",
    registry: RegistryFile = STARTER,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Compile a model of the store for this kind of device; the lock file gets the SHA-256."""
    with session(registry, as_json, store) as opened:
        entry = opened.catalogue.find(name)
        if not isinstance(entry, ModelSpec):
            raise ConfigError(
                "Only models are compiled.", value=entry.name, remedy="Name an entry of `models`."
            )
        opened.catalogue.check_licence(entry)
        digest = opened.provider().digest(entry)
        artefact, seconds = _make(opened, entry, digest, mode, device)
        what = f"{artefact.id}, {artefact.bytes} bytes ({decimal(artefact.bytes)})"
        opened.output.say(
            f"{entry.name}: compiled for {artefact.device} in {seconds:.1f} s: {what}", "green"
        )
        status = {"name": entry.name, "status": "compiled", "digest": digest}
        opened.output.emit(status | {"seconds": round(seconds, 3)} | artefact.model_dump())


def _make(
    opened: Session, spec: ModelSpec, digest: str, mode: Mode, device: Device
) -> tuple[LockedArtefact, float]:
    """Load, compile, store and lock; the artefact, and how many seconds compiling took."""
    from deployments.gpu.target import this_target
    from deployments.loader import load

    settings = Settings(models=opened.registry, device=device, store=opened.settings)
    loaded = load(spec, digest, opened.store, settings)
    with loaded.lease:
        start_s = time.monotonic()
        with _fresh_caches():
            blob, shapes = _compile(spec, loaded.pipeline, mode)
        seconds = time.monotonic() - start_s
        key = compiled.CompiledKey(spec.name, digest, this_target(device), mode, shapes)
        artefact = compiled.add(opened.store, key, blob)
    update_lock(opened.registry, lambda lock: lock.with_artefact(spec.name, digest, artefact))
    return artefact, seconds


@contextmanager
def _fresh_caches() -> Generator[None]:
    """Let torch compile everything here and now, so that nothing of an older cache is published."""
    before = {name: os.environ.get(name) for name in _CACHES}
    with tempfile.TemporaryDirectory(prefix="imagen-compile-") as folder:
        os.environ.update({name: str(Path(folder, name.lower())) for name in _CACHES})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _compile(spec: ModelSpec, pipeline: AnyPipeline, mode: Mode) -> tuple[bytes, str]:
    """Compile a diffusion model's UNet at its largest size; the artefact, and its shapes.

    Raises:
        ConfigError: the model has no UNet, torch cannot compile here, or it compiled nothing.
    """
    import torch

    unet: Any = getattr(getattr(pipeline, "denoiser", None), "unet", None)
    if unet is None:
        raise _uncompiled(spec, f"family {spec.family} has no UNet")
    if mode == "blocks":
        unet.compile_repeated_blocks(dynamic=False)
    else:
        unet.compile(dynamic=False)
    try:
        shapes = _run_once(spec, pipeline)
    except RuntimeError as error:  # the base of what torch raises: no compiler, say
        raise _uncompiled(spec, str(error).splitlines()[0].rstrip(".")) from error
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise _uncompiled(spec, "torch compiled nothing")
    return saved[0], shapes


def _run_once(spec: ModelSpec, pipeline: AnyPipeline) -> str:
    """Run a grey picture of the largest size; says which."""
    import numpy as np

    from deployments.contract import complete
    from deployments.engine.row import RowInput
    from deployments.images import Picture

    width_px, height_px = max(spec.buckets or ((spec.tile_px,) * 2,), key=lambda b: b[0] * b[1])
    picture = Picture(np.full((height_px, width_px, 3), 127, np.uint8), None)
    request = complete(spec.task.request(), spec.defaults, spec.parameters)
    row = RowInput(request, pipeline.fit(picture, request), 0, float("inf"))
    beginning = pipeline.begin(row)
    try:
        while True:
            next(beginning)
    except StopIteration as ended:
        pipeline.step([ended.value])
    return f"{width_px}x{height_px}"


def _uncompiled(spec: ModelSpec, reason: str) -> ConfigError:
    return ConfigError(
        f"{spec.name} cannot be compiled here: {reason}.",
        value=spec.name,
        remedy="Name a diffusion model; give this machine a C++ compiler, or serve it plain.",
    )
