"""`imagen models add`: from a checkpoint file of one's own to a model that can be served."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Meter, Output
from cli.ending import ending
from cli.models.registry_file import add_entry, catalogue_of, restored_on_failure
from cli.models.session import EVERY, AsJson, Root, store_settings
from cli.paths import user_path
from deployments.errors import ConfigError, ModelCorrupt
from deployments.registry import ModelSpec
from deployments.settings import StoreSettings, parse_settings
from deployments.store.cache import Store
from deployments.store.checkpoint import read_checkpoint, shapes_of
from deployments.store.convert import convert
from deployments.store.lockfile import update_lock
from deployments.store.manifest import SHORT
from deployments.store.resolve import resolve
from deployments.tasks import Task

if TYPE_CHECKING:
    from deployments.pipelines.recognise import Recognised

OWN = Path("configs/models/own.yaml")
_PREFERRED = ("params_ema", "params", None)
"""Entries of a checkpoint, the best first: Real-ESRGAN's average, its last weights, a bare file."""
_NO_LICENCE = "unresolved"


@dataclass(frozen=True)
class Given:
    """What the command line says of the model."""

    task: Task
    name: str | None
    licence: str | None
    commercial: bool


def add_model(
    file: Annotated[Path, typer.Argument(help="A .pth or .safetensors file of one network")],
    task: Annotated[Task, typer.Option(help="What it shall serve")],
    name: Annotated[str | None, typer.Option(help="In the registry; default: the file's")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights, such as MIT")] = None,
    commercial: Annotated[
        bool, typer.Option("--commercial", help="The licence allows commercial use")
    ] = False,
    registry: Annotated[
        Path, typer.Option("--registry", help="The YAML file that gets the entry")
    ] = OWN,
    store: Root = None,
    as_json: AsJson = False,
) -> None:
    """Recognise the network in a file, and make a model of it: entry, lock file and store."""
    output = Output(as_json=as_json)
    with ending(output):
        given = Given(task, name, licence, commercial)
        _add(file.absolute(), user_path(registry), given, store_settings(store), output)


def _add(file: Path, registry: Path, given: Given, settings: StoreSettings, output: Output) -> None:
    key, found = _inspect(file, given.task)
    spec = _entry(file, key, found, given)
    _check_new(spec.name, registry)
    output.say(f"{spec.name}: {spec.summary}, {found.tensors} tensors, all as they must be")
    for line in (missing := _missing(found, spec)):
        output.say(f"  not known: {line}", "yellow")
    locked = resolve(spec, settings)
    with restored_on_failure(registry):
        add_entry(registry, spec)
        update_lock(registry, lambda lock: lock.with_model(spec.name, locked))
        with Meter(output) as meter:
            manifest = convert(spec, registry, Store(settings, meter.on_event))
    output.say(f"{spec.name}: added to {registry} and the store: {manifest.short}", "green")
    output.emit(
        {
            "name": spec.name,
            "status": "added",
            "digest": manifest.digest,
            "family": spec.family,
            "config": found.config,
            "scale": found.scale,
            "missing": missing,
            "registry": str(registry),
            "folder": str(Store(settings).folder(spec.name, manifest.digest[:SHORT])),
        }
    )


def _check_new(name: str, registry: Path) -> None:
    """Raises ConfigError if a registry has the name: files with it could not be loaded together."""
    for path in (*EVERY, registry):
        if name in {entry.name for entry in catalogue_of(path).entries}:
            raise ConfigError(
                f"The registry {path.name} has a model of this name.",
                value=name,
                remedy="Give another --name.",
            )


def _inspect(file: Path, task: Task) -> tuple[str | None, Recognised]:
    """The entry of the file that holds the tensors, and the network they are for.

    Raises:
        ConfigError: there is no such file, or its network serves another task.
        ModelCorrupt: it cannot be read, or fits none of our networks.
    """
    from deployments.pipelines.networks import first_of
    from deployments.pipelines.recognise import recognise

    if not file.is_file():
        raise ConfigError("There is no such file.", value=file)
    shapes = shapes_of(read_checkpoint(file))
    if not shapes:
        raise ModelCorrupt(
            f"{file.name} holds no dictionary of tensors.",
            remedy="Save the network's state_dict() with torch.save or safetensors.",
        )
    found = {key: recognise(shapes[key]) for key in sorted(shapes, key=_rank)}
    key = min(found, key=lambda key: len(found[key].differences) / found[key].tensors)
    best = found[key]
    if best.differences:
        raise ModelCorrupt(
            f"{file.name} holds none of the known networks. The nearest is {best.title}, of which"
            f" {len(best.differences)} tensors differ: {first_of(best.differences)}.",
            remedy="docs/models.md lists the networks; a new one is a pipeline family"
            " (CONTRIBUTING.md).",
        )
    if best.family not in task.families:
        tasks = ", ".join(task for task in Task if best.family in task.families)
        raise ConfigError(
            f"{file.name} holds {best.title}, which serves another task.",
            value=task,
            remedy=f"Give --task {tasks}.",
        )
    return key, best


def _rank(key: str | None) -> int:
    return _PREFERRED.index(key) if key in _PREFERRED else len(_PREFERRED)


def _entry(file: Path, key: str | None, found: Recognised, given: Given) -> ModelSpec:
    named = given.name or re.sub(r"[^a-z0-9.-]+", "-", file.stem.lower()).strip("-.")
    if given.name is None and named in list(Task):
        named += "-own"  # a task's name is none for a model
    scale = f", {found.scale} times" if found.scale else ""
    values: dict[str, Any] = {
        "name": named,
        "task": given.task,
        "family": found.family,
        "origins": [{"source": f"file://{file.parent}", "files": [file.name]}],
        "convert": {"to": "safetensors", "key": key, "config": found.config},
        "summary": f"{found.title}{scale}, from {file.name}",
        "licence": given.licence or _NO_LICENCE,
        "commercial": given.commercial,
    }
    if found.scale and found.scale != given.task.scale:
        values["times"] = found.scale
    return parse_settings(ModelSpec, values, f"The entry of {file.name}")


def _missing(found: Recognised, spec: ModelSpec) -> list[str]:
    """What the file does not tell, in sentences."""
    lines = [f"{key}, for which {value} is assumed" for key, value in found.unknown.items()]
    if not spec.commercial:
        lines.append(
            f"whether the licence ({spec.licence}) allows commercial use. Until the entry says"
            f" `commercial: true`, or the file `accept_noncommercial: [{spec.name}]`, it is not"
            " served"
        )
    return lines
