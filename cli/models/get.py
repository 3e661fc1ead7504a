"""`imagen models get`: whatever a model needs until it can be served, in one command."""

from __future__ import annotations

import shutil

from rich.filesize import decimal

from cli.models.bring import bring_entry
from cli.models.session import (
    EVERY,
    AsJson,
    HubCache,
    LockTimeoutS,
    Mirror,
    Name,
    Rate,
    RegistryFiles,
    Root,
    Session,
    Threads,
    session,
)
from cli.models.show import warn_network
from cli.models.upkeep import show_removed
from cli.paths import existing
from deployments.errors import ConfigError
from deployments.registry import ArtefactSpec
from deployments.store.gc import make_room
from deployments.store.lockfile import locked_origins
from deployments.store.manifest import SHORT
from deployments.store.resolve import resolve


def get_model(
    name: Name,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    mirror: Mirror = None,
    hub_cache: HubCache = None,
    threads: Threads = None,
    max_bytes_per_s: Rate = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Make a model ready to serve: look it up, pull it and convert it, as far as it needs that."""
    with session(
        registry,
        as_json,
        store,
        mirror=mirror,
        hub_cache=hub_cache,
        threads=threads,
        max_bytes_per_s=max_bytes_per_s,
        lock_timeout_s=lock_timeout_s,
    ) as opened:
        entry = opened.catalogue.find(name)
        opened.catalogue.check_licence(entry)
        known = opened.digest(entry.name)
        there = known is not None and opened.store.find(entry.name, known, "crc32c") is not None
        digest = known if known and there else _get(opened, entry)
        size = decimal(opened.store.size_bytes(entry.name, digest))
        what = "already there, and whole" if there else "ready"
        opened.output.say(f"{entry.name}: {what}: {digest[:SHORT]}, {size}", "green")
        row = {"name": entry.name, "status": "present" if there else "ready", "digest": digest}
        opened.output.emit(row | {"folder": str(opened.store.folder(entry.name, digest))})


def _get(opened: Session, entry: ArtefactSpec) -> str:
    if not (opened.settings.mirror and opened.digest(entry.name)):
        _resolve_if_needed(opened, entry)
    _announce(opened, entry)
    warn_network(opened.output, opened.store.root)
    show_removed(opened, make_room(opened.store, opened.kept, opened.settings))
    return bring_entry(opened, entry)


def _resolve_if_needed(opened: Session, entry: ArtefactSpec) -> None:
    try:
        locked_origins(entry, opened.lock)
    except ConfigError:
        opened.output.say(f"{entry.name}: looking up revision, sizes and hashes")
        known = opened.lock.models.get(entry.name)
        opened.lock_entry(entry, resolve(entry, opened.settings, known))


def _announce(opened: Session, entry: ArtefactSpec) -> None:
    """Say what will be fetched, from where, and under which licence."""
    locked = opened.lock.models[entry.name]
    size = sum(int(file.size) for origin in locked.origins for file in origin.files)
    sources = opened.settings.mirror or ", ".join(origin.source for origin in locked.origins)
    commercial = "allows" if entry.commercial else "forbids, and the registry accepts that,"
    free = shutil.disk_usage(existing(opened.store.root)).free
    opened.output.say(f"{entry.name}: {entry.summary}")
    opened.output.say(f"  {decimal(size)} from {sources}; {decimal(free)} are free")
    opened.output.say(f"  licence {entry.licence}, which {commercial} commercial use")
