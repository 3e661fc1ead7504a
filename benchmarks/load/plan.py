"""The plan of a load: its requests, their arrivals, and the kind of server."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, FiniteFloat, ValidationError, model_validator

from deployments.errors import ConfigError
from deployments.settings import Strict, file_fault, resolve
from deployments.tasks import Task

Scalar = bool | int | float | str
Protocol = Literal["multipart", "raw", "kserve"]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Side = Annotated[int, Field(ge=1, le=8192)]
KEYS_REMEDY = "Correct the named keys; docs/benchmarks.md explains each."


class Distribution(Strict):
    """The values of a parameter; exactly one of the first four. A bare value is a constant.

    Attributes:
        constant: this value.
        uniform: a random number from the first up to the second, to four decimals.
        integers: a random whole number from the first up to the second, both included.
        choice: a random one of these.
        weights: relative frequencies of the choices; None makes them equal.
    """

    constant: Scalar | None = None
    uniform: tuple[FiniteFloat, FiniteFloat] | None = None
    integers: tuple[int, int] | None = None
    choice: tuple[Scalar, ...] | None = Field(default=None, min_length=1)
    weights: tuple[Positive, ...] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = (self.constant, self.uniform, self.integers, self.choice)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError(
                "give one of a value, {uniform: [a, b]}, {integers: [a, b]}, {choice: [...]}"
            )
        for bounds in (self.uniform, self.integers):
            if bounds and bounds[0] > bounds[1]:
                raise ValueError(f"[{bounds[0]}, {bounds[1]}] is descending; swap the two")
        if self.weights and len(self.weights) != len(self.choice or ()):
            raise ValueError("weights needs one number for each value of choice")
        return self


def _constant(value: Any) -> Any:
    return value if isinstance(value, dict | Distribution) else {"constant": value}


class PhotoSize(Strict):
    """A photo size in px, and its relative frequency.

    Attributes:
        size: width and height; with `up_to`, their minimum.
        up_to: their maximum; each request draws both sides, evenly distributed.
        weight: relative frequency.
    """

    size: tuple[Side, Side]
    up_to: tuple[Side, Side] | None = None
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _upwards(self) -> Self:
        if self.up_to and (self.up_to[0] < self.size[0] or self.up_to[1] < self.size[1]):
            raise ValueError(f"up_to {list(self.up_to)} is below size {list(self.size)}")
        return self


def _bare_size(value: Any) -> Any:
    return {"size": value} if isinstance(value, list | tuple) else value


Parameter = Annotated[Distribution, BeforeValidator(_constant)]
Sizes = tuple[Annotated[PhotoSize, BeforeValidator(_bare_size)], ...]


class Entry(Strict):
    """One kind of request in the mix.

    Attributes:
        weight: relative frequency.
        task: the task, whose route is used; or
        path: another path.
        parameters: name to distribution.
        sizes: photo sizes; empty takes the plan's.
    """

    weight: Positive = 1.0
    task: Task | None = None
    path: str | None = Field(default=None, pattern="^/")
    parameters: dict[str, Parameter] = Field(default={})
    sizes: Sizes = ()

    @model_validator(mode="after")
    def _one_route(self) -> Self:
        if (self.task is None) == (self.path is None):
            raise ValueError("give either task or path")
        return self

    @property
    def label(self) -> str:
        """Its name in reports."""
        return str(self.task or self.path)


class Target(Strict):
    """The server's address and protocol.

    Attributes:
        url: its address.
        protocol: multipart is Imagen's own; raw sends the image as the body and parameters in the
            query; kserve is the KServe (Triton) v2 protocol with binary tensors.
        paths: paths by task that replace the protocol's.
        shape: of both kserve inputs, one element each; [1, 1] for a Triton model that batches.
    """

    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/?#]+")
    protocol: Protocol = "multipart"
    paths: dict[Task, Annotated[str, Field(pattern="^/")]] = Field(default={})
    shape: tuple[Literal[1], ...] = Field(default=(1,), min_length=1)


class Plan(Strict):
    """A load. A plan makes the same requests for every server.

    Attributes:
        name: its name in reports.
        seed: of every random choice.
        mode: open sends at Poisson arrivals, however slow the server is; closed has a fixed number
            of clients, each of which waits for its answer before it sends again.
        rate_per_s: arrivals of an open plan.
        concurrency: clients of a closed plan.
        requests: number of counted requests; or
        duration_s: how long new ones are sent.
        warm_up: requests sent before the clock starts, the entries of the mix in turn.
        timeout_s: how long a client waits.
        disconnect_share: share of the clients that leave early, in [0, 1].
        disconnect_after_s: range of the times at which they leave, from sending.
        slowdown: first send the requests one by one, and report latency over unloaded latency.
        slowdown_requests: how many of them; None for all.
        photo: what photos are cut from; relative to the project.
        sizes: photo sizes of entries without sizes of their own.
        mix: kinds of requests.
        target: the server.
    """

    name: str = Field(min_length=1)
    seed: int = 0
    mode: Literal["open", "closed"]
    rate_per_s: Positive | None = None
    concurrency: int | None = Field(default=None, ge=1)
    requests: int | None = Field(default=None, ge=1)
    duration_s: Positive | None = None
    warm_up: int = Field(default=0, ge=0)
    timeout_s: Positive = 60.0
    disconnect_share: float = Field(default=0.0, ge=0, le=1)
    disconnect_after_s: (
        tuple[Annotated[FiniteFloat, Field(ge=0)], Annotated[FiniteFloat, Field(ge=0)]] | None
    ) = None
    slowdown: bool = False
    slowdown_requests: int | None = Field(default=None, ge=1)
    photo: Path = Path("docs/photo.jpg")
    sizes: Sizes = ()
    mix: tuple[Entry, ...] = Field(min_length=1)
    target: Target = Target()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for mode, key, other in (
            ("open", "rate_per_s", "concurrency"),
            ("closed", "concurrency", "rate_per_s"),
        ):
            if self.mode == mode and (getattr(self, key) is None or getattr(self, other)):
                raise ValueError(f"mode {mode} needs {key}, and no {other}")
        if (self.requests is None) == (self.duration_s is None):
            raise ValueError("give either requests or duration_s")
        if bare := [entry.label for entry in self.mix if not (entry.sizes or self.sizes)]:
            raise ValueError(f"sizes: {bare[0]} has no photo sizes; give some there or in the plan")
        return self

    @model_validator(mode="after")
    def _parts_that_need_each_other(self) -> Self:
        stay_s = self.disconnect_after_s
        if self.disconnect_share and stay_s is None:
            raise ValueError("disconnect_share needs disconnect_after_s, as in [0.1, 2]")
        if stay_s and stay_s[0] > stay_s[1]:
            raise ValueError(
                f"disconnect_after_s: [{stay_s[0]}, {stay_s[1]}] is descending; swap the two"
            )
        if self.slowdown_requests and not self.slowdown:
            raise ValueError("slowdown_requests needs slowdown: true")
        endless = self.mode == "closed" and self.duration_s
        if endless and any(kind.up_to for kind in self.photo_sizes):
            raise ValueError(
                "sizes: in a closed plan up_to needs requests, because photos are made first"
            )
        if self.slowdown and endless and not self.slowdown_requests:
            raise ValueError(
                "slowdown needs slowdown_requests in a closed plan with duration_s, whose number of"
                " requests is not known before the run"
            )
        return self

    @property
    def photo_sizes(self) -> Sizes:
        """All photo sizes of the plan and its entries."""
        return (*self.sizes, *(kind for entry in self.mix for kind in entry.sizes))

    def change(self, **values: Any) -> Plan:
        """This plan with some values replaced, checked; `target` may hold some of its keys.

        Raises:
            ConfigError: as `load_plan`.
        """
        target = self.target.model_dump() | dict(values.pop("target", {}))
        return parse_plan(self.model_dump() | values | {"target": target}, "The changed plan")

    @cached_property
    def fingerprint(self) -> str:
        """A hash that is equal for plans with the same requests, whatever their arrivals."""
        kept = self.model_dump(mode="json", include={"seed", "photo", "sizes", "mix"})
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def load_plan(path: Path) -> Plan:
    """Read a plan from a YAML file, relative to the working folder, else to the project.

    Raises:
        ConfigError: unreadable, or an unknown key or value.
    """
    try:
        place = path if path.exists() else resolve(path)
        values = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no date
        raise ConfigError(
            f"The plan cannot be read: {file_fault(error)}.",
            value=path,
            remedy="Name a YAML file, such as benchmarks/plans/smoke.yaml.",
        ) from error
    return parse_plan(values, f"The plan {path}")


def parse_plan(values: Any, where: str) -> Plan:
    """Build a plan from plain values.

    Raises:
        ConfigError: naming each wrong key, in `where`.
    """
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        found = "; ".join(_problem(detail) for detail in error.errors())
    raise ConfigError(f"{where} is wrong: {found}.", remedy=KEYS_REMEDY)


def _problem(detail: Any) -> str:
    key = ".".join(map(str, detail["loc"])) or "the file"
    if detail["type"] == "extra_forbidden":
        return f"{key}: no such key"
    if detail["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {detail['msg'].removeprefix('Value error, ')}"
