"""The catalogue: every model that registry files know, and which of them are served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeAlias

import yaml
from pydantic import Field, PrivateAttr, model_validator

from deployments.errors import ConfigError, InvalidParameter, LicenceRefused, Problem
from deployments.registry import ArtefactSpec, ModelSpec
from deployments.settings import Strict, file_fault, parse_settings, resolve
from deployments.tasks import Task

Serve: TypeAlias = Mapping[str, Sequence[str] | None]
"""Names of models by task, the default first; see `Settings.serve`."""


class Registry(Mapping[Task, ModelSpec]):
    """The models that are served: a task's default model by task, and further ones by name.

    Args:
        models: those that are served. The first one of a task is its default.
        known: the task of every model by name, of those that are not served too.

    Attributes:
        models: by task, in the order of the table of tasks; the default of a task comes first.
    """

    def __init__(self, models: Iterable[ModelSpec], known: Mapping[str, Task]) -> None:
        given = list(models)
        self.models = tuple(model for task in Task for model in given if model.task == task)
        self._known = known
        self._by_task = {task: self.of(task)[0] for task in Task if self.of(task)}

    def __getitem__(self, task: Task) -> ModelSpec:
        return self._by_task[task]

    def __iter__(self) -> Iterator[Task]:
        return iter(self._by_task)

    def __len__(self) -> int:
        return len(self._by_task)

    def of(self, task: Task) -> tuple[ModelSpec, ...]:
        """The models of a task, its default first; none if it is not served."""
        return tuple(model for model in self.models if model.task == task)

    def is_default(self, spec: ModelSpec) -> bool:
        """Whether requests of its task that name no model get this one."""
        return self._by_task[spec.task].name == spec.name

    def label(self, spec: ModelSpec) -> str:
        """What `/readyz` calls a model: the task for its default, else the model's name."""
        return str(spec.task) if self.is_default(spec) else spec.name

    def deployment(self, spec: ModelSpec) -> str:
        """The name of a model's Serve deployment: the task's for its default, else the model's."""
        return spec.task.deployment if self.is_default(spec) else spec.name

    def choose(self, task: Task, name: str | None = None) -> ModelSpec:
        """The model of a task that a request names, or its default.

        Raises:
            InvalidParameter: no model of that name, or none at all, serves the task.
        """
        if task not in self:
            raise self._unserved(task)
        if name is None:
            return self[task]
        for model in self.of(task):
            if model.name == name:
                return model
        served = ", ".join(model.name for model in self.of(task))
        remedy = f"Send one of: {served}."
        if self._known.get(name) == task:
            fact = f"{name} is known here, but it is not served."
            added = ",".join([*(model.name for model in self.of(task)), name])
            remedy += f" The operator can serve it with `imagen run --serve {task}={added}`"
            remedy += " (docs/models.md)."
        elif name in self._known:
            fact = f"{name} serves {self._known[name]}, not {task}."
        else:
            fact = f"There is no such model for {task}."
        value = (name or "nothing")[:200]
        problem = Problem(parameter="model", fact=fact, value=value, remedy=remedy)
        raise InvalidParameter(fact, value=value, remedy=remedy, problems=(problem,))

    def _unserved(self, task: Task) -> InvalidParameter:
        return InvalidParameter(
            f"No model serves the task {task} here.",
            value=task,
            remedy=f"Served: {', '.join(self)}. The operator can add a model for it with"
            f" `imagen run --serve {task}=NAME`; `imagen models list` has the names.",
        )

    def on_cpu(self) -> Registry:
        """The same models without a share of a GPU, in float32, which every CPU computes fast."""
        changes = {"num_gpus": 0.0, "dtype": "float32"}
        return Registry((m.model_copy(update=changes) for m in self.models), self._known)


class Catalogue(Strict):
    """A registry file, or several together: every model and artefact the store may hold.

    Attributes:
        models: what can be served.
        artefacts: what only the store keeps.
        serving: the default model by task, for tasks with more than one model; null for a task
            that is not served unless `serve` names a model of it.
        accept_noncommercial: names of models that may be pulled and served although their licence
            forbids commercial use.
    """

    models: tuple[ModelSpec, ...]
    artefacts: tuple[ArtefactSpec, ...] = ()
    serving: dict[Task, str | None] = Field(default={})
    accept_noncommercial: tuple[str, ...] = ()
    _files: dict[str, Path] = PrivateAttr(default_factory=dict[str, Path])

    @property
    def entries(self) -> tuple[ArtefactSpec, ...]:
        """Models, then artefacts."""
        return (*self.models, *self.artefacts)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [entry.name for entry in self.entries]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"a name stands twice: {', '.join(twice)}")
        known = {(m.task, m.name) for m in self.models} | {(task, None) for task in Task}
        if wrong := [f"{t}: {n}" for t, n in self.serving.items() if (t, n) not in known]:
            raise ValueError(f"serving names no model of that task: {', '.join(wrong)}")
        if unknown := set(self.accept_noncommercial) - set(names):
            raise ValueError(f"accept_noncommercial names no model: {', '.join(sorted(unknown))}")
        return self

    @classmethod
    def joined(cls, parts: Mapping[Path, Catalogue]) -> Catalogue:
        """The catalogue of several registry files; raises as `load_catalogue`."""
        values = {
            "models": [model for part in parts.values() for model in part.models],
            "artefacts": [entry for part in parts.values() for entry in part.artefacts],
            "serving": cls._first_defaults(list(parts.values())),
            "accept_noncommercial": [n for p in parts.values() for n in p.accept_noncommercial],
        }
        joined = parse_settings(cls, values, f"The model registry {', '.join(map(str, parts))}")
        for path, part in parts.items():
            joined._files.update(dict.fromkeys((entry.name for entry in part.entries), path))
        return joined

    @classmethod
    def _first_defaults(cls, parts: Sequence[Catalogue]) -> dict[Task, str | None]:
        serving: dict[Task, str | None] = {}
        for task in Task:
            deciding = (part for part in parts if any(m.task == task for m in part.models))
            candidates = next((part._candidates(task) for part in deciding), [])
            if len(candidates) == 1:
                serving[task] = candidates[0].name
            elif not candidates:
                serving[task] = None
        return serving

    def find(self, name: str) -> ArtefactSpec:
        """The entry of that name, or else the default model of the task of that name.

        Raises:
            ConfigError: there is none.
        """
        known = {entry.name: entry for entry in self.entries}
        for task in Task:
            if len(candidates := self._candidates(task)) == 1:
                known.setdefault(str(task), candidates[0])
        if found := known.get(name.lower()):
            return found
        names = ", ".join(entry.name for entry in self.entries)
        raise ConfigError("No such model in the registry.", value=name, remedy=f"Names: {names}.")

    def is_default(self, entry: ArtefactSpec) -> bool:
        """Whether an entry is the default of its task, unless `serve` names others."""
        return isinstance(entry, ModelSpec) and self._candidates(entry.task) == [entry]

    def file_of(self, entry: ArtefactSpec) -> Path:
        """The registry file that an entry stands in; its lock file is beside it."""
        return self._files[entry.name]

    def check_licence(self, entry: ArtefactSpec) -> None:
        """Raises LicenceRefused unless the entry's licence is commercial or accepted by name."""
        if not entry.commercial and entry.name not in self.accept_noncommercial:
            raise LicenceRefused(
                f"The licence of {entry.name} ({entry.licence}) forbids commercial use.",
                remedy=f"Accept it with `accept_noncommercial: [{entry.name}]` in the model"
                " registry, or serve another model.",
            )

    def accepting(self) -> Catalogue:
        """A copy in which every licence is accepted, to plan with; nothing is served from it."""
        names = tuple(entry.name for entry in self.entries)
        return self.model_copy(update={"accept_noncommercial": names})

    def served(self, serve: Serve | None = None) -> Registry:
        """The models that are served: those that `serve` names, and the default of other tasks.

        Raises:
            ConfigError: `serve` names no task, or no model of that task; a task has several models
                and no default; or no task has any model.
            LicenceRefused: see `check_licence`.
        """
        chosen = {_task(name): names or () for name, names in (serve or {}).items()}
        models = [
            model
            for task in Task
            for model in (
                self._named(task, chosen[task]) if task in chosen else self._default(task)
            )
        ]
        if not models:
            raise ConfigError(
                "The model registry serves no task.", remedy="Add a model, as in configs/models."
            )
        for model in models:
            self.check_licence(model)
        return Registry(models, {model.name: model.task for model in self.models})

    def _named(self, task: Task, names: Sequence[str]) -> list[ModelSpec]:
        known = {model.name: model for model in self.models}
        fitting = ", ".join(name for name, model in known.items() if model.task == task) or "none"
        for name in names:
            other = known.get(name)
            if other is not None and other.task == task:
                continue
            fact = (
                f"serve names a model for {task} that serves {other.task}."
                if other
                else f"serve names a model for {task} that no registry knows."
            )
            raise ConfigError(fact, value=name, remedy=f"Models for {task}: {fitting}.")
        return [known[name] for name in dict.fromkeys(names)]

    def _candidates(self, task: Task) -> list[ModelSpec]:
        """The default model of a task; all its models if `serving` does not tell, and none if it
        says null.
        """
        return [
            m for m in self.models if m.task == task and self.serving.get(task, m.name) == m.name
        ]

    def _default(self, task: Task) -> list[ModelSpec]:
        """The default of a task; none if it has no model."""
        candidates = self._candidates(task)
        if len(candidates) > 1:
            raise ConfigError(
                f"The model registry names several models for the task {task}.",
                value=", ".join(m.name for m in candidates),
                remedy="Choose one under `serving`, or under `serve` in the Serve config.",
            )
        return candidates


def _task(name: str) -> Task:
    try:
        return Task(name)
    except ValueError as error:
        tasks = ", ".join(Task)
        raise ConfigError("serve names no task.", value=name, remedy=f"Tasks: {tasks}.") from error


def load_catalogue(*paths: Path) -> Catalogue:
    """Every entry of registry files.

    The first file that has a model for a task decides the task's default, or that it has none.

    Raises:
        ConfigError: unreadable, an unknown key or value, or a name that stands in two files.
    """
    return Catalogue.joined({path: _load(path) for path in paths})


def _load(path: Path) -> Catalogue:
    try:
        values = yaml.safe_load(resolve(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no date
        raise ConfigError(
            f"The model registry cannot be read: {file_fault(error)}.", value=path
        ) from error
    return parse_settings(Catalogue, values, f"The model registry {path}")


def load_registry(*paths: Path, serve: Serve | None = None) -> Registry:
    """The models that registry files serve. Raises as `load_catalogue` and `Catalogue.served`."""
    return load_catalogue(*paths).served(serve)
