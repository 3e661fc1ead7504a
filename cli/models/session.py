"""What the commands of `imagen models` share: options, the session, and one row for each model."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from cli.console import Output, Row
from cli.ending import INTERRUPTED, ending, error_row
from cli.paths import user_path
from deployments.catalogue import Catalogue, load_catalogue
from deployments.errors import ConfigError, SetupError
from deployments.registry import ArtefactSpec
from deployments.settings import ROOT_VARIABLE, Settings, StoreSettings, parse_settings
from deployments.store.cache import Store
from deployments.store.events import Listener, ignore
from deployments.store.lockfile import Lock, LockedModel, known_digest, load_lock, update_lock
from deployments.store.provider import Provider

EVERY = [*Settings().models]
"""The registries that commands know if none is named: all that Imagen comes with."""
T = TypeVar("T")


def _root(text: str) -> Path:
    if not text:  # an unset variable of the shell, which must not mean the current folder
        raise typer.BadParameter("it is empty")
    return Path(text).absolute()


Names = Annotated[list[str] | None, typer.Argument(help="Names in the registry, or tasks")]
Name = Annotated[str, typer.Argument(help="A name in the registry, or a task")]
Everything = Annotated[bool, typer.Option("--all", help="Every entry of the registry")]
RegistryFiles = Annotated[
    list[Path],
    typer.Option(
        "--registry",
        envvar="IMAGEN_REGISTRY",
        help="A YAML file of models; may be repeated (in the variable: separated by :)",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        "--store",
        parser=_root,
        metavar="PATH",
        help=f"The store's root; by default ${ROOT_VARIABLE}, else ~/.cache/imagen-models",
    ),
]
Mirror = Annotated[
    str | None,
    typer.Option(
        help="gs://, s3:// or file:// folder of published models, to use instead of origins"
    ),
]
Threads = Annotated[int | None, typer.Option(help="Ranges of one model to fetch at a time")]
Rate = Annotated[
    float | None, typer.Option("--max-bytes-per-s", help="Limit for all models together")
]
LockTimeoutS = Annotated[
    float | None,
    typer.Option("--lock-timeout-s", help="How long another puller may make no progress"),
]
HubCache = Annotated[
    Path | None,
    typer.Option(
        "--hub-cache",
        parser=_root,
        metavar="PATH",
        help="A Hugging Face cache on this machine, to take files of hf:// from before the hub",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else")]


@dataclass(frozen=True)
class Session:
    """The registry, the settings and the output of one command."""

    registries: tuple[Path, ...]
    catalogue: Catalogue
    settings: StoreSettings
    output: Output

    @property
    def store(self) -> Store:
        return Store(self.settings)

    @property
    def lock(self) -> Lock:
        """The lock files as they are now."""
        return load_lock(*self.registries)

    @property
    def kept(self) -> set[str]:
        """Digests that garbage collection leaves alone."""
        return self.provider().locked_digests | set(self.store.refs().values())

    def provider(self, listener: Listener = ignore) -> Provider:
        return Provider(self.lock, self.settings, listener)

    def digest(self, name: str) -> str | None:
        """The locked digest; None while it is unresolved."""
        return known_digest(self.lock, self.catalogue.find(name))

    def lock_entry(self, entry: ArtefactSpec, locked: LockedModel) -> None:
        """Write what is known of an entry into the lock file of its registry."""
        update_lock(self.catalogue.file_of(entry), lambda lock: lock.with_model(entry.name, locked))

    def choose(self, names: Sequence[str] | None, everything: bool) -> dict[str, ArtefactSpec]:
        """The entries that the command line names, by name.

        Raises:
            ConfigError: it names none, or one that does not exist, or has --all as well.
        """
        check_choice(names, everything)
        chosen = [entry.name for entry in self.catalogue.entries] if everything else names or []
        return {entry.name: entry for entry in map(self.catalogue.find, chosen)}

    def for_each(
        self, items: Mapping[str, T], work: Callable[[T], Row], at_once: int = 1
    ) -> list[Row]:
        """Call `work` for each model, and go on after failures.

        Args:
            items: what to work on, by name.
            work: returns a row, or raises SetupError.
            at_once: how many to work on at a time.

        Returns:
            A row for each item; a failure's has the status `failed` and an `error`.
        """

        def one(name: str) -> Row:
            try:
                return {"name": name} | work(items[name])
            except SetupError as error:
                self.output.fail(error, name)
                return {"name": name, "status": "failed", "error": error_row(error)}

        with ThreadPoolExecutor(at_once, thread_name_prefix="model") as pool:
            try:
                tasks = [pool.submit(one, name) for name in items]
                return [task.result() for task in tasks]
            except KeyboardInterrupt:
                # At once, without waiting for downloads of other threads: the store never holds
                # half a model, whenever a pull ends.
                self.output.notes.show_cursor()
                self.output.say("\nStopped. The next pull continues here.", "yellow")
                os._exit(INTERRUPTED)

    def finish(self, rows: Sequence[Row], more: Row | None = None) -> None:
        """Report the rows, and exit with the code of the first failure."""
        failed = [row for row in rows if "error" in row]
        code = failed[0]["error"]["exit_code"] if failed else 0
        self.output.emit({"models": rows, "exit_code": code} | (more or {}))
        if failed and len(rows) > 1:
            self.output.say(f"{len(failed)} of {len(rows)} failed.", "red")
        raise typer.Exit(code)


def check_choice(names: Sequence[str] | None, everything: bool) -> None:
    """Raises ConfigError unless there is either a name or --all."""
    if bool(names) == everything:
        raise ConfigError("Which models? Name some, or use --all; not both.")


@contextmanager
def session(
    registries: Sequence[Path], as_json: bool, root: Path | None, **settings: object
) -> Generator[Session]:
    """Open a session with these `StoreSettings`, and end the command well."""
    output = Output(as_json=as_json)
    with ending(output):
        paths = tuple(map(user_path, registries))
        yield Session(paths, load_catalogue(*paths), store_settings(root, **settings), output)


def store_settings(root: Path | None, **settings: object) -> StoreSettings:
    """The settings of the command line; None keeps a default.

    Raises:
        ConfigError: a value is wrong.
    """
    given = {"root": root, **settings}
    values = {key: value for key, value in given.items() if value is not None}
    return parse_settings(StoreSettings, values, "The command line")
