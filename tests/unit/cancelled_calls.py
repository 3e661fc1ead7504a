"""How many bytes of malloc's a cancelled gRPC call leaves in use; run by test_grpc_repair.

Arguments: `explicitly` or `with-its-task` (how calls are cancelled), and `repaired` if so.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import sys
from typing import Any

import grpc
from grpc import aio

from serve_app.grpc_repair import free_cancelled_calls

CALLS = 500
AT_A_TIME = 10
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


async def _explicitly(method: Any) -> None:
    call = method(b"x" * 100)
    await asyncio.sleep(0.005)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call


async def _with_its_task(method: Any) -> None:
    async def awaits() -> None:
        await method(b"x" * 100)

    task = asyncio.create_task(awaits())
    await asyncio.sleep(0.005)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _kept(cancel: Any) -> float:
    server = aio.server()
    server.add_generic_rpc_handlers((_Slow(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/slow/answer")
        used = [0, 0]
        for part in (0, 1):  # the first warms up
            for _ in range(CALLS // AT_A_TIME):
                await asyncio.gather(*(cancel(method) for _ in range(AT_A_TIME)))
            used[part] = _used_bytes()
    await server.stop(0)
    return (used[1] - used[0]) / CALLS


if __name__ == "__main__":
    if "repaired" in sys.argv:
        free_cancelled_calls()
        free_cancelled_calls()
    ways = {"explicitly": _explicitly, "with-its-task": _with_its_task}
    print(asyncio.run(_kept(ways[sys.argv[1]])))
