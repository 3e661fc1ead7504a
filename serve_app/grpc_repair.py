"""A repair of grpcio, which keeps about a kibibyte of every call that is cancelled.

Serve's handles speak gRPC by `grpc.aio` in `imagen run`, and a client who leaves early is a
cancelled call. The task that waits for the call is cancelled with it, and then nobody frees the
operations that it had started: https://github.com/grpc/grpc/issues/43360, open as of 1.85.1.

Before 1.84 a call whose operations end after it was cancelled tells its callbacks twice, by which
Serve counts requests: hence grpcio's floor in pyproject.toml. `tests/unit/test_grpc_repair.py`
fails once this is needed no more.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from grpc.aio._call import UnaryUnaryCall


def free_cancelled_calls() -> None:
    """From now on, let the operations of a cancelled unary call end, so that they are freed.

    Whoever awaits the call is cancelled as before. If the answer had come already, the call's own
    status is the answer's afterwards, no longer CANCELLED. Repeated calls change nothing.
    """
    unary: Any = UnaryUnaryCall
    invoke = unary._invoke
    if hasattr(invoke, "__wrapped__"):
        return

    @functools.wraps(invoke)
    async def invoke_to_its_end(call: Any) -> Any:
        operations = asyncio.ensure_future(invoke(call))
        try:
            return await asyncio.shield(operations)
        except asyncio.CancelledError:
            # The operations end by themselves once the call itself is cancelled.
            if not call.cancelled():
                call.cancel()
            raise

    unary._invoke = invoke_to_its_end
