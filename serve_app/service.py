"""Routes about the service itself: its models, and whether it lives and is ready."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from serve_app.intake import Backends

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.catalogue import Registry
    from deployments.registry import ModelSpec
    from serve_app.intake import State
    from serve_app.jobs.service import Jobs

router = APIRouter(tags=["service"])


class Model(BaseModel):
    """A model, and the route it serves."""

    name: str = Field(description="what a request sends as `model` to get it")
    task: str
    default: bool = Field(description="whether requests of the task that name no model get it")
    route: str
    state: str = Field(description="ready, idle (wakes on demand), starting or failed")
    summary: str
    family: str
    licence: str
    commercial: bool = Field(description="whether the licence allows commercial use")
    parameters: list[str] = Field(description="the form fields it reads")
    defaults: dict[str, Any]
    buckets_px: list[tuple[int, int]] = Field(description="working sizes, width and height")
    scale: int = Field(description="width of the result over width of the picture")
    num_gpus: float = Field(description="share of a GPU that each replica takes")


class Models(BaseModel):
    """Every model that is served."""

    models: list[Model]


class Health(BaseModel):
    """The process answers."""

    status: str


class Readiness(BaseModel):
    """Whether every model is ready or idle, and what lies behind that."""

    status: str = Field(description="ready, or not ready")
    models: dict[str, str] = Field(
        description="state of each task's default model, by task, and of further ones, by name"
    )
    replicas: dict[str, list[Any]] = Field(description="what each running replica serves, likewise")
    pulling_percent: dict[str, float] = Field(description="progress of models being fetched")
    jobs_waiting: dict[str, int] = Field(
        description="jobs in the queue, by task; empty without jobs, or while Redis is away"
    )


async def backends_of(request: Request) -> Backends:
    """The application's models."""
    return request.app.state.backends


AnyBackends = Annotated[Backends, Depends(backends_of)]


@router.get("/api/v1/models", summary="The models of each route, and their states")
async def list_models(request: Request, backends: AnyBackends) -> Models:
    """Every model that is served."""
    states = await backends.states()
    prefix = request.scope.get("root_path", "")
    registry: Registry = request.app.state.registry
    return Models(
        models=[
            _describe(spec, registry, prefix, _state(states, spec.name)) for spec in registry.models
        ]
    )


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="The process lives")
async def healthz() -> Health:
    """For liveness probes."""
    return Health(status="alive")


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="200 when every model is ready or idle",
    responses={503: {"model": Readiness, "description": "A model is starting or has failed"}},
)
async def readyz(request: Request, response: Response, backends: AnyBackends) -> Readiness:
    """For readiness probes, and for people who want to know why."""
    states = await backends.states()
    registry: Registry = request.app.state.registry
    models = {spec.name: _state(states, spec.name) for spec in registry.models}
    waiting = [name for name, state in models.items() if state not in ("ready", "idle")]
    if waiting:
        recovery_s = max(backends.recovery_s(name) for name in waiting)
        response.status_code = 503
        response.headers["Retry-After"] = str(math.ceil(recovery_s))
    details = await backends.details()
    label = {spec.name: registry.label(spec) for spec in registry.models}
    return Readiness(
        status="not ready" if waiting else "ready",
        models={label[name]: state for name, state in models.items()},
        replicas={label[name]: replicas for name, replicas in details.replicas.items()},
        pulling_percent={name: round(percent, 1) for name, percent in details.pulling.items()},
        jobs_waiting=_jobs_waiting(request.app.state.jobs, registry),
    )


def _jobs_waiting(jobs: Jobs | None, registry: Registry) -> dict[str, int]:
    """As they were when the metrics were told, so that a Redis that hangs delays no probe."""
    seen = (jobs and jobs.queue.seen) or {}
    served = {spec.task for spec in registry.models}
    return {str(task): waiting for task, (waiting, _, _) in seen.items() if task in served}


def _state(states: Mapping[str, State], name: str) -> State:
    return states.get(name, "starting")


def _describe(spec: ModelSpec, registry: Registry, prefix: str, state: State) -> Model:
    """A model as clients see it; its route is below the prefix that the application serves at."""
    return Model(
        name=spec.name,
        task=spec.task,
        default=registry.is_default(spec),
        route=prefix + spec.task.route,
        state=state,
        summary=spec.summary,
        family=spec.family,
        licence=spec.licence,
        commercial=spec.commercial,
        parameters=sorted(spec.parameters),
        defaults={name: spec.defaults[name] for name in spec.defaults if name not in spec.ignores},
        buckets_px=list(spec.buckets),
        scale=spec.scale,
        num_gpus=spec.num_gpus,
    )
