"""What a case of the torture set is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from benchmarks.torture.scenes import Pixels
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.torture.arithmetic import Colour

Judge = Callable[[Pixels], str]
Form = Literal["plain", "image[]", "preamble", "padded"]


@dataclass(frozen=True, slots=True)
class Patch:
    """A place in the result, and its colour.

    Attributes:
        x, y: of its centre, 0 to 1 of the width and the height.
        colour: in sRGB.
    """

    x: float
    y: float
    colour: Colour


@dataclass(frozen=True, slots=True)
class Case:
    """One request.

    Attributes:
        name: of it.
        file: the picture.
        patches: of the result; empty where only the answer counts.
        note: a code that the result must carry, or several with | of which one will do; empty for
            any.
        refused: whether the right answer is a refusal with the status 400 or 422.
        task, fields: what is asked for.
        form: how the form is written.
        media_type: of the result; empty for any.
        is_grey: whether all channels of the result are equal.
        judge: says what is wrong with the result's `H x W x 4` straight colours and alpha; empty if
            nothing is. None where patches say enough.
    """

    name: str
    file: bytes
    patches: tuple[Patch, ...] = ()
    note: str = ""
    refused: bool = False
    task: Task = Task.UPSCALE
    fields: Mapping[str, str] = field(default_factory=dict[str, str])
    form: Form = "plain"
    media_type: str = ""
    is_grey: bool = False
    judge: Judge | None = None


def limit(what: str, found: float, most: float) -> str:
    """What is wrong if a figure is above its limit."""
    return "" if found <= most else f"{what} is {found:.1f}, at most {most:g} is right"


def first(*wrongs: str) -> str:
    """The first thing that is wrong, if any."""
    return next((wrong for wrong in wrongs if wrong), "")
