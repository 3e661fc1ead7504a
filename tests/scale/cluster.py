"""A Ray of several nodes on one machine, which its own autoscaler (v2) starts and ends.

A head, and fake nodes as further processes beside it. Whatever a test wants to know it asks of the
dashboard over HTTP, as KubeRay's operator does; this process itself never joins the cluster. Needs
Linux, for /proc.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import ray.util

from benchmarks.server import free_port
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD_ID = "f" * 51 + "00000"
"""The provider counts on: the first node is …00001."""
HEAD_TYPE = "ray.head.default"
"""As the provider calls it."""
NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
_FAKE_NODES = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    NODE_ID: HEAD_ID,
}
_START_S = 240
_END_S = 30


@dataclass(frozen=True)
class Group:
    """Nodes of one kind.

    Attributes:
        name: of the group.
        resources: of a node, as Ray names them; a GPU is a number, not a device.
        labels: of a node.
        min_nodes, max_nodes: at a time.
        idle_timeout_s: after which a node that nobody uses is ended.
    """

    name: str
    resources: dict[str, int]
    labels: dict[str, str]
    min_nodes: int
    max_nodes: int
    idle_timeout_s: float

    def node_type(self) -> dict[str, Any]:
        """As the autoscaler's config has it."""
        return {
            "resources": self.resources,
            "labels": self.labels,
            "node_config": {},
            "min_workers": self.min_nodes,
            "max_workers": self.max_nodes,
            "idle_timeout_s": self.idle_timeout_s,
        }


class Cluster:
    """A context: the head starts and takes whatever there is of the cluster along when it ends.

    Args:
        groups: of nodes.
        proxy_ports: on which the Serve proxy of a group's only node listens.
        environment: further variables of all processes.
    """

    def __init__(
        self, groups: list[Group], proxy_ports: dict[str, int], environment: dict[str, str]
    ) -> None:
        # A short path: Ray keeps sockets there.
        self._folder = Path(tempfile.mkdtemp(prefix="scale"))
        self.address = f"{ray.util.get_node_ip_address()}:{free_port()}"
        self._dashboard_port = free_port()
        self._groups, self._proxy_ports = groups, proxy_ports
        self.environment = os.environ | _environment() | environment
        self._started: list[subprocess.Popen[bytes]] = []
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{self._dashboard_port}", timeout=60, trust_env=False
        )

    def __enter__(self) -> Self:
        try:
            self.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._end(self._started)
        shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self) -> None:
        """Start whatever is there at the beginning."""
        config = _autoscaling(
            self._groups, self.address, self._folder / "stores", self._proxy_ports
        )
        path = self._folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        options = [f"--autoscaling-config={path}", f"--temp-dir={self._folder / 'ray'}"]
        self._start_head(_FAKE_NODES, options)

    def deploy(self, config: dict[str, Any]) -> None:
        """What `serve deploy` and KubeRay do with a Serve config."""
        self._client.put("/api/serve/applications/", json=config).raise_for_status()

    def serving(self) -> dict[str, Any]:
        """What `serve status` is made from."""
        return self._client.get("/api/serve/applications/").raise_for_status().json()

    def nodes(self, labels: dict[str, str]) -> list[str]:
        """Ids of the living nodes with these labels."""
        alive = self._states("nodes", state="ALIVE")
        return sorted(n["node_id"] for n in alive if labels.items() <= n["labels"].items())

    def actors(self, **wanted: str) -> list[dict[str, Any]]:
        """Actors of the whole cluster with these properties, the dead ones too."""
        return self._states("actors", **wanted)

    def plasma_bytes(self) -> dict[str, int]:
        """Of objects, by living node that was measured; a second old."""
        query = {"view": "summary", "nocache": "1"}  # else the answer of the last time it was asked
        found = self._client.get("/nodes", params=query).raise_for_status().json()
        raylets = [node["raylet"] for node in found["data"]["summary"]]
        measured = [r for r in raylets if r["state"] == "ALIVE" and "storeStats" in r]
        return {r["nodeId"]: int(r["storeStats"].get("objectStoreBytesUsed", 0)) for r in measured}

    def kill(self, node_id: str) -> None:
        """End a node as a machine ends: every process of its raylet's tree, by SIGKILL."""
        sessions = {process.pid for process in self._started}
        ours = [p for p in _processes() if p.session in sessions]
        mark = f"{NODE_ID}={node_id}".encode()
        tree = {p.pid for p in ours if p.name == "raylet" and mark in p.environment()}
        assert tree, node_id
        while more := {p.pid for p in ours if p.parent in tree} - tree:
            tree |= more
        _kill(tree)

    def _start(
        self, name: str, command: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """A process, and a log of its name, without what was there before."""
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self.environment | environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,  # by which its processes are found again
            )
        self._started.append(process)
        return process

    def _end(self, started: list[subprocess.Popen[bytes]]) -> None:
        """Kill these and all that they started."""
        deadline_s = time.monotonic() + _END_S
        sessions = {process.pid for process in started}
        while living := [p for p in _processes() if p.session in sessions]:
            assert time.monotonic() < deadline_s, living
            _kill(p.pid for p in living)
            time.sleep(0.2)
        for process in started:
            process.wait(_END_S)
        self._started = [one for one in self._started if one not in started]

    def _start_head(self, environment: dict[str, str], options: list[str]) -> None:
        self._head = self._start("head", [*self._command(), *options], environment)
        wait_until(self._answers, _START_S, "the dashboard answers")

    def _answers(self) -> bool:
        log = (self._folder / "head.log").read_text()
        assert self._head.poll() is None, log
        try:
            return "Ray runtime started" in log and bool(self._states("nodes", state="ALIVE"))
        except httpx.HTTPError:
            return False

    def _states(self, kind: str, **wanted: str) -> list[dict[str, Any]]:
        query: list[tuple[str, str]] = [("detail", "1"), ("limit", "10000")]
        for key, value in wanted.items():
            query += [("filter_keys", key), ("filter_predicates", "="), ("filter_values", value)]
        answer = self._client.get(f"/api/v0/{kind}", params=query).raise_for_status()
        return answer.json()["data"]["result"]["result"]

    def _command(self) -> list[str]:
        ports = {
            "port": self.address.rpartition(":")[2],
            "dashboard-port": self._dashboard_port,
            "ray-client-server-port": free_port(),
            "dashboard-agent-listen-port": free_port(),
            "metrics-export-port": free_port(),
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        return [
            str(Path(sys.executable).parent / "ray"),
            *("start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true"),
            *("--num-cpus=0", "--num-gpus=0", f"--object-store-memory={100 * 2**20}"),
            f"--node-ip-address={self.address.partition(':')[0]}",
            *(f"--{name}={port}" for name, port in ports.items()),
        ]


def _environment() -> dict[str, str]:
    return {
        "PYTHONPATH": str(ROOT),  # for the provider
        "RAY_AUTH_MODE": "disabled",  # else a token that another Ray left behind decides
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
        "NODE_STATS_UPDATE_INTERVAL_SECONDS": "1",
    }


def _autoscaling(
    groups: list[Group], address: str, stores: Path, proxy_ports: dict[str, int]
) -> dict[str, Any]:
    """The autoscaler's config; it insists on every key, used or not."""
    head: dict[str, Any] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    lists = (
        *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"),
        *("setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands"),
    )
    return {
        "cluster_name": "scale",
        "max_workers": sum(group.max_nodes for group in groups),
        "upscaling_speed": 1000,
        "idle_timeout_minutes": 60,
        "provider": {
            "type": "external",
            "module": "tests.scale.provider.Nodes",
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "stores": str(stores),
            "ports": proxy_ports,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": {HEAD_TYPE: head} | {g.name: g.node_type() for g in groups},
        "auth": {"ssh_user": "nobody"},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }


@dataclass(frozen=True)
class _Process:
    pid: int
    name: str
    parent: int
    session: int

    def environment(self) -> list[bytes]:
        try:
            return Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return []


def _processes() -> list[_Process]:
    """Every process of this machine that has not ended."""
    found: list[_Process] = []
    for folder in Path("/proc").iterdir():
        try:
            pid, rest = (folder / "stat").read_text().split(" (", 1)
        except (OSError, ValueError):  # ended meanwhile, or no process
            continue
        name, _, fields = rest.rpartition(") ")
        state, parent, _, session, *_ = fields.split()
        if state not in "ZX":
            found.append(_Process(int(pid), name, int(parent), int(session)))
    return found


def _kill(pids: Any) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(reached: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition; a busy machine may take its time.

    Raises:
        AssertionError: it was not reached in time.
    """
    deadline_s = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline_s, f"not within {seconds} s: {what}"
        time.sleep(0.5)  # each look costs the dashboard CPU time
