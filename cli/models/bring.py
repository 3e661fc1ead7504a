"""`imagen models resolve`, `pull`, `convert`, `publish`: from origins to store to bucket."""

from __future__ import annotations

import shutil
import time
from typing import Annotated

import typer
from rich.filesize import decimal

from cli.console import Meter, Row, make_table
from cli.models.session import (
    EVERY,
    AsJson,
    Everything,
    HubCache,
    LockTimeoutS,
    Mirror,
    Name,
    Names,
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
from deployments.gpu.target import this_target
from deployments.origins import UNRESOLVED
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.store.cache import Store
from deployments.store.convert import convert
from deployments.store.folder import read_manifest
from deployments.store.gc import make_room
from deployments.store.lockfile import LockedModel, locked_origins, origin_manifest
from deployments.store.manifest import SHORT
from deployments.store.provider import Provider, mirror_url, open_bucket
from deployments.store.publish import publish, publish_compiled
from deployments.store.resolve import resolve


def resolve_models(
    names: Names = None,
    everything: Everything = False,
    renew: Annotated[
        bool, typer.Option("--renew", help="Accept what differs from the lock file")
    ] = False,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    hub_cache: HubCache = None,
    as_json: AsJson = False,
) -> None:
    """Look up revisions, sizes and hashes at the origins, and write the lock file."""
    with session(registry, as_json, store, hub_cache=hub_cache) as opened:

        def work(entry: ArtefactSpec) -> Row:
            known = opened.lock.models.get(entry.name)
            locked = resolve(entry, opened.settings, known, renew=renew)
            opened.lock_entry(entry, locked)
            status = "unchanged" if opened.lock.models[entry.name] == known else "resolved"
            digest = None if locked.digest == UNRESOLVED else locked.digest
            hint = digest[:SHORT] if digest else f"now run `imagen models convert {entry.name}`"
            opened.output.say(f"{entry.name}: {status}; {hint}")
            return {"status": status, "digest": digest}

        opened.finish(opened.for_each(opened.choose(names, everything), work))


def pull(
    names: Names = None,
    everything: Everything = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what it would do")] = False,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    mirror: Mirror = None,
    hub_cache: HubCache = None,
    threads: Threads = None,
    max_bytes_per_s: Rate = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Bring models into the store; those already there are checked, and replaced if damaged."""
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
        entries = opened.choose(names, everything)
        if dry_run:
            _show_plan(opened, entries)
        else:
            _pull(opened, entries)


def _pull(opened: Session, entries: dict[str, ArtefactSpec]) -> None:
    warn_network(opened.output, opened.store.root)
    digests = {name: opened.digest(name) for name in entries}
    if not all(digest and opened.store.holds(name, digest) for name, digest in digests.items()):
        show_removed(opened, make_room(opened.store, opened.kept, opened.settings))
    with Meter(opened.output) as meter:
        provider = opened.provider(meter.on_event)

        def work(entry: ArtefactSpec) -> Row:
            opened.catalogue.check_licence(entry)
            start_s = time.monotonic()
            digest = provider.digest(entry)
            folder = provider.ensure(entry, digest, "crc32c")
            seconds = time.monotonic() - start_s
            fetched = meter.fetched(entry.name)
            if fetched is None:
                result, status = "already there, and whole", "present"
            else:
                result, status = f"pulled {decimal(fetched)} in {seconds:.1f} s", "pulled"
            opened.output.say(f"{entry.name}: {result}: {folder}", "green")
            return {
                "status": status,
                "digest": digest,
                "folder": str(folder),
                "fetched_bytes": fetched or 0,
                "seconds": round(seconds, 3),
                "compiled": _pull_compiled(opened, provider, entry, digest),
            }

        rows = opened.for_each(entries, work, opened.settings.models_at_once)
    opened.finish(rows)


def _pull_compiled(
    opened: Session, provider: Provider, entry: ArtefactSpec, digest: str
) -> dict[str, str]:
    """Bring the compiled artefacts for this machine; what became of each."""
    locked = provider.lock.models.get(entry.name)
    if not (locked and locked.compiled):  # so that most pulls need no torch
        return {}
    target = this_target("auto")
    done = provider.ensure_compiled(entry, digest, target)
    for identity, status in done.items():
        opened.output.say(f"{entry.name}: compiled for {target.device}: {identity}: {status}")
    if not done:
        opened.output.say(f"{entry.name}: nothing is compiled for {target.device} here")
    return dict(done)


def _show_plan(opened: Session, entries: dict[str, ArtefactSpec]) -> None:
    """What a pull would do."""
    provider = opened.provider()

    def work(entry: ArtefactSpec) -> Row:
        opened.catalogue.check_licence(entry)
        digest = provider.digest(entry)
        if opened.store.holds(entry.name, digest):
            manifest = read_manifest(opened.store.folder(entry.name, digest), entry.name)
            status, urls = "present", list[str]()
        else:
            manifest, places = provider.plan(entry, digest)
            status, urls = "to pull", sorted({reader.url for reader, _ in places.values()})
        files, size = len(manifest.files), manifest.total_bytes
        return {"status": status, "digest": digest, "files": files, "bytes": size, "sources": urls}

    rows = opened.for_each(entries, work)
    table = make_table("Name", "Digest", "Files", "Size", "From")
    for row in (row for row in rows if "error" not in row):
        source = "\n".join(row["sources"]) or "already there"
        facts = (row["digest"][:SHORT], str(row["files"]), decimal(row["bytes"]))
        table.add_row(row["name"], *facts, source)
    opened.output.show(table)
    total = sum(row["bytes"] for row in rows if row["status"] == "to pull")
    free = shutil.disk_usage(existing(opened.store.root)).free
    opened.output.show(f"To pull: {decimal(total)} ({total} bytes); free: {decimal(free)}")
    opened.finish(rows, {"bytes_to_pull": total, "free_bytes": free})


def publish_model(
    name: Name,
    target: Annotated[
        str, typer.Argument(help="gs://bucket/prefix, s3://bucket/prefix or file:///folder")
    ],
    smoke: Annotated[
        bool, typer.Option("--smoke/--no-smoke", help="Load it first, without a network")
    ] = True,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    mirror: Mirror = None,
    hub_cache: HubCache = None,
    threads: Threads = None,
    max_bytes_per_s: Rate = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Upload a model to where nodes pull from; pulls or converts it first if necessary."""
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
        _publish(opened, name, target, smoke)


def _publish(opened: Session, name: str, target: str, smoke: bool) -> None:
    entry = opened.catalogue.find(name)
    opened.catalogue.check_licence(entry)
    # A wrong target fails here, before a long pull.
    open_bucket(mirror_url(target, entry.name, ""), opened.settings)
    digest = bring_entry(opened, entry)
    if smoke and isinstance(entry, ModelSpec):
        opened.output.say(f"{entry.name}: verifying, and loading without a network")
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
    opened.output.say(f"{entry.name}: {result}: {done.url}", "green")
    status = "published" if done.files else "present"
    more = {"compiled": _publish_compiled(opened, entry.name, digest, target)}
    row = {"name": entry.name, "status": status, "digest": digest} | done._asdict()
    opened.output.emit(row | more)


def _publish_compiled(opened: Session, name: str, digest: str, target: str) -> dict[str, str]:
    """Upload the compiled artefacts; what became of each."""
    locked = opened.lock.models.get(name)
    if not locked or locked.digest != digest:
        return {}
    done = publish_compiled(name, locked, opened.store, target, opened.settings)
    for artefact in locked.compiled:
        what = {
            "published": f"published, {decimal(artefact.bytes)}",
            "present": "already there",
            "absent": "not in this store; publish it where it was compiled",
        }[done[artefact.id]]
        opened.output.say(f"{name}: compiled for {artefact.device}: {artefact.id}: {what}")
    return dict(done)


def convert_model(
    name: Name,
    again: Annotated[
        bool, typer.Option("--again", help="Even if the result is in the store")
    ] = False,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    hub_cache: HubCache = None,
    threads: Threads = None,
    max_bytes_per_s: Rate = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model's origins as the registry says, and write the digest to the lock file."""
    with session(
        registry,
        as_json,
        store,
        hub_cache=hub_cache,
        threads=threads,
        max_bytes_per_s=max_bytes_per_s,
        lock_timeout_s=lock_timeout_s,
    ) as opened:
        entry = opened.catalogue.find(name)
        name = entry.name
        opened.catalogue.check_licence(entry)
        before = opened.digest(name)
        if before and entry.convert and opened.store.holds(name, before) and not again:
            digest, status = before, "present"
            opened.output.say(f"{name}: already there: {digest[:SHORT]}", "green")
        else:
            digest, status = _convert(opened, entry), "converted"
            if before not in (None, digest):
                opened.output.say(f"{name}: the digest was {str(before)[:SHORT]} before", "yellow")
        folder = str(opened.store.folder(name, digest))
        opened.output.emit({"name": name, "status": status, "digest": digest, "folder": folder})


def bring_entry(opened: Session, entry: ArtefactSpec) -> str:
    """Pull or convert a model unless it is in the store, whole; returns its digest.

    Raises:
        ConfigError: its origins are unresolved.
        SetupError: a source or the store failed; see `Provider.ensure` and `convert`.
    """
    digest = opened.digest(entry.name)
    if digest is None and not entry.convert:
        origins = locked_origins(entry, opened.lock)
        digest = origin_manifest(entry, origins).digest
        opened.lock_entry(entry, LockedModel(digest=digest, origins=origins))
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
        manifest = convert(
            entry, opened.catalogue.file_of(entry), Store(opened.settings, meter.on_event)
        )
    size = decimal(manifest.total_bytes)
    opened.output.say(f"{entry.name}: converted: {manifest.short}, {size}", "green")
    return manifest.digest
