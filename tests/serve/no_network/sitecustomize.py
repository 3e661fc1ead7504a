"""Imported by every Python process that has this folder on its path: no network but this machine.

Ray's own connections are made below Python, and to this machine.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

_REAL = socket.socket.connect


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback or host == os.environ.get("OWN_ADDRESS")
    except ValueError:
        return host in ("localhost", socket.gethostname())


def _refuse(wanted: object) -> None:
    if folder := os.environ.get("NETWORK_REPORTS"):
        Path(folder, f"{os.getpid()}.touched").write_text(str(wanted))
    raise OSError(f"the network is blocked: {wanted}")


def _connect(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(str(address[0])):
        _refuse(address)
    _REAL(self, address)


def _look_up(real: Any) -> Any:
    def look_up(host: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name and not _is_here(name):
            _refuse(name)
        return real(host, *args, **options)

    return look_up


socket.socket.connect = _connect  # type: ignore[method-assign]
socket.getaddrinfo = _look_up(socket.getaddrinfo)
if reports := os.environ.get("NETWORK_REPORTS"):
    Path(reports, f"{os.getpid()}.blocked").touch()
