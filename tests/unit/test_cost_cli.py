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

from cli.cost.bill import seconds_of, up_share
from cli.cost.inputs import PRICES, SPEEDS, TRAFFIC, Prices, Speeds, Traffic, load
from cli.main import app
from deployments.errors import ConfigError
from deployments.settings import ROOT

if TYPE_CHECKING:
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


def test_the_gpus_of_every_hour_follow_from_the_printed_inputs(example: dict[str, Any]) -> None:
    traffic, lines = example["traffic"], example["lines"]
    stays_s = traffic["model_stays_s"] + traffic["node_stays_s"]
    for hour in example["hours"]:
        at = hour["hour"]
        work_s = sum(line["per_hour"][at] * line["seconds"] for line in lines)
        assert hour["gpu_seconds"] == pytest.approx(work_s)
        rates = [
            sum(line["per_hour"][at] for line in lines if line["gpu_index"] == gpu) / 3600
            for gpu in {line["gpu_index"] for line in lines}
        ]
        awake = [rate for rate in rates if rate]
        wanted = max(len(awake), math.ceil(work_s / 3600 / traffic["busy_share"]))
        assert hour["gpus"] == wanted
        # Up for a busy period and its start, down until the next request: means of both.
        up_s = [(math.exp(r * stays_s) - 1) / r + traffic["node_start_s"] for r in awake]
        shares = [up / (up + 1 / r) for up, r in zip(up_s, awake, strict=True)]
        assert hour["gpu_hours"] == pytest.approx(sum(shares) + wanted - len(awake))


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
    assert workers["images_per_h"][1] == pytest.approx(5 * 0.07 * 3600)


def test_the_share_of_time_that_a_node_is_up_is_that_of_requests_at_random() -> None:
    traffic = load(Traffic, TRAFFIC)
    rate, stays_s = 1 / 1200, 1500.0
    gaps = np.random.default_rng(7).exponential(1 / rate, 40_000)
    # The node goes down once a gap is longer than it stays, and starts at the next request.
    quiet = gaps[gaps > stays_s]
    down_s = float((quiet - stays_s).sum())
    up_s = float(gaps.sum()) - down_s + traffic.node_start_s * len(quiet)
    assert up_share(rate, traffic) == pytest.approx(up_s / (up_s + down_s), rel=0.02)


# --------------------------------------------------------------------------- what users change


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_much_work_needs_more_gpus_than_the_models_themselves(tmp_path: Path) -> None:
    busy = {"name": "busy", "requests": [{"task": "comic", "size": [512, 512], "per_hour": 9000}]}
    values = values_of(write(tmp_path / "busy.yaml", busy))
    seconds = values["lines"][0]["seconds"]
    assert values["hours"][3]["gpus"] == math.ceil(9000 * seconds / 3600 / 0.6) > 1


def test_an_hour_without_requests_costs_no_gpu(tmp_path: Path) -> None:
    quiet = {"name": "quiet", "requests": [{"task": "comic", "size": [512, 512], "per_hour": 0}]}
    values = values_of(write(tmp_path / "quiet.yaml", quiet))
    assert values["usd_per_month"]["spot"]["gpus"] == 0
    assert values["usd_per_month"]["spot"]["total"] == pytest.approx(73)  # the cluster


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


def test_the_times_that_nodes_stay_are_those_of_the_manifests() -> None:
    traffic = load(Traffic, TRAFFIC)
    base = yaml.safe_load((ROOT / "configs/gke.yaml").read_text(encoding="utf-8"))["base"]
    scaling = base["serve"]["model"]["autoscaling_config"]
    assert traffic.model_stays_s == scaling["downscale_to_zero_delay_s"]
    assert traffic.node_stays_s == base["models"]["group"]["idleTimeoutSeconds"]


def test_the_documentation_shows_what_the_command_prints() -> None:
    text = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
    shown = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0]
    printed = run(*EXAMPLE).stdout
    assert [line.rstrip() for line in shown.splitlines() if line.strip()] == [
        line.rstrip() for line in printed.splitlines() if line.strip()
    ]
