"""The command: what it prints and writes, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from aiohttp import web
from PIL import Image
from typer.testing import CliRunner

from benchmarks.load import load_report, parse_plan, run
from cli import bench_tables as show
from cli.main import app
from deployments.settings import ROOT
from tests.unit.bench_server import Got, hang, picture, serving
from tests.unit.test_layers import loaded_by

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

PLAN: dict[str, Any] = {
    "name": "test plan",
    "mode": "closed",
    "concurrency": 2,
    "requests": 6,
    "sizes": [[16, 16]],
    "mix": [{"task": "comic"}, {"task": "background"}],
}


def bench(tmp_path: Path, *arguments: object, **values: Any) -> Result:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(PLAN | values))
    return CliRunner().invoke(app, ["bench", str(file), *map(str, arguments)])


def words(result: Result) -> str:
    return " ".join(result.output.split())


def test_a_key_is_sent_and_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.json"
    with serving() as server:
        sent = bench(tmp_path, "--url", server.url, "--json", report, "--key", "imagen_of_mine")
        monkeypatch.setenv("IMAGEN_KEY", "imagen_of_mine")
        also = bench(tmp_path, "--url", server.url, "--json", report)
        keys = {got.headers.get("Authorization") for got in server.got}
    assert (sent.exit_code, also.exit_code) == (0, 0)
    assert keys == {"Bearer imagen_of_mine"}
    assert "imagen_of_mine" not in report.read_text() + sent.output + also.output


def test_it_prints_and_writes_a_report(tmp_path: Path) -> None:
    json_file, plot = tmp_path / "report.json", tmp_path / "plot.png"
    with serving() as server:
        options = ["--url", server.url, "--json", json_file, "--plot", plot, "--seed", 8]
        result = bench(tmp_path, *options, "--price-per-gpu-hour", 3.6)
    assert result.exit_code == 0, result.output
    shown = words(result)
    assert "test plan" in shown
    assert "0.50 USD per 1,000" in shown
    assert "denoise 1.500 s" in shown
    report = load_report(json_file)
    assert (report.succeeded, report.plan.seed, report.url) == (6, 8, server.url)
    with Image.open(plot) as drawn:
        drawn.load()
        assert drawn.format == "PNG"
        assert drawn.width > 800


def test_the_server_may_speak_another_protocol(tmp_path: Path) -> None:
    with serving() as server:
        options = ["--url", server.url, "--protocol", "raw", "--path", "comic=/v1/c"]
        result = bench(tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert {got.path for got in server.got} <= {"/v1/c", "/api/v1/images/background/remove"}
    assert {got.headers["Content-Type"] for got in server.got} == {"image/jpeg"}


async def busy(_: Got) -> web.Response:
    return web.json_response({"code": "full", "detail": "Every queue is full."}, status=429)


def test_it_fails_when_nothing_succeeded(tmp_path: Path) -> None:
    with serving(busy) as server:
        result = bench(tmp_path, "--url", server.url)
    assert result.exit_code == 1
    assert "refused: full 6 Every queue is full." in words(result)
    assert "GPU-seconds not measured" in words(result)


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        ([], {"rate": 1}, "rate: no such key"),
        (["--url", "nowhere"], {}, "target.url"),
        (["--path", "comic"], {}, "--path comic=/v1/comic"),
        (["--path", "cartoon=/x"], {}, "cartoon"),
        (["--json", "/absent/report.json"], {}, "/absent/report.json"),
        (["--unloaded", "/absent/report.json"], {}, "/absent/report.json"),
        ([], {"photo": "absent.jpg"}, "absent.jpg"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_sent(
    arguments: list[str], values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    result = bench(tmp_path, *arguments, **values)
    assert result.exit_code == 2
    assert message in words(result)
    assert "Traceback" not in result.output


def test_a_server_that_is_not_there_is_code_three_with_the_remedy(tmp_path: Path) -> None:
    result = bench(tmp_path, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 3
    assert "make run" in words(result)


def test_ctrl_c_reports_what_was_done(tmp_path: Path) -> None:
    async def three(got: Got) -> web.Response:
        return await (picture if got.number < 3 else hang)(got)

    file, json_file = tmp_path / "plan.yaml", tmp_path / "report.json"
    file.write_text(yaml.safe_dump(PLAN))
    command = [sys.executable, "-m", "cli.main", "bench", file, "--json", json_file]
    with (
        serving(three) as server,
        subprocess.Popen(
            [*command, "--url", server.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        deadline_s = time.monotonic() + 60
        while len(server.got) < 5 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped early" in shown
    report = load_report(json_file)
    assert report.interrupted
    assert (report.succeeded, report.total.outcomes["unfinished"]) == (3, 2)


def test_a_run_with_nothing_to_show_is_drawn_all_the_same(tmp_path: Path) -> None:
    with serving(busy) as server:
        report = run(parse_plan(PLAN, "The plan"), server.url)
    show.plot(report, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.format == "PNG"


def test_a_plot_without_matplotlib_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench(tmp_path, "--plot", tmp_path / "plot.png", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "make setup" in words(result)


def test_the_load_starts_without_ray_or_torch() -> None:
    assert not loaded_by("benchmarks.load") & {"ray", "torch", "diffusers", "matplotlib"}


def test_other_commands_start_without_the_load() -> None:
    assert not loaded_by("cli.main") & {"aiohttp", "benchmarks"}
