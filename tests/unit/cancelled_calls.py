"""How many bytes of malloc's a cancelled gRPC call leaves in use, and how often it calls back.

Run by test_grpc_repair. Arguments: `explicitly` or `with-its-task` (how calls are cancelled), and
`repaired` if so. Prints both as JSON. `serve` is the server, in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from itertools import pairwise
from typing import Any

import grpc
from grpc import aio

from serve_app.grpc_repair import free_cancelled_calls

CALLS = 300
AT_A_TIME = 10
WINDOWS = 5
_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def _used_bytes() -> int:
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Mallinfo
    return libc.mallinfo2().uordblks


class _Slow(grpc.GenericRpcHandler):
    def service(self, _details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, _request: bytes, _context: Any) -> bytes:
        await asyncio.sleep(5)
        return b""


class _Counted:
    """A method whose calls count how often they call back."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self.called_back = 0

    def __call__(self) -> Any:
        call = self._method(b"x" * 100)
        call.add_done_callback(self._count)
        return call

    def _count(self, _call: Any) -> None:
        self.called_back += 1


async def _explicitly(method: _Counted) -> None:
    call = method()
    await asyncio.sleep(0.005)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call


async def _with_its_task(method: _Counted) -> None:
    async def awaits() -> None:
        await method()

    task = asyncio.create_task(awaits())
    await asyncio.sleep(0.005)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _serve() -> None:
    server = aio.server()
    server.add_generic_rpc_handlers((_Slow(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def _measured(cancel: Any, port: int) -> dict[str, float]:
    used = list[int]()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = _Counted(channel.unary_unary("/slow/answer"))
        for _ in range(1 + WINDOWS):  # the first warms up
            for _ in range(CALLS // AT_A_TIME):
                await asyncio.gather(*(cancel(method) for _ in range(AT_A_TIME)))
            await asyncio.sleep(0.2)
            used.append(_used_bytes())
    kept = statistics.median(after - before for before, after in pairwise(used))
    calls = CALLS * (1 + WINDOWS)
    return {"kept_bytes": kept / CALLS, "called_back": method.called_back / calls}


def main(way: str, *, repaired: bool) -> None:
    if repaired:
        free_cancelled_calls()
        free_cancelled_calls()
    command = [sys.executable, "-m", "tests.unit.cancelled_calls", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            port = int(server.stdout.readline())
            print(json.dumps(asyncio.run(_measured(WAYS[way], port))))
        finally:
            server.kill()


WAYS = {"explicitly": _explicitly, "with-its-task": _with_its_task}

if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(_serve())
    else:
        main(sys.argv[1], repaired="repaired" in sys.argv)
