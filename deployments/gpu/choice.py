"""Which models to serve on the GPUs at hand: as many of those wanted as fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from deployments.errors import GpuTooSmall
from deployments.gpu.plan import demand_of, plan
from deployments.gpu.profiles import load_profiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deployments.gpu.profiles import Gpu, MemoryProfile
    from deployments.registry import ModelSpec


class Instead(NamedTuple):
    """A model that does not fit, and the smaller one of its task that is planned; None for none."""

    wanted: ModelSpec
    chosen: ModelSpec | None


def choose_fitting(
    wanted: Sequence[ModelSpec], others: Sequence[ModelSpec], gpu: Gpu, gpus: int
) -> tuple[list[ModelSpec], list[Instead]]:
    """The models that fit, one row each.

    As long as they do not, the largest that has a smaller one of its task gives way to that; if
    none has one, the largest is left out.

    Args:
        wanted: one of each task.
        others: models that may stand in for one of their task.
        gpu: the type.
        gpus: how many there are.

    Returns:
        The models to plan, and what was given up for it.

    Raises:
        ConfigError: no profile knows a model that is wanted.
    """
    known = load_profiles()
    profiled = {profile.model for profile in known}
    needs = {
        spec.name: demand_of(spec, gpu, known).need_bytes(1)
        for spec in (*wanted, *(other for other in others if other.name in profiled))
    }
    chosen = {spec.name: spec for spec in wanted}
    given_up: dict[str, Instead] = {}
    while chosen and not _fit(list(chosen.values()), gpu, gpus, known):
        smaller = {name: _next_smaller(spec, others, needs) for name, spec in chosen.items()}
        replaced = [name for name in chosen if smaller[name]] or list(chosen)
        largest = max(replaced, key=lambda name: needs[chosen[name].name])
        given_up.pop(largest, None)
        first = next(spec for spec in wanted if spec.name == largest)
        given_up[largest] = Instead(first, smaller[largest])
        if instead := smaller[largest]:
            chosen[largest] = instead
        else:
            del chosen[largest]
    return list(chosen.values()), list(given_up.values())


def _fit(models: list[ModelSpec], gpu: Gpu, gpus: int, profiles: Sequence[MemoryProfile]) -> bool:
    try:
        plan(models, gpu, gpus, profiles)
    except GpuTooSmall:
        return False
    return True


def _next_smaller(
    spec: ModelSpec, others: Sequence[ModelSpec], needs: Mapping[str, int]
) -> ModelSpec | None:
    """The largest model of the same task that needs less; one whose need is known."""
    smaller = [
        other
        for other in others
        if other.task == spec.task and needs.get(other.name, needs[spec.name]) < needs[spec.name]
    ]
    return max(smaller, key=lambda other: needs[other.name], default=None)
