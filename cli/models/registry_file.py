"""Adding an entry to a registry file, with all that people wrote in it left as it is."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from deployments.catalogue import Catalogue, load_catalogue
from deployments.errors import ConfigError
from deployments.registry import ModelSpec
from deployments.settings import parse_settings, resolve
from deployments.store.lockfile import lock_path, write_whole

_MODELS = re.compile(r"^models:[ \t]*(?:\[[ \t]*\])?[ \t]*(?:#.*)?$", re.MULTILINE)
_FIRST = re.compile(r"(?:[ \t]*(?:#.*)?\n)*([ ]*)- ")
_NEW = (
    "# Models of this installation. `imagen models add` writes entries; docs/models.md explains.\n"
)


def catalogue_of(path: Path) -> Catalogue:
    """The registry of a file; an empty one if there is no such file.

    Raises:
        ConfigError: it cannot be read.
    """
    return load_catalogue(path) if resolve(path).exists() else Catalogue(models=())


def add_entry(path: Path, spec: ModelSpec) -> None:
    """Write a model's entry into a registry file, which is made if there is none.

    Raises:
        ConfigError: the file has no place for it, or cannot be written.
    """
    file = resolve(path)
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else f"{_NEW}models:\n"
        after = _with_entry(before, _values(spec))
        values = yaml.safe_load(after) if after else None
        expected = (spec, *catalogue_of(path).models)
        if values is None or parse_settings(Catalogue, values, "It").models != expected:
            raise ConfigError(
                "The registry file has no list `models:` that an entry can be added to.",
                value=path,
                remedy="Name another file with --registry, or begin the list there.",
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file.resolve(), str(after))
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def restored_on_failure(path: Path) -> Generator[None]:
    """Put a registry file and its lock file back as they were if what is done meanwhile fails.

    Raises:
        ConfigError: they cannot be read, or not be put back.
    """
    files = (resolve(path).resolve(), lock_path(path))
    try:
        before = {
            file: file.read_text(encoding="utf-8") if file.exists() else None for file in files
        }
    except OSError as error:
        raise ConfigError(
            f"The registry or its lock file cannot be read: {error.strerror}.", value=path
        ) from error
    try:
        yield
    except BaseException:  # a Ctrl-C, too
        try:
            for file, text in before.items():
                _restore(file, text)
        except OSError as error:
            raise _unwritable(path, error) from error
        raise


def _restore(file: Path, text: str | None) -> None:
    if text is None:
        file.unlink(missing_ok=True)
    elif file.read_text(encoding="utf-8") != text:
        write_whole(file, text)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"The registry file cannot be written: {error.strerror}.", value=path)


def _values(spec: ModelSpec) -> dict[str, Any]:
    values = spec.model_dump(mode="json", exclude_defaults=True)
    first = ("name", "task", "family", "origins", "convert")
    return {key: values[key] for key in (*first, *values) if key in values}


def _with_entry(text: str, values: dict[str, Any]) -> str | None:
    """The text with an entry at the head of the list of models; None if it has no such list."""
    match = _MODELS.search(text)
    if match is None:
        return None
    head, rest = text[: match.start()] + "models:", text[match.end() :].removeprefix("\n")
    found = _FIRST.match(rest)
    indent = found[1] if found else "  "
    entry = yaml.safe_dump([values], sort_keys=False, allow_unicode=True, width=100)
    lines = "".join(f"{indent}{line}\n" for line in entry.splitlines())
    return f"{head}\n{lines}\n{rest}" if rest.strip() else f"{head}\n{lines}"
