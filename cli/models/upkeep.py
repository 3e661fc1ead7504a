"""`imagen models verify`, `gc` and `clear`: checking the store, and making room in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.filesize import decimal

from cli.console import Row
from cli.models.session import (
    EVERY,
    AsJson,
    Everything,
    Names,
    RegistryFiles,
    Root,
    Session,
    check_choice,
    session,
)
from deployments.errors import StoreUnwritable
from deployments.store import compiled
from deployments.store.gc import Removed, collect


def verify(
    names: Names = None,
    everything: Everything = False,
    full: Annotated[bool, typer.Option("--full", help="By SHA-256, too")] = False,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of models in the store; changes nothing.

    Without names it checks whatever is there. Named models, and with --all every entry, must be
    there.
    """
    with session(registry, as_json, store) as opened:
        if names or everything:
            held = {name: (name, "") for name in opened.choose(names, everything)}
        else:
            held = _held(opened)

        def work(model: tuple[str, str]) -> Row:
            name, short = model
            digest = short or opened.provider().digest(opened.catalogue.find(name))
            start_s = time.monotonic()
            manifest = opened.store.check(name, digest, "full" if full else "crc32c")
            _check_compiled(opened, name, manifest.digest)
            seconds = time.monotonic() - start_s
            size = decimal(manifest.total_bytes)
            place = f"{name}@{manifest.short}"
            opened.output.say(f"{place}: whole ({size} in {seconds:.1f} s)", "green")
            return {"status": "whole", "digest": manifest.digest, "bytes": manifest.total_bytes}

        rows = opened.for_each(held, work)
        if not rows:
            opened.output.say("No model is in the store.", "yellow")
        opened.finish(rows)


def gc(
    now: Annotated[bool, typer.Option("--now", help="However full the disk is")] = False,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Remove leftovers, and, if the disk is too full, models that nothing refers to."""
    with session(registry, as_json, store) as opened:
        removed = collect(opened.store, opened.kept, opened.settings, now=now)
        show_removed(opened, removed)
        opened.output.emit(
            {"removed": [r._asdict() for r in removed], "bytes": sum(r.bytes for r in removed)}
        )


def clear(
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="Whatever is in the store")] = False,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Remove every digest of models from the store, even those that the lock file names."""
    with session(registry, as_json, store) as opened:
        check_choice(names, everything)
        held = opened.store.removable()
        stored = dict.fromkeys(model for model, _ in held)
        chosen = [n if n in stored else opened.catalogue.find(n).name for n in names or stored]

        def work(name: str) -> Row:
            shorts = [short for model, short in held if model == name]
            freed = sum(_remove(opened, name, short) for short in shorts)
            what = f"removed {', '.join(shorts)}, {decimal(freed)}" if shorts else "not there"
            opened.output.say(f"{name}: {what}")
            return {"status": "removed" if shorts else "absent", "bytes": freed}

        opened.finish(opened.for_each({name: name for name in chosen}, work))


def _check_compiled(opened: Session, name: str, digest: str) -> None:
    """Check the compiled artefacts that are there; raises ModelCorrupt."""
    locked = opened.lock.models.get(name)
    if locked and locked.digest == digest:
        for artefact in locked.compiled:
            compiled.check(opened.store, name, digest, artefact)


def show_removed(opened: Session, removed: Sequence[Removed]) -> None:
    """Print what garbage collection removed."""
    for kind, name, digest, size in removed:
        what = f"{name}@{digest}" if kind == "model" else f"{kind} {name}"
        opened.output.say(f"removed {what}: {decimal(size)}")
    if removed:
        opened.output.say(f"Freed {decimal(sum(r.bytes for r in removed))}.")


def _held(opened: Session) -> dict[str, tuple[str, str]]:
    """Name and digest of each model in the store, by name; by name@digest if it is not locked."""
    locked = {entry.name: opened.digest(entry.name) or "" for entry in opened.catalogue.entries}
    return {
        name if locked.get(name, "").startswith(short) else f"{name}@{short}": (name, short)
        for name, short in opened.store.models()
    }


def _remove(opened: Session, name: str, short: str) -> int:
    """Remove a model and its compiled artefacts; returns the bytes they occupied."""
    size = opened.store.size_bytes(name, short)
    if not opened.store.remove(name, short):
        raise StoreUnwritable(
            f"{name}@{short} is in use: a process has it loaded.",
            remedy="Stop that process first.",
        )
    return size
