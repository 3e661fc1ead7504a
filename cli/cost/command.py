"""`imagen cost`: reads the files, has the bill made, and shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Output, make_table
from cli.cost.bill import MARKETS, bill, hours_of, lines_of, older_bill
from cli.cost.inputs import HOURS, PRICES, SPEEDS, TRAFFIC, Prices, Speeds, Traffic, load
from cli.ending import ending
from cli.paths import user_path
from cli.serving import Serve, say_unaccepted, serve_of
from deployments.catalogue import load_catalogue
from deployments.errors import ConfigError
from deployments.gpu.plan import Plan
from deployments.gpu.plan import plan as make_plan
from deployments.gpu.profiles import as_gpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cli.cost.bill import Bill, Hour, Line
    from cli.cost.inputs import OlderDesign
    from deployments.catalogue import Catalogue
    from deployments.registry import ModelSpec

_PRODUCTION = [Path("configs/models/production.yaml")]
_TITLES = {"spot": "spot", "on_demand": "on demand"}
_NOT_IN_IT = (
    "Not in it: load balancer, disks, network traffic beyond other_usd_per_month, tax, discounts,"
    " and GPUs that Serve starts for peaks within an hour."
)


def cost(
    traffic: Annotated[
        Path, typer.Argument(help="A day of requests, a YAML file as configs/traffic.yaml")
    ] = TRAFFIC,
    gpu: Annotated[str, typer.Option(help="t4, l4 or h100; any that the prices name")] = "l4",
    gpus: Annotated[
        int | None, typer.Option(min=1, max=64, help="Fit one replica of each model on this many")
    ] = None,
    prices: Annotated[Path, typer.Option(help="A YAML file as configs/prices.yaml")] = PRICES,
    models: Annotated[
        list[Path], typer.Option(help="A registry, a YAML file of models; may be repeated")
    ] = _PRODUCTION,
    serve: Serve = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else")
    ] = False,
) -> None:
    """Work out what a day's requests cost a month, and per 1,000 images, on spot and on demand.

    Exit codes: 0; 2 a file or an option is wrong; 9 the models do not fit the GPU.
    """
    output = Output(as_json=as_json)
    with ending(output):
        day = load(Traffic, traffic)
        priced = load(Prices, prices)
        catalogue = load_catalogue(*map(user_path, models))
        specs = _models_of(day, catalogue, serve_of(serve))
        made = make_plan(specs, as_gpu(gpu), gpus)
        lines = lines_of(day, made, load(Speeds, SPEEDS))
        report = _Report(day, priced, made, lines)
        report.show(output)
        say_unaccepted(specs, catalogue, output)
        output.emit(report.as_values())


def _models_of(
    traffic: Traffic, catalogue: Catalogue, serve: dict[str, list[str]]
) -> list[ModelSpec]:
    """The default model of each task of the requests, whatever its licence.

    Raises:
        ConfigError: a task has none.
    """
    served = {spec.task: spec for spec in reversed(catalogue.accepting().served(serve).models)}
    tasks = sorted({requests.task for requests in traffic.requests})
    for task in (one for one in tasks if one not in served):
        known = ", ".join(spec.name for spec in catalogue.models if spec.task is task)
        raise ConfigError(
            "No model is served for a task of the requests.",
            value=task,
            remedy=f"Name one by --serve {task}=NAME; the registry has {known or 'none'}.",
        )
    return [served[task] for task in tasks]


class _Report:
    """Everything that was read and worked out."""

    def __init__(self, traffic: Traffic, prices: Prices, made: Plan, lines: Sequence[Line]) -> None:
        self._traffic = traffic
        self._prices = prices
        self._made = made
        self._lines = lines
        self._hours = hours_of(lines, traffic)
        gpu = made.gpu.name
        self._machine = prices.machine_of(gpu)
        self._bills = {
            market: bill(self._hours, traffic, prices, gpu, market) for market in MARKETS
        }
        days = prices.hours_per_month / HOURS
        self._images = days * sum(line.images_a_day for line in lines)
        self._peak = max(hour.requests for hour in self._hours)
        self._peak_of_a_task = _peak_of_a_task(lines)

    # --- for people ---

    def show(self, output: Output) -> None:
        for table in (self._lines_table, self._hours_table, self._bill_table):
            output.show(table())
        if self._prices.older_designs:
            output.show(self._older_table())
        if any(line.source != "measured" for line in self._lines):
            output.show(
                "~ marks estimates: run `make bench-gpu` on that GPU, and write what it says into"
                f" {SPEEDS} (docs/cost.md)."
            )
        for name in dict.fromkeys(self._used_sources()):
            source = self._prices.source(name)
            output.show(f"Prices, {self._prices.region}, read {source.read}: {source.url}")
        output.show(_NOT_IN_IT)

    def _used_sources(self) -> list[str]:
        names = [self._machine, *self._traffic.always_on]
        names += [design.machine for design in self._prices.older_designs]
        machines = [self._prices.machine(name).source for name in names]
        return [*machines, self._prices.cluster.source]

    def _lines_table(self) -> Any:
        table = make_table(
            *("Task", "Pictures", "Model", "Works at", "Images/day", "GPU s/image", "From"),
            title=f"{self._traffic.name}: {self._made.gpus} x {self._made.gpu.label} hold one"
            f" replica of each model ({self._machine})",
        )
        for line in self._lines:
            about = "" if line.source == "measured" else "~"
            works_at = _size(line.working_px)
            if line.tiles > 1:
                works_at = f"{line.tiles} tiles of {works_at}"
            cells = [line.task, _size(line.size_px), line.model, works_at]
            seconds = f"{about}{line.seconds:.3g}"
            table.add_row(*cells, f"{line.images_a_day:g}", seconds, line.source)
        return table

    def _hours_table(self) -> Any:
        names = ("Hours", "Requests/h", "GPU s", "GPUs", "GPU hours")
        table = make_table(*names, title="Through the day: GPUs at a time, and hours billed")
        for first, last in _alike(self._hours):
            hours = self._hours[first : last + 1]
            table.add_row(
                f"{first}-{last + 1}",
                f"{hours[0].requests:g}",
                f"{sum(hour.gpu_seconds for hour in hours):.0f}",
                str(hours[0].gpus),
                f"{sum(hour.gpu_hours for hour in hours):.2f}",
            )
        seconds = sum(hour.gpu_seconds for hour in self._hours)
        billed = sum(hour.gpu_hours for hour in self._hours)
        requests = sum(hour.requests for hour in self._hours)
        table.add_row("day", f"{requests:g}", f"{seconds:.0f}", "", f"{billed:.2f}", style="bold")
        busy = seconds / (billed * 3600) if billed else 0
        table.caption = f"busy {busy:.0%} of the hours billed"
        table.caption_justify = "left"
        return table

    def _bill_table(self) -> Any:
        table = make_table(
            "USD a month",
            *(_TITLES[market] for market in MARKETS),
            title=f"{self._images:,.0f} images a month",
        )
        spot, on_demand = (self._bills[market] for market in MARKETS)
        always = " + ".join(f"{n} x {name}" for name, n in self._traffic.always_on.items())
        rows = (
            (f"GPUs: {self._machine}", spot.gpus, on_demand.gpus),
            (f"always on: {always or 'nothing'}", spot.always_on, on_demand.always_on),
            ("cluster", spot.cluster, on_demand.cluster),
            ("storage, logs, traffic", spot.other, on_demand.other),
        )
        for name, *amounts in rows:
            table.add_row(name, *map(_usd, amounts))
        table.add_row("total", *(_usd(one.total) for one in (spot, on_demand)), style="bold")
        each = [self._per_1000(one) for one in (spot, on_demand)]
        thousand = ["-" if one is None else f"{one:.2f}" for one in each]
        table.add_row("per 1,000 images", *thousand, style="bold")
        return table

    def _older_table(self) -> Any:
        table = make_table(
            *(
                "Older design",
                "as published",
                "spot",
                "on demand",
                "Images/h, claimed",
                "this peak",
            ),
            title="Beside it, in USD a month; at these prices with the machines that the T4 are in",
        )
        for design in self._prices.older_designs:
            claimed = _images_per_h(design)
            table.add_row(
                design.name,
                _range(design.published_usd_per_month),
                *(_range(older_bill(design, self._prices, market)) for market in MARKETS),
                _range(claimed) + (" of a task" if design.one_task_each else ""),
                f"{'held' if self._held(design) else 'not held'}, {self._peak_for(design):g}/h",
            )
        return table

    def _peak_for(self, design: OlderDesign) -> float:
        return self._peak_of_a_task if design.one_task_each else self._peak

    def _held(self, design: OlderDesign) -> bool:
        return _images_per_h(design)[1] >= self._peak_for(design)

    def _per_1000(self, one: Bill) -> float | None:
        return one.total / self._images * 1000 if self._images else None

    # --- for programs ---

    def as_values(self) -> dict[str, Any]:
        """Inputs and results, so that the arithmetic can be done again."""
        return {
            "traffic": self._traffic.model_dump(mode="json"),
            "prices": self._prices.model_dump(mode="json"),
            "gpu": self._made.gpu.name,
            "machine": self._machine,
            "lines": [_line_values(line) for line in self._lines],
            "hours": [_hour_values(hour) for hour in self._hours],
            "images_per_month": self._images,
            "usd_per_month": {market: _bill_values(self._bills[market]) for market in MARKETS},
            "usd_per_1000_images": {
                market: self._per_1000(self._bills[market]) for market in MARKETS
            },
            "older_designs": [self._older_values(one) for one in self._prices.older_designs],
        }

    def _older_values(self, design: OlderDesign) -> dict[str, Any]:
        return {
            "name": design.name,
            "published_usd_per_month": design.published_usd_per_month,
            "usd_per_month": {m: older_bill(design, self._prices, m) for m in MARKETS},
            "images_per_h": _images_per_h(design),
            "peak_per_h": self._peak_for(design),
            "held": self._held(design),
        }


def _line_values(line: Line) -> dict[str, Any]:
    return {
        "task": line.task,
        "model": line.model,
        "gpu_index": line.gpu_index,
        "size_px": line.size_px,
        "working_px": line.working_px,
        "tiles": line.tiles,
        "seconds": line.seconds,
        "source": line.source,
        "per_hour": line.by_hour,
    }


def _hour_values(hour: Hour) -> dict[str, Any]:
    return {
        "hour": hour.hour,
        "requests": hour.requests,
        "gpu_seconds": hour.gpu_seconds,
        "gpus": hour.gpus,
        "gpu_hours": hour.gpu_hours,
    }


def _bill_values(one: Bill) -> dict[str, float]:
    return {
        "gpus": one.gpus,
        "always_on": one.always_on,
        "cluster": one.cluster,
        "other": one.other,
        "total": one.total,
    }


def _images_per_h(design: OlderDesign) -> tuple[float, float]:
    """What the design claims to make, of one task if each machine has its own: least and most."""
    of_a_gpu = design.images_per_s_of_a_gpu * 3600
    if design.one_task_each:
        return of_a_gpu, of_a_gpu
    least, most = (n * of_a_gpu for n in design.machines)
    return least, most


def _peak_of_a_task(lines: Sequence[Line]) -> float:
    """The most requests of one task in an hour."""
    by_task: dict[str, list[Line]] = {}
    for line in lines:
        by_task.setdefault(line.task, []).append(line)
    return max(
        sum(line.by_hour[hour] for line in those)
        for those in by_task.values()
        for hour in range(HOURS)
    )


def _alike(hours: Sequence[Hour]) -> list[tuple[int, int]]:
    """First and last of neighbouring hours with as many requests and GPUs."""
    spans: list[tuple[int, int]] = []
    for hour in hours:
        before = hours[spans[-1][0]] if spans else None
        if before and (before.requests, before.gpus) == (hour.requests, hour.gpus):
            spans[-1] = (spans[-1][0], hour.hour)
        else:
            spans.append((hour.hour, hour.hour))
    return spans


def _size(size_px: tuple[int, int]) -> str:
    return f"{size_px[0]} x {size_px[1]}"


def _usd(amount: float) -> str:
    return f"{amount:,.0f}"


def _range(pair: tuple[float, float]) -> str:
    least, most = pair
    return _usd(least) if round(least) == round(most) else f"{_usd(least)} to {_usd(most)}"
