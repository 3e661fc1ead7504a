"""The simulation of growth: against theory, and that no request is forgotten."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.growth import limits, scenarios, tables
from benchmarks.growth.profiles import Scaling, Service, Work, fixed, refiner_on_h100
from benchmarks.growth.simulation import poisson, simulate
from benchmarks.output import RESULTS
from deployments.settings import ROOT

if TYPE_CHECKING:
    from pathlib import Path

INSTANT = {"begin_s": 0.0, "finish_s": 0.0, "file_s": 0.0, "front_s": 0.0}
PLAIN = Service(ingress_pods=1, proxy_s=0.0, ingress_s=0.0)
FRONT = limits.Front(0.003, 0.004, 0.03, 0.005, 1700.0)


def test_a_lone_request_takes_what_its_parts_take() -> None:
    work = refiner_on_h100()
    service = Service(ingress_pods=1, proxy_s=0.005, ingress_s=0.006)
    run = simulate(work, service, fixed(1), [1.0])
    assert run.latency_s == [pytest.approx(work.alone_s + work.front_s)]


def test_waiting_is_that_of_a_queue_with_random_arrivals_and_equal_work() -> None:
    work = Work("one pass", steps=1, pass_s=(1.0,), **INSTANT)
    service = Service(ingress_pods=1, proxy_s=0, ingress_s=0, timeout_s=1e5)
    load = 0.6
    run = simulate(work, service, fixed(1), poisson([(12_000, load)], 3), warm_up_s=100)
    waited_s = float(np.mean(run.latency_s)) - 1.0
    assert waited_s == pytest.approx(load / (2 * (1 - load)), rel=0.07)  # Pollaczek, Khinchine
    assert run.gpu_busy == pytest.approx(load, abs=0.03)


def test_what_the_refiner_can_do_is_what_the_benchmark_measured_of_whole_images() -> None:
    # 1.94 images a second, in groups of two with CUDA graphs, against passes timed alone.
    assert refiner_on_h100().capacity_per_s == pytest.approx(1.94, rel=0.05)


def test_requests_at_once_are_worked_off_as_fast_as_groups_allow() -> None:
    work = refiner_on_h100()
    run = simulate(work, PLAIN, fixed(2), [0.001 * i for i in range(40)])
    assert run.outcomes["ok"] == 40
    assert 40 / run.last_s == pytest.approx(2 * work.capacity_per_s, rel=0.1)


def test_a_burst_is_shared_less_evenly_where_replicas_are_heard_late() -> None:
    work = refiner_on_h100()
    busy = Service(ingress_pods=1, proxy_s=0.013, ingress_s=0.019)
    burst = [0.0005 * i for i in range(40)]
    ends_s = [simulate(work, busy, fixed(2), burst, seed=seed).last_s for seed in range(10)]
    even_s = simulate(work, PLAIN, fixed(2), burst).last_s
    assert 1.05 * even_s < np.mean(ends_s) < 1.6 * even_s


def test_the_router_asks_a_replica_that_it_has_not_heard_for_long() -> None:
    work = refiner_on_h100()
    service = Service(ingress_pods=1, proxy_s=0.0, ingress_s=0.0)
    run = simulate(work, service, fixed(2), [1.0, 30.0])
    known_s, asked_s = run.latency_s
    assert asked_s - known_s == pytest.approx(work.front_s)  # there and back once more


def test_too_many_requests_are_refused_early_rather_than_answered_late() -> None:
    work = refiner_on_h100()
    run = simulate(work, PLAIN, fixed(1), poisson([(600, 3 * work.capacity_per_s)], 1))
    assert run.outcomes["refused"] > run.outcomes["ok"] > 0
    assert run.outcomes["late"] < 0.02 * run.outcomes.total()
    assert max(run.latency_s) <= PLAIN.timeout_s


@pytest.mark.parametrize(
    "scaling",
    [
        fixed(3),
        Scaling(least=0, most=6, first=0),
        Scaling(3, 3, 3, spot_life_s=200.0),
        Scaling(least=0, most=6, first=2, spot_life_s=300.0, downscale_delay_s=20.0),
    ],
)
def test_every_request_has_one_outcome_whatever_nodes_do(scaling: Scaling) -> None:
    arrivals = poisson([(400, 3.0), (300, 0.02), (300, 6.0)], 5)
    run = simulate(refiner_on_h100(), Service(), scaling, arrivals, seed=2)
    assert run.outcomes.total() == len(arrivals)
    assert run.outcomes["ok"] == len(run.latency_s) > 0


def test_a_lost_node_ends_its_requests_and_is_replaced() -> None:
    scaling = Scaling(2, 2, 2, spot_life_s=250.0, node_start_s=(20.0, 40.0), load_s=10)
    run = simulate(refiner_on_h100(), Service(), scaling, poisson([(1500, 2.0)], 1), seed=4)
    assert run.lost_nodes > 1
    assert run.outcomes["lost"] > 0
    assert max(size for _, size in run.sizes) == 2
    assert run.outcomes["ok"] > 0.7 * run.outcomes.total()


def test_the_first_request_waits_for_node_and_model_and_the_node_goes_when_it_is_quiet() -> None:
    scaling = Scaling(
        *(0, 4, 0), node_start_s=(10.0, 10.0), downscale_delay_s=30.0, node_stays_s=60.0, load_s=20
    )
    # The last one, an hour later, only keeps the clock going.
    run = simulate(refiner_on_h100(), Service(), scaling, [0.0, 3600.0])
    assert run.latency_s[0] >= 30.0
    assert run.outcomes["ok"] == 2
    first_gone = next(at for at, size in run.sizes[1:] if size == 0)
    assert 100 < first_gone < 200  # look back, delay, and the time that a node stays
    assert run.gpu_hours < 600 / 3600


def test_more_gpus_hold_more_at_the_same_percentile() -> None:
    work = refiner_on_h100()
    one, eight = (scenarios.held(work, FRONT, gpus, requests=300) for gpus in (1, 8))
    assert one
    assert eight
    assert eight.rate > 8 * one.rate  # a shared queue smooths what comes
    assert max(one.p95_s, eight.p95_s) <= scenarios.P95_S
    found = scenarios.gpus_for(work, FRONT, eight.rate, scenarios.P95_S, requests=300)
    assert found.gpus in (7, 8, 9)
    with pytest.raises(ValueError, match="lone request"):
        scenarios.gpus_for(work, FRONT, 1.0, 0.3)


def test_limits_follow_from_cpu_time_beyond_that_of_the_idle_processes(tmp_path: Path) -> None:
    def write(name: str, values: Any) -> Path:
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
        return tmp_path / name

    quiet = {"1": {"proxy": 0.05, "ingress": 0.10}}
    load = {"name": "burst", "replicas": 1, "ok": 100, "wall_s": 50.0}
    load |= {"cpu_s": {"proxy": 2.8, "ingress": 5.4}}
    front = limits.front(
        write("growth.json", {"quiet_cpu_share": quiet, "loads": [load]}),
        write("controller.json", {"shares": {"1": 0.05, "11": 0.15, "21": 0.25}}),
    )
    assert front.proxy_s == pytest.approx(0.003)
    assert front.ingress_s == pytest.approx(0.004)
    assert front.ingress_per_s == pytest.approx(175)
    assert front.controller_replicas == pytest.approx(66)


def test_the_documentation_has_the_tables_of_the_results() -> None:
    text = (ROOT / "docs/growth.md").read_text(encoding="utf-8")
    check = json.loads(limits.latest().read_text(encoding="utf-8"))
    newest = sorted(RESULTS.glob("growth-scenarios-*.json"))[-1]
    kept = json.loads(newest.read_text(encoding="utf-8"))
    assert tables.comparison(check["comparison"]) in text
    assert tables.growth(kept["growth"], kept["growth_asked"]) in text
    assert tables.mornings(kept["mornings"]) in text
    assert tables.spots(kept["spots"]) in text
    assert tables.limits(limits.front()) in text
    work = limits.work()
    assert f"(a lone request takes {work.alone_s + work.front_s:.2f} s)" in text
