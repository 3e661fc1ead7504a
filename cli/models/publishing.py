"""`imagen models publish` and `convert`: making what nodes pull, on an operator's machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from cli.console import Meter
from cli.models.session import (
    STARTER,
    AsJson,
    LockTimeoutS,
    Mirror,
    Name,
    Rate,
    RegistryFile,
    Root,
    Session,
    Threads,
    session,
)
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.store.cache import Store
from deployments.store.convert import convert
from deployments.store.lockfile import LockedModel, locked_origins, origin_manifest, update_lock
from deployments.store.manifest import SHORT
from deployments.store.provider import mirror_url, open_bucket
from deployments.store.publish import publish


def publish_model(
    name: Name,
    target: Annotated[str, typer.Argument(help="gs://bucket/prefix or file:///folder")],
    smoke: Annotated[
        bool, typer.Option("--smoke/--no-smoke", help="Load it first, without a network")
    ] = True,
    registry: RegistryFile = STARTER,
    store: Root = None,
    mirror: Mirror = None,
    threads: Threads = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Upload a model to where nodes pull from; pulls or converts it first if necessary."""
    limits = {"threads": threads, "lock_timeout_s": lock_timeout_s}
    with session(registry, as_json, root=store, mirror=mirror, **limits) as opened:
        entry = opened.catalogue.find(name)
        name = entry.name
        opened.catalogue.check_licence(entry)
        # A wrong target fails here, before a long pull.
        open_bucket(mirror_url(target, name, ""), opened.settings)
        digest = _bring(opened, entry)
        if smoke and isinstance(entry, ModelSpec):
            opened.output.say(f"{name}: verifying, and loading without a network")
        with Meter(opened.output) as meter:
            done = publish(
                entry,
                digest,
                opened.store,
                target,
                opened.settings,
                smoke=smoke,
                listener=meter.on_event,
            )
        uploaded = f"published {done.files} files, {decimal(done.bytes)}"
        result = uploaded if done.files else "already there"
        opened.output.say(f"{name}: {result}: {done.url}", "green")
        status = "published" if done.files else "present"
        opened.output.emit({"name": name, "status": status, "digest": digest} | done._asdict())


def convert_model(
    name: Name,
    again: Annotated[
        bool, typer.Option("--again", help="Even if the result is in the store")
    ] = False,
    registry: RegistryFile = STARTER,
    store: Root = None,
    threads: Threads = None,
    max_bytes_per_s: Rate = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model's origins as the registry says, and write the digest to the lock file."""
    limits = {
        "threads": threads,
        "max_bytes_per_s": max_bytes_per_s,
        "lock_timeout_s": lock_timeout_s,
    }
    with session(registry, as_json, root=store, **limits) as opened:
        entry = opened.catalogue.find(name)
        name = entry.name
        opened.catalogue.check_licence(entry)
        before = opened.digest(name)
        present = bool(before and entry.convert and opened.store.holds(name, before))
        if before and present and not again:
            digest, status = before, "present"
            opened.output.say(f"{name}: already there: {digest[:SHORT]}", "green")
        else:
            digest, status = _convert(opened, entry), "converted"
            if before not in (None, digest):
                opened.output.say(f"{name}: the digest was {str(before)[:SHORT]} before", "yellow")
        folder = str(opened.store.folder(name, digest))
        opened.output.emit({"name": name, "status": status, "digest": digest, "folder": folder})


def _bring(opened: Session, entry: ArtefactSpec) -> str:
    """Make sure that a model is in the store, verified; returns its digest."""
    digest = opened.digest(entry.name)
    if digest is None and not entry.convert:
        origins = locked_origins(entry, opened.lock)
        digest = origin_manifest(entry, origins).digest
        locked = LockedModel(digest=digest, origins=origins)
        update_lock(opened.registry, lambda lock: lock.with_model(entry.name, locked))
    if digest and opened.store.find(entry.name, digest, "crc32c"):
        return digest
    if entry.convert and not opened.settings.mirror:
        return _convert(opened, entry)
    with Meter(opened.output) as meter:
        provider = opened.provider(meter.on_event)
        provider.ensure(entry)
        return provider.digest(entry)


def _convert(opened: Session, entry: ArtefactSpec) -> str:
    with Meter(opened.output) as meter:
        manifest = convert(entry, opened.registry, Store(opened.settings, meter.on_event))
    size = decimal(manifest.total_bytes)
    opened.output.say(f"{entry.name}: converted: {manifest.short}, {size}", "green")
    return manifest.digest
