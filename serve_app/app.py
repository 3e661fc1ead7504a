"""The application: the table of contents, no logic."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import AutoscalingPolicy, BackpressureConfig

from deployments.catalogue import load_registry
from deployments.credentials import Signing
from deployments.former import unheeded
from deployments.model import ModelDeployment
from deployments.settings import MOST_AT_A_TIME, Settings, parse_settings
from deployments.store.lockfile import load_lock, locked_digest
from deployments.tasks import Task
from serve_app.backends import HEALTH_CHECK_PERIOD_S
from serve_app.ingress import Ingress
from serve_app.jobs.autoscaling import JobWorkerPolicy
from serve_app.jobs.connection import url_of_environment
from serve_app.local_redis import LocalRedis
from serve_app.worker import JobWorker

if TYPE_CHECKING:
    from ray.serve import Application

    from deployments.catalogue import Registry
    from deployments.registry import ModelSpec

logger = logging.getLogger("ray.serve.imagen")
_MOST_WORKERS = 4
_SHORT_ONES = 50
"""Requests that hold nothing, such as probes, beside those that the settings limit."""
_BACKPRESSURE = BackpressureConfig(status_code=429, retry_after_s=2)


def build(args: dict[str, Any]) -> Application:
    """The Serve application: an Ingress, a ModelDeployment for each model, and what jobs need.

    Args:
        args: the `args` of a Serve config file; its `deployments` section overrides the options
            below by deployment name.

    Raises:
        ConfigError: `args` or a model registry is wrong, or its lock file lacks a digest; or
            `args.c2pa` names what cannot sign.
        LicenceRefused: a model's licence forbids commercial use and was not accepted.
    """
    settings = parse_settings(Settings, args, "The application's args")
    registry = load_registry(*settings.models, serve=settings.serve)
    lock = load_lock(*settings.models)
    if settings.c2pa is not None:
        Signing(settings.c2pa)  # Here, because a replica that fails to start is started again.
    for spec in registry.models:
        locked_digest(lock, spec)
    for line in unheeded(os.environ):
        logger.warning("%s", line)
    if absent := [str(task) for task in Task if task not in registry]:
        logger.warning("No model serves: %s", ", ".join(absent))
    if settings.device == "cpu":
        registry = registry.on_cpu()
    models = {spec.name: _model(spec, registry, settings) for spec in registry.models}
    ingress: Any = serve.deployment(Ingress)
    ingress = ingress.options(
        name="Ingress",
        # High enough that our middleware refuses first: Serve's own refusals are plain text.
        max_ongoing_requests=MOST_AT_A_TIME + _SHORT_ONES,
        max_queued_requests=1000,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        backpressure_config=_BACKPRESSURE,
        ray_actor_options={"num_cpus": 0.1},
        user_config={},
    )
    return ingress.bind(models, registry, settings, _beside(models, registry, settings))


def __getattr__(name: str) -> Application:
    """`app`, for commands that want an application rather than its builder, such as `serve build`.

    Built on first use, so that an import stays cheap.
    """
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build({})


def _beside(
    models: dict[str, Application], registry: Registry, settings: Settings
) -> dict[str, Application]:
    """What jobs need besides the models; nothing if they are switched off."""
    if not settings.jobs.enabled:
        return {}
    beside: dict[str, Application] = {}
    if url_of_environment() is None:
        redis: Any = serve.deployment(LocalRedis)
        beside["redis"] = redis.options(
            name="Redis",
            num_replicas=1,
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
            ray_actor_options={"num_cpus": 0},
        ).bind(settings.jobs.place)
    beside["worker"] = job_worker(models, registry, settings, beside.get("redis"))
    return beside


def job_worker(
    models: dict[str, Application],
    registry: Registry,
    settings: Settings,
    redis: Application | None,
) -> Application:
    """The deployment that carries jobs to these models.

    Args:
        models: by name.
        registry: what each model is.
        settings: of the application.
        redis: the application's own one; None if REDIS_URL names one.
    """
    # As many jobs as a worker carries at a time.
    room = settings.jobs.per_model * len(models)
    worker: Any = serve.deployment(JobWorker)
    return worker.options(
        name="JobWorker",
        autoscaling_config=_workers(room, settings.jobs.namespace)
        if redis is None
        # Serve's controller does not know where that Redis is, and one machine needs one worker.
        else {"min_replicas": 1, "max_replicas": 1},
        # Nobody sends it requests; Serve warns if it is below the target.
        max_ongoing_requests=room,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # A worker that is to end finishes its jobs.
        graceful_shutdown_timeout_s=settings.jobs.run_timeout_s + 30,
        ray_actor_options={"num_cpus": 0},
        user_config={},
    ).bind(models, registry, settings, redis)


def _workers(room: int, namespace: str) -> dict[str, Any]:
    """None without a job: the first one waits some seconds for a process. Serve's controller
    starts it, whatever else sleeps, so that a quiet cluster pays for nothing.
    """
    return {
        "min_replicas": 0,
        "max_replicas": _MOST_WORKERS,
        "target_ongoing_requests": room,
        "upscale_delay_s": 5,
        "downscale_delay_s": 60,
        "downscale_to_zero_delay_s": 300,
        "policy": AutoscalingPolicy(
            policy_function=JobWorkerPolicy, policy_kwargs={"namespace": namespace}
        ),
    }


def _model(spec: ModelSpec, registry: Registry, settings: Settings) -> Application:
    deployment: Any = serve.deployment(ModelDeployment)
    return deployment.options(
        name=registry.deployment(spec),
        # A replica of a slow model accepts few requests and would never reach a larger target.
        autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 2},
        # A replica itself refuses what it cannot finish in time (deployments/admission.py), so that
        # requests queue in front of it only while there is no replica.
        max_ongoing_requests=1000,
        max_queued_requests=40,
        backpressure_config=_BACKPRESSURE,
        # Long enough for the jobs at hand.
        graceful_shutdown_timeout_s=max(60, settings.jobs.run_timeout_s),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30,
        ray_actor_options={"num_cpus": settings.model_num_cpus, "num_gpus": spec.num_gpus},
        user_config={},
    ).bind(spec, settings)
