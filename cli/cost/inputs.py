"""The files that `imagen cost` reads: requests, prices, and what an image takes of a GPU."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from cli.paths import user_path
from deployments.errors import ConfigError
from deployments.settings import Strict, file_fault, parse_settings, resolve
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Sequence

HOURS = 24
TRAFFIC = Path("configs/traffic.yaml")
PRICES = Path("configs/prices.yaml")
SPEEDS = Path("configs/gpu_speeds.yaml")
Size = tuple[PositiveInt, PositiveInt]
F = TypeVar("F", bound=Strict)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"write a number, not {str(value).lower()}")
    return value


def _ordered(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    if pair[0] > pair[1]:
        raise ValueError("the first is the least, the second the most")
    return pair


# With a largest value, so that no sum of them overflows; it also refuses infinity and NaN.
_LARGEST = 1e9
Number = Annotated[float, Field(ge=0, le=_LARGEST), BeforeValidator(_no_bool)]
Positive = Annotated[float, Field(gt=0, le=_LARGEST), BeforeValidator(_no_bool)]
Count = Annotated[int, Field(ge=0, le=_LARGEST), BeforeValidator(_no_bool)]


def _day(value: Any) -> Any:
    """One number is that of every hour."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return [value] * HOURS if number else value


class Requests(Strict):
    """Requests of one task and size.

    Attributes:
        task: of the API.
        size: width and height of the pictures, px.
        per_hour: requests in each hour of the day.
    """

    task: Task
    size: Size
    per_hour: Annotated[
        tuple[Number, ...],
        Field(min_length=HOURS, max_length=HOURS),
        BeforeValidator(_day),
    ]


class Traffic(Strict):
    """A day of requests, and the service that they meet; configs/traffic.yaml explains the keys."""

    name: str
    requests: list[Requests] = Field(min_length=1)
    model_stays_s: Number = 900
    node_stays_s: Number = 900
    node_start_s: Number = 240
    busy_share: float = Field(default=0.6, ge=0.01, le=1)
    always_on: dict[str, Count] = Field(default={"e2-standard-8": 2})
    other_usd_per_month: Number = 20

    @property
    def lasts_s(self) -> float:
        """How long a GPU node is billed for a request that comes alone."""
        return self.node_start_s + self.model_stays_s + self.node_stays_s


class Source(Strict):
    """Where a price was read, and when."""

    url: str
    read: datetime.date


class Machine(Strict):
    """Dollars an hour; `gpu` is a name of `imagen plan --gpu`, for a machine with one GPU."""

    on_demand: Positive
    spot: Positive
    source: str
    gpu: str = ""


class ClusterPrice(Strict):
    """Of the cluster's management."""

    usd_per_hour: Number
    source: str


class OlderDesign(Strict):
    """A design to compare with, always on. Pairs are the least and the most.

    Attributes:
        images_per_s_of_a_gpu: as its own page claims.
        one_task_each: each machine serves one task, so that one must hold that task's peak.
    """

    name: str
    published_usd_per_month: Annotated[tuple[Number, Number], AfterValidator(_ordered)]
    machine: str
    machines: Annotated[tuple[Count, Count], AfterValidator(_ordered)]
    other_usd_per_month: Number
    images_per_s_of_a_gpu: Positive
    one_task_each: bool = False


class Prices(Strict):
    """Prices with their sources."""

    region: str
    hours_per_month: Positive
    sources: dict[str, Source]
    machines: dict[str, Machine]
    cluster: ClusterPrice
    older_designs: list[OlderDesign] = Field(default_factory=list[OlderDesign])

    @model_validator(mode="after")
    def _one_machine_for_each_gpu(self) -> Self:
        gpus = [one.gpu for one in self.machines.values() if one.gpu]
        if twice := sorted({gpu for gpu in gpus if gpus.count(gpu) > 1}):
            raise ValueError(f"several machines have gpu {', '.join(twice)}: keep one of them")
        return self

    def machine(self, name: str) -> Machine:
        """The price of a machine.

        Raises:
            ConfigError: it has none.
        """
        if found := self.machines.get(name):
            return found
        raise _unpriced("machine", name, self.machines)

    def machine_of(self, gpu: str) -> str:
        """The name of the machine with one GPU of that type.

        Raises:
            ConfigError: none is priced.
        """
        by_gpu = {one.gpu: name for name, one in self.machines.items() if one.gpu}
        if found := by_gpu.get(gpu):
            return found
        raise _unpriced("GPU", gpu, by_gpu)

    def source(self, name: str) -> Source:
        """Where a price comes from.

        Raises:
            ConfigError: the file does not say.
        """
        if found := self.sources.get(name):
            return found
        raise _unpriced("source", name, self.sources)


class GpuData(Strict):
    """Of a data sheet."""

    tflops: Positive
    memory_gb_per_s: Positive


class Operations(Strict):
    """Operations of one image at one working size."""

    model: str
    size_px: Size
    tflop: Positive
    request: str = ""


class MeasuredSpeed(Strict):
    """Seconds an image took, and where that is recorded."""

    model: str
    gpu: str
    size_px: Size
    seconds: Positive
    file: str = Field(alias="from")
    cell: str


class Reference(Strict):
    """The measurement that estimates start from."""

    gpu: str
    model: str


class Speeds(Strict):
    """What images take of GPUs."""

    gpus: dict[str, GpuData]
    reference: Reference
    models: list[Operations]
    measured: list[MeasuredSpeed]


def load(kind: type[F], path: Path) -> F:
    """Read one of these files, relative to the working folder, else to the project.

    Raises:
        ConfigError: unreadable, or naming each wrong key.
    """
    try:
        values: Any = yaml.safe_load(resolve(user_path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The file cannot be read: {file_fault(error)}.",
            value=path.name,
            remedy=f"Name a YAML file such as {TRAFFIC} or {PRICES}.",
        ) from error
    return parse_settings(kind, values, f"The file {path.name}")


def _unpriced(what: str, name: str, known: Sequence[str] | dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"The prices do not name this {what}.",
        value=name,
        remedy=f"Known are {', '.join(known)}; add it to a copy of {PRICES}, and give --prices.",
    )
