"""Ray Serve with plain `@serve.batch`: a collected batch is called in groups of equal keys.

Configured with Serve's default window (10 ms) and Imagen's batch limits. In its favour, decoding,
encoding and the calls run on threads, so that the next batch is collected meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ray import serve

from benchmarks.peers.ray_example import MODEL_OPTIONS, bind

if TYPE_CHECKING:
    from benchmarks.peers.work import Item, Upload
    from deployments.tasks import Task


@serve.deployment(ray_actor_options=MODEL_OPTIONS, max_ongoing_requests=100)
class BatchedModel:
    """One model."""

    def __init__(self, task: Task) -> None:
        from benchmarks.peers.work import MAX_BATCH, load

        self._work = load(task)
        batched: Any = self._call
        batched.set_max_batch_size(MAX_BATCH[task])

    async def ready(self) -> None:
        """Answers once the model is loaded."""

    async def generate(self, upload: Upload) -> bytes:
        on_pool = asyncio.get_running_loop().run_in_executor
        item = await on_pool(self._work.pool, self._work.decode, *upload)
        output = await self._call(item)
        return await on_pool(self._work.pool, self._work.encode, item, output)

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.01)
    async def _call(self, items: list[Item]) -> list[Any]:
        return await asyncio.to_thread(self._work.call, items)


app = bind(BatchedModel)
