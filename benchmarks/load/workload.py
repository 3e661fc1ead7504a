"""The requests of a plan, as data.

Request i depends on the plan's seed and on i alone. Each of its choices has a random stream of its
own, so that a change of rate, length or share of leavers leaves every other choice as it was.
"""

from __future__ import annotations

import io
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from deployments.errors import ConfigError
from deployments.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.load.plan import Distribution, Entry, Plan, Scalar, Sizes
    from deployments.tasks import Task

_JPEG_QUALITY = 90
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Request:
    """One request, independent of the server's protocol.

    Attributes:
        index: its number; negative in the warm-up.
        label: task or path, in reports.
        task, path: its target; one of them is None.
        size: of the photo, in px.
        parameters: name to value.
        arrival_s: when it is due, in seconds after the start; None in a closed plan.
        leaves_after_s: seconds after which its client disconnects; None if it stays.
    """

    index: int
    label: str
    task: Task | None
    path: str | None
    size: Size
    parameters: Mapping[str, Scalar]
    arrival_s: float | None = None
    leaves_after_s: float | None = None


def requests(plan: Plan) -> Iterator[Request]:
    """The counted requests in order; endless for a closed plan with a duration."""
    weights = [entry.weight for entry in plan.mix]
    for index, arrival_s in enumerate(_arrivals(plan)):
        entry = _stream(plan, index, "entry").choices(plan.mix, weights)[0]
        yield _request(plan, entry, index, arrival_s)


def warm_up(plan: Plan) -> list[Request]:
    """The requests before the clock starts: the entries of the mix in turn."""
    turns = itertools.islice(itertools.cycle(plan.mix), plan.warm_up)
    return [_request(plan, entry, -1 - turn, None) for turn, entry in enumerate(turns)]


def photos(plan: Plan) -> dict[Size, bytes]:
    """One JPEG of each size the plan may use, cropped and scaled from its photo.

    Raises:
        ConfigError: the photo cannot be read.
    """
    sizes = {kind.size for kind in plan.photo_sizes if not kind.up_to}
    if any(kind.up_to for kind in plan.photo_sizes):
        sizes |= {request.size for request in (*warm_up(plan), *requests(plan))}
    try:
        with Image.open(resolve(plan.photo)) as file:
            photo = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(
            "The plan's photo cannot be read.", value=plan.photo, remedy="Name a picture file."
        ) from error
    return {size: _jpeg(photo, size) for size in sizes}


def _jpeg(photo: Image.Image, size: Size) -> bytes:
    buffer = io.BytesIO()
    ImageOps.fit(photo, size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _arrivals(plan: Plan) -> Iterator[float | None]:
    if plan.rate_per_s is None:
        yield from (
            itertools.repeat(None, plan.requests) if plan.requests else itertools.repeat(None)
        )
        return
    gaps = random.Random(f"{plan.seed}/arrivals")
    arrival_s = 0.0
    for _ in itertools.count() if plan.requests is None else range(plan.requests):
        arrival_s += gaps.expovariate(plan.rate_per_s)
        if plan.duration_s is not None and arrival_s > plan.duration_s:
            return
        yield arrival_s


def _request(plan: Plan, entry: Entry, index: int, arrival_s: float | None) -> Request:
    size = _size(entry.sizes or plan.sizes, _stream(plan, index, "size"))
    parameters = {
        name: _draw(distribution, _stream(plan, index, f"parameter/{name}"))
        for name, distribution in entry.parameters.items()
    }
    leaves_after_s = None
    leaving = _stream(plan, index, "leaving")
    if index >= 0 and plan.disconnect_after_s and leaving.random() < plan.disconnect_share:
        leaves_after_s = leaving.uniform(*plan.disconnect_after_s)
    return Request(
        index=index,
        label=entry.label,
        task=entry.task,
        path=entry.path,
        size=size,
        parameters=parameters,
        arrival_s=arrival_s,
        leaves_after_s=leaves_after_s,
    )


def _size(kinds: Sizes, stream: random.Random) -> Size:
    kind = stream.choices(kinds, [kind.weight for kind in kinds])[0]
    if kind.up_to is None:
        return kind.size
    (width, height), (most_width, most_height) = kind.size, kind.up_to
    return stream.randint(width, most_width), stream.randint(height, most_height)


def _stream(plan: Plan, index: int, purpose: str) -> random.Random:
    # A text seeds the same stream on every machine and in every run.
    return random.Random(f"{plan.seed}/{index}/{purpose}")


def _draw(distribution: Distribution, stream: random.Random) -> Scalar:
    if distribution.uniform:
        return round(stream.uniform(*distribution.uniform), 4)
    if distribution.integers:
        return stream.randint(*distribution.integers)
    if distribution.choice:
        return stream.choices(distribution.choice, distribution.weights)[0]
    assert distribution.constant is not None
    return distribution.constant
