"""Jobs over real HTTP, with a real Redis and models that stand in for Ray's."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import psutil
import pytest
from PIL import Image

from deployments.catalogue import Registry
from deployments.errors import DamagedImage, Full, ModelFailed, NotReady
from deployments.settings import KeyLimits
from deployments.tasks import Task
from serve_app.access.editing import create_key, revoke_key
from serve_app.jobs import kept, worker
from tests.jobs.application import PATIENCE_S, Application, application, picture
from tests.jobs.redis_server import RedisServer
from tests.unit.fakes import REGISTRY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

ASYNC = {"Prefer": "respond-async"}
COMIC = Task.COMIC.route
NOBODY = "0" * 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
async def app(server: RedisServer, tmp_path: Path) -> AsyncGenerator[Application]:
    namespace = f"t{time.monotonic_ns()}"
    async with application(server.url, tmp_path, namespace=namespace) as running:
        yield running


@pytest.fixture
async def idle(server: RedisServer, tmp_path: Path) -> AsyncGenerator[Application]:
    """Nobody works."""
    namespace = f"t{time.monotonic_ns()}"
    async with application(server.url, tmp_path, working=False, namespace=namespace) as running:
        yield running


async def post(
    app: Application, headers: dict[str, str] | None = None, **data: str
) -> httpx.Response:
    return await app.client.post(
        COMIC, files={"image": ("photo.png", picture(0))}, data=data, headers=headers or {}
    )


def refused(answer: httpx.Response, status: int, code: str) -> Any:
    assert answer.status_code == status, answer.text
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["code"] == code
    assert problem["remedy"]
    return problem


async def test_openais_clients_may_ask_for_addresses(idle: Application) -> None:
    files = {"image": ("photo.png", picture(0))}
    fields = {"model": "comic", "prompt": "ink", "seed": "5", "n": "2", "response_format": "url"}
    answer = await idle.client.post("/v1/images/edits", files=files, data=fields)
    assert answer.status_code == 200, answer.text
    made = answer.json()["data"]
    assert [one["imagen"]["seed"] for one in made] == [5, 6]
    assert not any("b64_json" in one for one in made)
    for seed, one in enumerate(made, 5):
        assert one["url"].startswith(f"{idle.url}/files/")
        shown = await idle.client.get(one["url"])
        assert shown.status_code == 200, shown.text
        assert shown.content == picture(seed)
        assert shown.headers["content-type"] == "image/png"
    assert (await idle.client.get("/api/v1/jobs")).json()["jobs"] == []


async def ask_for_addresses(app: Application, n: int, token: str = "") -> httpx.Response:
    files = {"image": ("photo.png", picture(0))}
    fields = {"model": "comic", "prompt": "ink", "n": str(n), "response_format": "url"}
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return await app.client.post("/v1/images/edits", files=files, data=fields, headers=headers)


async def test_pictures_behind_addresses_are_few_and_make_room_when_they_end(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_SPARE_S", 0)
    _, token = create_key(tmp_path / "keys.yaml", "other", KeyLimits())
    _, mine = create_key(tmp_path / "keys.yaml", "mine", KeyLimits())
    async with application(
        server.url,
        tmp_path / "f",
        namespace="kept-urls",
        keys=tmp_path / "keys.yaml",
        working=False,
        max_urls=8,
        link_s=2,
    ) as app:
        assert (await ask_for_addresses(app, 6, mine)).status_code == 200
        before = len(app.models.jobs)
        answer = await ask_for_addresses(app, 3, mine)
        assert answer.status_code == 429, answer.text
        assert len(app.models.jobs) == before, "refused before any work"
        assert 1 <= int(answer.headers["retry-after"]) <= 2
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
        assert "let the answer hold the pictures themselves" in error["message"]
        assert (await ask_for_addresses(app, 2, mine)).status_code == 200, "which fill it"
        assert (await ask_for_addresses(app, 1, token)).status_code == 200, "of another key"
        async with asyncio.timeout(PATIENCE_S):
            while [one for one in (tmp_path / "f/files/outputs").rglob("*") if one.is_file()]:
                await asyncio.sleep(0.1)
        assert (await ask_for_addresses(app, 8, mine)).status_code == 200


async def test_pictures_that_could_not_be_stored_take_no_place(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(
        server.url, tmp_path, namespace="kept-no", working=False, max_urls=8
    ) as app:
        outputs = tmp_path / "files/outputs"
        outputs.write_bytes(b"a file where the folder should be")
        answer = await ask_for_addresses(app, 8)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "jobs_unavailable"
        outputs.unlink()
        assert (await ask_for_addresses(app, 8)).status_code == 200


# Submitting


async def test_a_job_is_accepted_at_once_and_ends_with_the_picture(app: Application) -> None:
    answer = await post(app, ASYNC, steps="4", seed="5")
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"
    job_id = answer.json()["job_id"]
    assert answer.json() == {"job_id": job_id, "status": "queued"}
    assert answer.headers["location"] == f"/api/v1/jobs/{job_id}"
    job = await app.ended(job_id)
    assert job["status"] == "completed"
    assert (job["steps_done"], job["steps"], job["attempts"]) == (4, 4, 1)
    assert job["gpu_seconds"] == 0.25
    [result] = job["results"]
    assert (result["seed"], result["media_type"]) == (5, "image/png")
    link = await app.client.get(result["url"])
    assert link.status_code == 307
    assert link.headers["cache-control"] == "no-store"
    shown = await app.client.get(link.headers["location"])
    assert shown.status_code == 200
    assert shown.content == picture(5)
    assert shown.headers["content-type"] == "image/png"


async def test_wait_answers_as_a_sync_call_does(app: Application) -> None:
    waited = await post(app, {"Prefer": "wait=10"}, steps="2", seed="5")
    direct = await post(app, steps="2", seed="5")
    assert waited.status_code == direct.status_code == 200
    assert waited.content == direct.content
    assert waited.headers["preference-applied"] == "wait=10"
    same = ("x-imagen-model", "x-imagen-seed", "x-imagen-batch-size", "x-imagen-size")
    assert [waited.headers[name] for name in same] == [direct.headers[name] for name in same]


async def documented(app: Application, answer: httpx.Response) -> None:
    """The answer of an image route is one that the document describes, to its last field."""
    document = (await app.client.get("/openapi.json")).json()
    known = document["paths"][COMIC]["post"]["responses"][str(answer.status_code)]
    schema = known["content"][answer.headers["content-type"]]["schema"]
    components = document["components"]
    for name in ("JobDocument", "Result"):
        components["schemas"][name]["additionalProperties"] = False
    jsonschema.validate(answer.json(), schema | {"components": components})
    assert {"location", "preference-applied"} <= set(answer.headers) & {
        name.lower() for name in known["headers"]
    }


async def test_wait_for_several_results_gets_the_job_as_the_document_says(
    app: Application,
) -> None:
    answer = await post(app, {"Prefer": "wait=10"}, n="2")
    assert answer.status_code == 200
    assert len(answer.json()["results"]) == 2
    await documented(app, answer)


async def test_wait_for_a_job_that_is_canceled_gets_the_job_as_the_document_says(
    app: Application,
) -> None:
    app.models.step_s = 5
    waiting = asyncio.create_task(post(app, {"Prefer": "wait=20"}))
    async with asyncio.timeout(PATIENCE_S):
        while not (jobs := (await app.client.get("/api/v1/jobs")).json()["jobs"]):
            await asyncio.sleep(0.05)
    await app.client.delete(jobs[0]["links"]["self"])
    answer = await waiting
    assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
    await documented(app, answer)


async def test_wait_gives_up_with_202(app: Application) -> None:
    app.models.step_s = 5
    answer = await post(app, {"Prefer": "wait=1"}, steps="2")
    assert (answer.status_code, answer.json()["status"]) == (202, "processing")


async def test_wait_for_a_job_that_fails_gets_the_problem_of_a_sync_call(app: Application) -> None:
    error = DamagedImage("The picture ends early.", value="half", remedy="Send all of it.")
    app.models.errors = [error, error]
    waited, direct = await post(app, {"Prefer": "wait=9"}), await post(app)
    assert (
        refused(waited, 400, "damaged_image")["fact"]
        == refused(direct, 400, "damaged_image")["fact"]
    )


async def test_several_results_have_seeds_that_follow_one_another(app: Application) -> None:
    job = await app.ended(await app.submit(seed=40, n="3"))
    assert [one["seed"] for one in job["results"]] == [40, 41, 42]
    assert len(app.models.jobs) == 1
    for k, seed in enumerate((40, 41, 42)):
        link = await app.client.get(f"/api/v1/jobs/{job['job_id']}/results/{k}")
        assert (await app.client.get(link.headers["location"])).content == picture(seed)
    refused(await app.client.get(f"/api/v1/jobs/{job['job_id']}/results/3"), 404, "no_such_job")


async def test_a_seed_is_drawn_once_for_all_attempts(app: Application) -> None:
    app.models.errors = [ModelFailed("No picture.", value="none", remedy="Again.")]
    job = await app.ended(await app.submit(seed=9))
    assert job["attempts"] == 2
    assert {one.request.seed for one in app.models.jobs} == {9}
    answer = await post(app, ASYNC)
    drawn = (await app.ended(answer.json()["job_id"]))["results"][0]["seed"]
    assert drawn == app.models.jobs[-1].request.seed


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", "2"), ("webhook", "https://a.example"), ("deadline_s", "9"), ("preview", "true")],
)
async def test_a_field_of_jobs_on_a_sync_call_names_prefer(
    app: Application, name: str, value: str
) -> None:
    problem = refused(await post(app, **{name: value}), 422, "invalid_parameter")
    assert "Prefer" in problem["remedy"]
    assert name in problem["fact"]


async def test_an_idempotency_key_on_a_sync_call_is_refused(app: Application) -> None:
    answer = await post(app, {"Idempotency-Key": "k"})
    assert "Prefer" in refused(answer, 422, "invalid_parameter")["remedy"]


async def test_n_of_one_is_fine_on_a_sync_call(app: Application) -> None:
    assert (await post(app, n="1")).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", "0"),
        ("n", "9"),
        ("priority", "urgent"),
        ("deadline_s", "0"),
        ("deadline_s", "nan"),
        ("webhook_events", "completed,exploded"),
        ("webhook", "ftp://a.example"),
        ("webhook", "https://127.0.0.1/x"),
        ("steps", "0"),
    ],
)
async def test_a_wrong_field_is_refused_before_anything_is_kept(
    idle: Application, name: str, value: str
) -> None:
    refused(await post(idle, ASYNC, **{name: value}), 422, "invalid_parameter")
    assert (await idle.client.get("/api/v1/jobs")).json()["jobs"] == []


async def test_n_needs_a_model_that_uses_chance(app: Application) -> None:
    answer = await app.client.post(
        Task.BACKGROUND.route, files={"image": picture(0)}, data={"n": "2"}, headers=ASYNC
    )
    refused(answer, 422, "invalid_parameter")


async def test_a_background_picture_goes_with_the_job_and_its_retry(app: Application) -> None:
    files = {"image": ("a.png", picture(0)), "background": ("b.png", picture(1))}
    app.models.errors.append(DamagedImage("No.", value="x", remedy="y"))
    key = ASYNC | {"Idempotency-Key": "bg"}
    made = await app.client.post(Task.BACKGROUND.route, files=files, headers=key)
    job = await app.ended(made.json()["job_id"])
    assert job["status"] == "failed"
    retried = await app.client.post(f"/api/v1/jobs/{job['job_id']}/retry")
    assert (await app.ended(retried.json()["job_id"]))["status"] == "completed"
    assert [(one.image, one.background) for one in app.models.jobs] == [
        (picture(0), picture(1))
    ] * 2
    files["background"] = ("b.png", picture(2))
    other = await app.client.post(Task.BACKGROUND.route, files=files, headers=key)
    refused(other, 409, "idempotency_conflict")


async def test_a_mask_goes_with_the_job_and_its_retry(app: Application) -> None:
    files = {"image": ("a.png", picture(0)), "mask": ("b.png", picture(1))}
    app.models.errors.append(DamagedImage("No.", value="x", remedy="y"))
    key = ASYNC | {"Idempotency-Key": "mask"}
    made = await app.client.post(Task.COMIC.route, files=files, headers=key)
    job = await app.ended(made.json()["job_id"])
    assert job["status"] == "failed"
    assert job["request"]["mask"] == "picture"
    retried = await app.client.post(f"/api/v1/jobs/{job['job_id']}/retry")
    assert (await app.ended(retried.json()["job_id"]))["status"] == "completed"
    assert [(one.image, one.mask) for one in app.models.jobs] == [(picture(0), picture(1))] * 2
    files["mask"] = ("b.png", picture(2))
    other = await app.client.post(Task.COMIC.route, files=files, headers=key)
    refused(other, 409, "idempotency_conflict")


async def test_a_repeated_submission_finds_the_first_job(idle: Application) -> None:
    key = ASYNC | {"Idempotency-Key": "k-1"}
    first, again = await post(idle, key, steps="3"), await post(idle, key, steps="3")
    assert again.status_code == 202
    assert again.json()["job_id"] == first.json()["job_id"]
    refused(await post(idle, key, steps="4"), 409, "idempotency_conflict")
    assert len((await idle.client.get("/api/v1/jobs")).json()["jobs"]) == 1


async def test_a_repeated_submission_tells_the_present_status_of_the_first(
    app: Application,
) -> None:
    app.models.step_s = 0.2
    key = ASYNC | {"Idempotency-Key": "k-3"}
    first = (await post(app, key, steps="8")).json()
    async with asyncio.timeout(PATIENCE_S):
        while (await app.job(first["job_id"]))["status"] == "queued":
            await asyncio.sleep(0.02)
    assert (await post(app, key, steps="8")).json() == first | {"status": "processing"}
    await app.ended(first["job_id"])
    assert (await post(app, key, steps="8")).json() == first | {"status": "completed"}
    waited = await post(app, {"Prefer": "wait=9", "Idempotency-Key": "k-3"}, steps="8")
    assert (waited.status_code, waited.headers["content-type"]) == (200, "image/png")


async def test_an_idempotency_key_ends_with_its_job(server: RedisServer, tmp_path: Path) -> None:
    async with application(server.url, tmp_path, namespace="ends", keep_s=1) as app:
        key = ASYNC | {"Idempotency-Key": "k"}
        first = (await post(app, key)).json()["job_id"]
        await app.ended(first)
        async with asyncio.timeout(PATIENCE_S):
            while (await app.client.get(f"/api/v1/jobs/{first}")).status_code == 200:
                await asyncio.sleep(0.1)
        again = await post(app, key)
        assert again.json()["status"] == "queued"
        assert again.json()["job_id"] != first
        assert (await app.ended(again.json()["job_id"]))["status"] == "completed"


async def test_a_repeated_submission_is_not_charged(server: RedisServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    # A picture has 384 px, of which a minute has room for one and a half.
    _, token = create_key(keys, "mine", KeyLimits(megapixels_per_minute=600 / 1e6))
    me = {"Authorization": f"Bearer {token}"}
    async with application(
        server.url, tmp_path / "f", namespace="repeated", keys=keys, working=False
    ) as app:
        same = ASYNC | me | {"Idempotency-Key": "k"}
        answers = [await post(app, same) for _ in range(5)]
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.json()["job_id"] for answer in answers}) == 1
        refused(await post(app, ASYNC | me), 429, "rate_limited")
        assert (await post(app, same)).status_code == 202
        await app.client.delete(answers[0].headers["location"], headers=me)


async def test_a_job_that_ends_badly_keeps_its_charge_also_where_its_client_waits(
    server: RedisServer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    _, token = create_key(keys, "mine", KeyLimits(megapixels_per_minute=600 / 1e6))
    me = {"Authorization": f"Bearer {token}"}
    async with application(server.url, tmp_path / "f", namespace="late", keys=keys) as app:
        app.models.step_s = 10
        late = await post(app, {"Prefer": "wait=20"} | me, deadline_s="1")
        assert late.status_code == 504
        refused(await post(app, ASYNC | me), 429, "rate_limited")


async def test_equal_submissions_at_once_are_charged_once(
    server: RedisServer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    _, token = create_key(keys, "mine", KeyLimits(megapixels_per_minute=384 * 12 / 1e6))
    me = {"Authorization": f"Bearer {token}"}
    async with application(
        server.url, tmp_path / "f", namespace="once", keys=keys, working=False
    ) as app:
        same = ASYNC | me | {"Idempotency-Key": "k"}
        answers = await asyncio.gather(*(post(app, same) for _ in range(8)))
        assert {answer.status_code for answer in answers} == {202}
        others = [(await post(app, ASYNC | me)).status_code for _ in range(11)]
        assert others == [202] * 11


async def test_many_equal_submissions_at_once_make_one_job(idle: Application) -> None:
    key = ASYNC | {"Idempotency-Key": "k-2"}
    answers = await asyncio.gather(*(post(idle, key) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["job_id"] for answer in answers}) == 1


@pytest.mark.parametrize("prefer", ["", "wait", "wait=-1", "wait=x", "handling=strict", "foo"])
async def test_a_preference_that_means_nothing_here_is_ignored(
    app: Application, prefer: str
) -> None:
    answer = await post(app, {"Prefer": prefer})
    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


async def test_async_can_be_the_default(server: RedisServer, tmp_path: Path) -> None:
    async with application(
        server.url, tmp_path, namespace="default", respond_async_by_default=True
    ) as app:
        answer = await post(app)
        assert answer.status_code == 202
        waited = await post(app, {"Prefer": "wait=9"})
        assert waited.status_code == 200


async def test_a_full_queue_says_when_to_come_back(server: RedisServer, tmp_path: Path) -> None:
    async with application(
        server.url, tmp_path, working=False, namespace="full", max_queued=2
    ) as app:
        assert [(await post(app, ASYNC)).status_code for _ in range(2)] == [202, 202]
        answer = await post(app, ASYNC)
        refused(answer, 429, "full")
        assert int(answer.headers["retry-after"]) >= 1
        assert len(list((tmp_path / "files").glob("inputs/*/image"))) == 2


# Reading


async def test_the_queue_tells_the_place_and_the_time(idle: Application) -> None:
    ids = [await idle.submit(seed=i) for i in range(3)]
    places = [(await idle.job(job_id))["position"] for job_id in ids]
    assert places == [1, 2, 3]


async def test_pages_lead_through_all_jobs(idle: Application) -> None:
    made = [await idle.submit(seed=i) for i in range(5)]
    await idle.client.delete(f"/api/v1/jobs/{made[1]}")
    seen, cursor = [], ""
    while cursor is not None:
        page = (await idle.client.get(f"/api/v1/jobs?limit=2&cursor={cursor}")).json()
        seen += [job["job_id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert seen == made[::-1]
    canceled = (await idle.client.get("/api/v1/jobs?status=canceled")).json()["jobs"]
    assert [job["job_id"] for job in canceled] == [made[1]]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "status=lost", "cursor=../x", "page=2"]
)
async def test_a_wrong_query_is_refused(idle: Application, query: str) -> None:
    refused(await idle.client.get(f"/api/v1/jobs?{query}"), 422, "invalid_parameter")


@pytest.mark.parametrize("job_id", [NOBODY, "x", "0" * 31, "A" * 32, "%2e%2e", "*", "0" * 400])
@pytest.mark.parametrize("route", ["", "/result", "/results/0", "/events", "/retry", "DELETE"])
async def test_a_job_that_nobody_knows_is_404(idle: Application, job_id: str, route: str) -> None:
    method = {"/retry": "POST", "DELETE": "DELETE"}.get(route, "GET")
    path = f"/api/v1/jobs/{job_id}{route if route != 'DELETE' else ''}"
    refused(await idle.client.request(method, path), 404, "no_such_job")


async def test_a_result_comes_in_the_answer_itself_where_the_client_prefers_that(
    app: Application,
) -> None:
    job = await app.ended(await app.submit(seed=40, n="2"))
    headers = {"Prefer": "return=representation"}
    answer = await app.client.get(job["results"][1]["url"], headers=headers)
    assert (answer.status_code, answer.content) == (200, picture(41))
    assert answer.headers["preference-applied"] == "return=representation"
    assert answer.headers["x-imagen-seed"] == "41"
    assert "denoise" in answer.headers["server-timing"]
    wrong = await app.client.get(f"/api/v1/jobs/{job['job_id']}/results/2", headers=headers)
    refused(wrong, 404, "no_such_job")


async def test_a_result_before_the_end_is_a_conflict(idle: Application) -> None:
    job_id = await idle.submit()
    refused(await idle.client.get(f"/api/v1/jobs/{job_id}/result"), 409, "job_conflict")


async def test_a_link_that_was_altered_is_refused(app: Application) -> None:
    job = await app.ended(await app.submit())
    link = (await app.client.get(job["links"]["result"])).headers["location"]
    assert (await app.client.get(link)).status_code == 200
    for altered in (
        link[:-1] + ("0" if link[-1] != "0" else "1"),
        link.replace("expires=", "expires=1"),
    ):
        refused(await app.client.get(altered), 403, "link_refused")
    refused(await app.client.get("/files/outputs/x"), 403, "link_refused")


async def link_of(app: Application, job_id: str) -> str:
    job = await app.ended(job_id)
    return str((await app.client.get(job["links"]["result"])).headers["location"])


async def test_a_part_of_a_picture_can_be_fetched(app: Application) -> None:
    link, whole = await link_of(app, await app.submit(seed=5)), picture(5)
    size = len(whole)
    part = await app.client.get(link, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{size}"
    assert part.headers["content-type"] == "image/png"
    rest = await app.client.get(link, headers={"Range": f"bytes={size - 9}-"})
    assert (rest.status_code, rest.content) == (206, whole[-9:])
    end = await app.client.get(link, headers={"Range": "bytes=-9"})
    assert (end.status_code, end.content) == (206, whole[-9:])


@pytest.mark.parametrize(
    "ranges", ["bytes=9-3", "bytes=999999-", "bytes=0-1,5-9", "bytes=-0", "lines=1-2", "x"]
)
async def test_a_range_that_cannot_be_sent_is_ignored(app: Application, ranges: str) -> None:
    link = await link_of(app, await app.submit(seed=5))
    answer = await app.client.get(link, headers={"Range": ranges})
    assert (answer.status_code, answer.content) == (200, picture(5))


async def test_downloads_are_sent_in_pieces_and_have_bounded_places(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(server.url, tmp_path, namespace="downloads", max_streams=1) as app:
        link = await link_of(app, await app.submit())
        path = tmp_path / "files" / link.partition("?")[0].removeprefix("/files/")
        size = 64 * 2**20
        with path.open("r+b") as file:
            file.truncate(size)  # more than any socket holds
        before = psutil.Process().memory_info().rss
        async with app.client.stream("GET", link) as slow:
            assert int(slow.headers["content-length"]) == size
            pieces = slow.aiter_bytes()
            await anext(pieces)
            answer = await app.client.get(link)
            refused(answer, 429, "full")
            assert int(answer.headers["retry-after"]) >= 1
            assert psutil.Process().memory_info().rss - before < size / 2
            # A place for a stream is another one.
            assert (await app.client.get("/api/v1/jobs")).status_code == 200
        async with asyncio.timeout(PATIENCE_S):
            while (await app.client.get(link, headers={"Range": "bytes=0-9"})).status_code != 206:
                await asyncio.sleep(0.05)


# Ending


async def test_cancel_a_queued_job(idle: Application) -> None:
    job_id = await idle.submit()
    canceled = await idle.client.delete(f"/api/v1/jobs/{job_id}")
    assert (canceled.status_code, canceled.json()["status"]) == (200, "canceled")
    assert (await idle.client.delete(f"/api/v1/jobs/{job_id}")).status_code == 200
    await idle.start_worker()
    await asyncio.sleep(0.3)
    assert idle.models.jobs == []


async def test_jobs_that_are_over_are_forgotten_although_nobody_works(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(server.url, tmp_path, namespace="idle", working=False, keep_s=1) as idle:
        job_id = await idle.submit()
        pictures = tmp_path / "files/inputs" / job_id
        assert list(pictures.iterdir())
        await idle.client.delete(f"/api/v1/jobs/{job_id}")
        async with asyncio.timeout(PATIENCE_S):
            while (await idle.client.get(f"/api/v1/jobs/{job_id}")).status_code == 200:
                await asyncio.sleep(0.1)
        assert (await idle.client.get("/api/v1/jobs")).json()["jobs"] == []
        while list(pictures.iterdir()):
            await asyncio.sleep(0.05)


async def test_the_oldest_ended_jobs_of_a_key_make_room(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(server.url, tmp_path, namespace="kept", max_kept=2) as app:
        made = [await app.submit(seed=i) for i in range(2)]
        for job_id in made:
            await app.ended(job_id)
        made.append(await app.submit())
        await app.ended(made[2])
        listed = (await app.client.get("/api/v1/jobs")).json()["jobs"]
        assert [job["job_id"] for job in listed] == made[:0:-1]
        async with asyncio.timeout(PATIENCE_S):
            while (await app.client.get(f"/api/v1/jobs/{made[0]}")).status_code == 200:
                await asyncio.sleep(0.1)


async def test_cancel_stops_a_running_job_between_its_steps(app: Application) -> None:
    app.models.step_s = 0.1
    job_id = await app.submit(steps="100")
    async with asyncio.timeout(PATIENCE_S):
        while (await app.job(job_id))["steps_done"] < 3:
            await asyncio.sleep(0.05)
    assert (await app.client.delete(f"/api/v1/jobs/{job_id}")).json()["status"] == "canceled"
    await asyncio.sleep(0.3)
    stopped_at = app.models.stepped[job_id]
    await asyncio.sleep(0.4)
    assert app.models.stepped[job_id] == stopped_at
    assert (await app.job(job_id))["status"] == "canceled"


async def test_cancel_after_the_end_is_a_conflict(app: Application) -> None:
    job_id = await app.submit()
    await app.ended(job_id)
    refused(await app.client.delete(f"/api/v1/jobs/{job_id}"), 409, "job_conflict")


async def test_bad_input_is_never_tried_again(app: Application) -> None:
    app.models.errors = [DamagedImage("The picture ends early.", value="half", remedy="Send it.")]
    job = await app.ended(await app.submit())
    assert (job["status"], job["attempts"]) == ("failed", 1)
    assert job["error"]["code"] == "damaged_image"
    assert len(app.models.jobs) == 1


async def test_waiting_for_a_replica_costs_no_attempt(server: RedisServer, tmp_path: Path) -> None:
    async with application(server.url, tmp_path, namespace="waits", attempts=1) as app:
        app.models.errors = [NotReady("It starts.", value="starting", remedy="Again.")] * 2
        job = await app.ended(await app.submit())
        assert (job["status"], job["attempts"]) == ("completed", 1)


async def test_a_busy_model_costs_no_attempt(app: Application) -> None:
    busy = Full("Busy.", value="busy", remedy="Again.", retry_after_s=0.01)
    app.models.errors = [busy] * 8
    job = await app.ended(await app.submit())
    assert (job["status"], job["attempts"]) == ("completed", 1)


async def test_a_job_that_fails_again_and_again_is_a_dead_letter(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(server.url, tmp_path, namespace="dead", attempts=2) as app:
        app.models.errors = [ModelFailed("No picture.", value="none", remedy="Again.")] * 2
        job = await app.ended(await app.submit())
        assert (job["status"], job["attempts"]) == ("failed", 2)
        assert [one.spec.job_id for one in await app.queue.dead()] == [job["job_id"]]


async def test_a_job_past_its_deadline_fails_as_too_late(app: Application) -> None:
    app.models.step_s = 10
    job = await app.ended(await app.submit(deadline_s="1"))
    assert (job["status"], job["error"]["code"]) == ("failed", "too_late")


async def test_a_failed_job_can_be_retried_as_a_new_one(app: Application) -> None:
    app.models.errors = [DamagedImage("The picture ends early.", value="half", remedy="Send it.")]
    failed = await app.ended(await app.submit(seed=3))
    answer = await app.client.post(f"/api/v1/jobs/{failed['job_id']}/retry")
    assert answer.status_code == 202
    again = await app.ended(answer.json()["job_id"])
    assert (again["status"], again["retry_of"]) == ("completed", failed["job_id"])
    assert again["request"] == failed["request"]
    refused(await app.client.post(f"/api/v1/jobs/{again['job_id']}/retry"), 409, "job_conflict")


async def test_a_job_runs_on_the_model_that_its_request_named(
    server: RedisServer, tmp_path: Path
) -> None:
    second = REGISTRY[Task.COMIC].model_copy(update={"name": "comic-second"})
    two = Registry([*REGISTRY.models, second], {"comic-second": Task.COMIC})
    async with application(
        server.url, tmp_path, namespace="two", working=False, registry=two
    ) as app:
        asked = [await app.submit(), await app.submit(model="comic-second")]
        assert [(await app.job(one))["model"] for one in asked] == [None, "comic-second"]
        await app.start_worker()
        ended = [await app.ended(one) for one in asked]
        used = [one["results"][0]["metadata"]["model"].partition("@")[0] for one in ended]
        assert used == ["comic-starter", "comic-second"]


async def test_a_job_whose_model_is_not_served_any_more_fails_and_says_so(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_LEAVE_S", 0.0)
    second = REGISTRY[Task.COMIC].model_copy(update={"name": "comic-second"})
    two = Registry([*REGISTRY.models, second], {"comic-second": Task.COMIC})
    async with application(
        server.url, tmp_path, namespace="gone", working=False, registry=two
    ) as app:
        job_id = await app.submit(model="comic-second")
        app.registry = REGISTRY
        await app.start_worker()
        job = await app.ended(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "invalid_parameter")
        assert "comic-starter" in job["error"]["remedy"]


async def test_a_retry_for_a_model_that_is_not_served_any_more_is_refused(
    server: RedisServer, tmp_path: Path
) -> None:
    second = REGISTRY[Task.COMIC].model_copy(update={"name": "comic-second"})
    two = Registry([*REGISTRY.models, second], {"comic-second": Task.COMIC})
    none = Registry([one for one in REGISTRY.models if one.task != Task.COMIC], {})
    same: dict[str, Any] = {"namespace": "refused", "working": False}
    async with application(server.url, tmp_path, registry=two, **same) as app:
        job_ids = [await app.submit(), await app.submit(model="comic-second")]
        for job_id in job_ids:
            assert (await app.client.delete(f"/api/v1/jobs/{job_id}")).status_code == 200
    async with application(server.url, tmp_path, registry=none, **same) as app:
        for job_id in job_ids:
            answer = await app.client.post(f"/api/v1/jobs/{job_id}/retry")
            problem = refused(answer, 422, "invalid_parameter")
            assert "No model serves the task comic here" in problem["detail"]


async def test_a_lost_worker_s_job_is_run_again(server: RedisServer, tmp_path: Path) -> None:
    async with application(server.url, tmp_path, namespace="lost", lease_s=1) as app:
        app.models.step_s = 0.2
        job_id = await app.submit(steps="10", seed=6)
        async with asyncio.timeout(PATIENCE_S):
            while (await app.job(job_id))["steps_done"] < 2:
                await asyncio.sleep(0.05)
        await app.lose_worker()
        app.models.step_s = 0
        await app.start_worker()
        job = await app.ended(job_id)
        assert (job["status"], job["attempts"]) == ("completed", 2)


async def test_results_that_a_lost_worker_stored_are_not_made_again(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(
        server.url, tmp_path, namespace="stored", working=False, lease_s=1
    ) as app:
        job_id = await app.submit(seed=6)
        [job] = await app.queue.claim({Task.COMIC: 1})
        document = {
            "seed": 6,
            "media_type": "image/png",
            "width_px": 24,
            "height_px": 16,
            "bytes": 3,
            "metadata": {
                "model": "m",
                "batch_size": 1,
                "gpu_seconds": 0.0,
                "determinism": "exact",
                "timings_s": {"denoise": 1.0},
                "notes": [],
            },
        }
        await app.jobs.files.put_result(job_id, 0, picture(99), document)
        await app.start_worker()
        done = await app.ended(job_id)
        assert done["status"] == "completed"
        assert app.models.jobs == []
        link = (await app.client.get(done["links"]["result"])).headers["location"]
        assert (await app.client.get(link)).content == picture(99)
        assert job.spec.job_id == job_id


# Notes


@pytest.mark.parametrize("seed", ["-1", None])
async def test_a_seed_that_was_drawn_is_said_in_the_job_and_with_its_picture(
    server: RedisServer, tmp_path: Path, seed: str | None
) -> None:
    async with application(server.url, tmp_path, namespace=f"notes{seed is None}".lower()) as app:
        fields = {"steps": "2"} | ({} if seed is None else {"seed": seed})
        files = {"image": ("photo.png", picture(0))}
        headers = {"Prefer": "wait=30"}
        answer = await app.client.post(Task.COMIC.route, files=files, data=fields, headers=headers)
        assert answer.headers["x-imagen-note"].startswith("seed_drawn: ")
        job = (await app.client.get(answer.headers["location"])).json()
        [told] = job["results"][0]["metadata"]["notes"]
        assert told["code"] == "seed_drawn"
        assert str(job["request"]["seed"]) == answer.headers["x-imagen-seed"]

        told = await app.ended(await app.submit(seed=5))
        assert told["results"][0]["metadata"]["notes"] == []


async def test_a_preview_of_a_model_without_steps_is_said_to_be_ignored(app: Application) -> None:
    files, headers = {"image": ("photo.png", picture(0))}, {"Prefer": "wait=30"}
    for task, expected in ((Task.UPSCALE, True), (Task.COMIC, False)):
        data = {"preview": "true"} if expected else {"preview": "true", "steps": "2", "seed": "1"}
        answer = await app.client.post(task.route, files=files, data=data, headers=headers)
        told = answer.headers.get("x-imagen-note", "")
        assert ("preview was ignored" in told) is expected, told


# Events


async def events_of(app: Application, job_id: str, last: str = "") -> list[dict[str, Any]]:
    """Every event until the stream ends."""
    headers = {"Last-Event-ID": last} if last else {}
    found: list[dict[str, Any]] = []
    async with app.client.stream("GET", f"/api/v1/jobs/{job_id}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        async for line in stream.aiter_lines():
            name, _, value = line.partition(": ")
            if not line and "event" in event:
                assert event.pop("retry", "1000") == "1000"
                found.append(event | {"data": json.loads(event["data"])})
                event = {}
            elif name:
                event[name] = value
    return found


async def test_events_tell_each_state_and_the_steps_between(app: Application) -> None:
    app.models.step_s = 0.15
    events = await events_of(app, await app.submit(steps="6"))
    names = [event["event"] for event in events]
    assert names[0] == "queued"
    assert names[1] == "processing"
    assert names[-1] == "completed"
    assert set(names[2:-1]) == {"progress"}
    done = [event["data"]["steps_done"] for event in events[2:-1]]
    assert done == sorted(done)
    assert events[-1]["data"]["results"][0]["seed"] == 1


async def test_a_stream_is_resumed_after_the_last_event(app: Application) -> None:
    job_id = await app.submit()
    await app.ended(job_id)
    events = await events_of(app, job_id)
    assert await events_of(app, job_id, events[0]["id"]) == events[1:]


async def test_whoever_has_the_last_event_of_a_job_is_told_not_to_come_back(
    app: Application,
) -> None:
    job_id = await app.submit()
    await app.ended(job_id)
    last = {"Last-Event-ID": (await events_of(app, job_id))[-1]["id"]}
    # This ends the reconnections of a browser's EventSource.
    answer = await app.client.get(f"/api/v1/jobs/{job_id}/events", headers=last)
    assert (answer.status_code, answer.content) == (204, b"")


async def test_a_job_that_goes_on_has_more_events_to_come(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(
        server.url, tmp_path, namespace="more", working=False, stream_s=0.3
    ) as app:
        job_id = await app.submit()
        [queued] = await events_of(app, job_id)
        assert await events_of(app, job_id, queued["id"]) == []


@pytest.mark.parametrize(
    "last", ["9" * 20 + "-0", "18446744073709551615-18446744073709551615", "-", "x"]
)
async def test_an_event_id_that_no_event_has_begins_the_stream_anew(
    app: Application, last: str
) -> None:
    job_id = await app.submit()
    await app.ended(job_id)
    assert (await events_of(app, job_id, last))[0]["event"] == "queued"


async def test_a_stream_ends_before_the_proxy_would_cut_it(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(
        server.url, tmp_path, namespace="short", working=False, stream_s=0.5
    ) as app:
        job_id = await app.submit()
        events = await events_of(app, job_id)
        assert [event["event"] for event in events] == ["queued"]


async def test_a_stream_that_loses_redis_ends_so_that_the_client_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.jobs.service._LOOK_S", 0.1)
    with RedisServer(tmp_path / "redis") as server:
        async with application(
            server.url, tmp_path / "files", namespace="cut", working=False
        ) as app:
            path = f"/api/v1/jobs/{await app.submit()}/events"
            async with app.client.stream("GET", path) as stream:
                lines = stream.aiter_lines()
                while await anext(lines) != "event: queued":
                    pass
                server.kill()
                assert not [line async for line in lines if line.startswith("event:")]
            refused(await app.client.get(path), 503, "jobs_unavailable")


async def test_a_preview_is_a_small_jpeg(app: Application) -> None:
    app.models.step_s = 0.3
    events = await events_of(app, await app.submit(steps="3", preview="true"))
    [first, *_] = [event["data"]["image"] for event in events if event["event"] == "preview"]
    kind, _, data = first.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).width == 24


async def test_streams_have_bounded_places(server: RedisServer, tmp_path: Path) -> None:
    async with application(
        server.url, tmp_path, namespace="places", working=False, max_streams=1
    ) as app:
        job_id = await app.submit()
        path = f"/api/v1/jobs/{job_id}/events"
        async with app.client.stream("GET", path) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            refused(await app.client.get(path), 429, "full")
        async with app.client.stream("GET", path) as stream:
            assert stream.status_code == 200


async def test_one_key_takes_no_more_than_its_share_of_streams_and_waits(
    server: RedisServer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    made = [create_key(keys, name, KeyLimits(wait_share=0.5)) for name in ("mine", "other")]
    me, them = ({"Authorization": f"Bearer {token}"} for _, token in made)
    async with application(
        server.url,
        tmp_path / "f",
        namespace="waiting",
        keys=keys,
        working=False,
        max_streams=2,
        max_waits=2,
    ) as app:
        paths = [
            f"{(await post(app, ASYNC | who)).headers['location']}/events" for who in (me, them)
        ]
        async with app.client.stream("GET", paths[0], headers=me) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            answer = await app.client.get(paths[0], headers=me)
            assert "wait_share" in refused(answer, 429, "rate_limited")["value"]
            assert int(answer.headers["retry-after"]) >= 1
            async with app.client.stream("GET", paths[1], headers=them) as other:
                assert other.status_code == 200
        waiting = asyncio.create_task(post(app, {"Prefer": "wait=3"} | me))
        await asyncio.sleep(0.5)
        # It is told its job at once, while another key can wait.
        again, others = await asyncio.gather(
            post(app, {"Prefer": "wait=9"} | me), post(app, {"Prefer": "wait=1"} | them)
        )
        assert not waiting.done()
        assert [again.status_code, others.status_code] == [202, 202]
        assert (await app.client.get(again.headers["location"], headers=me)).status_code == 200
        assert (await waiting).status_code == 202


# Redis away


async def test_without_redis_sync_goes_on_and_async_says_when_to_come_back(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        async with application(server.url, tmp_path / "files", namespace="away") as app:
            before = await app.submit()
            await app.ended(before)
            server.kill()
            assert (await post(app)).status_code == 200
            answer = await post(app, ASYNC)
            refused(answer, 503, "jobs_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            refused(await app.client.get(f"/api/v1/jobs/{before}"), 503, "jobs_unavailable")
            server.start()
            assert (await app.ended(before))["status"] == "completed"
            assert (await app.ended(await app.submit()))["status"] == "completed"


# Keys


async def test_a_key_sees_only_its_own_jobs(server: RedisServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    (_, mine), (_, other) = (create_key(keys, name, KeyLimits()) for name in ("mine", "other"))
    async with application(
        server.url, tmp_path / "files", namespace="owners", keys=keys, working=False
    ) as app:
        me, them = ({"Authorization": f"Bearer {token}"} for token in (mine, other))
        assert (await post(app, ASYNC)).status_code == 401
        job_id = (await post(app, ASYNC | me)).json()["job_id"]
        path = f"/api/v1/jobs/{job_id}"
        assert (await app.client.get(path, headers=me)).status_code == 200
        for method, route in (
            ("GET", ""),
            ("DELETE", ""),
            ("GET", "/result"),
            ("GET", "/events"),
            ("POST", "/retry"),
        ):
            refused(
                await app.client.request(method, path + route, headers=them), 404, "no_such_job"
            )
        listed = [
            (await app.client.get("/api/v1/jobs", headers=headers)).json()["jobs"]
            for headers in (me, them)
        ]
        assert [len(jobs) for jobs in listed] == [1, 0]
        secrets = [
            (await app.client.get("/api/v1/webhook-secret", headers=headers)).json()["secret"]
            for headers in (me, me, them)
        ]
        assert secrets[0] == secrets[1] != secrets[2]
        # The same Idempotency-Key of two owners means two jobs.
        same = ASYNC | {"Idempotency-Key": "k"}
        ids = {(await post(app, same | headers)).json()["job_id"] for headers in (me, them)}
        assert len(ids) == 2


async def test_a_key_revoked_in_mid_job_loses_sight_of_it_but_not_the_job(
    server: RedisServer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    key, token = create_key(keys, "mine", KeyLimits())
    me = {"Authorization": f"Bearer {token}"}
    async with application(server.url, tmp_path / "files", namespace="revoked", keys=keys) as app:
        app.models.step_s = 0.3
        job_id = (await post(app, ASYNC | me, steps="6")).json()["job_id"]
        revoke_key(keys, key.id)
        path = f"/api/v1/jobs/{job_id}"
        async with asyncio.timeout(PATIENCE_S):
            while (await app.client.get(path, headers=me)).status_code != 401:
                await asyncio.sleep(0.1)
        async with asyncio.timeout(PATIENCE_S):
            while (job := await app.queue.get(job_id)) and not job.has_ended:
                await asyncio.sleep(0.1)
        assert job
        assert job.status == "completed"


async def test_a_share_of_the_queue_is_the_key_s_limit(server: RedisServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    _, token = create_key(keys, "mine", KeyLimits(queue_share=0.2))
    me = {"Authorization": f"Bearer {token}"}
    async with application(
        server.url, tmp_path / "f", namespace="share", keys=keys, working=False, max_queued=10
    ) as app:
        statuses = [(await post(app, ASYNC | me)).status_code for _ in range(3)]
        assert statuses == [202, 202, 429]
        refused(await post(app, ASYNC | me), 429, "rate_limited")


async def test_an_application_ends_with_a_test_that_fails(
    server: RedisServer, tmp_path: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with application(server.url, tmp_path, namespace="fails") as app:
            _ = 1 / 0
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(app.url)


# What one client must not do to others, or to itself


async def test_a_preview_never_stays_in_redis(app: Application) -> None:
    app.models.step_s = 0.3
    job_id = await app.submit(steps="4", preview="true")
    events = await events_of(app, job_id)
    previews = [event for event in events if event["event"] == "preview"]
    assert previews
    assert not any("id" in event for event in previews)
    assert all(event.name != "preview" for event in await app.queue.events(job_id))
    assert await app.queue.preview(job_id) == ""


async def test_a_job_whose_answer_finds_no_place_to_wait_is_told_its_id(
    server: RedisServer, tmp_path: Path
) -> None:
    async with application(
        server.url, tmp_path, working=False, namespace="nowait", max_waits=1
    ) as app:
        waiting = asyncio.create_task(post(app, {"Prefer": "wait=2"}))
        await asyncio.sleep(0.5)
        answer = await post(app, {"Prefer": "wait=2"})
        assert answer.status_code == 202
        assert (await app.client.get(answer.headers["location"])).json()["status"] == "queued"
        await waiting


async def test_without_redis_repeated_submissions_leave_one_picture_at_most(
    tmp_path: Path,
) -> None:
    with RedisServer(tmp_path / "redis") as server:
        async with application(
            server.url, tmp_path / "f", namespace="leaves", working=False
        ) as app:
            await app.submit()
            server.kill()
            for _ in range(4):
                refused(await post(app, ASYNC), 503, "jobs_unavailable")
            assert len(list((tmp_path / "f").glob("files/inputs/*/image"))) <= 2


async def test_a_record_of_another_version_stands_in_nobodys_way(app: Application) -> None:
    app.models.step_s = 10
    bad, good = await app.submit(deadline_s="1"), await app.submit(deadline_s="1")
    text = await app.queue._redis().hget(app.queue.key("job", bad), "spec")  # type: ignore[misc]
    other = json.dumps(json.loads(str(text)) | {"task": "future"})
    await app.queue._redis().hset(app.queue.key("job", bad), "spec", other)  # type: ignore[misc]
    assert (await app.ended(good))["error"]["code"] == "too_late"
    listed = (await app.client.get("/api/v1/jobs")).json()["jobs"]
    assert [job["job_id"] for job in listed] == [good]


async def test_a_retry_is_charged_as_a_submission(server: RedisServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    # A picture has 384 px; three of them are a bucket.
    _, token = create_key(keys, "mine", KeyLimits(megapixels_per_minute=1200 / 1e6))
    me = {"Authorization": f"Bearer {token}"}
    async with application(
        server.url, tmp_path / "f", namespace="charged", keys=keys, working=False
    ) as app:
        job_id = (await post(app, ASYNC | me)).json()["job_id"]
        path = f"/api/v1/jobs/{job_id}"
        await app.client.delete(path, headers=me)
        statuses = [
            (await app.client.post(f"{path}/retry", headers=me)).status_code for _ in range(5)
        ]
        assert statuses[0] == 202
        assert statuses[-1] == 429


async def test_the_webhook_of_a_job_says_what_the_job_says(app: Application) -> None:
    job = await app.ended(
        await app.submit(steps="3", webhook="https://a.example/hook", webhook_events="completed")
    )
    key = app.queue.key("hooks", job["job_id"])
    [hook] = [json.loads(text)["data"] for text in await app.queue._redis().lrange(key, 0, -1)]  # type: ignore[misc]
    same = ("status", "steps_done", "steps", "attempts", "results", "request", "position")
    assert {name: hook[name] for name in same} == {name: job[name] for name in same}


async def test_an_empty_idempotency_key_is_malformed(idle: Application) -> None:
    refused(await post(idle, ASYNC | {"Idempotency-Key": ""}), 400, "malformed_request")
