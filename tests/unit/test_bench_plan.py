"""A plan says what is wrong with it, and makes the same requests every time."""

from __future__ import annotations

import io
import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.load import Plan, load_plan, parse_plan
from benchmarks.load.workload import photos, requests, warm_up
from deployments.contract import parse, unused
from deployments.errors import ConfigError
from deployments.settings import ROOT
from deployments.tasks import Task
from tests.unit.fakes import REGISTRY

PLANS = sorted((ROOT / "benchmarks/plans").glob("*.yaml"))
MIX = [
    {
        "task": "comic",
        "weight": 3,
        "parameters": {
            "prompt": "a fox",
            "strength": {"uniform": [0.2, 0.9]},
            "steps": {"integers": [10, 40]},
            "output_size": {"choice": ["input", "working"], "weights": [3, 1]},
        },
    },
    {"task": "upscale", "sizes": [[32, 24]]},
]


def plan(**values: Any) -> Plan:
    basis = {
        "name": "test",
        "seed": 5,
        "mode": "open",
        "rate_per_s": 10,
        "requests": 400,
        "sizes": [{"size": [64, 48], "weight": 3}, [48, 64]],
        "mix": MIX,
    }
    return parse_plan(basis | values, "The plan")


def test_a_plan_makes_the_same_requests_every_time() -> None:
    assert list(requests(plan())) == list(requests(plan()))


def test_another_seed_makes_other_requests() -> None:
    assert list(requests(plan())) != list(requests(plan(seed=6)))


def test_rate_length_and_leavers_leave_every_other_choice_as_it_was() -> None:
    def choices(made: Plan) -> list[Any]:
        return [(r.label, r.size, dict(r.parameters)) for r in itertools.islice(requests(made), 50)]

    closed: dict[str, Any] = {"mode": "closed", "rate_per_s": None, "concurrency": 4}
    leavers = {"disconnect_share": 0.5, "disconnect_after_s": [1, 2]}
    others = [plan(rate_per_s=99, requests=50), plan(**closed), plan(**leavers)]
    assert [choices(other) for other in others] == [choices(plan())] * 3
    assert {other.fingerprint for other in others} == {plan().fingerprint}
    assert plan(seed=6).fingerprint != plan().fingerprint


def test_arrivals_are_poisson_at_the_rate() -> None:
    arrivals = [r.arrival_s or 0.0 for r in requests(plan(rate_per_s=20, requests=20_000))]
    gaps = [b - a for a, b in itertools.pairwise([0.0, *arrivals])]
    assert all(gap >= 0 for gap in gaps)
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.03)
    # An exponential distribution spreads as widely as its mean.
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.05)


def test_an_open_plan_with_a_duration_ends_by_then() -> None:
    arrivals = [r.arrival_s or 0.0 for r in requests(plan(requests=None, duration_s=20))]
    assert max(arrivals) <= 20
    assert len(arrivals) == pytest.approx(200, rel=0.4)


def test_choices_follow_their_distributions() -> None:
    made = list(requests(plan(requests=4000)))
    comics = [r for r in made if r.task == Task.COMIC]
    assert len(comics) / len(made) == pytest.approx(0.75, abs=0.05)
    assert {r.size for r in made if r.task == Task.UPSCALE} == {(32, 24)}
    assert sum(r.size == (64, 48) for r in comics) / len(comics) == pytest.approx(0.75, abs=0.05)
    assert {r.parameters["prompt"] for r in comics} == {"a fox"}
    assert {r.parameters["steps"] for r in comics} == set(range(10, 41))
    strengths = [float(r.parameters["strength"]) for r in comics]
    assert 0.2 <= min(strengths) < 0.25 < 0.85 < max(strengths) <= 0.9
    inputs = sum(r.parameters["output_size"] == "input" for r in comics)
    assert inputs / len(comics) == pytest.approx(0.75, abs=0.05)


def test_a_share_of_clients_leaves_within_the_range() -> None:
    made = list(requests(plan(requests=2000, disconnect_share=0.2, disconnect_after_s=[0.5, 2])))
    stays_s = [r.leaves_after_s for r in made if r.leaves_after_s is not None]
    assert len(stays_s) / len(made) == pytest.approx(0.2, abs=0.05)
    assert min(stays_s) >= 0.5
    assert max(stays_s) <= 2


def test_the_warm_up_takes_every_entry_by_turns() -> None:
    assert [r.label for r in warm_up(plan(warm_up=3))] == ["comic", "upscale", "comic"]


def test_photos_have_the_sizes_of_the_plan() -> None:
    made = photos(plan())
    assert set(made) == {(64, 48), (48, 64), (32, 24)}
    for size, data in made.items():
        with Image.open(io.BytesIO(data)) as picture:
            assert (picture.format, picture.size) == ("JPEG", size)


RANGE = {"size": [40, 20], "up_to": [80, 60]}


def test_sizes_in_a_range_are_drawn_anew_by_each_request() -> None:
    made = plan(sizes=[RANGE], warm_up=3)
    comics = [r.size for r in requests(made) if r.label == "comic"]
    assert len(set(comics)) > len(comics) / 2
    for side, least, most in ((0, 40, 80), (1, 20, 60)):
        found = [size[side] for size in comics]
        assert (min(found), max(found)) == (least, most)
        assert statistics.mean(found) == pytest.approx((least + most) / 2, abs=3)
    found = photos(made)
    assert {r.size for r in (*warm_up(made), *requests(made))} == found.keys() | {(32, 24)}
    with Image.open(io.BytesIO(found[comics[0]])) as picture:
        assert picture.size == comics[0]


def test_photos_are_the_same_every_time() -> None:
    assert photos(plan()) == photos(plan())


def test_a_photo_that_is_none_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="photo"):
        photos(plan(photo="README.md"))


COMIC = {"task": "comic"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"rate": 3}, "rate: no such key"),
    ({"mode": "both"}, "mode:"),
    ({"rate_per_s": None}, "mode open needs rate_per_s"),
    ({"concurrency": 4}, "mode open needs rate_per_s, and no concurrency"),
    ({"mode": "closed", "rate_per_s": None}, "mode closed needs concurrency"),
    ({"rate_per_s": 0}, "rate_per_s:"),
    ({"rate_per_s": float("inf")}, "rate_per_s:"),
    ({"duration_s": 3}, "either requests or duration_s"),
    ({"requests": None}, "either requests or duration_s"),
    ({"mix": []}, "mix:"),
    ({"mix": [COMIC | {"path": "/x"}]}, "mix.0: give either task or path"),
    ({"mix": [{}]}, "mix.0: give either task or path"),
    ({"mix": [{"path": "x"}]}, "mix.0.path:"),
    ({"mix": [{"task": "cartoon"}]}, "mix.0.task:"),
    ({"mix": [COMIC | {"weight": 0}]}, "mix.0.weight:"),
    ({"mix": [COMIC | {"colour": 1}]}, "mix.0.colour: no such key"),
    ({"mix": [COMIC | {"parameters": {"steps": {"normal": [1, 2]}}}]}, "steps.normal: no such key"),
    ({"mix": [COMIC | {"parameters": {"steps": {"integers": [4, 2]}}}]}, "steps: .* descending"),
    ({"mix": [COMIC | {"parameters": {"steps": {"integers": [1, 2.5]}}}]}, "steps.integers.1:"),
    ({"mix": [COMIC | {"parameters": {"steps": {}}}]}, "steps: give one of"),
    ({"mix": [COMIC | {"parameters": {"steps": [1, 2]}}]}, "parameters.steps"),
    (
        {"mix": [COMIC | {"parameters": {"steps": {"choice": [1, 2], "weights": [1]}}}]},
        "weights needs one number",
    ),
    ({"sizes": []}, "sizes: comic has no photo sizes"),
    ({"sizes": [[0, 4]]}, "sizes.0.size.0:"),
    ({"sizes": [RANGE | {"up_to": [80, 10]}]}, r"sizes.0: up_to \[80, 10\] is below"),
    ({"disconnect_share": 0.1}, "disconnect_share needs disconnect_after_s"),
    ({"disconnect_share": 1.1}, "disconnect_share:"),
    ({"disconnect_after_s": [2, 1]}, "disconnect_after_s: .* descending"),
    ({"slowdown_requests": 3}, "slowdown_requests needs slowdown"),
    ({"target": {"protocol": "grpc"}}, "target.protocol:"),
    ({"target": {"url": "localhost:8000"}}, "target.url:"),
    ({"target": {"paths": {"cartoon": "/x"}}}, "target.paths.cartoon"),
    ({"target": {"shape": [2]}}, "target.shape"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_wrong_plan_names_the_key_and_the_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(**values)
    assert "docs/benchmarks.md" in caught.value.remedy


def test_an_endless_plan_must_say_how_many_requests_run_unloaded() -> None:
    endless = {
        "mode": "closed",
        "rate_per_s": None,
        "concurrency": 2,
        "requests": None,
        "duration_s": 1,
        "slowdown": True,
    }
    with pytest.raises(ConfigError, match="slowdown needs slowdown_requests"):
        plan(**endless)
    assert plan(**endless, slowdown_requests=3).slowdown_requests == 3


def test_an_endless_plan_has_sizes_whose_photos_can_be_made_before() -> None:
    endless = {"mode": "closed", "rate_per_s": None, "concurrency": 2, "requests": None}
    with pytest.raises(ConfigError, match="in a closed plan up_to needs requests"):
        plan(**endless, duration_s=1, sizes=[RANGE])


@pytest.mark.parametrize("text", ["name: [", b"\xff\xfe\x00", "just text", "", "made: 2026-99-99"])
def test_an_unreadable_plan_is_a_config_error(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    assert "plan" in str(caught.value)
    assert caught.value.remedy


def test_a_plan_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"smoke\.yaml"):
        load_plan(tmp_path / "absent.yaml")


def test_a_changed_plan_is_checked_too() -> None:
    assert plan().change(seed=9, target={"protocol": "raw"}).target.protocol == "raw"
    with pytest.raises(ConfigError):
        plan().change(target={"url": "nowhere"})


def test_the_projects_plans_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_plan(Path("benchmarks/plans/smoke.yaml")).name == "smoke"


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_starter_models_accept_every_request_of_a_shipped_plan(path: Path) -> None:
    for request in itertools.islice(requests(load_plan(path)), 300):
        assert request.task is not None
        typed = parse(
            Task(request.task).request, {k: str(v) for k, v in request.parameters.items()}
        )
        assert unused(typed, REGISTRY[request.task].parameters) == {}


def test_the_mixed_plan_sends_every_task_with_a_picture() -> None:
    made = requests(load_plan(Path("benchmarks/plans/mixed.yaml")))
    assert {request.task for request in made} == {task for task in Task if task.needs_picture}
