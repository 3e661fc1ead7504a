"""`imagen run` as a process of its own, whose processes a test may kill by their ids."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import free_port, process_title
from deployments.settings import ROOT
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import TracebackType

    Config = dict[str, Any]

START_S = 300.0
TASKS = (Task.COMIC, Task.BACKGROUND, Task.UPSCALE)
_FILE = "chaos.yaml"


def replica(deployment: str) -> str:
    """The title of the processes of a deployment."""
    return f"ServeReplica:imagen:{deployment}"


CONTROLLER = "ServeController"
WORKER, INGRESS, REDIS = map(replica, ("JobWorker", "Ingress", "Redis"))
COMIC, BACKGROUND = replica(Task.COMIC.deployment), replica(Task.BACKGROUND.deployment)


class Application:
    """A context: the application is ready inside, and every process of it has ended after it.

    Args:
        redis_url: of a Redis; empty lets the application start its own.
        workers: replicas of JobWorker.

    Attributes:
        url: of the API.
        folder: of this application; `jobs` below it holds pictures and results.
    """

    def __init__(self, redis_url: str = "", workers: int = 1) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: Ray puts sockets below it
        self._log = self.folder / "log"
        self._redis_url = redis_url
        self._process: psutil.Popen | None = None
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.config = self._config(workers)
        self._environment = self._own_environment()

    def _config(self, workers: int) -> Config:
        """configs/local.yaml with three models, so that it starts soon on two cores."""
        config = yaml.safe_load((ROOT / "configs/local.yaml").read_text(encoding="utf-8"))
        config["http_options"]["port"] = self._port
        application = with_models(config["applications"][0], TASKS, self.folder)
        config["applications"] = [application]
        worker = {"name": "JobWorker", "autoscaling_config": between(workers, workers)}
        application["deployments"].append(worker)
        application["args"] |= {
            "model_num_cpus": 0.1,
            "jobs": {
                "folder": str(self.folder / "jobs"),
                # A kill every few seconds is no fault of a job that it hits again and again.
                "attempts": 10,
                "webhooks": {"allow_http": True, "allow_private": True},
            },
        }
        return config

    def _own_environment(self) -> dict[str, str]:
        """A user's whose home is empty."""
        not_ours = ("RAY_", "REDIS_URL", "IMAGEN_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(not_ours)}
        return kept | {
            "HOME": str(self.folder),
            "RAY_TMPDIR": str(self.folder),
            "RAY_metrics_report_interval_ms": "500",
            "IMAGEN_MODELS": str(self.folder / "models"),
            "PYTHONPATH": str(ROOT),
            **({"REDIS_URL": self._redis_url} if self._redis_url else {}),
        }

    def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        file = self.folder / _FILE
        file.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        with self._log.open("wb") as log:
            self._process = psutil.Popen(
                [sys.executable, "-m", "cli.main", "run", str(file)],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until("it is ready", lambda: "Imagen is ready" in self.log, START_S)

    @property
    def log(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        assert self._process is None or self._process.poll() is None, text[-5000:]
        return text

    def stop(self) -> None:
        """Interrupt it, and end whatever it leaves behind."""
        process, self._process = self._process, None
        if process is None:
            return
        family = process.children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except psutil.TimeoutExpired:
            process.kill()
        _, left = psutil.wait_procs(family, timeout=5)
        for one in left:
            one.kill()  # psutil checks that the id still belongs to this process
        psutil.wait_procs(left, timeout=5)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            kept = Path(tempfile.gettempdir()) / f"{self.folder.name}.log"
            shutil.copy(self._log, kept)
            print(f"The log of the application is kept in {kept}.")
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- its processes ---

    def processes(self, title: str) -> list[psutil.Process]:
        assert self._process is not None
        found = self._process.children(recursive=True)
        return [one for one in found if process_title(one) == title]

    def kill(self, title: str) -> psutil.Process:
        """End one process of that title (SIGKILL), as soon as there is one."""
        until(f"there is a {title}", lambda: bool(self.processes(title)), 60)
        victim = self.processes(title)[0]
        victim.kill()
        return victim

    def kill_all(self, title: str) -> None:
        for one in self.processes(title):
            one.kill()

    # --- what Serve says and does ---

    @contextmanager
    def dashboard(self) -> Iterator[httpx.Client]:
        """A client of Ray's dashboard, whose answers come from the Serve controller."""
        [address] = re.findall(r"^Dashboard +(\S+)", self.log, re.MULTILINE)
        program = Path(sys.executable).parent / "ray"
        asked = subprocess.run(
            [program, "get-auth-token"],
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        headers = {"Authorization": f"Bearer {asked.stdout.strip()}"}
        with httpx.Client(base_url=address, headers=headers, timeout=30, trust_env=False) as client:
            yield client

    def replicas(self, client: httpx.Client, deployment: str) -> list[dict[str, Any]]:
        """What the controller says of the replicas of a deployment."""
        answer = client.get("/api/serve/applications/")
        answer.raise_for_status()
        return answer.json()["applications"]["imagen"]["deployments"][deployment]["replicas"]

    def deploy(self, client: httpx.Client, changes: dict[str, Config]) -> None:
        """Deploy the same application with other options of deployments, by their names."""
        for deployment in self.config["applications"][0]["deployments"]:
            deployment |= changes.get(deployment["name"], {})
        values = {"applications": self.config["applications"]}
        client.put("/api/serve/applications/", json=values).raise_for_status()

    def metric(self, name: str, model: str) -> float:
        """The sum of a metric over all processes, as Ray exports it."""
        file = self.folder / "ray/prom_metrics_service_discovery.json"
        [places] = yaml.safe_load(file.read_text(encoding="utf-8"))
        total, answers = 0.0, 0
        for target in places["targets"]:
            try:
                text = httpx.get(f"http://{target}/metrics", timeout=10, trust_env=False).text
            except httpx.TransportError:
                continue  # an exporter that this Ray does not run
            answers += 1
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == f"ray_{name}" and sample.labels.get("model") == model:
                        total += sample.value
        assert answers, f"none answers of {places['targets']}"
        return total


def with_models(application: Config, tasks: Collection[Task], folder: Path) -> Config:
    """An application of a config with the models of these tasks alone, listed in a folder."""
    registry = ROOT / "configs/models/starter.yaml"
    values = yaml.safe_load(registry.read_text(encoding="utf-8"))
    values["models"] = [one for one in values["models"] if one["task"] in tasks]
    values["serving"] = {task: name for task, name in values["serving"].items() if task in tasks}
    ours = folder / registry.name
    ours.write_text(yaml.safe_dump(values), encoding="utf-8")
    shutil.copy(registry.with_suffix(".lock.json"), ours.with_suffix(".lock.json"))
    names = {"Ingress", *(task.deployment for task in tasks)}
    return application | {
        "args": application["args"] | {"models": str(ours)},
        "deployments": [one for one in application["deployments"] if one["name"] in names],
    }


def between(least: int, most: int) -> dict[str, int]:
    """An autoscaling_config."""
    return {"min_replicas": least, "max_replicas": most}


def until(what: str, is_true: Callable[[], bool], limit_s: float = 120) -> None:
    """Wait for a condition."""
    deadline_s = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"not true after {limit_s:g} s: {what}"
        time.sleep(0.1)
