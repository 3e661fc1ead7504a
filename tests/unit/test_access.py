"""Who may call the API, and how much, as clients see it."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.openapi.models import OpenAPI

from deployments.errors import ConfigError, Full
from deployments.settings import AccessSettings, ClientSettings, KeyLimits, parse_settings
from deployments.tasks import Task
from serve_app.access import keys as keys_module
from serve_app.access.editing import create_key, revoke_key
from serve_app.access.keys import KeyFile
from serve_app.api import create_app
from serve_app.doors import KSERVE_HEALTH
from tests.unit.fakes import REGISTRY, FakeBackends, chunks, picture_file, post, raw, send

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fastapi import FastAPI
    from starlette.types import Message

COMIC = Task.COMIC.route
PHOTO = picture_file()  # 24 x 16 px
LOG = "ray.serve.imagen.access"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def token(file: Path) -> str:
    return made(file)


@pytest.fixture(autouse=True)
def looks_at_the_file_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_STAT_S", 0)


def made(file: Path, **limits: Any) -> str:
    return create_key(file, "a client", KeyLimits(**limits))[1]


def guarded(file: Path, backends: FakeBackends | None = None, **access: Any) -> FastAPI:
    clients = ClientSettings(access=AccessSettings(keys=file, **access))
    return create_app(backends or FakeBackends(), REGISTRY, clients)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def comic(app: FastAPI, token: str | None, image: bytes = PHOTO, **data: str) -> Any:
    return await post(app, COMIC, image, headers=bearer(token) if token else {}, data=data)


# The key


async def test_a_key_opens_every_route_that_needs_one(file: Path, token: str) -> None:
    app = guarded(file)
    assert (await comic(app, token)).content == PHOTO
    assert (await send(app, "GET", "/api/v1/models", headers=bearer(token))).status_code == 200
    lower = {"authorization": f"bearer   {token} "}
    assert (await send(app, "GET", "/api/v1/models", headers=lower)).status_code == 200


async def test_without_a_key_no_byte_of_the_body_is_read(file: Path, token: str) -> None:
    async def body() -> AsyncIterator[Message]:
        raise AssertionError("the body was read")
        yield

    backends = FakeBackends()
    [start, end] = await raw(guarded(file, backends), COMIC, body(), {"content-length": "1000"})
    headers = dict(start["headers"])
    assert start["status"] == 401
    assert headers[b"www-authenticate"] == b"Bearer"
    assert headers[b"content-type"] == b"application/problem+json"
    problem = json.loads(end["body"])
    assert problem["code"] == "unauthorized"
    assert problem["value"] == "no Authorization header"
    assert problem["request_id"]
    assert backends.jobs == []


@pytest.mark.parametrize("path", ["/api/v1/models", "/nowhere", "/api/v1/jobs", "/DOCS"])
async def test_routes_that_do_not_exist_need_a_key_too(path: str, file: Path, token: str) -> None:
    assert (await send(guarded(file), "GET", path)).status_code == 401


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/docs", "/openapi.json", "/", "/playground", "/playground/"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_probes_and_pages_need_none(path: str, method: str, file: Path) -> None:
    if (path, method) in (("/docs", "HEAD"), ("/openapi.json", "HEAD")):
        return
    response = await send(guarded(file), method, path)
    assert response.status_code in (200, 307)
    assert "ratelimit-limit" not in response.headers


async def test_signed_links_need_none(file: Path) -> None:
    # Nothing but that this application keeps no jobs stands in the way.
    answer = await send(guarded(file), "GET", "/files/some/result.png")
    assert answer.json()["fact"] == "This service keeps no jobs."


@pytest.mark.parametrize("path", ["/docs/../api/v1/models", "/files/../api/v1/models"])
async def test_an_open_path_leads_to_no_other_route(path: str, file: Path) -> None:
    [start, *_] = await raw(guarded(file), path, chunks([b""]), method="GET")
    assert start["status"] == 404


@pytest.mark.parametrize("root", ["", "/below"])
async def test_below_a_prefix_the_same_paths_are_open(root: str, file: Path, token: str) -> None:
    app = guarded(file)
    for path, status in (("/healthz", 200), ("/api/v1/models", 401)):
        [start, *_] = await raw(app, root + path, chunks([b""]), method="GET", root_path=root)
        assert start["status"] == status


HOSTILE = [
    "",
    "Bearer",
    "Bearer ",
    "Basic YWRtaW46YWRtaW4=",
    "Bearer imagen_00000000_" + "A" * 43,
    "Bearer " + "A" * 60_000,
    "Bearer imagen_anonymous_" + "A" * 43,
    "Bearer \x00\x01",
    "Bearer \xff\xfe\xe9",
    "Bearer ' OR 1=1 --",
    "Bearer imagen_{id}_" + "A" * 43,
    "Bearer {token}\x00",
    "Bearer {token}A",
    "Bearer {token},Bearer {token}",
    "Token {token}",
    "{token}",
]


@pytest.mark.parametrize("header", HOSTILE)
async def test_hostile_headers_are_refused_and_not_repeated(
    header: str, file: Path, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    value = header.replace("{token}", token).replace("{id}", token.split("_")[1])
    with caplog.at_level(logging.DEBUG):
        start, end = await raw(guarded(file), COMIC, chunks([b""]), {"Authorization": value})
    assert start["status"] == 401
    secret = value.partition(" ")[2]
    answer = end["body"].decode() + caplog.text
    assert token not in answer
    assert not secret.strip() or secret not in answer


async def test_two_authorization_headers_are_refused(file: Path, token: str) -> None:
    twice = [("Authorization", f"Bearer {token}")] * 2
    [start, *_] = await raw(guarded(file), COMIC, chunks([b""]), twice)
    assert start["status"] == 401


def test_a_token_is_compared_in_constant_time(
    file: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, str]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return compare_digest(a, b)

    compare_digest = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = KeyFile(file, KeyLimits())
    assert keys.find(token)
    assert keys.find(token[:-1] + ("A" if token[-1] != "A" else "B")) is None
    assert keys.find("imagen_00000000_" + "A" * 43) is None, "an unknown id is compared as well"
    assert [len(a) + len(b) for a, b in compared] == [128] * 3
    assert token not in str(compared)


def test_the_file_holds_no_token(file: Path, token: str) -> None:
    text = file.read_text()
    assert token.split("_", 2)[2] not in text
    assert token not in text


# The file changes


async def test_a_revoked_key_is_refused_from_the_next_request_on(file: Path, token: str) -> None:
    app = guarded(file)
    assert (await comic(app, token)).status_code == 200
    revoke_key(file, token.split("_")[1])
    response = await comic(app, token)
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")


async def test_a_key_that_is_revoked_meanwhile_does_not_lose_its_request(
    file: Path, token: str
) -> None:
    app = guarded(file, FakeBackends(delay_s=0.05))
    under_way = asyncio.create_task(comic(app, token))
    await asyncio.sleep(0.01)
    revoke_key(file, token.split("_")[1])
    assert (await send(app, "GET", "/api/v1/models", headers=bearer(token))).status_code == 401
    assert (await under_way).status_code == 200


async def test_a_new_key_works_without_a_restart(file: Path) -> None:
    app = guarded(file)
    assert (await comic(app, "imagen_00000000_" + "A" * 43)).status_code == 401
    assert (await comic(app, made(file))).status_code == 200


async def test_the_file_may_be_replaced_while_requests_run(file: Path) -> None:
    token = made(file, requests_per_s=10_000)
    app = guarded(file)
    for turn in range(20):
        answers = [comic(app, token) for _ in range(3)]
        create_key(file, f"client {turn}", KeyLimits())
        assert [a.status_code for a in await asyncio.gather(*answers)] == [200] * 3


@pytest.mark.parametrize(
    "broken", ["", "keys: [", "keys: 3", "- a", "keys: [{id: x}]", "\x00", None, "keys: [{}]"]
)
async def test_a_broken_file_keeps_the_keys_from_before(
    broken: str | None, file: Path, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, good = guarded(file), file.read_bytes()
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    for _ in range(3):
        assert (await comic(app, token)).status_code == 200
    assert caplog.text.count("cannot be read, and the 1 keys from before stay") == 1
    file.write_bytes(good)
    revoke_key(file, token.split("_")[1])
    assert (await comic(app, token)).status_code == 401


@pytest.mark.parametrize(
    "text", ["keys: !hidden x", "keys: !!int hidden", "keys: !!bool hidden", "hidden: [\nhidden"]
)
def test_what_stands_in_a_broken_file_is_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="it is not YAML") as caught:
        keys_module.parse_keys(text.encode())
    assert "hidden" not in "".join(traceback.format_exception(caught.value.with_traceback(None)))


async def test_without_a_file_nobody_gets_in_and_the_log_says_why(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await comic(guarded(file), "imagen_00000000_" + "A" * 43)).status_code == 401
    assert "cannot be read, and no key works" in caplog.text


def test_the_file_is_looked_at_once_a_second(
    file: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "_STAT_S", 1.0)
    now_s = 10.0
    keys = KeyFile(file, KeyLimits(), clock=lambda: now_s)
    revoke_key(file, token.split("_")[1])
    assert keys.find(token)
    now_s = 11.0
    assert keys.find(token) is None


def test_a_mounted_secret_changes_by_way_of_its_links(tmp_path: Path) -> None:
    """As kubelet does it: keys.yaml -> ..data/keys.yaml, and ..data is exchanged."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, second = made(tmp_path / "first/keys.yaml"), made(tmp_path / "second/keys.yaml")
    (tmp_path / "..data").symlink_to("first")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    keys = KeyFile(tmp_path / "keys.yaml", KeyLimits())
    assert keys.find(first)
    (tmp_path / "new").symlink_to("second")
    os.replace(tmp_path / "new", tmp_path / "..data")
    assert keys.find(second)
    assert keys.find(first) is None


# Limits


async def test_every_answer_tells_the_limit(file: Path) -> None:
    token = made(file, requests_per_s=3, pictures=1)
    app = guarded(file)
    good = await comic(app, token)
    bad = await comic(app, token, steps="0")
    large = await raw(
        app, COMIC, chunks([b"x"]), {**bearer(token), "content-length": "99999999999"}
    )
    assert (good.status_code, bad.status_code, large[0]["status"]) == (200, 422, 413)
    left = [good.headers["ratelimit-remaining"], bad.headers["ratelimit-remaining"]]
    left.append(dict(large[0]["headers"])[b"ratelimit-remaining"].decode())
    assert left == ["2", "1", "0"]
    assert (good.headers["ratelimit-limit"], good.headers["ratelimit-reset"]) == ("3", "1")


async def test_too_many_requests_are_told_when_to_come_back(file: Path) -> None:
    token, other = made(file, requests_per_s=0.1), made(file)
    app, backends = guarded(file), FakeBackends()
    assert (await comic(app, token)).status_code == 200
    response = await comic(app, token)
    assert (response.status_code, response.json()["code"]) == (429, "rate_limited")
    assert response.headers["retry-after"] == "10"
    assert response.headers["ratelimit-remaining"] == "0"
    assert response.json()["value"] == "requests_per_s = 0.1"
    assert (await comic(app, other)).status_code == 200
    assert backends.jobs == []


async def test_pictures_at_a_time(file: Path) -> None:
    token = made(file, pictures=2)
    backends = FakeBackends(delay_s=0.05)
    app = guarded(file, backends)
    answers = await asyncio.gather(*(comic(app, token) for _ in range(5)))
    assert sorted(a.status_code for a in answers) == [200, 200, 429, 429, 429]
    refusal = next(a for a in answers if a.status_code == 429)
    assert refusal.headers["retry-after"] == "2"
    assert len(backends.jobs) == 2
    listed = await send(app, "GET", "/api/v1/models", headers=bearer(token))
    assert listed.status_code == 200
    for _ in range(5):
        assert (await comic(app, token)).status_code == 200, "one after the other never collides"


async def test_a_client_that_leaves_gives_its_place_back(file: Path) -> None:
    token = made(file, pictures=1)
    backends = FakeBackends(delay_s=60)
    app = guarded(file, backends)
    gone = asyncio.create_task(comic(app, token))
    while not backends.jobs:
        await asyncio.sleep(0.01)
    assert (await comic(app, token)).status_code == 429
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    backends.delay_s = 0
    assert (await comic(app, token)).status_code == 200


async def test_a_request_that_fails_gives_its_place_back(file: Path) -> None:
    token = made(file, pictures=1)
    backends = FakeBackends(error=RuntimeError("x"))
    app = guarded(file, backends)
    for body in (PHOTO, b"no picture", PHOTO):
        assert (await comic(app, token, body)).status_code in (415, 503)
    unread = await raw(app, COMIC, chunks([b"x"]), bearer(token))
    assert unread[0]["status"] == 415
    backends.error = None
    assert (await comic(app, token)).status_code == 200


async def test_megapixels_are_counted_before_the_work(file: Path) -> None:
    token = made(file, megapixels_per_minute=0.01)
    backends = FakeBackends()
    app = guarded(file, backends)
    large = picture_file(100, 100)
    assert (await comic(app, token, large)).status_code == 200
    response = await comic(app, token, large)
    assert (response.status_code, response.json()["code"]) == (429, "rate_limited")
    assert 58 <= int(response.headers["retry-after"]) <= 60
    assert len(backends.jobs) == 1


async def test_what_the_service_refuses_or_fails_is_not_charged(file: Path) -> None:
    token = made(file, megapixels_per_minute=0.01)
    large = picture_file(100, 100)
    backends = FakeBackends(error=Full("No room.", value="full", remedy="Wait."))
    app = guarded(file, backends)
    for _ in range(3):
        response = await comic(app, token, large)
        assert (response.status_code, response.json()["code"]) == (429, "full")
    backends.error = RuntimeError("unexpected")
    assert (await comic(app, token, large)).status_code == 503
    backends.error = None
    assert (await comic(app, token, large)).status_code == 200


# The log


async def test_a_line_says_who_did_what(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = made(file, megapixels_per_minute=0.0004)
    key_id, secret = token.split("_", 2)[1:]
    app = guarded(file)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            await post(app, COMIC, PHOTO, headers={**bearer(token), "X-Request-Id": "mine"})
        await comic(app, None)
    lines = [one.getMessage() for one in caplog.records if one.name == LOG]
    assert lines[0].startswith(f"POST {COMIC} 200 ")
    assert lines[0].endswith(f" s mine ok key={key_id} from=127.0.0.1 px=384")
    limit = "limit=megapixels_per_minute"
    assert lines[1].endswith(f"s mine rate_limited key={key_id} from=127.0.0.1 px=0 {limit}")
    assert lines[2].startswith(f"POST {COMIC} 401 ")
    assert "key=" not in lines[2]
    assert secret not in caplog.text


# Switched off, browsers, proxies


async def test_with_keys_off_everybody_is_served_without_limits(file: Path) -> None:
    app = guarded(file, auth="off")
    for token in (None, "whatever"):
        response = await comic(app, token)
        assert response.status_code == 200
        assert "ratelimit-limit" not in response.headers
    description = (await send(app, "GET", "/openapi.json")).json()
    assert "securitySchemes" not in description["components"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "imagen.example", ""])
def test_keys_can_be_off_on_this_machine_only(host: str) -> None:
    with pytest.raises(ConfigError, match=r"access.auth is off"):
        AccessSettings(auth="off").check_host(host)
    AccessSettings(auth="keys").check_host(host)
    for loopback in ("127.0.0.1", "127.0.0.2", "::1", "[::1]", "localhost"):
        AccessSettings(auth="off").check_host(loopback)


def test_the_bare_off_of_yaml_is_understood() -> None:
    assert parse_settings(ClientSettings, {"access": {"auth": False}}, "x").access.auth == "off"
    with pytest.raises(ConfigError, match=r"access.auth"):
        parse_settings(ClientSettings, {"access": {"auth": True}}, "x")


def test_the_keys_are_where_the_settings_or_the_environment_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("IMAGEN_KEYS", raising=False)
    assert AccessSettings().keys_file == tmp_path / ".config/imagen/keys.yaml"
    monkeypatch.setenv("IMAGEN_KEYS", str(tmp_path / "elsewhere"))
    assert AccessSettings().keys_file == tmp_path / "elsewhere"
    assert AccessSettings(keys=tmp_path / "own").keys_file == tmp_path / "own"


PREFLIGHT = {
    "Origin": "https://app.example.com",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, prefer",
}


async def test_pages_of_a_listed_origin_may_call(file: Path, token: str) -> None:
    app = guarded(file, cors_origins=("https://app.example.com",))
    asked = await send(app, "OPTIONS", COMIC, headers=PREFLIGHT)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://app.example.com"
    origin = {"Origin": "https://app.example.com"}
    good = await post(app, COMIC, PHOTO, headers=bearer(token) | origin)
    refused = await post(app, COMIC, PHOTO, headers=origin)
    for response, status in ((good, 200), (refused, 401)):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "X-Imagen-Seed" in good.headers["access-control-expose-headers"]
    other = await post(
        app, COMIC, PHOTO, headers=bearer(token) | {"Origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in other.headers


async def test_no_origin_is_listed_by_default(file: Path, token: str) -> None:
    asked = await send(guarded(file), "OPTIONS", COMIC, headers=PREFLIGHT)
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("origin", ["app.example.com", "https://a.example/path", "https://a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"access.cors_origins"):
        parse_settings(ClientSettings, {"access": {"cors_origins": [origin]}}, "x")


@pytest.mark.parametrize(("trusted", "client"), [((), "10.0.0.9"), (("10.0.0.0/8",), "1.2.3.4")])
async def test_forwarded_addresses_are_believed_of_trusted_proxies_only(
    trusted: tuple[str, ...],
    client: str,
    file: Path,
    token: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = guarded(file, trusted_proxies=trusted)
    headers = bearer(token) | {"X-Forwarded-For": "6.6.6.6, 1.2.3.4"}
    with caplog.at_level(logging.INFO, LOG):
        await raw(app, COMIC, chunks([b""]), headers, client=("10.0.0.9", 1))
    assert f" from={client} " in caplog.text


# The reference


async def test_the_reference_asks_for_the_key_where_it_is_needed(file: Path) -> None:
    description = (await send(guarded(file), "GET", "/openapi.json")).json()
    OpenAPI.model_validate(description)
    assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in description["paths"].items():
        for operation in operations.values():
            needs = path not in ("/healthz", "/readyz", "/files/{path}", *KSERVE_HEALTH)
            assert ("security" in operation) == needs, path
            assert ({"401", "429"} <= operation["responses"].keys()) == needs, path


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
@pytest.mark.parametrize("state", ["ready", "starting"])
async def test_head_answers_as_get(path: str, state: Any, file: Path) -> None:
    app = guarded(file, FakeBackends(state=state))
    get, head = await send(app, "GET", path), await send(app, "HEAD", path)
    assert head.status_code == get.status_code
    assert head.content == b""
    kept = ("content-length", "content-type", "retry-after")
    assert [head.headers.get(k) for k in kept] == [get.headers.get(k) for k in kept]
