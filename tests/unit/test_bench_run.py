"""A load on real servers: when requests are sent, and what is counted."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from aiohttp import web

from benchmarks.load import (
    Plan,
    Report,
    Unreachable,
    load_plan,
    load_report,
    parse_plan,
    run,
    run_async,
    unloaded_of,
)
from benchmarks.load.report import spread
from benchmarks.load.workload import photos, requests
from deployments.errors import ConfigError
from deployments.settings import ROOT
from deployments.tasks import Task
from tests.unit.bench_server import (
    JSON_LENGTH,
    PICTURE,
    Got,
    elements,
    hang,
    kserve_answer,
    one_at_a_time,
    picture,
    serving,
)
from tests.unit.fakes import FakeBackends, app_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.bench_server import Server

SECONDS_ENOUGH = 30


def plan(**values: Any) -> Plan:
    basis: dict[str, Any] = {
        "name": "test",
        "seed": 5,
        "mode": "closed",
        "concurrency": 2,
        "requests": 6,
        "timeout_s": SECONDS_ENOUGH,
        "sizes": [[16, 16], [24, 16]],
        "mix": [{"task": "comic", "parameters": {"steps": {"integers": [1, 9]}}}],
    }
    if values.get("mode") == "open":
        del basis["concurrency"]
        basis["rate_per_s"] = 1000
    return parse_plan(basis | values, "The plan")


def until(reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SECONDS_ENOUGH
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_every_request_of_the_plan_arrives_once_in_its_order() -> None:
    made = plan(concurrency=1, target={"protocol": "raw"})
    with serving() as server:
        report = run(made, server.url)
    expected = list(requests(made))
    assert [got.query for got in server.got] == [
        {"steps": str(r.parameters["steps"])} for r in expected
    ]
    assert [got.body for got in server.got] == [photos(made)[r.size] for r in expected]
    assert [(r.index, r.size, r.parameters) for r in report.records] == [
        (r.index, r.size, r.parameters) for r in expected
    ]
    assert report.succeeded == 6
    assert report.images_per_s == pytest.approx(6 / report.wall_s)


def test_our_own_api_reads_the_shipped_plans() -> None:
    backends = FakeBackends()
    server = uvicorn.Server(
        uvicorn.Config(app_of(backends), port=0, log_level="error", ws="none", lifespan="off")
    )

    async def main() -> list[Report]:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        plans = [load_plan(ROOT / f"benchmarks/plans/{n}.yaml") for n in ("smoke", "mixed")]
        plans[1] = plans[1].change(rate_per_s=500, slowdown=False)
        reports = [await run_async(each, url) for each in plans]
        server.should_exit = True
        await serving
        return reports

    for report in asyncio.run(main()):
        assert report.total.refusals == {}
        assert report.succeeded == len(report.records) == report.plan.requests
        assert set(report.tasks) == {str(task) for task in Task if task.needs_picture}
        # As the fakes say.
        assert report.batch_sizes == {3: report.succeeded}
        assert report.stages_s == pytest.approx({"decode": 0.001, "denoise": 1.5})
        assert report.gpu_seconds == pytest.approx(0.25 * report.succeeded)
    assert len(backends.jobs) == 10 + 5 + 45 + 5


def test_a_kserve_server_gets_tensors_and_its_picture_is_counted() -> None:
    async def infer(got: Got) -> web.Response:
        length = int(got.headers[JSON_LENGTH])
        image, parameters = elements(got.body[length:])
        assert image.startswith(b"\xff\xd8")
        assert set(json.loads(parameters)) == {"steps"}
        headers, body = kserve_answer(PICTURE)
        return web.Response(body=body, headers=headers)

    with serving(infer) as server:
        report = run(plan(target={"protocol": "kserve"}), server.url)
    assert report.succeeded == 6
    assert {got.path for got in server.got} == {"/v2/models/comic/infer"}


def test_a_closed_load_keeps_just_so_many_requests_in_flight() -> None:
    meeting = asyncio.Barrier(3)

    async def together(got: Got) -> web.Response:
        await meeting.wait()  # fewer than three at a time would never be answered
        return await picture(got)

    with serving(together) as server:
        report = run(plan(concurrency=3, requests=9), server.url)
    assert report.succeeded == 9
    assert server.most == 3


def test_a_closed_load_stops_sending_when_its_time_is_over() -> None:
    with serving() as server:
        report = run(plan(requests=None, duration_s=0.2), server.url)
    assert report.succeeded == len(server.got) == len(report.records) > 0
    assert [record.index for record in report.records] == list(range(len(report.records)))


def test_an_open_load_charges_the_servers_queue_to_latency() -> None:
    each_s = 0.05
    made = plan(mode="open", requests=10)
    with serving(one_at_a_time(each_s)) as server:
        report = run(made, server.url)
    assert report.succeeded == 10
    assert [record.due_s for record in report.records] == pytest.approx(
        [request.arrival_s for request in requests(made)]
    )
    ends_s = sorted(record.due_s + record.latency_s for record in report.records)
    for served, end_s in enumerate(ends_s, 1):
        assert end_s >= served * each_s * 0.99


def test_an_open_load_charges_its_own_lateness_to_latency() -> None:
    pause_s = 0.3

    def hold_up(phase: str, _: int) -> None:
        if phase == "warming up":  # the load follows at once
            asyncio.get_running_loop().call_later(0.1, time.sleep, pause_s)

    made = plan(mode="open", requests=40, rate_per_s=100, warm_up=1)
    with serving() as server:
        report = run(made, server.url, progress=hold_up)
    late = [record for record in report.records if record.sent_s - record.due_s > pause_s / 3]
    assert late
    assert all(record.latency_s > record.sent_s - record.due_s for record in late)
    assert report.send_lag_s is not None
    assert report.send_lag_s.max > pause_s / 3


def test_an_open_load_has_no_limit_of_connections() -> None:
    arrived = asyncio.Barrier(150)

    async def together(got: Got) -> web.Response:
        await arrived.wait()
        return await picture(got)

    with serving(together) as server:
        report = run(plan(mode="open", requests=150), server.url)
    assert report.succeeded == 150


def test_the_warm_up_is_sent_and_not_counted() -> None:
    with serving() as server:
        report = run(plan(warm_up=4), server.url)
    assert len(server.got) == 10
    assert len(report.records) == 6


def test_percentiles_are_those_of_the_values() -> None:
    found = spread([*range(101), None])
    assert found is not None
    assert (found.count, found.p50, found.p95, found.p99) == (101, 50, 95, 99)
    assert (found.mean, found.max) == (50, 100)
    assert spread([None]) is None


async def refuse(got: Got) -> web.Response:
    if got.number % 3 == 0:
        body = {"code": "full", "detail": "Every queue is full."}
        return web.json_response(body, status=429, content_type="application/problem+json")
    if got.number % 3 == 1:
        return web.Response(status=500, text="Internal Server Error")
    return web.Response(text="<html>please log in</html>")


def test_refusals_are_counted_by_their_code() -> None:
    with serving(refuse) as server:
        report = run(plan(concurrency=1), server.url)
    assert report.succeeded == 0
    assert report.total.outcomes["refused"] == 4
    assert report.total.outcomes["no_picture"] == 2
    assert report.total.refusals == {"full": 2, "HTTP 500": 2, "no picture": 2}
    assert report.total.latency_s is None
    assert report.images_per_s == 0
    assert report.records[0].detail == "Every queue is full."


def test_clients_leave_on_purpose_and_others_time_out() -> None:
    made = plan(
        requests=12,
        concurrency=12,
        timeout_s=1.0,
        disconnect_share=0.5,
        disconnect_after_s=[0.05, 0.1],
    )
    leaving = {r.index for r in requests(made) if r.leaves_after_s is not None}
    assert 0 < len(leaving) < 12
    with serving(hang) as server:
        report = run(made, server.url)
        until(lambda: server.left == server.begun)
    assert server.left > 0
    ended = {record.index: record.outcome for record in report.records}
    assert {i for i, outcome in ended.items() if outcome == "disconnected"} == leaving
    assert {i for i, outcome in ended.items() if outcome == "timeout"} == set(range(12)) - leaving
    assert all(r.latency_s >= 0.99 for r in report.records if r.outcome == "timeout")


def test_clients_that_would_have_left_are_in_no_percentile() -> None:
    made = plan(requests=20, disconnect_share=0.5, disconnect_after_s=[20, 25])
    with serving() as server:
        report = run(made, server.url)
    assert report.succeeded == 20
    assert report.total.latency_s is not None
    assert report.total.latency_s.count == sum(not record.leaves for record in report.records) < 20


def test_a_server_that_hangs_up_is_a_connection_error() -> None:
    async def main() -> Report:
        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await run_async(plan(), f"http://127.0.0.1:{port}")

    report = asyncio.run(main())
    assert report.total.outcomes["connection_error"] == 6
    assert all(record.code for record in report.records)


def test_an_address_without_a_server_is_an_error_with_a_remedy() -> None:
    with pytest.raises(Unreachable, match="make run"):
        run(plan(), "http://127.0.0.1:9")


def test_slowdown_is_latency_over_the_same_requests_unloaded_latency() -> None:
    made = plan(mode="open", requests=8, slowdown=True, slowdown_requests=6)
    with serving(one_at_a_time(0.05)) as server:
        report = run(made, server.url)
    assert len(server.got) == 6 + 8
    assert set(report.unloaded_s) == set(range(6))
    assert all(seconds >= 0.049 for seconds in report.unloaded_s.values())
    for record in report.records[:6]:
        assert record.unloaded_s == report.unloaded_s[record.index]
        assert record.slowdown == pytest.approx(record.latency_s / record.unloaded_s)
    assert [record.slowdown for record in report.records[6:]] == [None, None]
    assert report.total.slowdown is not None
    assert report.total.slowdown.count == 6
    assert report.total.slowdown.max > 1


def test_clients_stay_while_the_idle_server_is_measured() -> None:
    made = plan(slowdown=True, disconnect_share=1.0, disconnect_after_s=[0, 0])
    with serving() as server:
        report = run(made, server.url)
    assert set(report.unloaded_s) == set(range(6))
    assert report.total.outcomes["disconnected"] == 6


def test_unloaded_latencies_are_taken_from_an_earlier_report(tmp_path: Path) -> None:
    made, file = plan(slowdown=True), tmp_path / "report.json"
    with serving() as server:
        first = run(made, server.url)
        file.write_text(first.model_dump_json())
        sent = len(server.got)
        second = run(made, server.url, unloaded_s=unloaded_of(file, made))
        assert len(server.got) == sent + 6
    assert second.unloaded_s == first.unloaded_s
    assert second.total.slowdown is not None
    with pytest.raises(ConfigError, match="other requests"):
        unloaded_of(file, made.change(seed=6))


def test_a_report_without_unloaded_latencies_gives_none(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with serving() as server:
        file.write_text(run(plan(), server.url).model_dump_json())
    with pytest.raises(ConfigError, match="no unloaded"):
        unloaded_of(file, plan())


def test_a_report_comes_back_from_json_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    with serving(refuse_some) as server:
        report = run(plan(slowdown=True), server.url, usd_per_gpu_hour=3.6)
    file.write_text(report.model_dump_json())
    assert load_report(file) == report


async def refuse_some(got: Got) -> web.Response:
    return await (refuse if got.number % 2 else picture)(got)


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 2}'])
def test_a_file_that_is_no_report_is_a_config_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="it is not a report"):
        load_report(file)
    with pytest.raises(ConfigError, match="no such file"):
        load_report(tmp_path / "absent.json")


def test_gpu_seconds_have_a_price() -> None:
    with serving() as server:
        report = run(plan(), server.url, usd_per_gpu_hour=3.6)
    assert report.gpu_seconds == pytest.approx(0.5 * 6)
    assert report.usd_per_1000_images == pytest.approx(0.5 * 1000 / 3600 * 3.6)
    assert report.batch_sizes == {2: 6}
    assert report.stages_s == pytest.approx({"decode": 0.01, "denoise": 1.5})


@pytest.mark.parametrize("headers", [{}, {"X-Imagen-Gpu-Seconds": "0.0000"}])
def test_without_gpu_seconds_no_cost_is_made_up(headers: dict[str, str]) -> None:
    async def answer(_: Got) -> web.Response:
        return web.Response(body=PICTURE, headers=headers)

    with serving(answer) as server:
        report = run(plan(), server.url, usd_per_gpu_hour=3.6)
    assert (report.gpu_seconds, report.usd_per_1000_images) == (None, None)


def test_a_stopped_load_reports_what_was_done() -> None:
    async def main(server: Server) -> Report:
        stop = asyncio.Event()

        def progress(_: str, done: int) -> None:
            if done == 3:
                stop.set()

        return await run_async(plan(requests=8), server.url, stop=stop, progress=progress)

    async def three(got: Got) -> web.Response:
        return await (picture if got.number < 3 else hang)(got)

    with serving(three) as server:
        report = asyncio.run(main(server))
    assert report.interrupted
    assert report.succeeded == 3
    assert report.total.outcomes["unfinished"] >= 1
