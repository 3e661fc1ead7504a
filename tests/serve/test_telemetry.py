"""What the running application tells of itself: metrics that alerts read, and traces."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import ray

from deployments.tasks import Task
from tests.promql import alerts, panels, selectors, shown
from tests.serve.conftest import FURTHER
from tests.serve.test_http import ROUTES, draw, jpeg, post

if TYPE_CHECKING:
    from collections.abc import Iterator

    from promql_parser import VectorSelector

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? ")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_COLLECTED_S = 90
COMIC = "/api/v1/images/style/comic"
Samples = dict[str, list[dict[str, str]]]
"""Labels of each series, by metric."""


def scrape() -> Samples:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: Samples = {}
    for line in httpx.get(url, timeout=10, trust_env=False).text.splitlines():
        if sample := _SAMPLE.match(line):
            labels = dict(_LABEL.findall(sample[2] or ""))
            found.setdefault(sample[1], []).append(labels)
    return found


@pytest.fixture(scope="module")
def samples(address: str, scripted: str) -> Samples:
    """The metrics after a picture of each kind, a job, a request that was refused, and a lost
    route; and after a wrong method, below a prefix.
    """
    for task in ROUTES:
        assert post(address, task, jpeg()).status_code == 200
    assert post(address, "upscale", jpeg(), model=FURTHER).status_code == 200
    assert draw(address, "a red star").status_code == 200
    job = httpx.post(
        f"{address}{COMIC}",
        files={"image": jpeg()},
        headers={"Prefer": "wait=60"},
        timeout=120,
        trust_env=False,
    )
    assert (job.status_code, job.headers["preference-applied"]) == (200, "wait=60")
    assert post(address, "comic", b"no picture").status_code == 415
    assert httpx.get(f"{address}/nowhere", trust_env=False).status_code == 404
    assert httpx.post(f"{scripted}/api/v1/models", trust_env=False).status_code == 405
    deadline_s = time.monotonic() + _COLLECTED_S
    while not _whole(found := scrape()) and time.monotonic() < deadline_s:
        time.sleep(2)  # each process tells Ray's agent in its own time
    return found


def _whole(found: Samples) -> bool:
    models = values(found, "ray_imagen_stage_seconds_count", "model")
    answers = found.get("ray_imagen_http_answers_total", [])
    statuses = {(one["route"], one["status"]) for one in answers}
    wanted = {(COMIC, "415"), ("other", "404"), ("/api/v1/models", "405")}
    named = [selector for e in _expressions() for selector in selectors(e)]
    return (
        wanted <= statuses
        and len(models) == len(Task) + 1
        and not any(missing(s, found) for s in named)
    )


def _expressions() -> list[str]:
    on_a_cpu = [panel for panel in panels() if panel.get("description") != "Empty without a GPU."]
    return [alert["expr"] for alert in alerts()] + [e for p in on_a_cpu for e in shown(p)]


def missing(selector: VectorSelector, samples: Samples) -> str:
    """What of a selector is not exported: the metric, or a label it is picked by."""
    series = samples.get(str(selector.name))
    if not series:
        return str(selector.name)
    labels = {matcher.name for matcher in selector.matchers.matchers}
    absent = labels - set(series[0])
    return f"{selector.name}{absent}" if absent else ""


@pytest.mark.parametrize("expression", _expressions())
def test_what_alerts_and_panels_read_is_exported(expression: str, samples: Samples) -> None:
    assert [what for one in selectors(expression) if (what := missing(one, samples))] == []


def values(samples: Samples, name: str, label: str) -> set[str]:
    return {series[label] for series in samples.get(name, []) if label in series}


def test_answers_are_counted_by_route_status_and_reason(samples: Samples) -> None:
    answers = samples["ray_imagen_http_answers_total"]
    told = {(one["route"], one["status"], one["reason"]) for one in answers}
    assert {one["protocol"] for one in answers} >= {"native"}
    assert {(COMIC, "200", "ok"), (COMIC, "415", "unsupported_media")} <= told
    assert ("other", "404", "not_found") in told
    assert ("/api/v1/models", "405", "method_not_allowed") in told, "of the one below a prefix"


def test_every_stage_of_every_model_is_timed(samples: Samples) -> None:
    series = samples["ray_imagen_stage_seconds_count"]
    stages = {(one["model"], one["stage"]) for one in series}
    models = values(samples, "ray_imagen_requests_total", "model")
    assert models == {*(f"{task}-starter" for task in Task), FURTHER}
    wanted = {"queue", "decode", "denoise", "vae", "encode"}
    drawn = {("generate-starter", stage) for stage in wanted - {"decode"}}
    others = models - {"generate-starter"}
    assert drawn | {(model, stage) for model in others for stage in wanted} <= stages


def serve_logs() -> Path:
    return Path(ray._private.worker._global_node.get_session_dir_path(), "logs", "serve")


def lines_about(request_id: str, file_name: str) -> list[dict[str, Any]]:
    """Lines of the application's logs that carry the request's id; every line must be JSON."""
    texts = [path.read_text() for path in serve_logs().glob(file_name)]
    lines = [line for text in texts for line in text.splitlines()]
    return [one for line in lines if (one := json.loads(line)).get("request_id") == request_id]


def test_jobs_are_counted_by_outcome_and_their_queue_is_told(samples: Samples) -> None:
    ended = samples["ray_imagen_jobs_ended_total"]
    assert ("comic", "completed") in {(one["task"], one["outcome"]) for one in ended}
    assert values(samples, "ray_imagen_jobs_waiting", "task") == set(Task)


def test_logs_are_json_and_carry_the_id_of_the_request(address: str) -> None:
    prompt, request_id = "a prompt that is nobody's business", "logged-1"
    answer = httpx.post(
        f"{address}/api/v1/images/style/comic",
        files={"image": ("photo.jpg", jpeg())},
        data={"prompt": prompt},
        headers={"X-Request-Id": request_id},
        timeout=120,
        trust_env=False,
    )
    assert answer.status_code == 200
    told = [line["message"] for line in lines_about(request_id, "replica_imagen_Ingress_*.log")]
    assert any("POST /api/v1/images/style/comic 200" in message for message in told), told
    assert lines_about(request_id, "replica_imagen_Comic_*.log")
    assert not any(prompt in path.read_text() for path in serve_logs().glob("*.log"))


def spans() -> Iterator[dict[str, Any]]:
    """Those that Serve's own exporter has written."""
    decoder = json.JSONDecoder()
    for path in serve_logs().glob("spans/*.json"):
        text = path.read_text()
        while text := text.lstrip():
            try:
                span, end = decoder.raw_decode(text)
            except ValueError:  # one that is being written
                break
            yield span
            text = text[end:]


def batches_in(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {span["context"]["span_id"]: span for span in found if span["name"] == "batch"}


def test_a_batch_is_one_span_linked_to_the_requests_in_it(address: str) -> None:
    # A request whose replica was killed has no span, but its batch may have one.
    earlier = batches_in(list(spans()))
    with ThreadPoolExecutor(4) as clients:
        answers = clients.map(lambda seed: post(address, "comic", jpeg(seed=seed)), range(4))
        assert [answer.status_code for answer in answers] == [200] * 4
    batches: list[dict[str, Any]] = []
    strangers = {"unread"}
    # A request's own span is written after its answer has left.
    ends_s = time.monotonic() + 20
    while (strangers or not batches) and time.monotonic() < ends_s:
        found = list(spans())
        batches = [span for name, span in batches_in(found).items() if name not in earlier]
        linked = {link["context"]["span_id"] for batch in batches for link in batch["links"]}
        others = (span["context"]["span_id"] for span in found if span["name"] != "batch")
        strangers = linked.difference(others)
        time.sleep(0.2)
    assert batches
    assert not strangers
    assert {"model", "rows", "closed", "passes"} <= set(batches[-1]["attributes"])
    for batch in batches:
        assert len(batch["links"]) == batch["attributes"]["rows"]
    assert {"decode", "engine", "encode"} <= {span["name"] for span in found}
