"""The GPU benchmark without a GPU: tiny networks on the processor; what it does with figures."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from benchmarks.gpu import measure, table
from benchmarks.gpu import options as speed
from benchmarks.gpu.__main__ import RESULTS, ROOT, main
from benchmarks.gpu.bench import Bench, compare, headline_cells
from benchmarks.gpu.options import Options
from benchmarks.gpu.systems import Ours, Stock, System, items
from benchmarks.gpu.tasks import run, tasks
from benchmarks.gpu.workloads import WORKLOADS, Item, build

if TYPE_CHECKING:
    from pathlib import Path

    Values = dict[str, Any]

BLOCKED = ("ray", "pydantic", "typer", "rich", "fastapi")
# As if those packages were not installed: libraries look whether they are there.
RUN_WITHOUT = """
import sys
from importlib.machinery import PathFinder
blocked, find = set(sys.argv.pop(1).split(",")), PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in blocked else find(name, *rest)
)
from benchmarks.gpu.__main__ import main
main(sys.argv[1:])
assert not blocked & set(sys.modules)
"""
DRY_RUN = ("enhance-1024/headline", "background-1024/*")
ALL = tasks()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dry run where only torch, diffusers and transformers are installed."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    before = sorted(RESULTS.iterdir())
    command = [sys.executable, "-c", RUN_WITHOUT, ",".join(BLOCKED), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(folder), "--only", *DRY_RUN],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(RESULTS.iterdir()) == before
    return folder


def json_file(folder: Path) -> Path:
    (path,) = folder.glob("gpu-*.json")
    return path


def load(folder: Path) -> Values:
    return json.loads(json_file(folder).read_text(encoding="utf-8"))


def tiny_bench(name: str, cells: Values | None = None) -> Bench:
    workload = WORKLOADS[name].tiny()
    until_s = time.monotonic() + 600
    return Bench(workload, "cpu", True, {} if cells is None else cells, until_s, rounds=1)


def cells_of_rows(text: str, title: str) -> list[list[str]]:
    lines = text.partition(f"### {title}\n")[2].partition("\n###")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return rows[2:]


# -------------------------------------------------------------------------------------- the dry run


def test_a_short_dry_run_measures_and_writes(tmp_path: Path) -> None:
    main(["--device", "cpu", "--only", "background-1024/headline", "--out", str(tmp_path)])
    cells = load(tmp_path)["cells"]
    for name in headline_cells(WORKLOADS["background-1024"]):
        assert cells[f"background-1024/{name}"]["images_per_s"] > 0
    assert "; background-1024 ours, CUDA graphs;" in (tmp_path / "gpu.md").read_text("utf-8")


@pytest.mark.slow
def test_a_dry_run_measures_every_system(dry_run: Path) -> None:
    result = load(dry_run)
    assert result["dry_run"]
    assert result["machine"]["gpu"] is None
    assert result["peak"]["flops"] > 0
    assert result["sessions"][0]["date"]
    for name in headline_cells(WORKLOADS["enhance-1024"]):
        cell = result["cells"][f"enhance-1024/{name}"]
        assert cell["images_per_s"] > 0
        assert cell["rows_per_s"] > cell["images_per_s"]
        assert set(cell["times"]) == set(headline_cells(WORKLOADS["enhance-1024"])) - {name}
    ours = result["cells"]["enhance-1024/ours"]
    assert ours["psnr_db"] > 40
    assert ours["grouped"] == 2


@pytest.mark.slow
def test_a_dry_run_tries_every_option(dry_run: Path) -> None:
    cells = load(dry_run)["cells"]
    for name in speed.applicable(WORKLOADS["background-1024"]):
        cell = cells[f"background-1024/option:{name}"]
        assert cell.get("why") == speed.missing(name, "cpu")
        assert "why" in cell or cell["times"]["ours"]
    assert cells["background-1024/company"]["levels"] <= 1


@pytest.mark.slow
def test_a_dry_runs_figures_are_not_in_its_table(dry_run: Path) -> None:
    text = (dry_run / "gpu.md").read_text(encoding="utf-8")
    for title in ("Systems", "Compiling", "Passes", "Options"):
        section = text.partition(f"### {title}\n")[2].partition("\n###")[0]
        assert "Not measured: " in section
        assert "| enhance-1024" not in section


@pytest.mark.slow
def test_what_is_measured_is_in_the_table(dry_run: Path) -> None:
    result = load(dry_run) | {"dry_run": False}
    for cell in result["cells"].values():
        if "peak_bytes" in cell:
            cell |= {"peak_bytes": 3 * table.GIB, "reserved_bytes": 4 * table.GIB}
    text = table.render([result])
    rows = {tuple(row[:2]): row[2:] for row in cells_of_rows(text, "Systems")}
    old = rows["enhance-1024", "old worker loop"]
    assert "not measured" not in old
    assert old[5:7] == ["3.0", "4.0"]
    assert old[9] == "1"
    assert ("aged-768", "ours, CUDA graphs") not in rows
    assert "; aged-768 ours, CUDA graphs;" in text


@pytest.mark.slow
def test_a_second_run_does_only_what_is_missing(dry_run: Path, tmp_path: Path) -> None:
    result = load(dry_run)
    missing = "background-1024/unet"
    del result["cells"][missing]
    former = tmp_path / "gpu-former.json"
    former.write_text(json.dumps(result), encoding="utf-8")
    main(["--device", "cpu", "--only", *DRY_RUN, "--resume", str(former), "--out", str(tmp_path)])
    again = load(tmp_path)
    assert again["cells"].pop(missing)["seconds_by_rows"]
    assert again["cells"] == result["cells"]
    assert len(again["sessions"]) == 2
    assert again["peak"] == result["peak"]


@pytest.mark.slow
def test_a_file_of_another_machine_is_refused(dry_run: Path, tmp_path: Path) -> None:
    result = load(dry_run)
    result["machine"]["gpu"] = "NVIDIA H200"
    former = tmp_path / "gpu-other.json"
    former.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(SystemExit, match="gpu differ"):
        main(["--device", "cpu", "--resume", str(former), "--out", str(tmp_path)])
    assert json.loads(former.read_text(encoding="utf-8")) == result


def test_without_out_a_dry_run_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(RESULTS.iterdir())
    main(["--device", "cpu", "--only", "nothing"])
    assert "; enhance-1024 ours, CUDA graphs;" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert sorted(RESULTS.iterdir()) == before


# ----------------------------------------------------------------------------------- time and tasks


def run_tasks(names: list[str], cells: Values, *, seconds: float, tiny: bool) -> int:
    """Run tasks by name; how often the file was written."""
    writes: list[None] = []
    run(
        [task for task in ALL if task.name in names],
        cells,
        lambda: writes.append(None),
        device="cpu",
        tiny=tiny,
        budget_s=seconds,
    )
    return len(writes)


def test_what_does_not_fit_the_time_says_so_and_is_tried_again() -> None:
    cells: Values = {"comic-512/ours": {"images_per_s": 1.0}}
    run_tasks(["comic-512/headline"], cells, seconds=5, tiny=False)
    assert cells["comic-512/ours"] == {"images_per_s": 1.0}
    gap = {"why": "time", "again": True}
    assert cells["comic-512/stock"] == gap
    text = table.render([{"cells": cells | {"comic-512/ours": gap}}])
    assert "| comic-512 | ours, CUDA graphs | not measured (time) |" in text
    cells = {"background-1024/unet": gap}
    run_tasks(["background-1024/unet"], cells, seconds=5, tiny=True)
    assert cells["background-1024/unet"]["seconds_by_rows"]


def test_every_headline_comes_before_any_option() -> None:
    names = [task.name for task in ALL]
    assert names[0] == "enhance-1024/headline"
    first = next(i for i, name in enumerate(names) if "option:" in name)
    for workload in WORKLOADS.values():
        assert (names.index(f"{workload.name}/headline") < first) is not workload.brief
    assert {name.partition("/")[0] for name in names} == set(WORKLOADS)
    assert len(set(names)) == len(names)


class Broken(System):
    """A system that never comes up."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    closed = False

    def warm_up(self) -> None:
        raise self._error

    def close(self) -> None:
        self.closed = True


def test_a_system_that_does_not_fit_leaves_the_others() -> None:
    bench = tiny_bench("background-1024")
    broken = Broken(torch.OutOfMemoryError("too much"))
    cells = compare(bench, {"old": lambda _: broken, "stock": Stock})
    assert set(cells) == {"stock"}
    assert broken.closed


def test_a_failure_is_written_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("Something about a kernel")

    monkeypatch.setattr("benchmarks.gpu.systems.Stock._call", fail)
    monkeypatch.setattr("benchmarks.gpu.pipelines.apply_network", fail)
    cells: Values = {}
    names = ["background-1024/headline", "background-1024/option:group_2"]
    assert run_tasks(names, cells, seconds=600, tiny=True) >= 2
    for name in ("stock", "option:group_2"):
        cell = cells[f"background-1024/{name}"]
        assert "Something about a kernel" in cell["why"]
        assert not cell["again"]


# -------------------------------------------------------------------------------------- the systems


@pytest.mark.parametrize("name", ["comic-512", "aged-768", "upscale-128"])
def test_ours_is_stocks_picture(name: str) -> None:
    workload = WORKLOADS[name].tiny()
    parts = build(workload, "cpu", tiny=True)
    item = Item(workload.request, 3)
    (stock,) = Stock(parts).run([item])
    assert stock.std() > 20  # else any two pictures would be alike
    (sliced,) = Stock(parts, sliced=True, upcast=True).run([item])
    (mine,) = Ours(parts).run_together([item])
    (rounded,) = Ours(parts, Options(noise="float32")).run_together([item])
    for picture in (sliced, mine, rounded):  # on a processor, the model's dtype is float32
        assert measure.psnr_db(picture, stock) > 50
    processors = {type(p).__name__ for p in parts.unet.attn_processors.values()}
    assert processors == {"AttnProcessor2_0"}  # nobody else's UNet is sliced


def test_options_leave_the_shared_networks_alone() -> None:
    parts = build(WORKLOADS["upscale-128"].tiny(), "cpu", tiny=True)
    before = copy.deepcopy(parts.unet.state_dict())
    options = Options(
        dtype=torch.bfloat16, vae_dtype=torch.bfloat16, channels_last=True, fused_qkv=True
    )
    ours = Ours(parts, options)
    picture = ours.run_together(items(parts, "mixed", 2))[0]
    assert picture.std() > 20
    assert ours.shared_bytes == 0
    assert Ours(parts).shared_bytes > 0
    after = parts.unet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_wrapped_network_looks_like_the_network() -> None:
    parts = build(WORKLOADS["upscale-128"].tiny(), "cpu", tiny=True)
    unet = speed.apply(parts.unet, Options(attention="cudnn"))
    assert (unet.device, unet.dtype) == (parts.unet.device, parts.unet.dtype)
    assert unet.config is parts.unet.config


# ---------------------------------------------------------------------------------------- measuring


def test_operations_are_counted_as_two_a_multiply_add() -> None:
    with torch.device("meta"):
        linear, convolution = nn.Linear(64, 32), nn.Conv2d(3, 8, 3, padding=1)
        x, picture = torch.zeros(5, 64), torch.zeros(2, 3, 16, 16)
    assert measure.flops(lambda: linear(x)) == 2 * 5 * 64 * 32
    assert measure.flops(lambda: convolution(picture)) == 2 * 2 * 8 * 16 * 16 * 3 * 9


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_pictures_operations_are_those_of_its_rows_and_its_autoencoder() -> None:
    found = measure.image_flops(WORKLOADS["enhance-1024"])
    assert found["rows"] == 18  # 9 steps of 30, with guidance
    assert 7e12 < found["row"] < 8e12
    assert found["row"] * 18 < found["image"] < found["row"] * 18 * 1.3
    tiles, whole = (measure.image_flops(WORKLOADS[n]) for n in ("upscale-256", "upscale-128"))
    autoencoder = [f["image"] - f["rows"] * f["row"] for f in (tiles, whole)]
    assert autoencoder[0] == 4 * autoencoder[1]  # in tiles of one size


def test_likeness_is_over_the_levels() -> None:
    a = torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()
    b = a + 1
    assert (measure.psnr_db(a, a), measure.levels(a, a)) == (float("inf"), 0)
    assert measure.levels(a, b) == 1
    assert measure.psnr_db(a, b) == pytest.approx(48.13, abs=0.01)


def test_a_dry_run_without_a_device_says_so_when_a_gpu_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_the_committed_table_is_made_of_the_committed_files() -> None:
    files = sorted(RESULTS.glob("gpu-*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    assert not any(result["dry_run"] for result in results)
    assert (RESULTS / "gpu.md").read_text(encoding="utf-8") == table.render(results)
