"""What the commands of `imagen models` share: their options, and the session they open."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import Output
from cli.ending import ending
from cli.paths import user_path
from deployments.errors import ConfigError
from deployments.registry import ArtefactSpec, Catalogue, load_catalogue
from deployments.settings import ROOT_VARIABLE, StoreSettings, parse_settings
from deployments.store.cache import Store
from deployments.store.events import Listener, ignore
from deployments.store.lockfile import Lock, load_lock, locked_digest
from deployments.store.provider import Provider

STARTER = Path("configs/models/starter.yaml")


def _root(text: str) -> Path:
    if not text:  # an unset variable of the shell, which must not mean the current folder
        raise typer.BadParameter("it is empty")
    return Path(text).absolute()


Names = Annotated[list[str] | None, typer.Argument(help="Names in the registry, or tasks")]
Name = Annotated[str, typer.Argument(help="A name in the registry, or a task")]
Everything = Annotated[bool, typer.Option("--all", help="Every entry of the registry")]
RegistryFile = Annotated[
    Path, typer.Option("--registry", envvar="IMAGEN_REGISTRY", help="The YAML file of models")
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
    typer.Option(help="gs:// or file:// folder of published models, to use instead of origins"),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else")]
Threads = Annotated[int | None, typer.Option(help="Ranges fetched at a time, for one model")]
Rate = Annotated[float | None, typer.Option("--max-bytes-per-s", help="All models together")]
LockTimeoutS = Annotated[
    float | None,
    typer.Option("--lock-timeout-s", help="How long to wait for a puller without progress"),
]


@dataclass(frozen=True)
class Session:
    """The registry, the settings and the output of one command."""

    registry: Path
    catalogue: Catalogue
    settings: StoreSettings
    output: Output

    @property
    def store(self) -> Store:
        return Store(self.settings)

    @property
    def lock(self) -> Lock:
        """The lock file as it is now."""
        return load_lock(self.registry)

    @property
    def kept(self) -> set[str]:
        """Digests that garbage collection leaves alone."""
        return self.provider().locked_digests | set(self.store.refs().values())

    def provider(self, listener: Listener = ignore) -> Provider:
        return Provider(self.registry, self.settings, listener)

    def digest(self, name: str) -> str | None:
        """The locked digest; None while it is unresolved."""
        try:
            return locked_digest(self.lock, self.catalogue.find(name))
        except ConfigError:
            return None

    def choose(self, names: Sequence[str] | None, everything: bool) -> list[ArtefactSpec]:
        """The entries that the command line names, each once.

        Raises:
            ConfigError: it names none, or one that does not exist, or has --all as well.
        """
        check_choice(names, everything)
        chosen = [entry.name for entry in self.catalogue.entries] if everything else names or []
        entries = [self.catalogue.find(name) for name in chosen]
        return list({entry.name: entry for entry in entries}.values())


def check_choice(names: Sequence[str] | None, everything: bool) -> None:
    """Raises ConfigError unless there is either a name or --all."""
    if bool(names) == everything:
        raise ConfigError("Which models? Name some, or use --all; not both.")


@contextmanager
def session(registry: Path, as_json: bool, **settings: Any) -> Generator[Session]:
    """Open a session and end the command well; `settings` that are None keep their defaults."""
    output = Output(as_json=as_json)
    with ending(output):
        path = user_path(registry)
        yield Session(path, load_catalogue(path), store_settings(**settings), output)


def store_settings(**values: Any) -> StoreSettings:
    """The settings of the command line; None keeps a default.

    Raises:
        ConfigError: a value is out of range.
    """
    given = {key: value for key, value in values.items() if value is not None}
    return parse_settings(StoreSettings, given, "The command line")
