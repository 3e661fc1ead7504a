"""`imagen models resolve` and `pull`: from origins or a mirror into the lock file and the store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.filesize import decimal

from cli.console import Meter, Row, make_table
from cli.models.rows import finish, for_each
from cli.models.session import (
    STARTER,
    AsJson,
    Everything,
    LockTimeoutS,
    Mirror,
    Names,
    Rate,
    RegistryFile,
    Root,
    Session,
    Threads,
    session,
)
from cli.models.show import warn_network
from cli.models.upkeep import show_removed
from cli.paths import existing
from deployments.origins import UNRESOLVED
from deployments.registry import ArtefactSpec
from deployments.store.disk import network_filesystem
from deployments.store.folder import read_manifest
from deployments.store.gc import make_room
from deployments.store.lockfile import update_lock
from deployments.store.manifest import SHORT
from deployments.store.resolve import resolve


def resolve_models(
    names: Names = None,
    everything: Everything = False,
    renew: Annotated[
        bool, typer.Option("--renew", help="Accept what differs from the lock file")
    ] = False,
    registry: RegistryFile = STARTER,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Look up revisions, sizes and hashes at the origins, and write the lock file."""
    with session(registry, as_json, root=store) as opened:

        def work(entry: ArtefactSpec) -> Row:
            known = opened.lock.models.get(entry.name)
            locked = resolve(entry, opened.settings, known, renew=renew)
            update_lock(opened.registry, lambda lock: lock.with_model(entry.name, locked))
            status = "unchanged" if locked == known else "resolved"
            digest = None if locked.digest == UNRESOLVED else locked.digest
            hint = digest[:SHORT] if digest else f"now run `imagen models convert {entry.name}`"
            opened.output.say(f"{entry.name}: {status}; {hint}")
            return {"status": status, "digest": digest}

        finish(opened, for_each(opened, opened.choose(names, everything), work))


def pull(
    names: Names = None,
    everything: Everything = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what it would do")] = False,
    registry: RegistryFile = STARTER,
    store: Root = None,
    mirror: Mirror = None,
    threads: Threads = None,
    max_bytes_per_s: Rate = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Bring models into the store; those already there are checked, and replaced if damaged."""
    limits = {
        "threads": threads,
        "max_bytes_per_s": max_bytes_per_s,
        "lock_timeout_s": lock_timeout_s,
    }
    with session(registry, as_json, root=store, mirror=mirror, **limits) as opened:
        entries = opened.choose(names, everything)
        if dry_run:
            _show_plan(opened, entries)
        else:
            _pull(opened, entries)


def _pull(opened: Session, entries: Sequence[ArtefactSpec]) -> None:
    if network := network_filesystem(opened.store.root):
        warn_network(opened.output, network)
    digests = [(entry.name, opened.digest(entry.name)) for entry in entries]
    if not all(digest and opened.store.holds(name, digest) for name, digest in digests):
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
            }

        rows = for_each(opened, entries, work, opened.settings.models_at_once)
    finish(opened, rows)


def _show_plan(opened: Session, entries: Sequence[ArtefactSpec]) -> None:
    """What a pull would do."""
    provider = opened.provider()

    def work(entry: ArtefactSpec) -> Row:
        opened.catalogue.check_licence(entry)
        digest = provider.digest(entry)
        present = opened.store.holds(entry.name, digest)
        if present:
            manifest = read_manifest(opened.store.folder(entry.name, digest), entry.name)
            urls: list[str] = []
        else:
            manifest, places = provider.plan(entry, digest)
            urls = sorted({reader.url for reader, _ in places.values()})
        return {
            "status": "present" if present else "to pull",
            "digest": digest,
            "files": len(manifest.files),
            "bytes": manifest.total_bytes,
            "sources": urls,
        }

    rows = for_each(opened, entries, work)
    total = sum(row["bytes"] for row in rows if row["status"] == "to pull")
    free = shutil.disk_usage(existing(opened.store.root)).free
    table = make_table("Name", "Digest", "Files", "Size", "From")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], "-", "-", "-", f"cannot be pulled: {row['error']['code']}")
            continue
        source = "\n".join(row["sources"]) or "already there"
        size = decimal(row["bytes"])
        table.add_row(row["name"], row["digest"][:SHORT], str(row["files"]), size, source)
    opened.output.show(table)
    opened.output.show(f"To pull: {decimal(total)} ({total} bytes); free: {decimal(free)}")
    finish(opened, rows, {"bytes_to_pull": total, "free_bytes": free})
