"""One request inside the engine."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from deployments.contract import ImageRequest

Pixels = NDArray[np.uint8]
"""`H x W x 3` sRGB, or `H x W` grey; uint8."""


@dataclass(slots=True, eq=False)
class Row:
    """One request inside the engine.

    Attributes:
        request: complete: every field has its final value.
        pixels: what the model sees, `H x W x 3`; from `Pipeline.fit`.
        seed: of this row's own random generator.
        deadline_s: on the clock of `time.monotonic`; past it the row is dropped.
        future: gets the output of `Pipeline.finish`, or the row's error.
        state: whatever the pipeline keeps for the row.
        trace: the request's span context, if it is traced.
        steps, steps_left: of the model; `Pipeline.begin` sets the latter, the engine counts down.
        cost_px: network pixels of each step, see `Pipeline.cost_px`.
        company: rows of all its passes so far, itself counted in each.
        arrived_s: on the engine's clock.
        queue_s, run_s, vae_s: seconds waiting, being stepped, and being begun and finished.
        compute_s: the row's share of the seconds its groups ran, and all of `vae_s`.
    """

    request: ImageRequest
    pixels: Pixels
    seed: int
    deadline_s: float
    future: Future[Pixels] = field(default_factory=Future[Pixels])
    state: object = None
    trace: object = None
    steps: int = 0
    steps_left: int = 0
    cost_px: int = 1
    company: int = 0
    arrived_s: float = 0.0
    queue_s: float = 0.0
    run_s: float = 0.0
    vae_s: float = 0.0
    compute_s: float = 0.0

    @property
    def batch_size(self) -> int:
        """Rows of its passes, itself among them: the mean, rounded."""
        return round(self.company / max(self.steps - self.steps_left, 1))

    def cancel(self) -> None:
        """Give the row up; the engine drops it before its next step. Safe to call twice."""
        self.future.cancel()

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()
