"""`imagen models`: the registry and the store of this machine, for operators and Jobs.

Tables go to stdout, everything else to stderr; with --json, stdout holds one JSON object.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from cli.console import Lines, Meter, Output, Row, make_table
from deployments.errors import (
    ConfigError,
    ModelCorrupt,
    ModelNotCached,
    SetupError,
    StoreUnwritable,
)
from deployments.registry import ArtefactSpec, Catalogue, ModelSpec, load_catalogue
from deployments.settings import ROOT_VARIABLE, StoreSettings, framework_caches, parse_settings
from deployments.store.cache import Store, filesystem, network_filesystem
from deployments.store.events import Listener, ignore
from deployments.store.folder import folder_bytes, read_manifest
from deployments.store.gc import Removed, collect, make_room
from deployments.store.lockfile import (
    Lock,
    LockedModel,
    load_lock,
    locked_digest,
    locked_origins,
    origin_manifest,
    update_lock,
)
from deployments.store.manifest import SHORT
from deployments.store.provider import Provider, mirror_url
from deployments.store.sources import UNRESOLVED

_INTERRUPTED = 130
models_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The models of this machine: look them up, pull, verify, publish, remove.",
)

Names = Annotated[list[str] | None, typer.Argument(help="Names in the registry, or tasks")]
Name = Annotated[str, typer.Argument(help="A name in the registry, or a task")]
Everything = Annotated[bool, typer.Option("--all", help="Every entry of the registry")]
RegistryFile = Annotated[
    Path, typer.Option("--registry", envvar="IMAGEN_REGISTRY", help="The YAML file of models")
]


def _root(text: str) -> Path:
    if not text:  # an unset variable of the shell, which must not mean the current folder
        raise typer.BadParameter("it is empty")
    return Path(text).absolute()


Root = Annotated[
    Path | None,
    typer.Option(
        "--store",
        parser=_root,
        metavar="PATH",
        help=f"Its root; else ${ROOT_VARIABLE}, else ~/.cache/imagen-models",
    ),
]
Mirror = Annotated[
    str | None,
    typer.Option(help="gs:// or file:// folder of published models; else their origins serve"),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else")]
Threads = Annotated[int | None, typer.Option(help="Ranges fetched at a time, for one model")]
Rate = Annotated[float | None, typer.Option("--max-bytes-per-s", help="All models together")]
LockTimeoutS = Annotated[
    float | None,
    typer.Option("--lock-timeout-s", help="How long another puller may stand still"),
]
STARTER = Path("configs/models/starter.yaml")


@dataclass(frozen=True)
class Desk:
    """What every command works with."""

    registry: Path
    catalogue: Catalogue
    settings: StoreSettings
    output: Output

    @property
    def store(self) -> Store:
        return Store(self.settings)

    @property
    def lock(self) -> Lock:
        """As the file is now."""
        return load_lock(self.registry)

    def provider(self, listener: Listener = ignore) -> Provider:
        return Provider(self.registry, self.settings, listener)

    def digest(self, name: str) -> str | None:
        """The locked digest; None as long as it is unresolved."""
        try:
            return locked_digest(self.lock, self.catalogue.find(name))
        except ConfigError:
            return None

    def choose(self, names: Sequence[str] | None, everything: bool) -> list[ArtefactSpec]:
        """The entries that were named.

        Raises:
            ConfigError: none was, or one that does not exist, or some and all.
        """
        if bool(names) == everything:
            raise ConfigError("Which models? Name some, or say --all; not both.")
        wanted = [entry.name for entry in self.catalogue.entries] if everything else names or []
        found = [self.catalogue.find(name) for name in wanted]
        return list({entry.name: entry for entry in found}.values())


@models_app.command("list")
def list_models(
    registry: RegistryFile = STARTER,
    store: Root = None,
    mirror: Mirror = None,
    as_json: AsJson = False,
) -> None:
    """Show every entry of the registry, and whether it is in the store."""
    with _desk(registry, as_json, root=store, mirror=mirror) as desk:
        rows = [_summary(desk, entry) for entry in desk.catalogue.entries]
        table = make_table("Name", "Task", "Licence", "Commercial", "Size", "In store", "Locked")
        for row in rows:
            size = decimal(row["bytes"]) if row["bytes"] is not None else "unresolved"
            held = row["in_store"] if row["in_store"] != "other" else ", ".join(row["stored"])
            table.add_row(
                row["name"],
                row["task"] or "-",
                row["licence"],
                _commercial(row),
                size,
                held,
                (row["digest"] or UNRESOLVED)[:SHORT],
            )
        desk.output.show(table)
        desk.output.emit(
            {"registry": str(desk.registry), "store": str(desk.store.root), "models": rows}
        )


@models_app.command()
def info(
    name: Name,
    registry: RegistryFile = STARTER,
    store: Root = None,
    mirror: Mirror = None,
    as_json: AsJson = False,
) -> None:
    """Show everything that is known of one entry, with its files."""
    with _desk(registry, as_json, root=store, mirror=mirror) as desk:
        entry = desk.catalogue.find(name)
        values = _summary(desk, entry) | entry.model_dump(mode="json", exclude={"origins"})
        values["origins"] = _origins(desk, entry)
        values["folder"] = (
            str(desk.store.folder(name, values["digest"])) if values["digest"] else None
        )
        facts = Table(show_header=False, box=None)
        for key, value in values.items():
            if key != "origins" and value not in (None, [], {}):
                facts.add_row(key, value if isinstance(value, str) else json.dumps(value))
        desk.output.show(facts)
        for origin in values["origins"]:
            title = f"{origin['source']} -> {origin['into'] or '.'}"
            table = make_table("File", "Bytes", "SHA-256", title=title)
            for file in origin["files"]:
                table.add_row(file["path"], str(file["size"]), file["sha256"])
            desk.output.show(table)
        desk.output.emit(values)


@models_app.command("resolve")
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
    """Look revisions, sizes and hashes up at the origins, and write the lock file."""
    from deployments.store.resolve import resolve

    with _desk(registry, as_json, root=store) as desk:

        def work(entry: ArtefactSpec) -> Row:
            known = desk.lock.models.get(entry.name)
            found = resolve(entry, desk.settings, known, renew=renew)
            update_lock(desk.registry, lambda lock: lock.with_model(entry.name, found))
            status = "unchanged" if found == known else "resolved"
            digest = None if found.digest == UNRESOLVED else found.digest
            told = digest[:SHORT] if digest else f"now run `imagen models convert {entry.name}`"
            desk.output.say(f"{entry.name}: {status}; {told}")
            return {"status": status, "digest": digest}

        _finish(desk, _each(desk, desk.choose(names, everything), work))


@models_app.command()
def pull(
    names: Names = None,
    everything: Everything = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would do")] = False,
    registry: RegistryFile = STARTER,
    store: Root = None,
    mirror: Mirror = None,
    threads: Threads = None,
    max_bytes_per_s: Rate = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Bring models into the store; what is there is checked, and replaced if it is damaged."""
    limits = {
        "threads": threads,
        "max_bytes_per_s": max_bytes_per_s,
        "lock_timeout_s": lock_timeout_s,
    }
    with _desk(registry, as_json, root=store, mirror=mirror, **limits) as desk:
        entries = desk.choose(names, everything)
        if dry_run:
            _plan(desk, entries)
        else:
            _pull(desk, entries)


@models_app.command()
def verify(
    names: Names = None,
    everything: Everything = False,
    full: Annotated[bool, typer.Option("--full", help="By SHA-256, too")] = False,
    registry: RegistryFile = STARTER,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of models in the store, and change nothing.

    Without names, whatever is there; the named ones, and with --all all, must be there.
    """
    with _desk(registry, as_json, root=store) as desk:
        if names or everything:
            held = {entry.name: (entry.name, "") for entry in desk.choose(names, everything)}
        else:
            held = _held(desk)

        def work(label: str) -> Row:
            name, short = held[label]
            digest = short or desk.provider().digest(desk.catalogue.find(name))
            start_s = time.monotonic()
            manifest = desk.store.check(name, digest, "full" if full else "crc32c")
            seconds = time.monotonic() - start_s
            size = decimal(manifest.total_bytes)
            desk.output.say(f"{label}: whole ({size} in {seconds:.1f} s)", "green")
            return {"status": "whole", "digest": manifest.digest, "bytes": manifest.total_bytes}

        rows = _each_name(desk, list(held), work)
        if not rows:
            desk.output.say("No model is in the store.", "yellow")
        _finish(desk, rows)


@models_app.command("publish")
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
    """Upload a model to where nodes pull from; pulls or converts it first if need be."""
    from deployments.store.publish import open_target, publish

    limits = {"threads": threads, "lock_timeout_s": lock_timeout_s}
    with _desk(registry, as_json, root=store, mirror=mirror, **limits) as desk:
        entry = desk.catalogue.find(name)
        name = entry.name
        desk.catalogue.check_licence(entry)
        open_target(
            mirror_url(target, name, ""), desk.settings
        )  # a wrong one fails before a long pull
        digest = _bring(desk, entry)
        if smoke and isinstance(entry, ModelSpec):
            desk.output.say(f"{name}: verifying, and loading without a network")
        with Meter(desk.output) as meter:
            done = publish(
                entry, digest, desk.store, target, desk.settings, smoke=smoke, listener=meter.hear
            )
        if done.files:
            desk.output.say(
                f"{name}: published {done.files} files, {decimal(done.bytes)}: {done.url}", "green"
            )
        else:
            desk.output.say(f"{name}: already there: {done.url}", "green")
        status = "published" if done.files else "present"
        desk.output.emit({"name": name, "status": status, "digest": digest} | done._asdict())


@models_app.command("convert")
def convert_model(
    name: Name,
    again: Annotated[bool, typer.Option("--again", help="Even if the result is there")] = False,
    registry: RegistryFile = STARTER,
    store: Root = None,
    threads: Threads = None,
    max_bytes_per_s: Rate = None,
    lock_timeout_s: LockTimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Make a model from its origins as the registry says, and write its digest to the lock."""
    limits = {
        "threads": threads,
        "max_bytes_per_s": max_bytes_per_s,
        "lock_timeout_s": lock_timeout_s,
    }
    with _desk(registry, as_json, root=store, **limits) as desk:
        entry = desk.catalogue.find(name)
        name = entry.name
        desk.catalogue.check_licence(entry)
        before = desk.digest(name)
        made = again or not (before and entry.convert and desk.store.holds(name, before))
        digest = _convert(desk, entry) if made else str(before)
        if not made:
            desk.output.say(f"{name}: already there: {digest[:SHORT]}", "green")
        elif before not in (None, digest):
            desk.output.say(f"{name}: the lock file said {str(before)[:SHORT]} before", "yellow")
        folder = str(desk.store.folder(name, digest))
        status = "converted" if made else "present"
        desk.output.emit({"name": name, "status": status, "digest": digest, "folder": folder})


@models_app.command()
def gc(
    now: Annotated[bool, typer.Option("--now", help="However full the disk is")] = False,
    registry: RegistryFile = STARTER,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Remove leftovers; and on a disk that is too full, models that nothing refers to."""
    with _desk(registry, as_json, root=store) as desk:
        removed = collect(desk.store, _kept(desk), desk.settings, now=now)
        _tell_removed(desk, removed)
        desk.output.emit(
            {"removed": [r._asdict() for r in removed], "bytes": sum(r.bytes for r in removed)}
        )


@models_app.command()
def clear(
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="Whatever is in the store")] = False,
    registry: RegistryFile = STARTER,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Remove models from the store, every digest of them, also ones that are still wanted."""
    with _desk(registry, as_json, root=store) as desk:
        held = desk.store.models()
        if bool(names) == everything:
            raise ConfigError("Which models? Name some, or say --all; not both.")
        there = dict.fromkeys(model for model, _ in held)
        found = [n if n in there else desk.catalogue.find(n).name for n in names or there]
        wanted = list(dict.fromkeys(found))

        def work(name: str) -> Row:
            shorts = [short for model, short in held if model == name]
            freed = sum(_remove(desk, name, short) for short in shorts)
            what = f"removed {', '.join(shorts)}, {decimal(freed)}" if shorts else "not there"
            desk.output.say(f"{name}: {what}")
            return {"status": "removed" if shorts else "absent", "bytes": freed}

        _finish(desk, _each_name(desk, wanted, work))


@models_app.command()
def where(
    env: Annotated[
        bool, typer.Option("--env", help='Lines for the shell: eval "$(… where --env)"')
    ] = False,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Say where the store is, on what disk, and how much room there is."""
    output = Output(as_json=as_json)
    with _ending(output):
        root = _settings(root=store).folder
        variables = framework_caches(root)
        if env:
            for name, value in variables.items():
                output.show(f"export {name}={shlex.quote(value)}")
            output.emit({"env": variables})
            return
        usage = shutil.disk_usage(_existing(root))
        kind, network = filesystem(root), network_filesystem(root)
        output.show(f"Store        {root}{'' if root.is_dir() else '  (not made yet)'}")
        output.show(f"Free         {decimal(usage.free)} of {decimal(usage.total)}")
        output.show(f"File system  {kind or 'unknown'}")
        if network:
            _warn_network(output, network)
        output.emit(
            {
                "store": str(root),
                "exists": root.is_dir(),
                "free_bytes": usage.free,
                "total_bytes": usage.total,
                "filesystem": kind,
                "network": bool(network),
                "env": variables,
            }
        )


def _pull(desk: Desk, entries: Sequence[ArtefactSpec]) -> None:
    if network := network_filesystem(desk.store.root):
        _warn_network(desk.output, network)
    wanted = [(entry.name, desk.digest(entry.name)) for entry in entries]
    if not all(digest and desk.store.holds(name, digest) for name, digest in wanted):
        _tell_removed(desk, make_room(desk.store, _kept(desk), desk.settings))
    with Meter(desk.output) as meter:
        provider = desk.provider(meter.hear)

        def work(entry: ArtefactSpec) -> Row:
            desk.catalogue.check_licence(entry)
            start_s = time.monotonic()
            digest = provider.digest(entry)
            folder = provider.ensure(entry, digest, "crc32c")
            seconds = time.monotonic() - start_s
            fetched = meter.fetched(entry.name)
            if fetched is None:
                said, status = "already there, and whole", "present"
            else:
                said, status = f"pulled {decimal(fetched)} in {seconds:.1f} s", "pulled"
            desk.output.say(f"{entry.name}: {said}: {folder}", "green")
            return {
                "status": status,
                "digest": digest,
                "folder": str(folder),
                "fetched_bytes": fetched or 0,
                "seconds": round(seconds, 3),
            }

        rows = _each(desk, entries, work, desk.settings.models_at_once)
    _finish(desk, rows)


def _plan(desk: Desk, entries: Sequence[ArtefactSpec]) -> None:
    provider = desk.provider()

    def work(entry: ArtefactSpec) -> Row:
        desk.catalogue.check_licence(entry)
        digest = provider.digest(entry)
        there = desk.store.holds(entry.name, digest)
        if there:
            manifest = read_manifest(desk.store.folder(entry.name, digest), entry.name)
            urls: list[str] = []
        else:
            manifest, places = provider.plan(entry, digest)
            urls = sorted({source.url for source, _ in places.values()})
        return {
            "status": "present" if there else "to pull",
            "digest": digest,
            "files": len(manifest.files),
            "bytes": manifest.total_bytes,
            "sources": urls,
        }

    rows = _each(desk, entries, work)
    total = sum(row["bytes"] for row in rows if row["status"] == "to pull")
    free = shutil.disk_usage(_existing(desk.store.root)).free
    table = make_table("Name", "Digest", "Files", "Size", "From")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], "-", "-", "-", f"cannot be pulled: {row['error']['code']}")
            continue
        source = "\n".join(row["sources"]) or "already there"
        size = decimal(row["bytes"])
        table.add_row(row["name"], row["digest"][:SHORT], str(row["files"]), size, source)
    desk.output.show(table)
    desk.output.show(f"To pull: {decimal(total)} ({total} bytes); free: {decimal(free)}")
    _finish(desk, rows, {"bytes_to_pull": total, "free_bytes": free})


def _bring(desk: Desk, entry: ArtefactSpec) -> str:
    """Make sure that a model is in the store, verified; its digest."""
    digest = desk.digest(entry.name)
    if digest is None and not entry.convert:
        origins = locked_origins(entry, desk.lock)
        digest = origin_manifest(entry, origins).digest
        known = LockedModel(digest=digest, origins=origins)
        update_lock(desk.registry, lambda lock: lock.with_model(entry.name, known))
    held = digest is not None and desk.store.find(entry.name, digest, "crc32c") is not None
    if digest and held:
        return digest
    if entry.convert and not desk.settings.mirror:
        return _convert(desk, entry)
    with Meter(desk.output) as meter:
        provider = desk.provider(meter.hear)
        provider.ensure(entry)
        return provider.digest(entry)


def _convert(desk: Desk, entry: ArtefactSpec) -> str:
    from deployments.store.convert import convert

    with Meter(desk.output) as meter:
        manifest = convert(entry, desk.registry, Store(desk.settings, meter.hear))
    size = decimal(manifest.total_bytes)
    desk.output.say(f"{entry.name}: converted: {manifest.short}, {size}", "green")
    return manifest.digest


def _remove(desk: Desk, name: str, short: str) -> int:
    size = folder_bytes(desk.store.folder(name, short))
    if not desk.store.remove(name, short):
        raise StoreUnwritable(
            f"{name}@{short} is in use: a process has it loaded.",
            remedy="Stop what serves it first.",
        )
    return size


def _kept(desk: Desk) -> set[str]:
    return desk.provider().locked_digests | set(desk.store.refs().values())


def _tell_removed(desk: Desk, removed: Sequence[Removed]) -> None:
    for kind, name, digest, size in removed:
        what = f"{name}@{digest}" if kind == "model" else f"{kind} {name}"
        desk.output.say(f"removed {what}: {decimal(size)}")
    total = sum(r.bytes for r in removed)
    if removed:
        desk.output.say(f"Freed {decimal(total)}.")


def _warn_network(output: Output, kind: str) -> None:
    output.say(
        f"Warning: the store is on a network file system ({kind}), where locks may mean nothing and"
        " loading is slow. Use a local disk.",
        "yellow",
    )


def _summary(desk: Desk, entry: ArtefactSpec) -> Row:
    state, stored = _state(desk, entry.name)
    return {
        "name": entry.name,
        "task": str(entry.task) if isinstance(entry, ModelSpec) else None,
        "licence": entry.licence,
        "commercial": entry.commercial,
        "accepted": entry.commercial or entry.name in desk.catalogue.accept_noncommercial,
        "bytes": _bytes(desk, entry),
        "in_store": state,
        "stored": stored,
        "digest": desk.digest(entry.name),
    }


def _held(desk: Desk) -> dict[str, tuple[str, str]]:
    """Name and digest of what is in the store, by name; or by name@digest, if not as locked."""
    wanted = {entry.name: desk.digest(entry.name) or "" for entry in desk.catalogue.entries}
    return {
        name if wanted.get(name, "").startswith(short) else f"{name}@{short}": (name, short)
        for name, short in desk.store.models()
    }


def _state(desk: Desk, name: str) -> tuple[str, list[str]]:
    """Whether the locked digest is in the store, by names and sizes; and which digests are."""
    stored = [short for model, short in desk.store.models() if model == name]
    digest = desk.digest(name)
    if digest is None or digest[:SHORT] not in stored:
        return ("other" if stored else "no"), stored
    return ("yes" if desk.store.holds(name, digest) else "damaged"), stored


def _bytes(desk: Desk, entry: ArtefactSpec) -> int | None:
    """Of the model in the store; else of its origins, which a conversion changes."""
    digest = desk.digest(entry.name)
    if digest:
        try:
            folder = desk.store.folder(entry.name, digest)
            return read_manifest(folder, entry.name).total_bytes
        except (ModelNotCached, ModelCorrupt):
            pass
    sizes = [file["size"] for origin in _origins(desk, entry) for file in origin["files"]]
    return None if UNRESOLVED in sizes else sum(sizes)


def _origins(desk: Desk, entry: ArtefactSpec) -> list[Row]:
    """The registry's origins, with what the lock file knows of them."""
    locked = desk.lock.models.get(entry.name)
    found: list[Row] = []
    for i, origin in enumerate(entry.origins):
        theirs = locked.origins[i] if locked and i < len(locked.origins) else None
        known = {f.path: f for f in theirs.files} if theirs else {}
        files = [
            {
                "path": path,
                "size": known[path].size if path in known else UNRESOLVED,
                "sha256": known[path].sha256 if path in known else UNRESOLVED,
            }
            for path in origin.files
        ]
        source = theirs.source if theirs else origin.source
        found.append({"source": source, "into": origin.into, "files": files})
    return found


def _commercial(row: Row) -> str:
    if row["commercial"]:
        return "yes"
    return "no, accepted" if row["accepted"] else "no"


def _each(
    desk: Desk,
    entries: Sequence[ArtefactSpec],
    work: Callable[[ArtefactSpec], Row],
    at_once: int = 1,
) -> list[Row]:
    by_name = {entry.name: entry for entry in entries}
    return _each_name(desk, list(by_name), lambda name: work(by_name[name]), at_once)


def _each_name(
    desk: Desk, names: Sequence[str], work: Callable[[str], Row], at_once: int = 1
) -> list[Row]:
    """Do `work` for each, going on after failures."""

    def one(name: str) -> Row:
        try:
            return {"name": name} | work(name)
        except SetupError as error:
            desk.output.fail(error, name)
            return {"name": name, "status": "failed", "error": _describe(error)}

    with ThreadPoolExecutor(at_once, thread_name_prefix="model") as pool:
        tasks = [pool.submit(one, name) for name in names]
        try:
            return [task.result() for task in tasks]
        except KeyboardInterrupt:
            # At once, without waiting for the others' downloads: the store never sees half a model.
            desk.output.notes.show_cursor()
            desk.output.say("\nStopped. What was fetched is taken over by the next pull.", "yellow")
            os._exit(_INTERRUPTED)


def _finish(desk: Desk, rows: Sequence[Row], more: Row | None = None) -> None:
    """Report, and exit with the code of the first failure."""
    failed = [row for row in rows if "error" in row]
    code = failed[0]["error"]["exit_code"] if failed else 0
    desk.output.emit({"models": rows, "exit_code": code} | (more or {}))
    if failed and len(rows) > 1:
        desk.output.say(f"{len(failed)} of {len(rows)} failed.", "red")
    raise typer.Exit(code)


def _describe(error: SetupError) -> Row:
    return {
        "code": error.code,
        "exit_code": error.exit_code,
        "message": error.message,
        "value": error.value,
        "remedy": error.remedy,
    }


@contextmanager
def _desk(registry: Path, as_json: bool, **settings: Any) -> Generator[Desk]:
    output = Output(as_json=as_json)
    with _ending(output):
        # Relative to where the user is; else to the project, as in configuration files.
        path = registry.absolute() if registry.exists() else registry
        yield Desk(path, load_catalogue(path), _settings(**settings), output)


@contextmanager
def _ending(output: Output) -> Generator[None]:
    """Show log lines meanwhile, and turn our errors into exit codes."""
    handler = Lines(output)
    logger = logging.getLogger("ray.serve.imagen")
    logger.addHandler(handler)
    try:
        yield
    except SetupError as error:
        output.fail(error)
        output.emit({"error": _describe(error), "exit_code": error.exit_code})
        raise typer.Exit(error.exit_code) from error
    finally:
        logger.removeHandler(handler)


def _settings(**values: Any) -> StoreSettings:
    given = {key: value for key, value in values.items() if value is not None}
    return parse_settings(StoreSettings, given, "The command line")


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
