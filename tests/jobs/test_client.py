"""The Python client against a real HTTP server. Each test runs with both clients."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import pickle
import re
import socket
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

import imagen_client as client
from deployments.settings import ROOT
from imagen_client import (
    AsyncImagen,
    Conflict,
    ConnectionFailed,
    Imagen,
    ImagenError,
    InvalidRequest,
    JobCanceled,
    JobFailed,
    Note,
    NotFound,
    PreviewEvent,
    ProgressEvent,
    RateLimited,
    StateEvent,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
    WaitTimeout,
    WebhookRefused,
    verify_webhook,
)
from tests.jobs.stand_in_jobs import (
    FAILING,
    MODEL,
    StandIn,
    StandInJob,
    away,
    busy,
    limited,
    picture_of,
    serving,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

PHOTO, MASK = picture_of(1), picture_of(2)
COMIC = "style/comic"
KEY = "ik_secret-0123456789"
SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSB0ZXN0cw=="


@pytest.fixture
def service() -> Iterator[StandIn]:
    with serving() as stand_in:
        yield stand_in


@pytest.fixture
def url(service: StandIn) -> str:
    """Where the service is. Tests without the fixture `service` fit the real one."""
    return service.url


class InThread:
    """An object of the blocking client, with the methods of its twin under asyncio."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if inspect.isgeneratorfunction(value):
            return lambda *args, **kwargs: _pulled(value(*args, **kwargs))
        if not inspect.ismethod(value):
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            return _wrapped(await asyncio.to_thread(value, *args, **kwargs))

        return call


def _wrapped(value: Any) -> Any:
    return InThread(value) if isinstance(value, client.Job) else value


async def _pulled(values: Iterator[Any]) -> AsyncIterator[Any]:
    end = object()
    while (value := await asyncio.to_thread(next, values, end)) is not end:
        yield _wrapped(value)


@pytest.fixture(params=["blocking", "asyncio"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Any]]:
    """Makes clients, which are closed in the end."""
    clients: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        if request.param == "asyncio":
            clients.append(AsyncImagen(*args, **kwargs))
        else:
            clients.append(InThread(Imagen(*args, **kwargs)))
        return clients[-1]

    yield make
    for one in clients:
        await one.close()


@pytest.fixture
def imagen(connect: Callable[..., Any], url: str) -> Any:
    return connect(url)


# --- Calls without a job


async def test_a_call_gives_the_picture_and_what_is_known_of_it(
    imagen: Any, tmp_path: Path
) -> None:
    picture = await imagen.run(COMIC, PHOTO, steps=4, seed=7)
    assert picture.data == picture_of(7)
    assert (picture.media_type, picture.width_px, picture.height_px) == ("image/png", 8, 8)
    assert (picture.model, picture.seed, picture.batch_size) == (MODEL, 7, 2)
    assert picture.timings_s == {"decode": 0.01, "denoise": 1.5005}
    assert picture.notes == (
        Note("frames_dropped", "The first of 12 frames was used."),
        Note("seed_drawn", "None was sent, and so one was drawn: see the result."),
    )
    assert picture.save(tmp_path / "out.png").read_bytes() == picture.data


async def test_a_picture_may_be_bytes_a_path_or_an_open_file(
    imagen: Any, service: StandIn, tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(PHOTO)
    with path.open("rb") as file:
        for image in (PHOTO, path, str(path), file, io.BytesIO(PHOTO)):
            await imagen.submit(COMIC, image)
    assert [job.image for job in service.jobs.values()] == [PHOTO] * 5


async def test_parameters_are_sent_as_the_form_has_them(imagen: Any, service: StandIn) -> None:
    await imagen.submit(
        COMIC,
        PHOTO,
        n=2,
        priority="batch",
        deadline_s=60,
        webhook="https://example.com/hook",
        webhook_events=["completed", "failed"],
        preview=True,
        strength=0.5,
        prompt="größer",
        seed=None,
    )
    [job] = service.jobs.values()
    assert job.fields == {
        "n": "2",
        "priority": "batch",
        "deadline_s": "60",
        "webhook": "https://example.com/hook",
        "webhook_events": "completed,failed",
        "preview": "true",
        "strength": "0.5",
        "prompt": "größer",
    }


async def test_a_mask_is_sent_as_a_file(imagen: Any, service: StandIn) -> None:
    await imagen.submit(COMIC, PHOTO, mask=MASK, steps=8)
    [job] = service.jobs.values()
    assert job.files == {"mask": MASK}
    assert job.fields["steps"] == "8"
    assert "mask" not in job.fields


async def test_a_wrong_parameter_is_named(imagen: Any) -> None:
    with pytest.raises(InvalidRequest, match="no parameter stepz") as caught:
        await imagen.run(COMIC, PHOTO, stepz=3)
    problem = caught.value.problem
    assert (problem.status, problem.code, problem.value) == (422, "invalid_parameter", "stepz")
    assert problem.fact.startswith("There is no parameter")
    assert problem.remedy == "Leave it out."
    assert problem.request_id
    assert problem.request_id in str(caught.value)


async def test_a_call_waits_where_the_service_makes_jobs_by_default(
    imagen: Any, service: StandIn
) -> None:
    service.async_by_default = True
    picture = await imagen.run(COMIC, PHOTO, seed=9)
    assert (picture.data, picture.seed) == (picture_of(9), 9)


# --- Jobs


async def test_a_job_is_submitted_awaited_and_fetched(imagen: Any) -> None:
    job = await imagen.submit(COMIC, PHOTO, n=3, seed=10)
    assert job.id
    await job.wait(timeout_s=30)
    assert (job.status, job.task, job.steps_done, job.ended) == ("completed", "comic", 4, True)
    assert job.created_at < job.expires_at
    assert [output.seed for output in job.outputs] == [10, 11, 12]
    pictures = await job.results()
    assert [picture.data for picture in pictures] == [picture_of(seed) for seed in (10, 11, 12)]
    assert [picture.seed for picture in pictures] == [10, 11, 12]
    assert pictures[0].model == MODEL
    assert pictures[0].notes == (Note("seed_drawn", "A note."),)
    assert (await job.result(2)).data == picture_of(12)
    with pytest.raises(NotFound):
        await job.result(3)


async def test_a_job_is_found_again_by_its_id(imagen: Any, connect: Any, url: str) -> None:
    job = await imagen.submit(COMIC, PHOTO)
    again = await connect(url).job(job.id)
    await again.wait(timeout_s=30)
    assert (await again.result()).data == (await job.result()).data


async def test_jobs_are_listed_over_pages(imagen: Any, service: StandIn) -> None:
    ids = [(await imagen.submit(COMIC, PHOTO)).id for _ in range(5)]
    assert [job.id async for job in imagen.jobs(page_size=2)] == ids[::-1]
    pages = [got for got in service.got if got.path == "/api/v1/jobs"]
    assert len(pages) == 3


async def test_jobs_are_listed_by_status(imagen: Any, service: StandIn) -> None:
    await (await imagen.submit(COMIC, PHOTO)).wait(timeout_s=30)
    service.holding = True
    queued = await imagen.submit(COMIC, PHOTO)
    assert [job.id async for job in imagen.jobs(status="queued")] == [queued.id]
    [found] = [job async for job in imagen.jobs(status="queued")]
    assert found.position == 1


async def test_a_wait_ends_and_the_job_goes_on(imagen: Any, service: StandIn) -> None:
    service.holding = True
    job = await imagen.submit(COMIC, PHOTO)
    with pytest.raises(WaitTimeout) as caught:
        await job.wait(timeout_s=0.2)
    assert caught.value.job_id == job.id
    assert job.status == "queued"
    with pytest.raises(Conflict):
        await job.result()
    service.holding = False
    assert (await (await job.wait(timeout_s=30)).result()).data == picture_of(5)


async def test_a_failed_job_says_why(imagen: Any) -> None:
    job = await imagen.submit(COMIC, PHOTO, prompt=FAILING)
    for call in (job.wait, job.result, job.results):
        with pytest.raises(JobFailed, match="The model gave no picture") as caught:
            await call()
        assert caught.value.problem.code == "model_failed"
        assert caught.value.job_id == job.id
    assert job.error.remedy == "Try another."


async def test_a_job_is_canceled_and_repeated(imagen: Any, service: StandIn) -> None:
    service.holding = True
    job = await imagen.submit(COMIC, PHOTO, seed=3)
    await job.cancel()
    await job.cancel()
    assert job.status == "canceled"
    for call in (job.wait, job.result):
        with pytest.raises(JobCanceled):
            await call()
    service.holding = False
    again = await job.retry()
    assert again.id != job.id
    await again.wait(timeout_s=30)
    assert again.retry_of == job.id
    assert (await again.result()).data == picture_of(3)


async def test_a_completed_job_can_be_neither_canceled_nor_repeated(imagen: Any) -> None:
    job = await imagen.submit(COMIC, PHOTO)
    await job.wait(timeout_s=30)
    for call in (job.cancel, job.retry):
        with pytest.raises(Conflict) as caught:
            await call()
        assert caught.value.problem.code == "job_conflict"
    assert job.status == "completed"


@pytest.mark.parametrize("job_id", ["0192f300", "a/b", "no such job?"])
async def test_an_unknown_job_is_not_found(imagen: Any, job_id: str) -> None:
    with pytest.raises(NotFound) as caught:
        await imagen.job(job_id)
    assert caught.value.problem.status == 404


# --- Sent again, and never twice


async def test_a_submission_whose_answer_was_lost_makes_one_job(
    imagen: Any, service: StandIn
) -> None:
    service.faults = ["drop", "drop"]
    job = await imagen.submit(COMIC, PHOTO, seed=4)
    assert [job.id] == list(service.jobs)
    keys = [got.headers["idempotency-key"] for got in service.got if got.method == "POST"]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    await job.wait(timeout_s=30)
    assert (await job.result()).data == picture_of(4)


async def test_two_submissions_are_two_jobs(imagen: Any, service: StandIn) -> None:
    await imagen.submit(COMIC, PHOTO)
    await imagen.submit(COMIC, PHOTO)
    assert len(service.jobs) == 2


async def test_the_same_idempotency_key_gives_the_first_job(imagen: Any) -> None:
    first = await imagen.submit(COMIC, PHOTO, idempotency_key="order 17")
    await first.wait(timeout_s=30)
    again = await imagen.submit(COMIC, PHOTO, idempotency_key="order 17")
    assert again.id == first.id
    await again.wait(timeout_s=0)
    assert [output.seed for output in again.outputs] == [5]
    with pytest.raises(Conflict) as caught:
        await imagen.submit(COMIC, PHOTO, idempotency_key="order 17", seed=2)
    assert caught.value.problem.code == "idempotency_conflict"


@pytest.mark.parametrize("fault", [busy(), limited(), away(), "bare 404", "bare 429"], ids=str)
async def test_a_service_that_says_when_is_asked_again(
    imagen: Any, service: StandIn, fault: ImagenError | str
) -> None:
    service.faults = [fault]
    job = await imagen.submit(COMIC, PHOTO)
    assert [job.id] == list(service.jobs)


@pytest.mark.parametrize(
    ("fault", "kind", "retry_after_s"),
    [(busy(), Unavailable, 0), (limited(), RateLimited, 0), ("bare 429", Unavailable, None)],
    ids=["busy", "limited", "bare"],
)
async def test_a_client_gives_up_after_its_retries(
    connect: Any,
    service: StandIn,
    fault: ImagenError | str,
    kind: type[ImagenError],
    retry_after_s: float | None,
) -> None:
    service.faults = [fault, fault, "pass"]
    with pytest.raises(kind) as caught:
        await connect(service.url, retries=1).submit(COMIC, PHOTO)
    assert caught.value.retry_after_s == retry_after_s
    assert len(service.got) == 2


async def test_a_pause_of_more_than_a_minute_is_left_to_the_caller(
    imagen: Any, service: StandIn
) -> None:
    service.faults = [limited(retry_after_s=61)]
    with pytest.raises(RateLimited) as caught:
        await imagen.submit(COMIC, PHOTO)
    assert caught.value.retry_after_s == 61
    assert len(service.got) == 1


async def test_a_wait_outlives_lost_connections(imagen: Any, service: StandIn) -> None:
    job = await imagen.submit(COMIC, PHOTO)
    service.faults = ["drop", "bare 404"]
    assert (await job.wait(timeout_s=30)).status == "completed"


async def test_a_retry_whose_answer_was_lost_is_not_sent_again(
    imagen: Any, service: StandIn
) -> None:
    job = await imagen.submit(COMIC, PHOTO, prompt=FAILING)
    with pytest.raises(JobFailed):
        await job.wait(timeout_s=30)
    service.faults = ["drop", "pass"]
    with pytest.raises(ConnectionFailed):
        await job.retry()
    assert len(service.jobs) == 2


async def test_a_server_that_is_not_there_is_named(connect: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionFailed, match=f"http://127.0.0.1:{port} does not answer"):
        await connect(f"http://127.0.0.1:{port}", retries=0).run(COMIC, PHOTO)


# --- Events


def kinds(events: list[Any]) -> list[str]:
    return [e.status if isinstance(e, StateEvent) else type(e).__name__ for e in events]


WHOLE = ["queued", "processing", *["ProgressEvent"] * 4, "completed"]


async def test_events_tell_all_steps_to_the_end(imagen: Any) -> None:
    job = await imagen.submit(COMIC, PHOTO, seed=6)
    events = [event async for event in job.events()]
    assert kinds(events) == WHOLE
    steps = [(e.steps_done, e.steps) for e in events if isinstance(e, ProgressEvent)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {event.job_id for event in events} == {job.id}
    assert (job.status, job.steps_done) == ("completed", 4)
    assert events[-1].job.outputs == job.outputs
    assert (await job.result()).data == picture_of(6)


async def test_events_go_on_where_a_stream_ended_as_planned(imagen: Any, service: StandIn) -> None:
    service.stream_events = 2
    job = await imagen.submit(COMIC, PHOTO)
    assert kinds([event async for event in job.events()]) == WHOLE
    streams = [got.headers for got in service.got if got.path.endswith("/events")]
    assert [headers.get("last-event-id") for headers in streams] == [
        None,
        "1732633445123-1",
        "1732633445123-3",
        "1732633445123-5",
    ]


async def test_events_go_on_where_a_stream_broke_off(imagen: Any, service: StandIn) -> None:
    service.breaking_streams = 2
    job = await imagen.submit(COMIC, PHOTO)
    assert kinds([event async for event in job.events()]) == WHOLE


async def test_events_outlive_a_busy_service_and_silence(connect: Any, service: StandIn) -> None:
    imagen = connect(service.url, timeout_s=0.3, retries=1)
    service.holding = True
    job = await imagen.submit(COMIC, PHOTO)
    service.faults = [limited()]

    def streams() -> int:
        return len([got for got in service.got if got.path.endswith("/events")])

    async def release() -> None:
        while streams() < 4:  # one refused, and more silent ones than a client forgives failures
            await asyncio.sleep(0.01)
        service.holding = False

    released = asyncio.create_task(release())
    assert kinds([event async for event in job.events()]) == WHOLE
    await released


async def test_events_after_one_that_is_known(imagen: Any) -> None:
    job = await imagen.submit(COMIC, PHOTO)
    events = [event async for event in job.events()]
    assert [e.id async for e in job.events(after=events[2].id)] == [e.id for e in events[3:]]
    assert [e.id async for e in job.events(after=events[-1].id)] == []


async def test_previews_are_pictures(imagen: Any) -> None:
    job = await imagen.submit(COMIC, PHOTO, preview=True)
    previews = [e async for e in job.events() if isinstance(e, PreviewEvent)]
    assert [preview.image for preview in previews] == [picture_of(step) for step in (1, 2, 3, 4)]
    assert previews[0].media_type == "image/jpeg"


async def test_events_of_a_job_that_is_canceled_meanwhile_end(
    imagen: Any, service: StandIn
) -> None:
    service.holding = True
    job = await imagen.submit(COMIC, PHOTO)
    other = await imagen.job(job.id)
    seen: list[Any] = []
    async for event in job.events():
        seen.append(event)
        if event.status == "queued":
            await other.cancel()
    assert kinds(seen) == ["queued", "canceled"]
    assert job.status == "canceled"


async def test_events_of_an_unknown_job_are_not_found(imagen: Any, service: StandIn) -> None:
    job = await imagen.submit(COMIC, PHOTO)
    service.jobs.clear()
    with pytest.raises(NotFound):
        _ = [event async for event in job.events()]


@given(st.data())
def test_events_are_read_alike_however_they_are_cut(data: st.DataObject) -> None:
    text = (
        "\ufeff: hello\nid: 1\r\nevent: a\rdata: x\u2028\r\ndata:y\n\nid: 2\n\nretry: 70\ndata\n\n"
    )
    stream = (text + "event: lost\ndata: no end\n").encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1))))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    parser = client._EventParser("0", retry_s=1)
    found = [message for chunk in chunks for message in parser.feed(chunk)]
    assert found == [
        client._Message("a", "x\u2028\ny", "1"),
        client._Message("message", "", "2"),
    ]
    assert (parser.last_id, parser.retry_s) == ("2", 0.07)


# --- The key


async def test_the_key_is_sent_to_the_service_and_not_to_the_storage(
    connect: Any, service: StandIn
) -> None:
    service.key = KEY
    job = await connect(service.url, KEY).submit(COMIC, PHOTO)
    await job.wait(timeout_s=30)
    assert (await job.result()).data == picture_of(5)
    sent = {got.path: got.headers.get("authorization") for got in service.got}
    assert sent.pop("/files/5") is None
    assert set(sent.values()) == {f"Bearer {KEY}"}


async def test_the_key_is_taken_from_the_environment(
    connect: Any, service: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEN_KEY", f"{KEY}\n")
    service.key = KEY
    assert (await connect(service.url).submit(COMIC, PHOTO)).id
    with pytest.raises(Unauthorized, match="no key"):
        await connect(service.url, "").submit(COMIC, PHOTO)


async def test_the_key_is_never_shown(connect: Any, service: StandIn) -> None:
    service.key = "another"
    imagen = connect(service.url, KEY)
    with pytest.raises(Unauthorized) as caught:
        await imagen.submit(COMIC, PHOTO)
    with pytest.raises(ConnectionFailed) as lost:
        await connect("http://127.0.0.1:1", KEY, retries=0).submit(COMIC, PHOTO)
    with pytest.raises(ValueError, match="API key") as wrong:
        connect(service.url, f"{KEY}\nX-Other: 1")
    inner = getattr(imagen, "inner", imagen)
    shown = [repr(inner), repr(vars(inner)), repr(vars(inner._sender.flows))]
    for error in (caught.value, lost.value, wrong.value):
        shown += [str(error), repr(error), repr(error.__cause__), repr(vars(error))]
    assert not [text for text in shown if KEY in text]
    assert service.url in repr(inner)


def test_a_password_in_the_address_is_not_shown() -> None:
    with Imagen("http://user:pass-word@127.0.0.1:1/base/", retries=0) as imagen:
        with pytest.raises(ConnectionFailed) as caught:
            imagen.run(COMIC, PHOTO)
        assert repr(imagen) == "Imagen('http://127.0.0.1:1/base')"
    assert "pass-word" not in str(caught.value)


@pytest.mark.parametrize(
    "base_url", ["127.0.0.1:8000", "ftp://host", "http://", "", "http://h:x", "http://h/?a=b"]
)
def test_an_address_that_cannot_be_one_is_refused(base_url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        Imagen(base_url)


# --- Answers of something else


@pytest.mark.parametrize("fault", ["page", "redirect"])
async def test_an_answer_of_something_else_is_unexpected(
    imagen: Any, service: StandIn, fault: str
) -> None:
    job = await imagen.submit(COMIC, PHOTO)
    service.faults = [fault] * 5
    calls = [
        imagen.run(COMIC, PHOTO),
        imagen.submit(COMIC, PHOTO),
        job.refresh(),
        anext(imagen.jobs()),
        anext(job.events()),
    ]
    for call in calls:
        with pytest.raises(UnexpectedAnswer, match="https://example" if fault != "page" else "no"):
            await call
    assert service.faults == []


# --- What docs/jobs.md shows

BLOCKS = re.findall(
    r"^```python\n((?:(?!```).)*imagen_client.*?)^```",
    (ROOT / "docs/jobs.md").read_text(),
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[-2])
def test_what_the_docs_show_runs(
    url: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    assert "http://127.0.0.1:8000" in block or "verify_webhook" in block
    exec(block.replace("http://127.0.0.1:8000", url), {"__name__": "shown"})
    if "aged" in block:
        assert {path.name for path in tmp_path.glob("*.png")} == {
            "comic.png",
            "aged-7.png",
            "aged-8.png",
        }


# --- Webhooks


def signed(body: str, *, secret: str = SECRET, age_s: int = 0) -> dict[str, str]:
    at = datetime.now(UTC) - timedelta(seconds=age_s)
    return {
        "Webhook-Id": "msg_1",
        "Webhook-Timestamp": str(int(at.timestamp())),
        "Webhook-Signature": Webhook(secret).sign("msg_1", at, body),
    }


def event_body() -> str:
    job = StandInJob(COMIC, {"seed": "7"}, PHOTO, "")
    job.become("completed")
    return json.dumps(
        {
            "type": "job.completed",
            "timestamp": "2026-11-26T15:04:05.123Z",
            "data": job.document(),
        }
    )


def test_a_signed_webhook_is_an_event_with_its_job() -> None:
    body = event_body()
    event = verify_webhook(body.encode(), signed(body), SECRET)
    assert (event.id, event.type, event.job.status) == ("msg_1", "job.completed", "completed")
    assert event.timestamp == datetime(2026, 11, 26, 15, 4, 5, 123000, UTC)
    assert [output.seed for output in event.job.outputs] == [7]


@pytest.mark.parametrize(
    "change",
    [
        {"Webhook-Id": "msg_2"},
        {"Webhook-Signature": "v1"},
        {"Webhook-Signature": "v1,***"},
        {"Webhook-Signature": ""},
        {"Webhook-Timestamp": "soon"},
        signed(event_body(), age_s=301),
        signed(event_body(), secret="whsec_b3RoZXI="),
    ],
    ids=["id", "no signature", "no base64", "empty", "no time", "old", "another secret"],
)
def test_a_webhook_that_is_not_signed_is_refused(change: dict[str, str]) -> None:
    body = event_body()
    with pytest.raises(WebhookRefused):
        verify_webhook(body, signed(body) | change, SECRET)
    for altered in (body.replace("7", "8"), b"\xff"):
        with pytest.raises(WebhookRefused):
            verify_webhook(altered, signed(body), SECRET)


def test_a_signed_body_that_is_no_event_is_unexpected() -> None:
    for body in ("[]", "{}", "no json", '{"type": "job.completed", "data": {}}'):
        with pytest.raises(UnexpectedAnswer):
            verify_webhook(body, signed(body), SECRET)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_a"])
def test_a_secret_that_cannot_be_one_is_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="is not whsec_"):
        verify_webhook("{}", signed("{}"), secret)


# --- The errors


def subclasses(kind: type[ImagenError]) -> list[type[ImagenError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in subclasses(child))]


def test_the_tree_of_errors_shows_every_class() -> None:
    drawn = re.findall(r"^ +(?:[+x] )?([A-Z]\w+)(?:  .*)?$", client.__doc__ or "", re.MULTILINE)
    assert drawn == [kind.__name__ for kind in subclasses(ImagenError)]


@pytest.mark.parametrize("kind", subclasses(ImagenError))
def test_errors_survive_a_pickle(kind: type[ImagenError]) -> None:
    problem = client.Problem(429, "full", "Full.", "64", "Wait.", "r1")
    error = kind("Full.", problem=problem, retry_after_s=2, job_id="j1")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, "Full.")
    assert (again.problem, again.retry_after_s, again.job_id) == (problem, 2, "j1")
