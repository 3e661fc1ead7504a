"""Pictures by address: what is fetched, from where, how much of it, and what never is."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from deployments.errors import Full
from deployments.settings import ClientSettings, FetchSettings, LimitSettings, UploadSettings
from serve_app import addresses
from serve_app.api import create_app
from serve_app.fetching import Fetcher
from tests.jobs.receiver import Received, Receiver, hang
from tests.unit.fakes import OPEN_TO_ALL, REGISTRY, FakeBackends, picture_file, send

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import httpx

PICTURE = picture_file()
COMIC, EDITS = "/api/v1/images/style/comic", "/v1/images/edits"
METADATA = "http://169.254.169.254/latest/meta-data/"
LOCAL = FetchSettings(enabled=True, allow_http=True, allow_private=True)
PUBLIC = LOCAL.model_copy(update={"allow_private": False})


def answer(status: int, *headers: str, body: bytes = b"") -> bytes:
    lines = (f"HTTP/1.1 {status} X", *headers, "Connection: close", "", "")
    return "\r\n".join(lines).encode() + body


WHOLE = answer(200, f"Content-Length: {len(PICTURE)}", body=PICTURE)
ENDLESS = answer(200, body=b"x" * 100_000)


@asynccontextmanager
async def host(
    content: bytes, *, hangs: bool = False, asked: list[Received] | None = None
) -> AsyncGenerator[str]:
    """A server that gives the same answer to whoever asks; the address of a picture on it."""

    async def give(received: Received, writer: asyncio.StreamWriter) -> None:
        if asked is not None:
            asked.append(received)
        writer.write(content)
        await writer.drain()
        if hangs:
            await hang(received, writer)

    async with Receiver(give) as receiver:
        yield receiver.url


async def ask(
    url: str, fetch: FetchSettings, backends: FakeBackends | None = None, **settings: Any
) -> httpx.Response:
    own = {"limits": LimitSettings(max_body_bytes=50_000), **settings}
    made = ClientSettings(access=OPEN_TO_ALL, fetch=fetch, **own)
    app = create_app(backends or FakeBackends(), REGISTRY, made)
    return await send(app, "POST", COMIC, json={"image": url})


@pytest.fixture
def this_machine_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a first address that can be reached from here, with the rules of any other."""
    real = addresses._is_public
    monkeypatch.setattr(addresses, "_is_public", lambda a: str(a) == "127.0.0.1" or real(a))


async def test_nothing_is_fetched_unless_the_operator_says_so() -> None:
    asked: list[Received] = []
    async with host(WHOLE, asked=asked) as url:
        found = await ask(url, FetchSettings())
    assert found.status_code == 422
    assert "fetch.enabled" in found.json()["remedy"]
    assert not asked


async def test_a_picture_by_address_is_the_requests_own() -> None:
    backends, asked = FakeBackends(), list[Received]()
    async with host(WHOLE, asked=asked) as url:
        found = await ask(url, LOCAL, backends)
    assert found.status_code == 200, found.text
    assert backends.jobs[0].image == PICTURE
    assert asked[0].headers["host"] == url.split("/")[2]
    assert asked[0].headers.keys().isdisjoint({"cookie", "authorization"})


async def test_clients_of_openai_may_name_an_address() -> None:
    backends = FakeBackends()
    app = create_app(backends, REGISTRY, ClientSettings(access=OPEN_TO_ALL, fetch=LOCAL))
    async with host(WHOLE) as url:
        body = {"model": "comic", "prompt": "ink", "images": [{"image_url": url}]}
        found = await send(app, "POST", EDITS, json=body)
    assert found.status_code == 200, found.text
    assert backends.jobs[0].image == PICTURE


async def test_a_redirect_is_followed(this_machine_is_public: None) -> None:
    async with host(WHOLE) as url, host(answer(302, f"Location: {url}")) as first:
        assert (await ask(first, PUBLIC)).status_code == 200


@pytest.mark.parametrize("target", [METADATA, "http://[::1]:8000/", "http://localhost:8265/"])
async def test_a_redirect_into_our_network_is_refused(
    target: str, this_machine_is_public: None
) -> None:
    asked: list[Received] = []
    async with host(answer(302, f"Location: {target}"), asked=asked) as url:
        found = await ask(url, PUBLIC)
    assert (found.status_code, found.json()["code"]) == (422, "invalid_parameter")
    assert "not public" in found.json()["fact"]
    assert len(asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        METADATA,
        "https://10.0.0.1/photo.png",
        "https://127.1/photo.png",
        "https://localhost/photo.png",
        "https://user:hunter2@example.com/photo.png",
        "ftp://example.com/photo.png",
        "file:///etc/passwd",
        f"https://example.com/{'a' * 3000}",
        "https://",
    ],
)
async def test_an_address_that_is_none_of_the_internet_is_refused(url: str) -> None:
    found = await ask(url, PUBLIC)
    assert found.status_code == 422, found.text
    assert "hunter2" not in found.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (answer(404), "status 404"),
        (answer(500), "status 500"),
        (answer(302, "Location: /hook"), "redirects"),
        (b"no HTTP\r\n\r\n", "no connection"),
        (answer(200, "Content-Length: 5000", body=PICTURE), "one that broke"),
        (answer(200, "Content-Length: 0"), ""),
    ],
)
async def test_what_is_no_picture_is_refused(content: bytes, words: str) -> None:
    async with host(content) as url:
        found = await ask(url, LOCAL)
    assert found.status_code in (400, 422), found.text
    assert words in found.json()["value"]


async def test_a_host_that_gives_nothing_is_left() -> None:
    hasty = LOCAL.model_copy(update={"timeout_s": 0.3})
    async with host(b"", hangs=True) as url:
        found = await ask(url, hasty)
    assert (found.status_code, found.json()["value"]) == (422, "nothing whole within 0.3 s")


async def test_a_picture_is_no_larger_than_a_body_may_be() -> None:
    async with host(ENDLESS, hangs=True) as url:
        found = await ask(url, LOCAL)
    assert (found.status_code, found.json()["code"]) == (413, "too_large")


async def test_fetched_bytes_count_as_those_of_uploads_do() -> None:
    room = {
        "limits": LimitSettings(max_body_bytes=1024),
        "uploads": UploadSettings(max_held_bytes=1024),
    }
    async with host(answer(200, body=b"x" * 1000), hangs=True) as url:
        found = await ask(url, LOCAL, **room)
    assert (found.status_code, found.json()["code"]) == (429, "full")


async def test_one_key_cannot_take_every_place_for_fetching() -> None:
    fetcher = Fetcher(LOCAL, 50_000)
    async with host(b"", hangs=True) as url:
        slow = [asyncio.create_task(fetcher.fetch(url, "one", lambda _: None)) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(Full, match="Too many pictures"):
            await fetcher.fetch(url, "one", lambda _: None)
        async with host(WHOLE) as other:
            assert await fetcher.fetch(other, "another", lambda _: None) == PICTURE
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    async with host(WHOLE) as url:
        assert await fetcher.fetch(url, "one", lambda _: None) == PICTURE
