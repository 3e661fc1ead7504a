"""A Ray of several nodes as KubeRay has it: nodes outlive the head, whose state is in a Redis.

Each node is a `ray start` of its own, as in a pod. Nothing scales: a test says which nodes come.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from itertools import count
from pathlib import Path

from ray import NodeID

from kuberay.render.environment import load_environments
from tests.scale.cluster import NODE_ID, Cluster, free_port

_BIN = Path(sys.executable).parent
_WAIT_FOR_HEAD = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
"""What KubeRay gives workers, where there is a Redis."""


class Pods(Cluster):
    """A Cluster whose head can go and come back.

    Attributes:
        gate: through which nodes reach the head.
    """

    def begin(self) -> None:
        port = free_port()
        head = load_environments(Path("configs/gke.yaml"))["prod"].head
        written = {key: str(value) for key, value in head.env.items()}
        self._of_head = written | {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{port}",
            "RAY_external_storage_namespace": "scale",
        }
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir"]
        self._start("redis", [str(_BIN / "redis-server"), *options, str(self._folder)], {})
        self._folders = count()
        self.gate = Gate(self.address)
        self.start_head()
        for group in self._groups:
            for _ in range(group.min_nodes):
                self.start_node(group.name)

    def start_head(self) -> None:
        """The first, or one in the place of another: all it knows of before is in the Redis."""
        self._start_head(self._of_head, [self._own_folder()])

    def kill_head(self) -> None:
        """By SIGKILL, with all that runs there: Serve's controller too."""
        self._end([self._head])

    def _answers(self) -> bool:
        """As KubeRay does, put another head in the place of one that did not get up in time."""
        if self._head.poll() is not None:
            self.kill_head()
            self.start_head()
        return super()._answers()

    def start_node(self, name: str) -> None:
        """A node of a group, which joins when it is up."""
        [group] = [group for group in self._groups if group.name == name]
        resources = dict(group.resources)
        command = [
            *(str(_BIN / "ray"), "start", "--block", f"--address={self.gate.address}"),
            f"--node-ip-address={self.address.partition(':')[0]}",
            f"--num-cpus={resources.pop('CPU')}",
            f"--num-gpus={resources.pop('GPU', 0)}",
            f"--object-store-memory={resources.pop('object_store_memory')}",
            f"--resources={json.dumps(resources)}",
            "--labels=" + ",".join(f"{key}={value}" for key, value in group.labels.items()),
            f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
            self._own_folder(),
        ]
        node_id = NodeID.from_random().hex()
        proxy = self._proxy_ports.get(name) or free_port()
        environment = {
            NODE_ID: node_id,
            "IMAGEN_MODELS": str(self._folder / "stores" / node_id),
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(proxy),
        }
        self._start(f"node-{node_id}", command, environment | _WAIT_FOR_HEAD)

    def _own_folder(self) -> str:
        """As of a pod, which finds nothing of another's; short, because of the sockets in it."""
        return f"--temp-dir={self._folder / str(next(self._folders))}"


class Gate:
    """A way to an address that can be shut, as a network that does not know the new head yet.

    Attributes:
        address: to use in place of the other one.
        is_open: whether connections are let through.
    """

    def __init__(self, address: str) -> None:
        host, _, self._port = address.partition(":")
        self._host, port = host, free_port()
        self.address, self.is_open = f"{host}:{port}", True
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        started = asyncio.start_server(self._connected, host, port)
        asyncio.run_coroutine_threadsafe(started, loop).result()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not self.is_open:
                return
            there, back = await asyncio.open_connection(self._host, self._port)
            await asyncio.gather(_pump(reader, back), _pump(there, writer))
        except OSError:
            pass  # the head is away
        finally:
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand bytes on until either side ends, and then end the other."""
    try:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
