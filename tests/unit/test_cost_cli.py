"""`imagen cost`: its arithmetic, done again from what it prints, and the sources of its figures."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from cli.cost.bill import seconds_of, up_shares
from cli.cost.inputs import PRICES, SPEEDS, TRAFFIC, Prices, Speeds, Traffic, load
from cli.main import app
from deployments.errors import ConfigError
from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# As in docs/cost.md: five models with licences for commercial use, on one L4.
EXAMPLE = (
    *("--gpus", "1"),
    *("--serve", "upscale=upscale-realesrgan-general-x4v3"),
    *("--serve", "background=background-u2net"),
)
MARKETS = ("spot", "on_demand")


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["cost", *map(str, args)])


def values_of(*args: object) -> dict[str, Any]:
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return values_of(*EXAMPLE)


# ----------------------------------------------------------------------- the arithmetic, again


def expected(per_hour: Sequence[float], start_h: float, end_h: float) -> float:
    """Requests between two moments; the day comes again and again."""
    return sum(
        per_hour[hour % 24] * max(min(end_h, hour + 1) - max(start_h, hour), 0)
        for hour in range(math.floor(start_h), math.ceil(end_h))
    )


def test_the_gpus_of_every_hour_follow_from_the_printed_inputs(example: dict[str, Any]) -> None:
    traffic, lines = example["traffic"], example["lines"]
    lasts_h = (
        sum(traffic[f"{name}_s"] for name in ("node_start", "model_stays", "node_stays")) / 3600
    )
    assert {line["gpu_index"] for line in lines} == {0}  # as --gpus 1 says
    of_gpu = [sum(line["per_hour"][at] for line in lines) for at in range(24)]
    wanted: list[int] = []
    for hour in example["hours"]:
        at = hour["hour"]
        work_s = sum(line["per_hour"][at] * line["seconds"] for line in lines)
        assert hour["gpu_seconds"] == pytest.approx(work_s)
        busy = math.ceil(work_s / 3600 / traffic["busy_share"])
        wanted.append(max(busy, 1) if of_gpu[at] else 0)
        assert hour["gpus"] == wanted[-1]
    for at, hour in enumerate(example["hours"]):
        moments = [at + (minute + 0.5) / 60 for minute in range(60)]
        quiet = sum(math.exp(-expected(of_gpu, now - lasts_h, now)) for now in moments) / 60
        further = max(wanted[at] - 1, 0)
        gone = max(wanted[at - 1] - 1 - further, 0)
        assert hour["gpu_hours"] == pytest.approx(1 - quiet + further + gone * lasts_h, abs=0.005)


@pytest.mark.parametrize("market", MARKETS)
def test_the_bill_follows_from_the_printed_inputs(example: dict[str, Any], market: str) -> None:
    prices, traffic = example["prices"], example["traffic"]
    days = prices["hours_per_month"] / 24
    hourly = prices["machines"][example["machine"]][market]
    gpus = sum(hour["gpu_hours"] for hour in example["hours"]) * days * hourly
    always = 2 * prices["machines"]["e2-standard-8"]["on_demand"] * 730
    total = gpus + always + 0.10 * 730 + traffic["other_usd_per_month"]
    images = sum(sum(line["per_hour"]) for line in example["lines"]) * days
    assert example["usd_per_month"][market]["gpus"] == pytest.approx(gpus)
    assert example["usd_per_month"][market]["total"] == pytest.approx(total)
    assert example["images_per_month"] == pytest.approx(images)
    assert example["usd_per_1000_images"][market] == pytest.approx(1000 * total / images)


def test_older_designs_at_these_prices_count_the_machines_too(example: dict[str, Any]) -> None:
    workers, triton = example["older_designs"]
    t4 = example["prices"]["machines"]["n1-standard-8-t4"]
    assert workers["usd_per_month"]["spot"][0] == pytest.approx(5 * 730 * t4["spot"] + 70)
    assert triton["usd_per_month"]["on_demand"] == pytest.approx(
        [n * 730 * t4["on_demand"] + 95 for n in (1, 3)]
    )
    assert workers["images_per_h"] == pytest.approx([0.07 * 3600] * 2)  # each task has one worker
    assert (workers["peak_per_h"], workers["held"]) == (120, True)
    assert triton["images_per_h"][1] == pytest.approx(3 * 0.3 * 3600)
    assert (triton["peak_per_h"], triton["held"]) == (290, True)


def test_hours_billed_are_those_of_requests_at_random() -> None:
    """A lunch hour, an evening with few requests, and nothing in between."""
    traffic, days = load(Traffic, TRAFFIC), 2000
    per_hour = [100.0 if hour == 12 else 1.5 if hour > 19 else 0.0 for hour in range(24)]
    random = np.random.default_rng(7)
    hours = np.tile(np.arange(24.0), days) + np.repeat(np.arange(days) * 24.0, 24)
    moments_h = np.repeat(hours, random.poisson(np.tile(per_hour, days)))
    moments_h = np.sort(moments_h + random.random(len(moments_h)))
    # Billed from each request until the next one, or until the node has gone.
    billed_h = np.minimum(np.diff(moments_h), traffic.lasts_s / 3600).sum() / days
    assert sum(up_shares(per_hour, traffic)) == pytest.approx(billed_h, rel=0.02)


# --------------------------------------------------------------------------- what users change


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def day_of(folder: Path, *requests: tuple[str, Any], **further: Any) -> Path:
    """A file with these requests an hour, by task, and further keys."""
    those = [{"task": task, "size": [512, 512], "per_hour": n} for task, n in requests]
    return write(folder / "day.yaml", {"name": "a day", "requests": those} | further)


def test_much_work_needs_more_gpus_than_the_models_themselves(tmp_path: Path) -> None:
    values = values_of(day_of(tmp_path, ("comic", 9000)))
    seconds = values["lines"][0]["seconds"]
    assert values["hours"][3]["gpus"] == math.ceil(9000 * seconds / 3600 / 0.6) > 1
    # One worker has the whole task, so that four others do not help it.
    assert not values["older_designs"][0]["held"]


def test_a_busy_model_does_not_use_the_gpu_of_the_others(tmp_path: Path) -> None:
    values = values_of(day_of(tmp_path, ("upscale", 130), ("enhance", 1), ("comic", 1)))
    busy = next(line for line in values["lines"] if line["task"] == "upscale")
    alone = {line["gpu_index"] for line in values["lines"]} - {busy["gpu_index"]}
    assert alone
    assert values["hours"][3]["gpus"] >= math.ceil(130 * busy["seconds"] / 3600 / 0.6) + len(alone)


def test_a_burst_pays_for_the_time_that_its_gpus_stay(tmp_path: Path) -> None:
    for n, gpus in ((100, 1), (3000, 2)):
        burst = [n if hour == 9 else 0 for hour in range(24)]
        values = values_of(day_of(tmp_path, ("comic", burst)))
        most = values["hours"][9]["gpus"]
        assert most >= gpus
        # kuberay/README.md: half an hour and the length; the start comes on top.
        billed = sum(hour["gpu_hours"] for hour in values["hours"])
        assert billed == pytest.approx(most * (1 + 0.5 + 240 / 3600), rel=0.02)


def test_a_large_picture_is_enhanced_in_tiles_and_each_of_them_costs(tmp_path: Path) -> None:
    def line_of(*size_px: int) -> dict[str, Any]:
        asked = {"task": "enhance", "size": list(size_px), "per_hour": 10}
        day = write(tmp_path / "day.yaml", {"name": "a day", "requests": [asked]})
        return values_of(day)["lines"][0]

    small, large, huge = line_of(1024, 1024), line_of(4096, 4096), line_of(50_000, 50_000)
    assert (small["tiles"], large["tiles"]) == (1, 24)
    work_px = large["tiles"] * math.prod(large["working_px"])
    assert work_px > 4096 * 4096, "tiles overlap"
    assert large["seconds"] == pytest.approx(small["seconds"] * work_px / 1024**2)
    # More tiles than the model allows: it works at a smaller size.
    assert (huge["tiles"], huge["seconds"]) == (1, small["seconds"])


def test_a_picture_that_the_model_refuses_has_no_price(tmp_path: Path) -> None:
    asked = {"task": "upscale", "size": [4096, 4096], "per_hour": 10}
    done = run(write(tmp_path / "day.yaml", {"name": "a", "requests": [asked]}))
    assert done.exit_code
    assert "at most 262144 px" in " ".join(done.output.split())


def test_a_gpu_that_works_is_billed_even_where_it_stays_for_nobody(tmp_path: Path) -> None:
    gone = {"node_start_s": 0, "model_stays_s": 0, "node_stays_s": 0}
    values = values_of(day_of(tmp_path, ("comic", 100), **gone))
    [hour, *_] = values["hours"]
    assert hour["gpu_hours"] == pytest.approx(hour["gpu_seconds"] / 3600)


def test_an_hour_without_requests_costs_no_gpu(tmp_path: Path) -> None:
    quiet = day_of(tmp_path, ("comic", 0))
    values = values_of(quiet)
    assert values["usd_per_month"]["spot"]["gpus"] == 0
    always = 2 * 730 * values["prices"]["machines"]["e2-standard-8"]["on_demand"]
    assert values["usd_per_month"]["spot"]["total"] == pytest.approx(always + 73 + 20)
    assert values["usd_per_1000_images"] == {"spot": None, "on_demand": None}
    assert re.search(r"per 1,000 images +- +-", run(quiet).stdout)


def test_what_a_file_leaves_out_is_as_in_the_one_that_comes_with_it(tmp_path: Path) -> None:
    least, whole = (load(Traffic, one) for one in (day_of(tmp_path, ("comic", 1)), TRAFFIC))
    keys = {"name", "requests"}
    assert least.model_dump(exclude=keys) == whole.model_dump(exclude=keys)


def test_text_to_image_asks_for_its_model_and_is_counted(tmp_path: Path) -> None:
    day = day_of(tmp_path, ("generate", 10))
    refused = run(day)
    assert refused.exit_code == 2
    assert "--serve generate=NAME" in " ".join(refused.stderr.split())
    for model in ("generate-sdxl-base", "generate-sd21", "generate-lcm-dreamshaper7"):
        (line,) = values_of(day, "--serve", f"generate={model}")["lines"]
        assert line["model"] == model
        assert line["seconds"] > 0


def test_a_licence_that_is_not_accepted_is_named(example: dict[str, Any]) -> None:
    assert "background-rmbg14 is planned, but" in " ".join(run().stderr.split())
    assert "background-rmbg14" not in {line["model"] for line in example["lines"]}


def test_prices_without_older_designs_show_no_table_of_them(tmp_path: Path) -> None:
    prices = yaml.safe_load((ROOT / PRICES).read_text(encoding="utf-8"))
    del prices["older_designs"]
    shown = run("--prices", write(tmp_path / "prices.yaml", prices), *EXAMPLE)
    assert shown.exit_code == 0
    assert "Older design" not in shown.stdout


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_hour", math.inf),
        ("per_hour", True),
        ("per_hour", 1e300),
        ("always_on", {"e2-standard-8": -3}),
        ("always_on", {"e2-standard-8": True}),
        ("node_stays_s", math.nan),
    ],
)
def test_a_wrong_number_of_the_requests_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    further = {} if key == "per_hour" else {key: value}
    day = day_of(tmp_path, ("comic", value if key == "per_hour" else 1), **further)
    done = run(day)
    assert done.exit_code == 2
    assert key in done.stderr


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("machines|g2-standard-8|spot", math.inf, "machines.g2-standard-8.spot"),
        ("older_designs|0|machines", [-5, 1], "older_designs.0.machines"),
        ("older_designs|0|machines", [5, 1], "the first is the least"),
        ("older_designs|0|published_usd_per_month", [435, 365], "the first is the least"),
        ("machines|e2-standard-8|gpu", "l4", "several machines have gpu l4"),
    ],
)
def test_a_wrong_price_is_refused(tmp_path: Path, path: str, value: Any, word: str) -> None:
    prices = yaml.safe_load((ROOT / PRICES).read_text(encoding="utf-8"))
    node, (*steps, last) = prices, path.split("|")
    for step in steps:
        node = node[int(step) if isinstance(node, list) else step]
    node[last] = value
    done = run("--prices", write(tmp_path / "prices.yaml", prices), *EXAMPLE)
    assert done.exit_code == 2
    assert word in " ".join(done.stderr.split())


def test_prices_of_ones_own_are_taken(tmp_path: Path, example: dict[str, Any]) -> None:
    prices = yaml.safe_load((ROOT / PRICES).read_text(encoding="utf-8"))
    prices["machines"]["g2-standard-8"]["spot"] *= 2
    mine = values_of("--prices", write(tmp_path / "prices.yaml", prices), *EXAMPLE)
    before = example["usd_per_month"]
    assert mine["usd_per_month"]["spot"]["gpus"] == pytest.approx(2 * before["spot"]["gpus"])
    assert mine["usd_per_month"]["on_demand"] == before["on_demand"]


def test_wrong_files_and_unpriced_gpus_are_refused_by_name(tmp_path: Path) -> None:
    day = {"name": "x", "requests": [{"task": "comic", "size": [512, 512], "per_hour": [1, 2]}]}
    cases = (
        ((write(tmp_path / "short.yaml", day),), "requests.0.per_hour"),
        ((tmp_path / "none.yaml",), "No such file"),
        (("--gpu", "a100-40"), "The prices do not name this GPU"),
    )
    for args, words in cases:
        done = run(*args)
        assert done.exit_code == 2
        assert words in done.stderr
        assert str(tmp_path) not in done.stderr


# ----------------------------------------------------------------------- where figures come from


def test_measured_seconds_are_those_of_the_benchmark_and_no_others() -> None:
    speeds = load(Speeds, SPEEDS)
    for one in speeds.measured:
        file = ROOT / "benchmarks/results" / one.file
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        per_image_s = 1 / cells[f"{one.cell}/ours"]["images_per_s"]
        assert one.seconds == pytest.approx(per_image_s, rel=0.005)
        tflop = next(m.tflop for m in speeds.models if m.model == one.model)
        assert tflop == pytest.approx(cells[f"{one.cell}/flops"]["image"] / 1e12, rel=0.005)
        assert seconds_of(speeds, one.model, one.size_px, one.gpu) == (one.seconds, "measured")


def test_what_was_not_measured_says_estimate() -> None:
    speeds = load(Speeds, SPEEDS)
    seconds, source = seconds_of(speeds, "enhance-sdxl-refiner", (1024, 1024), "l4")
    # Of L4 and H100, memory is further apart than arithmetic: 300 and 3,350 GB/s.
    assert seconds == pytest.approx(0.515 * 3350 / 300, rel=0.01)
    assert source.startswith("estimate")
    half, source = seconds_of(speeds, "comic-ghibli", (512, 256), "h100")
    assert (half, source) == (pytest.approx(0.159 / 2), "estimate, from 512 x 512")
    with pytest.raises(ConfigError, match="how fast"):
        seconds_of(speeds, "comic-ghibli", (512, 512), "t3")


def test_every_price_has_a_source_with_a_date() -> None:
    prices = load(Prices, PRICES)
    for machine in prices.machines.values():
        assert prices.source(machine.source).url.startswith("https://")
        assert machine.spot < machine.on_demand


def test_the_guide_of_migration_has_these_prices() -> None:
    text, prices = (ROOT / "docs/migration.md").read_text(encoding="utf-8"), load(Prices, PRICES)
    for name in ("n1-standard-8-t4", "g2-standard-8"):
        month = {m: prices.hours_per_month * getattr(prices.machine(name), m) for m in MARKETS}
        assert f"{month['spot']:.0f} spot, {month['on_demand']:.0f} on demand" in text


def test_the_times_that_nodes_stay_are_those_of_the_manifests() -> None:
    traffic = load(Traffic, TRAFFIC)
    base = yaml.safe_load((ROOT / "configs/gke.yaml").read_text(encoding="utf-8"))["base"]
    scaling = base["serve"]["model"]["autoscaling_config"]
    assert traffic.model_stays_s == scaling["downscale_to_zero_delay_s"]
    text = (ROOT / "kuberay/gke/compute-class.yaml").read_text(encoding="utf-8")
    waits_min = yaml.safe_load(text)["spec"]["autoscalingPolicy"]["consolidationDelayMinutes"]
    idle_s = base["models"]["group"]["idleTimeoutSeconds"]
    assert traffic.node_stays_s == idle_s + 60 * waits_min


def test_the_documentation_shows_what_the_command_prints() -> None:
    text = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
    shown = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0]
    printed = run(*EXAMPLE).stdout
    assert [line.rstrip() for line in shown.splitlines() if line.strip()] == [
        line.rstrip() for line in printed.splitlines() if line.strip()
    ]
