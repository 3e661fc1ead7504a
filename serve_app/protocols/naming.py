"""Models as clients of other services name them: by their own name, or by their task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import NotFound

if TYPE_CHECKING:
    from deployments.catalogue import Registry
    from deployments.registry import ModelSpec


def named(name: str, served: Registry) -> ModelSpec:
    """A model by its name, or the default one of the task of that name.

    Raises:
        NotFound: there is none.
    """
    for spec in served.models:
        if name in names_of(spec, served):
            return spec
    raise NotFound("There is no such model.", value=name, remedy=known_models(served))


def names_of(spec: ModelSpec, served: Registry) -> tuple[str, ...]:
    """What a model may be called."""
    return (spec.name, str(spec.task)) if served.is_default(spec) else (spec.name,)


def known_models(served: Registry) -> str:
    """The models that there are, for errors."""
    return f"Models: {', '.join(f'{spec.name} ({spec.task})' for spec in served.models)}."
