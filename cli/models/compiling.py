"""`imagen models compile`: from a model in the store to an artefact for this kind of device."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal

from cli.models.session import EVERY, AsJson, Name, RegistryFiles, Root, Session, session
from deployments.errors import ConfigError
from deployments.registry import ModelSpec
from deployments.settings import Settings
from deployments.store import compiled
from deployments.store.lockfile import LockedArtefact, Mode, update_lock

if TYPE_CHECKING:
    from deployments.loader import Loaded

Device = Literal["auto", "cpu", "cuda"]
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def compile_model(
    name: Name,
    mode: Annotated[
        Mode, typer.Option(help="The whole network, or its repeated blocks: faster to compile")
    ] = "full",
    device: Annotated[Device, typer.Option(help="Where to compile, and what for")] = "auto",
    registry: RegistryFiles = EVERY,
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

    settings = Settings(models=opened.registries, device=device, store=opened.settings)
    loaded = load(spec, digest, opened.store, settings)
    with loaded.lease:
        start_s = time.monotonic()
        with _fresh_caches():
            blob, shapes = _compile(spec, loaded, mode)
        seconds = time.monotonic() - start_s
        key = compiled.CompiledKey(spec.name, digest, this_target(device), mode, shapes)
        artefact = compiled.add(opened.store, key, blob)
    update_lock(
        opened.catalogue.file_of(spec), lambda lock: lock.with_artefact(spec.name, digest, artefact)
    )
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


def _compile(spec: ModelSpec, loaded: Loaded, mode: Mode) -> tuple[bytes, str]:
    """Prepare the model as a replica does; the artefact, and the fingerprint of its shapes.

    Raises:
        ConfigError: the family is not compiled, torch cannot compile here, or it compiled nothing.
    """
    import torch

    from deployments.engine.grouping import GroupLimits
    from deployments.preparing import prepare, shapes_of

    limits = GroupLimits(spec.max_batch_size)
    try:
        graph_bytes = loaded.cap_bytes if spec.graphs else None
        prepare(spec, loaded.pipeline, limits, mode=mode, graph_bytes=graph_bytes)
    except RuntimeError as error:  # the base of what torch raises: no compiler, say
        raise _uncompiled(spec, str(error).splitlines()[0].rstrip(".")) from error
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise _uncompiled(spec, f"torch compiled nothing of family {spec.family}")
    return saved[0], shapes_of(spec)


def _uncompiled(spec: ModelSpec, reason: str) -> ConfigError:
    return ConfigError(
        f"{spec.name} cannot be compiled here: {reason}.",
        value=spec.name,
        remedy="Name a diffusion model; give this machine a C++ compiler, or serve it plain.",
    )
