"""One local Ray with the application on it, shared by every test of this folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
import yaml
from ray import serve
from ray.serve import RunTarget
from ray.serve.config import BackpressureConfig
from ray.serve.schema import ServeDeploySchema, TracingConfig

from benchmarks.server import free_port
from cli.config import SERVICER, SIZE_VARIABLE
from deployments.catalogue import load_registry
from deployments.settings import ROOT, Settings
from deployments.tasks import Task
from serve_app.ingress import Ingress
from tests.serve.scripted import BrokenModel, ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

UPLOAD_PAUSE_S = 4
"""Shorter than the default, so that tests wait less for it."""
FURTHER = "upscale-perceptual"
"""A second model of a task, beside its default."""
MOST_GRPC_BYTES = 2**20
"""Of a message over gRPC; less than `max_body_bytes`."""
NO_NETWORK = Path(__file__).parent / "no_network"


@pytest.fixture(scope="package")
def local_config() -> dict[str, Any]:
    """configs/local.yaml as plain values."""
    return yaml.safe_load((ROOT / "configs/local.yaml").read_text())


@pytest.fixture(scope="package")
def models_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model store of the cluster."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="package")
def network_reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each worker says that its network is blocked, and whether it was touched."""
    return tmp_path_factory.mktemp("network")


@pytest.fixture(scope="package")
def grpc_port() -> int:
    """Of Serve's gRPC proxy."""
    return free_port()


@pytest.fixture(scope="package")
def cluster(
    tmp_path_factory: pytest.TempPathFactory,
    models_root: Path,
    network_reports: Path,
    grpc_port: int,
) -> Iterator[str]:
    """A Ray of our own with Serve listening; the URL. Its one GPU is a number, not a device.

    Its workers reach no network but this machine.
    """
    port = free_port()
    ray.init(
        _system_config={"metrics_report_interval_ms": 500},
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        _temp_dir=str(tmp_path_factory.mktemp("ray")),
        runtime_env={
            "env_vars": {
                "PYTHONPATH": f"{NO_NETWORK}:{ROOT}",
                "OWN_ADDRESS": ray.util.get_node_ip_address(),
                "NETWORK_REPORTS": str(network_reports),
                "IMAGEN_MODELS": str(models_root),
                "IMAGEN_JOBS": str(tmp_path_factory.mktemp("jobs")),
                # A lost proxy is noticed after three of them, by default of 10 s each.
                "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
                SIZE_VARIABLE: str(MOST_GRPC_BYTES),
            }
        },
    )
    serve.start(
        http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 90},
        grpc_options={
            "port": grpc_port,
            "grpc_servicer_functions": [SERVICER],
            "enable_reflection": False,
        },
        tracing_config=TracingConfig(enabled=True, sampling_ratio=1),
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="package")
def address(cluster: str, local_config: dict[str, Any]) -> str:
    """The URL of the whole application, as configs/local.yaml has it.

    But it serves a second upscaler, the default models share a GPU, and a body may stand still for
    a shorter time.
    """
    application = local_config["applications"][0]
    args = application["args"]
    clients_of(application)["uploads"] = {"pause_s": UPLOAD_PAUSE_S}
    args["serve"] = {"upscale": f"upscale-starter,{FURTHER}"}
    for deployment in application["deployments"]:
        if deployment["name"] != "Ingress":
            deployment["ray_actor_options"] = {"num_cpus": 0.2, "num_gpus": 0.1666}
    one_replica = {"min_replicas": 1, "max_replicas": 1}
    application["deployments"] += [{"name": FURTHER, "autoscaling_config": one_replica}]
    deploy(application)
    return cluster


def clients_of(application: dict[str, Any]) -> dict[str, Any]:
    """The `user_config` of its Ingress: what clients may do."""
    [ingress] = [one for one in application["deployments"] if one["name"] == "Ingress"]
    return ingress["user_config"]


def deploy(application: dict[str, Any]) -> None:
    """What `serve deploy` does with a config file's application."""
    client: Any = serve.context._get_global_client()
    logging = {"encoding": "JSON", "log_level": "INFO"}  # as in configs/gke.yaml
    values = {"applications": [application], "logging_config": logging}
    config = ServeDeploySchema.model_validate(values)
    client.deploy_apps(config)
    wait_until_running("imagen")


def wait_until_running(name: str) -> None:
    """Wait for the controller to finish what it was told; a busy machine may take its time."""
    deadline_s = time.monotonic() + 300
    time.sleep(1)
    while (application := serve.status().applications[name]).status != "RUNNING":
        assert application.status != "DEPLOY_FAILED", application.message
        assert time.monotonic() < deadline_s, application
        time.sleep(0.5)


@pytest.fixture(scope="package")
def scripted(cluster: str) -> str:
    """The URL of an application whose models follow the prompt; two Ingress replicas."""
    run_models("scripted", dict.fromkeys(Task, ScriptedModel), replicas=2, wait=True)
    return f"{cluster}/scripted"


@pytest.fixture(scope="package")
def broken(cluster: str) -> str:
    """The URL of an application whose comic model never starts."""
    kinds = {**dict.fromkeys(Task, ScriptedModel), Task.COMIC: BrokenModel}
    run_models("broken", kinds, replicas=1, wait=False)
    return f"{cluster}/broken"


def run_models(
    name: str,
    kinds: dict[Task, type],
    *,
    replicas: int,
    wait: bool,
    keys: Path | None = None,
) -> None:
    """Run the real Ingress over scripted models; comic takes two requests and queues one.

    With a file of keys it asks for keys, and takes calls over gRPC.
    """
    clients: dict[str, Any] = {
        "request_timeout_s": 6,
        "retry_after_s": 7,
        "access": {"auth": "off"},
    }
    if keys is not None:
        clients |= {"access": {"auth": "keys", "keys": str(keys)}, "grpc": {"enabled": True}}
    settings = Settings()
    registry = load_registry(*settings.models)
    models: dict[str, Any] = {}
    for task, kind in kinds.items():
        narrow = task == Task.COMIC
        model: Any = serve.deployment(kind)
        models[registry[task].name] = model.options(
            name=task.deployment,
            max_ongoing_requests=2 if narrow else 20,
            max_queued_requests=1 if narrow else 20,
            max_constructor_retry_count=1,
            backpressure_config=BackpressureConfig(status_code=429, retry_after_s=7),
            ray_actor_options={"num_cpus": 0},
        ).bind()
    ingress: Any = serve.deployment(Ingress)
    ingress = ingress.options(
        name="Ingress",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 0},
        user_config=clients,
    )
    target = RunTarget(ingress.bind(models, registry, settings, {}), name, f"/{name}")
    serve.run_many([target], wait_for_applications_running=wait)
