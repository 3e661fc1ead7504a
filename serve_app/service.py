"""Routes about the service itself: its models, and whether it lives and is ready."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from deployments.tasks import Task
from serve_app.intake import Backends

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.registry import ModelSpec
    from serve_app.intake import State

router = APIRouter(tags=["service"])


class Model(BaseModel):
    """A model, and the route it serves."""

    name: str
    task: str
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
    models: dict[str, str] = Field(description="state by task")
    replicas: dict[str, list[Any]] = Field(description="what each running replica serves")
    pulling_percent: dict[str, float] = Field(description="progress of models being fetched")


async def backends_of(request: Request) -> Backends:
    """The application's models."""
    return request.app.state.backends


AnyBackends = Annotated[Backends, Depends(backends_of)]


@router.get("/api/v1/models", summary="What serves each route, and its state")
async def list_models(request: Request, backends: AnyBackends) -> Models:
    """Every model that is served."""
    states = await backends.states()
    prefix = request.scope.get("root_path", "")
    served = request.app.state.registry.items()
    return Models(models=[_describe(spec, prefix, _state(states, task)) for task, spec in served])


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
    models = {task: _state(states, task) for task in request.app.state.registry}
    waiting = [task for task, state in models.items() if state not in ("ready", "idle")]
    if waiting:
        recovery_s = max(backends.recovery_s(task) for task in waiting)
        response.status_code = 503
        response.headers["Retry-After"] = str(math.ceil(recovery_s))
    details = await backends.details()
    return Readiness(
        status="not ready" if waiting else "ready",
        models={str(task): state for task, state in models.items()},
        replicas={str(task): replicas for task, replicas in details.replicas.items()},
        pulling_percent={name: round(percent, 1) for name, percent in details.pulling.items()},
    )


def _state(states: Mapping[Task, State], task: Task) -> State:
    return states.get(task, "starting")


def _describe(spec: ModelSpec, prefix: str, state: State) -> Model:
    """A model as clients see it; its route is below the prefix that the application serves at."""
    return Model(
        name=spec.name,
        task=spec.task,
        route=prefix + spec.task.route,
        state=state,
        summary=spec.summary,
        family=spec.family,
        licence=spec.licence,
        commercial=spec.commercial,
        parameters=sorted(spec.parameters),
        defaults=spec.defaults,
        buckets_px=list(spec.buckets),
        scale=spec.scale,
        num_gpus=spec.num_gpus,
    )
