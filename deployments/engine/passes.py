"""A network's passes: prepared for a short list of shapes, plain for every other.

To prepare a shape is to compile the network for it, to record its pass as a CUDA graph, or both. It
happens before the model is ready: never under traffic. A prepared pass copies its inputs to where
the network reads them, and gives the same output as a plain one up to rounding.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deployments.engine.device import finish_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.graphs import Recorder, Replay

    Tensors = dict[str, torch.Tensor]
    Forward = Callable[[Tensors], torch.Tensor]
    Shape = tuple[torch.Size, ...]

_TRIES = 3
_GAIN = 0.98
"""A prepared pass is used where it takes at most this much of a plain one's time."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A pass of one shape and number of rows.

    Attributes:
        rows: that it always works on.
        inputs: that it reads, with `rows` rows.
        replay: works on them.
        output: that every replay overwrites.
    """

    rows: int
    inputs: Tensors
    replay: Replay
    output: torch.Tensor

    def __call__(self, tensors: Tensors) -> torch.Tensor:
        """The output for up to `rows` rows; what fills the rest of the inputs does not matter."""
        for name, tensor in tensors.items():
            self.inputs[name][: len(tensor)].copy_(tensor)
        self.replay()
        return self.output[: rows_of(tensors)]


class Passes:
    """Calls one network. For one thread at a time.

    Args:
        plain: the network's output for named tensors that all have a row in their first dimension.
    """

    def __init__(self, plain: Forward) -> None:
        self._plain = plain
        self._chosen: dict[tuple[Shape, int], Forward] = {}

    @torch.inference_mode()
    def __call__(self, tensors: Tensors) -> torch.Tensor:
        """The network's output, which the next call may overwrite."""
        chosen = self._chosen.get((_shape(tensors), rows_of(tensors)))
        return (chosen or self._plain)(tensors)

    @property
    def prepared(self) -> int:
        """Shapes and numbers of rows that run prepared."""
        return len(self._chosen)

    def clear(self) -> None:
        """Run every pass plain, because the weights move."""
        self._chosen.clear()

    @torch.inference_mode()
    def prepare(
        self,
        examples: Sequence[Tensors],
        counts: Sequence[int],
        *,
        forward: Forward | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Prepare every example's shape for some numbers of rows, and measure which of them pay.

        Args:
            examples: a row of each shape, the largest first.
            counts: numbers of rows, ascending. Between two of them a pass is filled up to the next
                where that is quicker.
            forward: the compiled network; None for the plain one.
            recorder: records each pass; None where passes are called.
        """
        work, sizes, wanted = forward or self._plain, dict[int, int](), list(counts)
        for example in examples:
            largest = _repeat(example, counts[-1])
            passes: dict[int, Forward] = {}
            for count in reversed(wanted):
                if one := self._prepared(_first(largest, count), work, recorder):
                    passes[count] = one
            # What pays for the first shape pays for the others: they differ little.
            if not sizes or not set(sizes.values()) <= set(passes):
                sizes = self._choose_sizes(largest, passes)
                wanted = sorted(set(sizes.values())) or wanted
            self._chosen |= {(_shape(largest), n): passes[m] for n, m in sizes.items()}

    def _prepared(
        self, inputs: Tensors, work: Forward, recorder: Recorder | None
    ) -> Forward | None:
        if recorder is None:
            work(inputs)  # compiles
            return work
        recorded = recorder.record(lambda: work(inputs))
        return Prepared(rows_of(inputs), inputs, *recorded) if recorded else None

    def _choose_sizes(self, largest: Tensors, passes: dict[int, Forward]) -> dict[int, int]:
        """By number of rows, the prepared number that is quicker than a plain pass."""
        sizes: dict[int, int] = {}
        for count in range(1, rows_of(largest) + 1):
            inputs = {name: tensor.clone() for name, tensor in _first(largest, count).items()}
            size = min((size for size in passes if size >= count), default=0)
            if size and _seconds(lambda i=inputs, s=size: passes[s](i)) <= _GAIN * _seconds(
                lambda i=inputs: self._plain(i)
            ):
                sizes[count] = size
        return sizes


def rows_of(tensors: Tensors) -> int:
    """How many rows the tensors have."""
    return len(next(iter(tensors.values())))


def _shape(tensors: Tensors) -> Shape:
    """Of one row."""
    return tuple(tensor.shape[1:] for tensor in tensors.values())


def _first(tensors: Tensors, count: int) -> Tensors:
    return {name: tensor[:count] for name, tensor in tensors.items()}


def _repeat(example: Tensors, count: int) -> Tensors:
    return {
        name: tensor[:1].expand(count, *tensor.shape[1:]).contiguous()
        for name, tensor in example.items()
    }


def _seconds(work: Callable[[], Any]) -> float:
    """The quickest of a few tries, after one that does not count."""
    times: list[float] = []
    for _ in range(_TRIES + 1):
        finish_stream()
        start_s = time.perf_counter()
        work()
        finish_stream()
        times.append(time.perf_counter() - start_s)
    return min(times[1:])
