"""The application on a Cluster: as configs/gke.yaml has it, with small models and short delays."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import yaml

from deployments.settings import JOBS_VARIABLE, ROOT
from deployments.tasks import Task
from kuberay.render.environment import Environment, load_environments
from kuberay.render.serve_config import serve_config
from kuberay.render.sizing import Sizing
from serve_app.jobs.connection import URL_VARIABLE
from tests.jobs.redis_server import RedisServer
from tests.scale.cluster import Cluster, Group, free_port, wait_until
from tests.scale.load import Answer, ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.render.environment import Values

LONG_S = 240
"""Generous, for whatever a busy machine with two cores may take."""
_IDLE_S = 5
_NEVER_S = 10**6
DEADLINE_S = 120
"""Of a request: time for a node, and for five models that load on two cores."""
CLIENT_S = DEADLINE_S + 60
"""After which a client gives up; Serve does so before, half-way."""
_STORE_BYTES = 100 * 2**20
_IMPATIENT = {
    "upscale_delay_s": 1,
    "downscale_delay_s": 2,
    "metrics_interval_s": 1,
    "look_back_period_s": 3,
}


TASKS = [task for task in Task if task.needs_picture]
"""Those that prod serves."""
MODELS = frozenset(task.deployment for task in TASKS)


@dataclass(frozen=True, slots=True)
class Process:
    """A replica and its process, which the controller does not know in every state."""

    deployment: str
    replica_id: str
    pid: int | None
    state: str


class Service:
    """A context: the application on an ingress node that is always there, and GPU nodes from zero.

    Attributes:
        cluster: beneath it.
        config: the Serve config in force.
        url: of the ingress node's proxy.
    """

    def __init__(self, cluster: type[Cluster] = Cluster) -> None:
        environment = load_environments(Path("configs/gke.yaml"))["prod"]
        ports = {"head": free_port(), "ingress": free_port()}
        self._gpu_labels = environment.models.group["labels"]
        self.url = f"http://127.0.0.1:{ports['ingress']}"
        self.config = _small(serve_config(Sizing(environment)), ports["head"])
        self.client = httpx.Client(base_url=self.url, timeout=CLIENT_S, trust_env=False)
        self._folder = Path(tempfile.mkdtemp(prefix="jobs"))
        self._redis = RedisServer(self._folder / "redis")
        self._redis.__enter__()  # now, because its port is not known before
        self.cluster = cluster(
            _groups(environment),
            {environment.ingress.group["groupName"]: ports["ingress"]},
            {
                "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
                URL_VARIABLE: self._redis.url,
                JOBS_VARIABLE: str(self._folder),  # in place of a bucket
            },
        )

    def __enter__(self) -> Self:
        try:
            self.cluster.__enter__()
            self.deploy(self.config)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.cluster.__exit__()
        self._redis.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def deploy(self, config: Values) -> None:
        """Put a Serve config in force, and wait until the controller says that it is."""
        self.cluster.deploy(config)
        self.config = config
        time.sleep(1)  # the controller takes it in
        wait_until(self._is_running, LONG_S, "the application runs")
        wait_until(self._is_reachable, LONG_S, "the ingress node's proxy leads to it")

    def be_patient(self, seconds: float) -> None:
        """Let a model's last replica go after so long without a request."""
        config = deepcopy(self.config)
        for deployment in by_name(config).values():
            deployment["autoscaling_config"]["downscale_to_zero_delay_s"] = seconds
        self.deploy(config)

    def stay_awake(self) -> None:
        """Have one replica of each model up, and let none go for minutes."""
        self.be_patient(600)
        self.wake()

    def go_to_sleep(self) -> None:
        """Let replicas go after seconds, from now on; wait until no GPU node or worker is left."""
        self.be_patient(3)
        wait_until(lambda: not self.gpu_nodes(), LONG_S, "no GPU node is left")
        wait_until(lambda: not self.workers(), LONG_S, "no worker is left")

    def wake(self) -> list[Answer]:
        """A picture of each model, all five at a time."""
        with ThreadPoolExecutor(len(TASKS)) as pool:
            answers = list(pool.map(self.ask, TASKS))
        assert all(answer.is_picture for answer in answers), answers
        return answers

    def ask(self, task: Task) -> Answer:
        return ask(self.client, task)

    def gpu_nodes(self) -> list[str]:
        """Ids of the living ones."""
        return self.cluster.nodes(self._gpu_labels)

    def replicas(self) -> dict[str, set[str]]:
        """Ids of the running replicas, by deployment."""
        found = self._application().get("deployments", {})
        return {
            name: {r["replica_id"] for r in one["replicas"] if r["state"] == "RUNNING"}
            for name, one in found.items()
        }

    def processes(self) -> set[Process]:
        """All replicas; none while Serve's controller is away."""
        try:
            found = self._application().get("deployments", {})
        except httpx.HTTPError:
            return set()
        return {
            Process(name, replica["replica_id"], replica.get("pid"), replica["state"])
            for name, one in found.items()
            for replica in one["replicas"]
        }

    def model_replicas(self) -> int:
        return sum(len(ids) for name, ids in self.replicas().items() if name in MODELS)

    def workers(self) -> int:
        return len(self.replicas().get("JobWorker", ()))

    def shares(self) -> dict[str, list[tuple[str, float]]]:
        """Whom Ray promised how much of each GPU node: deployments of living replicas, sorted."""
        found: dict[str, list[tuple[str, float]]] = {}
        for actor in self.cluster.actors(state="ALIVE"):
            if share := actor["required_resources"].get("GPU"):
                _, deployment, _ = actor["name"].split("#")
                found.setdefault(actor["node_id"], []).append((deployment, share))
        return {node: sorted(shares) for node, shares in found.items()}

    def fullest_share(self) -> float:
        """The most that is promised of any GPU."""
        return max(sum(share for _, share in shares) for shares in self.shares().values())

    def _is_running(self) -> bool:
        application = self._application()
        assert application.get("status") != "DEPLOY_FAILED", application
        return application.get("status") == "RUNNING"

    def _is_reachable(self) -> bool:
        try:
            return self.client.get("/healthz").status_code == 200
        except httpx.HTTPError:
            return False

    def _application(self) -> Values:
        return self.cluster.serving()["applications"].get("imagen", {})


def by_name(config: Values) -> dict[str, Values]:
    """The deployments of a Serve config."""
    return {one["name"]: one for one in config["applications"][0]["deployments"]}


def _small(config: Values, port: int) -> Values:
    """A Serve config for production, changed to what one machine without a GPU can do.

    Kept: what is pinned where, the shares of a GPU, the replicas' bounds.
    """
    local: Values = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    config["http_options"] = local["http_options"]
    config["http_options"] |= {"port": port, "request_timeout_s": DEADLINE_S + 30}
    # Two threads each of many replicas would mostly wait for each other on two cores.
    few = {"torch_threads": 1, "pixel_threads": 1}
    # As in prod, which serves no text to image unless it is named.
    args = local["applications"][0]["args"] | few | {"serve": {"generate": None}}
    config["applications"][0]["args"] = args
    for name, deployment in by_name(config).items():
        if name == "Ingress":
            # One node for it, rather than two to four.
            deployment["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
            clients: Values = by_name(local)[name]["user_config"]
            deployment["user_config"] = clients | {"request_timeout_s": DEADLINE_S}
        elif name == "JobWorker":
            deployment["autoscaling_config"] |= _IMPATIENT
        else:
            del deployment["ray_actor_options"]["memory"]  # fake nodes cannot promise any
            deployment["autoscaling_config"] |= _IMPATIENT
            # Else the deploy of a change wakes a model that sleeps.
            del deployment["autoscaling_config"]["initial_replicas"]
            deployment["user_config"] = by_name(local)[name]["user_config"]
    return config


def _groups(environment: Environment) -> list[Group]:
    """The pods of the manifests as nodes; one ingress node, which is always there."""
    ingress, models = environment.ingress, environment.models
    plasma = {"object_store_memory": _STORE_BYTES}
    cpus = int(models.size["cpu"])
    gpus = int(models.size["nvidia.com/gpu"])
    assert environment.gpu is not None
    return [
        Group(
            ingress.group["groupName"],
            {"CPU": int(ingress.size["cpu"])} | plasma,
            ingress.group["labels"],
            1,
            1,
            _NEVER_S,
        ),
        Group(
            models.group["groupName"],
            {"CPU": cpus, "GPU": gpus} | plasma,
            models.group["labels"],
            models.group["minReplicas"],
            environment.gpu.max_nodes,
            _IDLE_S,
        ),
    ]


@dataclass(frozen=True, slots=True)
class Moment:
    """What there was at an instant of `time.monotonic`."""

    at_s: float
    gpu_nodes: int
    replicas: int


class Watch:
    """A context that keeps looking at nodes and replicas, once a second.

    Attributes:
        moments: what it saw.
        plasma_bytes: what each GPU node held when it was last seen.
    """

    def __init__(self, service: Service) -> None:
        self.moments: list[Moment] = []
        self.plasma_bytes: dict[str, int] = {}
        self._service = service
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def first(self, wanted: Callable[[Moment], bool], after_s: float = 0) -> float:
        """When it was first seen, on `time.monotonic`; what is about to be seen, it waits for."""

        def found() -> list[float]:
            return [m.at_s for m in list(self.moments) if m.at_s >= after_s and wanted(m)]

        wait_until(found, 20, "it is seen")
        return found()[0]

    def _look(self) -> None:
        while not self._stop.wait(1):
            nodes, replicas = self._service.gpu_nodes(), self._service.model_replicas()
            self.moments.append(Moment(time.monotonic(), len(nodes), replicas))
            held = self._service.cluster.plasma_bytes()
            self.plasma_bytes |= {node: held[node] for node in nodes if node in held}


class Stages:
    """Times of what happened, printed as a table at the end; a context.

    Args:
        title: of the table.
    """

    def __init__(self, title: str) -> None:
        self._rows: list[tuple[str, str]] = [(title, "")]

    def add(self, stage: str, seconds: float) -> None:
        self._rows.append((stage, f"{seconds:6.1f} s"))

    def say(self, line: str) -> None:
        self._rows.append((line, ""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        print()
        for stage, seconds in self._rows:
            print(f"{stage:58}{seconds}".rstrip())
