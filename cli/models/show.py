"""`imagen models list`, `info` and `where`: what there is; they change nothing."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from cli.console import Output, Row, make_table
from cli.ending import ending
from cli.models.session import (
    EVERY,
    AsJson,
    Name,
    RegistryFiles,
    Root,
    Session,
    session,
    store_settings,
)
from cli.paths import existing
from deployments.errors import ModelCorrupt, ModelNotCached
from deployments.origins import UNRESOLVED
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.settings import framework_caches
from deployments.store import compiled
from deployments.store.disk import filesystem, folder_bytes, network_filesystem
from deployments.store.folder import read_manifest
from deployments.store.lockfile import LockedFile
from deployments.store.manifest import SHORT


def list_models(
    registry: RegistryFiles = EVERY,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Show every entry of the registry, and whether it is in the store."""
    with session(registry, as_json, store) as opened:
        rows = [_summary(opened, entry) for entry in opened.catalogue.entries]
        columns = ("Name", "Task", "Licence", "Commercial", "Size", "In store", "Locked")
        table = make_table(*columns, "Compiled")
        for row in rows:
            size = decimal(row["bytes"]) if row["bytes"] is not None else "unresolved"
            held = row["in_store"] if row["in_store"] != "other" else ", ".join(row["stored"])
            table.add_row(
                row["name"],
                _task(row),
                row["licence"],
                _commercial(row),
                size,
                held,
                (row["digest"] or UNRESOLVED)[:SHORT],
                decimal(row["compiled_bytes"]) if row["compiled_bytes"] else "-",
            )
        opened.output.show(table)
        places = {"registries": [*map(str, opened.registries)], "store": str(opened.store.root)}
        opened.output.emit(places | {"models": rows})


def info(
    name: Name,
    registry: RegistryFiles = EVERY,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of one entry, with its files."""
    with session(registry, as_json, store) as opened:
        entry = opened.catalogue.find(name)
        values = _summary(opened, entry) | entry.model_dump(mode="json", exclude={"origins"})
        values["origins"] = _origins(opened, entry)
        digest = values["digest"]
        values["compiled"] = _compiled(opened, entry.name)
        values["folder"] = str(opened.store.folder(entry.name, digest)) if digest else None
        facts = Table(show_header=False, box=None)
        for key, value in values.items():
            if key not in ("origins", "compiled") and value not in (None, [], {}):
                facts.add_row(key, value if isinstance(value, str) else json.dumps(value))
        opened.output.show(facts)
        if values["compiled"]:
            table = make_table("Compiled", "Device", "Torch", "Mode", "Shapes", "Bytes", "In store")
            for row in values["compiled"]:
                cells = [str(row[key]) for key in ("id", "device", "torch", "mode", "shapes")]
                table.add_row(*cells, str(row["bytes"]), "yes" if row["in_store"] else "no")
            opened.output.show(table)
        for origin in values["origins"]:
            title = f"{origin['source']} -> {origin['into'] or '.'}"
            table = make_table("File", "Bytes", "SHA-256", title=title)
            for file in origin["files"]:
                table.add_row(file["path"], str(file["size"]), file["sha256"])
            opened.output.show(table)
        opened.output.emit(values)


def where(
    env: Annotated[
        bool, typer.Option("--env", help='Lines for the shell: eval "$(… where --env)"')
    ] = False,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Show where the store is, on what disk, and how much room it has."""
    output = Output(as_json=as_json)
    with ending(output):
        root = store_settings(store).folder
        variables = framework_caches(root)
        if env:
            for name, value in variables.items():
                output.show(f"export {name}={shlex.quote(value)}")
            output.emit({"env": variables})
            return
        usage, made = shutil.disk_usage(existing(root)), root.is_dir()
        output.show(f"Store  {root}{'' if made else '  (not made yet)'}")
        output.show(f"Free   {decimal(usage.free)} of {decimal(usage.total)}")
        output.show(f"Disk   {filesystem(root) or 'of an unknown file system'}")
        place = {"store": str(root), "exists": made, "network": warn_network(output, root)}
        place |= {"filesystem": filesystem(root), "env": variables}
        output.emit(place | {"free_bytes": usage.free, "total_bytes": usage.total})


def warn_network(output: Output, root: Path) -> bool:
    """Warn of a store on a network file system; whether it is on one."""
    if kind := network_filesystem(root):
        output.say(
            f"Warning: the store is on a network file system ({kind}), where locks may mean nothing"
            " and loading is slow. Use a local disk.",
            "yellow",
        )
    return bool(kind)


def _summary(opened: Session, entry: ArtefactSpec) -> Row:
    state, stored = _state(opened, entry.name)
    return {
        "name": entry.name,
        "task": str(entry.task) if isinstance(entry, ModelSpec) else None,
        "default": opened.catalogue.is_default(entry),
        "licence": entry.licence,
        "commercial": entry.commercial,
        "accepted": entry.commercial or entry.name in opened.catalogue.accept_noncommercial,
        "bytes": _bytes(opened, entry),
        "in_store": state,
        "stored": stored,
        "compiled_bytes": sum(
            folder_bytes(opened.store.compiled_folder(entry.name, short)) for short in stored
        ),
        "digest": opened.digest(entry.name),
    }


def _state(opened: Session, name: str) -> tuple[str, list[str]]:
    """Whether the locked digest is in the store, by names and sizes; and which digests are."""
    stored = [short for model, short in opened.store.models() if model == name]
    digest = opened.digest(name)
    if digest is None or digest[:SHORT] not in stored:
        return ("other" if stored else "no"), stored
    return ("yes" if opened.store.holds(name, digest) else "damaged"), stored


def _bytes(opened: Session, entry: ArtefactSpec) -> int | None:
    """Bytes of the model in the store; else of its origins, which a conversion changes."""
    digest = opened.digest(entry.name)
    if digest:
        try:
            folder = opened.store.folder(entry.name, digest)
            return read_manifest(folder, entry.name).total_bytes
        except (ModelNotCached, ModelCorrupt):
            pass  # not in the store, or damaged there: `verify` reports that
    sizes = [file["size"] for origin in _origins(opened, entry) for file in origin["files"]]
    return None if UNRESOLVED in sizes else sum(sizes)


def _compiled(opened: Session, name: str) -> list[Row]:
    """The lock file's compiled artefacts of a model."""
    locked = opened.lock.models.get(name)
    return [
        artefact.model_dump()
        | {"in_store": compiled.holds(opened.store, name, locked.digest, artefact, "quick")}
        for artefact in (locked.compiled if locked else ())
        if locked
    ]


def _origins(opened: Session, entry: ArtefactSpec) -> list[Row]:
    """The registry's origins, with what the lock file knows of them."""
    locked = opened.lock.models.get(entry.name)
    rows: list[Row] = []
    for i, origin in enumerate(entry.origins):
        theirs = locked.origins[i] if locked and i < len(locked.origins) else None
        known = {f.path: f for f in theirs.files} if theirs else {}
        files = [known.get(path, LockedFile(path=path)).model_dump() for path in origin.files]
        source = theirs.source if theirs else origin.source
        rows.append({"source": source, "into": origin.into, "files": files})
    return rows


def _task(row: Row) -> str:
    return f"{row['task'] or '-'}{', default' if row['default'] else ''}"


def _commercial(row: Row) -> str:
    if row["commercial"]:
        return "yes"
    return "no, accepted" if row["accepted"] else "no"
