"""What holds for every request, whatever the route does."""

from __future__ import annotations

import asyncio
import json
import logging
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import Response

from deployments.errors import Full, TooLarge
from deployments.settings import UploadSettings
from deployments.tasks import Task
from serve_app.middleware import AccessLog, BodyLimit, ErrorBoundary, InFlightLimit, RequestId
from tests.unit.fakes import FakeBackends, app_of, chunks, raw

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COMIC = Task.COMIC.route
MULTIPART = {"content-type": "multipart/form-data; boundary=cut"}
OPEN_PART = b'--cut\r\nContent-Disposition: form-data; name="image"\r\n\r\n'


def stack(
    app: ASGIApp, max_body_bytes: int = 1024, uploads: UploadSettings | None = None
) -> ASGIApp:
    """The middleware in the order of the API, around any app."""
    limited = BodyLimit(app, max_body_bytes, uploads or UploadSettings(), retry_after_s=2)
    return RequestId(AccessLog(ErrorBoundary(limited)))


async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading."""
    await Response(scope["state"]["request_id"])(scope, receive, send)


async def keen(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads all there is, then tells how much it was."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await Response(str(size))(scope, receive, send)


def headers_of(sent: list[Message]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in sent[0]["headers"]:
        found.setdefault(name.decode(), []).append(value.decode())
    return found


def problem_of(sent: list[Message], status: int) -> Any:
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == status
    assert headers_of(sent)["content-type"] == ["application/problem+json"]
    return json.loads(sent[1]["body"])


class Sender:
    """A client that sends chunk after chunk, and counts what is taken of it."""

    def __init__(self, chunk: bytes, count: int, first: bytes = b"") -> None:
        self.taken = 0
        self._chunk, self._count, self._first = chunk, count, first

    async def body(self) -> AsyncIterator[Message]:
        for position in range(self._count):
            await asyncio.sleep(0)
            self.taken += 1
            part = self._first if position == 0 and self._first else self._chunk
            more = position + 1 < self._count
            yield {"type": "http.request", "body": part, "more_body": more}


# Request ids


@pytest.mark.parametrize("given", ["a", "Mine_1.2-3", "x" * 128])
async def test_a_well_formed_request_id_is_repeated_once(given: str) -> None:
    sent = await raw(stack(deaf), "/", chunks([b""]), {"x-request-id": given})
    assert headers_of(sent)["x-request-id"] == [given]
    assert sent[1]["body"] == given.encode()


@pytest.mark.parametrize(
    "given",
    ["", " ", "a b", "x" * 129, "a\nX-Evil: 1", "a\r\n", "<script>", "\xe9", "a/../b", "a\n"],
)
async def test_any_other_request_id_is_replaced(given: str) -> None:
    sent = await raw(stack(deaf), "/", chunks([b""]), {"x-request-id": given})
    [request_id] = headers_of(sent)["x-request-id"]
    assert request_id != given
    assert len(request_id) == 32
    assert request_id.isalnum()
    assert sent[1]["body"] == request_id.encode()


async def test_requests_without_an_id_get_different_ones() -> None:
    sent = [await raw(stack(deaf), "/", chunks([b""])) for _ in range(50)]
    assert len({headers_of(messages)["x-request-id"][0] for messages in sent}) == 50


async def test_an_id_the_app_sets_itself_is_not_doubled() -> None:
    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        await Response("", headers={"X-Request-Id": "own"})(scope, receive, send)

    sent = await raw(stack(own), "/", chunks([b""]), {"x-request-id": "given"})
    assert headers_of(sent)["x-request-id"] == ["given"]


# The access log


async def test_every_request_leaves_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve.imagen.access"):
        await raw(app_of(), "/api/v1/models", chunks([b""]), {"x-request-id": "mine"}, method="GET")
        await raw(app_of(), "/nowhere", chunks([b""]), {"x-request-id": "lost"})
    first, second = caplog.messages
    assert first.startswith("GET /api/v1/models 200 ")
    assert first.endswith(" s mine")
    assert second.startswith("POST /nowhere 404 ")


async def test_probes_do_not_bury_the_lines_of_requests(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "ray.serve.imagen.access"):
        for path in ("/healthz", "/readyz"):
            await raw(app_of(), path, chunks([b""]), method="GET")
    levels = [one.levelno for one in caplog.records if one.name == "ray.serve.imagen.access"]
    assert levels == [logging.DEBUG, logging.DEBUG]


async def test_a_path_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve.imagen.access"):
        await raw(app_of(), "/a\r\nGET /admin 200\x1b[2J\ud800é b", chunks([b""]))
    [line] = caplog.messages
    assert line.isprintable()
    assert line.isascii()
    assert len(line.split(" ")) == 6


async def test_the_log_names_neither_prompt_nor_query(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve.imagen.access"):
        await raw(app_of(), "/healthz", chunks([b""]), method="GET", query_string=b"prompt=secret")
    assert "secret" not in caplog.text


async def test_a_request_that_ends_without_an_answer_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def cancelled(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    with (
        caplog.at_level(logging.INFO, "ray.serve.imagen.access"),
        pytest.raises(asyncio.CancelledError),
    ):
        await raw(stack(cancelled), "/x", chunks([b""]))
    assert caplog.messages[0].startswith("POST /x disconnected ")


async def test_whoever_listens_is_told_of_each_answer_and_its_reason() -> None:
    answers: list[tuple[str, int, str, str]] = []

    def count(path: str, status: int, reason: str, seconds: float, door: str) -> None:
        assert seconds >= 0
        answers.append((path, status, reason, door))

    app = app_of(on_answer=count)
    await raw(app, "/healthz", chunks([b""]), method="GET")
    await raw(app, "/nowhere", chunks([b""]))
    too_large = app_of(max_body_bytes=1024, on_answer=count)
    await raw(too_large, "/healthz", chunks([b"ab"]), {"content-length": "2000"})

    async def cancelled(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await raw(RequestId(AccessLog(cancelled, count)), "/x", chunks([b""]))
    assert answers == [
        ("/healthz", 200, "ok", "native"),
        ("/nowhere", 404, "not_found", "native"),
        ("/healthz", 413, "too_large", "native"),
        ("/x", 0, "disconnected", "native"),
    ]


# Errors


async def test_an_unforeseen_error_becomes_a_problem_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("in /home/imagen/secret.py")

    sent = await raw(stack(broken), "/", chunks([b""]), {"x-request-id": "mine"})
    problem = problem_of(sent, 503)
    assert problem["request_id"] == "mine"
    assert "secret" not in json.dumps(problem)
    assert headers_of(sent)["retry-after"] == ["5"]
    assert "secret.py" in caplog.text
    assert "mine" in caplog.text


async def test_an_error_of_our_own_keeps_its_status() -> None:
    async def full(scope: Scope, receive: Receive, send: Send) -> None:
        raise Full("Full.", retry_after_s=3)

    sent = await raw(stack(full), "/", chunks([b""]))
    assert problem_of(sent, 429)["fact"] == "Full."
    assert headers_of(sent)["retry-after"] == ["3"]


@pytest.mark.parametrize("error", [ZeroDivisionError("late"), TooLarge("late")])
async def test_after_an_answer_has_begun_no_second_one_is_sent(error: Exception) -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    sent: list[Message] = []
    with pytest.raises(type(error), match="late"):
        await raw(stack(half), "/", chunks([b""]), on_sent=sent.append)
    assert [message["type"] for message in sent] == ["http.response.start"]


# Bodies


async def test_a_body_of_just_the_limit_passes() -> None:
    sent = await raw(stack(keen), "/", chunks([bytes(1000), bytes(24)]))
    assert sent[1]["body"] == b"1024"


async def test_a_body_of_one_byte_more_is_refused() -> None:
    problem = problem_of(await raw(stack(keen), "/", chunks([bytes(1000), bytes(25)])), 413)
    assert problem["value"] == "more than 1024 bytes"


@pytest.mark.parametrize("declared", ["1025", "99999999999999999999", "9" * 5000])
async def test_a_declared_length_beyond_the_limit_is_refused_unread(declared: str) -> None:
    read = False

    async def reader(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal read
        read = True

    problem = problem_of(
        await raw(stack(reader), "/", chunks([b"x"]), {"content-length": declared}), 413
    )
    assert not read
    assert problem["value"] == f"{declared} bytes"[:200]


@pytest.mark.parametrize("declared", ["", "0" * 5000, "-5", "abc", "\xb2", "1e9", "10, 20"])
async def test_a_length_that_is_no_number_does_not_lift_the_limit(declared: str) -> None:
    sender = chunks([bytes(1000)] * 3)
    problem_of(await raw(stack(keen), "/", sender, {"content-length": declared}), 413)


async def test_a_lie_about_the_length_does_not_lift_the_limit() -> None:
    problem_of(
        await raw(stack(keen), "/", chunks([bytes(1000)] * 3), {"content-length": "10"}), 413
    )


async def test_a_body_nobody_reads_is_left_to_the_server_in_front() -> None:
    sender = Sender(bytes(100), 50)
    sent = await raw(stack(deaf), "/", sender.body())
    assert sent[0]["status"] == 200
    assert sender.taken == 0


async def test_a_refusal_does_not_wait_for_the_rest_of_the_body() -> None:
    sender = Sender(bytes(512), 50, first=OPEN_PART)
    problem_of(await raw(app_of(max_body_bytes=1024), COMIC, sender.body(), MULTIPART), 413)
    assert sender.taken == 3


async def stalled(*parts: bytes) -> AsyncIterator[Message]:
    """A body that begins and never goes on."""
    for part in parts:
        yield {"type": "http.request", "body": part, "more_body": True}
    await asyncio.Event().wait()


async def test_a_client_that_stops_sending_is_refused_and_cut_off() -> None:
    app = stack(keen, uploads=UploadSettings(pause_s=0.05))
    sent = await raw(app, "/", stalled(bytes(100)))
    assert problem_of(sent, 408)["value"] == "100 bytes came"
    assert headers_of(sent)["connection"] == ["close"]


async def test_an_answer_that_has_begun_outlives_a_body_that_stands_still() -> None:
    async def long_answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.2)
        await send({"type": "http.response.body", "body": b"whole"})

    app = stack(long_answer, uploads=UploadSettings(pause_s=0.05))
    sent = await raw(app, "/", stalled(bytes(100)))
    assert sent[-1]["body"] == b"whole"


async def test_a_client_below_the_least_rate_is_refused_however_much_came_before() -> None:
    async def trickle() -> AsyncIterator[Message]:
        yield {"type": "http.request", "body": bytes(900), "more_body": True}
        while True:
            await asyncio.sleep(0.01)
            yield {"type": "http.request", "body": b"x", "more_body": True}

    app = stack(keen, uploads=UploadSettings(pause_s=0.1, min_bytes_per_s=1000))
    assert problem_of(await raw(app, "/", trickle()), 408)["code"] == "slow_upload"


async def test_a_body_that_keeps_the_least_rate_may_take_many_pauses() -> None:
    async def steady() -> AsyncIterator[Message]:
        for position in range(20):
            await asyncio.sleep(0.1)
            yield {"type": "http.request", "body": bytes(50), "more_body": position < 19}

    app = stack(keen, uploads=UploadSettings(pause_s=1.0, min_bytes_per_s=10))
    assert (await raw(app, "/", steady()))[1]["body"] == b"1000"


async def test_a_body_in_whole_is_hurried_no_more() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0.2)
        await Response("done")(scope, receive, send)

    app = stack(slow, uploads=UploadSettings(pause_s=0.05))
    assert (await raw(app, "/", chunks([b"all"])))[1]["body"] == b"done"


@pytest.mark.parametrize(
    "uploads", [{"max_arriving": 2}, {"max_held_bytes": 2400}], ids=["bodies", "bytes"]
)
async def test_a_body_that_arrives_takes_the_room_of_one_that_stands_still(
    uploads: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.middleware._STILL_S", 0.02)
    app = stack(keen, uploads=UploadSettings(**uploads))
    first, second = (asyncio.create_task(raw(app, "/", stalled(bytes(1000)))) for _ in range(2))
    await asyncio.sleep(0.05)
    assert (await raw(app, "/", chunks([bytes(500), bytes(500)])))[1]["body"] == b"1000"
    assert "its room" in problem_of(await first, 408)["fact"]
    assert not second.done()
    second.cancel()


@pytest.mark.parametrize(
    "uploads", [{"max_arriving": 1}, {"max_held_bytes": 1400}], ids=["bodies", "bytes"]
)
async def test_where_all_bodies_arrive_one_more_is_told_when_to_come_back(
    uploads: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.middleware._STILL_S", 60)
    app = stack(keen, uploads=UploadSettings(**uploads))
    first = asyncio.create_task(raw(app, "/", stalled(bytes(1000))))
    await asyncio.sleep(0.01)
    refused = await raw(app, "/", chunks([bytes(500), bytes(500)]))
    assert problem_of(refused, 429)["code"] == "full"
    assert headers_of(refused)["retry-after"] == ["2"]
    first.cancel()


async def test_what_ended_bodies_held_is_free_again() -> None:
    app = stack(keen, uploads=UploadSettings(max_arriving=1, max_held_bytes=1024))
    for _ in range(5):
        assert (await raw(app, "/", chunks([bytes(500), bytes(524)])))[1]["body"] == b"1024"
        problem_of(await raw(app, "/", chunks([bytes(1025), b"x"])), 413)


async def test_a_client_that_has_gone_is_not_waited_for() -> None:
    async def gone() -> AsyncIterator[Message]:
        yield {"type": "http.disconnect"}
        pytest.fail("asked again after the client had gone")

    sent = await raw(stack(keen), "/", gone())
    assert sent[0]["status"] == 200


async def test_a_flood_never_fills_the_memory() -> None:
    backends = FakeBackends()
    app = app_of(backends, max_body_bytes=2**20)
    sender = Sender(bytes(64 * 1024), 3200, first=OPEN_PART)  # 200 MiB
    tracemalloc.start()
    try:
        sent = await raw(app, COMIC, sender.body(), MULTIPART)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    problem_of(sent, 413)
    assert sender.taken < 20
    assert peak < 8 * 2**20
    assert backends.jobs == []


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_what_is_no_request_passes_untouched(kind: str) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    await raw(stack(app), "/", chunks([b""]), type=kind)
    [scope] = seen
    assert "state" not in scope


async def test_one_upload_too_many_is_told_when_to_come_back() -> None:
    gate = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await gate.wait()
        await Response("done")(scope, receive, send)

    app = stack(InFlightLimit(slow, max_uploads=1, retry_after_s=3))
    first = asyncio.create_task(raw(app, COMIC, chunks([b"one"])))
    await asyncio.sleep(0.01)
    refused = await raw(app, COMIC, chunks([b"t", b"wo"]))
    assert problem_of(refused, 429)["value"] == "1 under way"
    assert headers_of(refused)["retry-after"] == ["3"]
    gate.set()
    assert (await first)[1]["body"] == b"done"
    assert (await raw(app, COMIC, chunks([b"again"])))[1]["body"] == b"done"


async def test_who_stops_sending_takes_no_place_among_the_uploads_in_work() -> None:
    app = stack(InFlightLimit(keen, max_uploads=1, retry_after_s=3))
    others = [asyncio.create_task(raw(app, COMIC, stalled(b"x"))) for _ in range(20)]
    await asyncio.sleep(0.01)
    assert (await raw(app, COMIC, chunks([b"t", b"wo"])))[1]["body"] == b"3"
    for other in others:
        other.cancel()


async def test_uploads_that_come_in_whole_at_once_are_counted_then() -> None:
    gate = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await gate.wait()
        await Response("done")(scope, receive, send)

    app = stack(InFlightLimit(slow, max_uploads=1, retry_after_s=3))
    both = [asyncio.create_task(raw(app, COMIC, chunks([b"o", b"ne"]))) for _ in range(2)]
    await asyncio.sleep(0.01)
    gate.set()
    assert sorted([(await one)[0]["status"] for one in both]) == [200, 429]
