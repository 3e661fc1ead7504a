"""serveConfigV2: the application, and the options of its deployments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.settings import ClientSettings, parse_settings
from kuberay.quantity import as_bytes
from kuberay.render.environment import Values, merged
from kuberay.render.sizing import Sizing, application_args

if TYPE_CHECKING:
    from deployments.registry import ModelSpec

JOB_POLICY = "serve_app.jobs.autoscaling.JobWorkerPolicy"
"""Counts unfinished jobs in Redis. A test compares the name with the class."""


def serve_config(sizing: Sizing) -> Values:
    """The Serve config of an environment."""
    environment = sizing.environment
    serve, timeouts_s = environment.serve, environment.timeouts_s
    models = [_model(spec, sizing) for spec in sizing.registry.models]
    tracing = {"tracing_config": serve.tracing_config} if serve.tracing_config else {}
    return {
        "proxy_location": serve.proxy_location,
        "http_options": serve.http_options
        | {"request_timeout_s": timeouts_s.serve, "keep_alive_timeout_s": timeouts_s.keep_alive},
        "logging_config": serve.logging_config,
        **tracing,
        "applications": [
            {
                "name": environment.name,
                "route_prefix": "/",
                "import_path": "serve_app.app:build",
                "args": _args(sizing),
                "deployments": [_ingress(sizing), *models, *_jobs(sizing)],
            }
        ],
    }


def _args(sizing: Sizing) -> Values:
    args, cache = application_args(sizing.environment), sizing.environment.cache
    if cache.kind == "emptyDir":
        # The kubelet evicts a pod that uses more, and the free space of the disk does not show it.
        args["store"] = {"max_bytes": as_bytes(sizing.cache_size)} | args.get("store", {})
    return args


def _ingress(sizing: Sizing) -> Values:
    """What clients may do is checked here, because the application only logs a later mistake.

    Raises:
        ConfigError: the `user_config` is wrong.
    """
    environment = sizing.environment
    derived: Values = {"request_timeout_s": environment.timeouts_s.engine}
    clients = derived | environment.serve.ingress.get("user_config", {})
    parse_settings(ClientSettings, clients, "serve.ingress.user_config")
    return {"name": "Ingress"} | environment.serve.ingress | {"user_config": clients}


def _jobs(sizing: Sizing) -> list[Values]:
    """The deployments of jobs: a worker, and a Redis where no pod has a REDIS_URL."""
    environment, jobs = sizing.environment, sizing.settings.jobs
    if not jobs.enabled:
        return []
    worker: Values = {"name": "JobWorker"}
    if environment.redis is None:
        return [worker | environment.serve.worker, {"name": "Redis"} | environment.serve.redis]
    # A config file's autoscaling_config replaces that of the code as a whole.
    policy = {"policy_function": JOB_POLICY, "policy_kwargs": {"namespace": jobs.namespace}}
    return [merged(worker | {"autoscaling_config": {"policy": policy}}, environment.serve.worker)]


def _model(spec: ModelSpec, sizing: Sizing) -> Values:
    """Options of one model deployment: from the plan, then `serve.model`, then its task's own."""
    environment, placed = sizing.environment, sizing.placed.get(spec.name)
    actor: Values = {
        "num_cpus": sizing.settings.model_num_cpus,
        "num_gpus": sizing.num_gpus(spec),
        "memory": sizing.replica_memory_bytes(spec),
    }
    derived: Values = {"name": sizing.registry.deployment(spec), "ray_actor_options": actor}
    if placed:
        derived["user_config"] = {"max_batch_size": placed.rows, "budget_px": placed.budget_px}
    if environment.gpu:
        derived["autoscaling_config"] = {"max_replicas": environment.gpu.max_nodes}
    common = merged(derived, environment.serve.model)
    return merged(common, environment.serve.models.get(spec.task, {}))
