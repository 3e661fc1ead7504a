"""How long a request takes on an idle replica, and the largest one that fits its time."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from deployments.errors import InvalidParameter, TooMuchWork

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.contract import ImageRequest
    from deployments.engine.grouping import Pace
    from deployments.engine.pipeline import AnyPipeline, Work

_RESERVE = 1.2
"""An estimate is multiplied by this before it is compared with a limit."""
_SAMPLES = 20
_LEAST_PX = 2**18
"""Smaller pictures tell nothing of larger ones: most of their time is the same for any size."""


class Size(NamedTuple):
    """Of the client's picture; 0 x 0 without one."""

    width_px: int
    height_px: int

    def scaled(self, percent: int) -> Size:
        """That share of each side, at least 1 px."""
        width_px, height_px = self.width_px * percent // 100, self.height_px * percent // 100
        return Size(max(width_px, 1), max(height_px, 1))


class Forecast:
    """Seconds that a request takes on an idle replica, learned from the requests it has served.

    Args:
        pace: knows what passes of the network take.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._stage_s_per_px: deque[float] = deque(maxlen=_SAMPLES)
        self._file_s_per_px: deque[float] = deque(maxlen=_SAMPLES)

    def record(self, work: Work, file_px: int, timings_s: Mapping[str, float]) -> None:
        """Learn from a request that is done.

        Args:
            work: what it cost the model.
            file_px: pixels of its upload or its result, whichever has more.
            timings_s: seconds by stage, see `ImageResult.timings_s`.
        """
        if work.stage_px >= _LEAST_PX:
            self._stage_s_per_px.append(timings_s["vae"] / work.stage_px)
        if file_px >= _LEAST_PX:
            self._file_s_per_px.append((timings_s["decode"] + timings_s["encode"]) / file_px)

    def seconds(self, work: Work, file_px: int) -> float | None:
        """About what a request takes; None if the replica has timed no pass yet."""
        pass_s = self._pace.alone_s(work.step_px)
        if pass_s is None:
            return None
        # The quickest of the last ones: the others shared the machine with something.
        stage_s = min(self._stage_s_per_px, default=0.0) * work.stage_px
        file_s = min(self._file_s_per_px, default=0.0) * file_px
        return work.steps * pass_s + stage_s + file_s

    def is_certain(self, work: Work) -> bool:
        """Whether passes of this size were timed, so that nothing had to be extrapolated."""
        return self._pace.has_timed(work.step_px)


class Estimator:
    """Estimates the requests of one model.

    Args:
        pipeline: knows what a request costs.
        forecast: knows what that takes.
        scale: side of the result over side of the picture.
    """

    def __init__(self, pipeline: AnyPipeline, forecast: Forecast, scale: int) -> None:
        self._pipeline = pipeline
        self._forecast = forecast
        self._scale = scale

    def seconds(
        self,
        request: ImageRequest,
        size: Size,
        limit_s: float,
        n: int = 1,
        *,
        is_job: bool = False,
    ) -> float | None:
        """Of work on an idle replica; None if passes of this size were not timed yet.

        Args:
            request: complete.
            size: of its picture.
            limit_s: that such a request may take in all.
            n: how often it runs.
            is_job: whether it may take so long because it is a job.

        Raises:
            TooMuchWork: more than a request may take.
        """
        if not self._forecast.is_certain(self._pipeline.work(*size, request)):
            return None
        seconds = self._extrapolated_s(request, size) * n
        if not fits(seconds, limit_s):
            remedy = self._smaller_request(request, size, limit_s / n, is_job=is_job)
            raise TooMuchWork(
                "The model cannot finish this request in time, even with nothing else to do.",
                value=f"about {seconds:.0f} s of work; a request may take {limit_s:g} s",
                remedy=remedy,
            )
        return seconds

    def record(self, request: ImageRequest, size: Size, timings_s: Mapping[str, float]) -> None:
        """Learn from a request that is done."""
        work = self._pipeline.work(*size, request)
        self._forecast.record(work, file_px(request, size, self._scale), timings_s)

    def _extrapolated_s(self, request: ImageRequest, size: Size) -> float:
        work = self._pipeline.work(*size, request)
        return self._forecast.seconds(work, file_px(request, size, self._scale)) or 0.0

    def _smaller_request(
        self, request: ImageRequest, size: Size, limit_s: float, *, is_job: bool
    ) -> str:
        """The largest similar request that fits: of less detail or fewer steps, else of a smaller
        picture.
        """
        if getattr(request, "detail", "working") == "full":
            working = request.model_copy(update={"detail": "working"})
            seconds = self._extrapolated_s(working, size)
            if fits(seconds, limit_s):
                job = "" if is_job else ", or make a job of it (Prefer: respond-async)"
                return f"Send detail=working, which takes about {seconds:.0f} s{job}."
        for steps in range(getattr(request, "steps", 1) - 1, 0, -1):
            if steps * getattr(request, "strength", 1.0) < 1:
                break
            seconds = self._extrapolated_s(request.model_copy(update={"steps": steps}), size)
            if fits(seconds, limit_s):
                return f"Send steps={steps} at most, which takes about {seconds:.0f} s."
        for percent in range(99, 0, -1) if any(size) else ():
            smaller = size.scaled(percent)
            if fits(self._extrapolated_s(request, smaller), limit_s):
                return f"Send a picture of at most {smaller.width_px} x {smaller.height_px} px."
        return "Use another model, or a faster machine."


def fits(seconds: float, limit_s: float) -> bool:
    """Whether so much work surely ends within the limit on an idle replica."""
    return seconds * _RESERVE <= limit_s


def file_px(request: ImageRequest, size: Size, scale: int) -> int:
    """Pixels of the upload or of the result, whichever has more; 1 without an upload."""
    if not any(size):
        return 1
    try:
        result = request.result_size(*size, scale)
    except InvalidParameter:  # of a smaller picture, which cannot have the size that is asked for
        result = size.width_px * scale, size.height_px * scale
    return max(math.prod(size), math.prod(result), 1)
