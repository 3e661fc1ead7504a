"""Which URLs take events, and what one delivery does and never does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from deployments.errors import InvalidParameter
from deployments.settings import WebhookSettings
from serve_app.jobs.webhooks import Event, Outcome, Sender, check_webhook, webhook_secret
from tests.jobs.receiver import Received, Receiver, hang, status, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MASTER = b"master secret of the tests"
STRICT = WebhookSettings(timeout_s=0.4)
LOCAL = WebhookSettings(allow_http=True, allow_private=True, timeout_s=20)
HASTY = LOCAL.model_copy(update={"timeout_s": 0.4})
# Belongs to a protocol that nobody runs (AMT, RFC 7450), so a connection reaches nobody.
PUBLIC = "192.52.193.1"

PRIVATE = (
    "10.0.0.1",
    "172.16.5.4",
    "192.168.1.1",
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "169.254.169.254",
    "169.254.10.1",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.1.2.3",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:8.8.8.8",
    "fd00:ec2::254",
    "fc00::1",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::7f00:1",
    "64:ff9b:1::a00:1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::",
    "2001::1",
    "2001:db8::1",
    "3fff::1",
    "100::1",
)


def in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def event(url: str, id: str = "msg_1", **data: Any) -> Event:
    return Event(
        id=id,
        url=url,
        owner="anna",
        type="job.completed",
        created=1732633445.1234,
        data={"job_id": "0192f3", **data},
    )


class Names:
    """A resolver whose answers a test gives, one after the other; the last stays."""

    def __init__(self, *answers: list[str]) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


_connected: list[str] = []


def _note_connection(name: str, args: tuple[Any, ...]) -> None:
    if name == "socket.connect":
        _connected.append(str(args[1][0]))


@pytest.fixture(scope="module", autouse=True)
def _audit() -> None:
    sys.addaudithook(_note_connection)  # stays until the process ends


@pytest.fixture
def connected() -> list[str]:
    """The addresses that this process has tried to connect to since the test began."""
    _connected.clear()
    return _connected


Send = Callable[..., Awaitable[Outcome]]


@pytest.fixture
async def send() -> AsyncIterator[Send]:
    senders: list[Sender] = []

    async def one(
        what: Event, settings: WebhookSettings, names: Names | None = None, **kwargs: Any
    ) -> Outcome:
        if names:
            kwargs["resolve"] = names
        senders.append(Sender(settings, MASTER, **kwargs))
        return await senders[-1].send(what)

    yield one
    for sender in senders:
        sender.close()


# URLs


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://example.com/hook", "https://example.com/hook"),
        ("HTTPS://EXAMPLE.com/Hook?a=B", "https://example.com/Hook?a=B"),
        ("https://example.com:8443/", "https://example.com:8443/"),
        ("https://bücher.example/ü", "https://xn--bcher-kva.example/%C3%BC"),
        ("https://8.8.8.8/", "https://8.8.8.8/"),
        ("https://[2606:4700::1111]/", "https://[2606:4700::1111]/"),
        ("https://[64:ff9b::808:808]/", "https://[64:ff9b::808:808]/"),
    ],
)
def test_a_public_https_url_is_taken_in_its_normal_form(url: str, normal: str) -> None:
    assert check_webhook(url, STRICT) == normal
    assert check_webhook(normal, STRICT) == normal


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/hook",
        "//example.com",
        "http://example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "https://",
        "https:///hook",
        "https://example.com:0/",
        "https://example.com:25/",
        "https://example.com:70000/",
        "https://example.com:port/",
        "https://exa mple.com/",
        "https://exam%70le.com/",
        "https://example..com/",
        f"https://{'a' * 64}.com/",
        "https://example.com/\n",
        "https://example.com\\@10.0.0.1/",
        "https://127.0.0.1:8000/",
        "https://localhost/",
        "https://api.localhost./",
        "https://127.1/",
        "https://0x7f.1/",
        "https://2130706433/",
        "https://[fe80::1%25eth0]/",
        "https://example.com/" + "a" * 2000,
        *(f"https://{in_url(address)}/" for address in PRIVATE),
    ],
)
def test_any_other_url_is_refused_when_the_job_is_submitted(url: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        check_webhook(url, STRICT)
    assert "webhook" in refused.value.message
    assert refused.value.message.endswith(".")
    assert refused.value.remedy.endswith(".")


@pytest.mark.parametrize("url", ["https://me:hunter2@example.com/", "https://me:hunter2@x:y/"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        check_webhook(url, STRICT)
    assert "hunter2" not in str(refused.value)


@given(st.text() | st.text().map("https://{}".format))
def test_no_text_at_all_breaks_the_check(text: str) -> None:
    with contextlib.suppress(InvalidParameter):
        normal = check_webhook(text, STRICT)
        assert normal.startswith("https://")
        assert check_webhook(normal, STRICT) == normal


def test_an_operator_may_allow_http_and_private_receivers() -> None:
    assert check_webhook("http://10.0.0.1:8000/", LOCAL) == "http://10.0.0.1:8000/"
    with pytest.raises(InvalidParameter):
        check_webhook("http://10.0.0.1/", WebhookSettings(allow_private=True))
    with pytest.raises(InvalidParameter):
        check_webhook("http://10.0.0.1/", WebhookSettings(allow_http=True))


# What a receiver gets


async def test_a_receiver_verifies_an_event_with_the_owners_secret(send: Send) -> None:
    async with Receiver() as receiver:
        assert await send(event(receiver.url, note="ü ✓"), LOCAL) == Outcome("delivered")
    (got,) = receiver.received
    secret = webhook_secret(MASTER, "anna")
    content = Webhook(secret).verify(got.body, got.headers)
    assert content == {
        "type": "job.completed",
        "timestamp": "2024-11-26T15:04:05.123Z",
        "data": {"job_id": "0192f3", "note": "ü ✓"},
    }
    assert got.id == "msg_1"
    with pytest.raises(WebhookVerificationError):
        Webhook(webhook_secret(MASTER, "bert")).verify(got.body, got.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(got.body.replace("completed", "failed"), got.headers)


async def test_neither_the_url_nor_the_owner_of_an_event_is_part_of_its_content(send: Send) -> None:
    async with Receiver() as receiver:
        await send(event(receiver.url + "?token=t"), LOCAL)
    assert set(json.loads(receiver.received[0].body)) == {"type", "timestamp", "data"}
    assert receiver.received[0].path == "/hook?token=t"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (200, Outcome("delivered")),
        (204, Outcome("delivered")),
        (299, Outcome("delivered")),
        (410, Outcome("gone", "status 410")),
        (304, Outcome("failed", "status 304")),
        (404, Outcome("failed", "status 404")),
        (429, Outcome("failed", "status 429")),
        (500, Outcome("failed", "status 500")),
    ],
)
async def test_the_status_decides(send: Send, code: int, outcome: Outcome) -> None:
    async with Receiver(status(code)) as receiver:
        assert await send(event(receiver.url), LOCAL) == outcome


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(send: Send, code: int) -> None:
    async with (
        Receiver() as other,
        Receiver(status(code, f"Location: {other.url}")) as receiver,
    ):
        assert await send(event(receiver.url), LOCAL) == Outcome("failed", f"status {code}")
        assert other.received == []


async def test_a_receiver_that_hangs_costs_no_more_than_the_time_limit(send: Send) -> None:
    async with Receiver(hang) as receiver:
        assert await send(event(receiver.url), HASTY) == Outcome("failed", "no answer within 0.4 s")
        assert len(receiver.received) == 1


async def test_an_answer_that_drips_costs_no_more_than_the_time_limit(send: Send) -> None:
    async def drip(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-Drip: drop\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with Receiver(drip) as receiver:
        assert await send(event(receiver.url), HASTY) == Outcome("failed", "no answer within 0.4 s")


async def test_an_answer_of_3_gb_is_not_read(send: Send) -> None:
    sent = 0

    async def flood(received: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000000\r\n\r\n")
        while sent < 3_000_000_000:
            writer.write(bytes(65536))
            await writer.drain()
            sent += 65536

    async with Receiver(flood) as receiver:
        assert await send(event(receiver.url), LOCAL) == Outcome("delivered")
        await until(lambda: receiver.open == 0)
    assert sent < 32 * 2**20


async def test_headers_without_end_are_a_failure(send: Send) -> None:
    async def flood(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-More: " + b"a" * 65536 + b"\r\n")
            await writer.drain()

    async with Receiver(flood) as receiver:
        outcome = await send(event(receiver.url), LOCAL)
    assert outcome.kind == "failed"
    assert "RemoteProtocolError" in outcome.reason


async def test_what_is_not_http_and_what_does_not_listen_are_failures(send: Send) -> None:
    async def noise(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\0" * 100)
        await writer.drain()

    async with Receiver(noise) as receiver:
        assert (await send(event(receiver.url), LOCAL)).kind == "failed"
    outcome = await send(event(receiver.url), LOCAL)
    assert outcome.kind == "failed"
    assert outcome.reason.startswith("ConnectError")


async def test_proxies_of_the_environment_are_not_used(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Receiver() as proxy, Receiver() as receiver:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert await send(event(receiver.url), LOCAL) == Outcome("delivered")
        assert proxy.received == []


# Names and addresses


async def test_the_connection_goes_to_the_address_that_was_checked(send: Send) -> None:
    """The name exists in the test only, so a second resolution would fail or go astray."""
    names = Names(["127.0.0.1"], ["127.0.0.2"])
    async with Receiver() as first, Receiver(host="127.0.0.2", port=first.port) as second:
        url = f"http://hooks.example:{first.port}/hook"
        assert await send(event(url), LOCAL, names) == Outcome("delivered")
        assert second.received == []
    assert names.asked == ["hooks.example"]
    assert first.received[0].headers["host"] == f"hooks.example:{first.port}"


async def test_a_name_that_changes_after_the_check_reaches_no_private_address(
    send: Send, connected: list[str]
) -> None:
    names = Names([PUBLIC], ["127.0.0.1"])
    async with Receiver() as private:
        settings = WebhookSettings(allow_http=True, timeout_s=0.4)
        url = f"http://rebind.example:{private.port}/hook"
        outcome = await send(event(url), settings, names)
        assert outcome.kind == "failed"
        assert private.received == []
    assert connected == [PUBLIC]
    assert names.asked == ["rebind.example"]


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_name_of_a_private_address_is_refused(
    send: Send, connected: list[str], address: str
) -> None:
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        outcome = await send(event("https://hooks.example/"), STRICT, Names(answer))
        assert outcome == Outcome("failed", "The webhook leads to an address that is not public.")
    assert connected == []


async def test_a_stored_url_is_checked_again_when_it_is_used(
    send: Send, connected: list[str]
) -> None:
    for url in ("http://example.com/", "https://127.0.0.1/", "https://169.254.169.254/"):
        assert (await send(event(url), STRICT, Names([PUBLIC]))).kind == "failed"
    assert connected == []


async def test_a_receiver_is_reached_through_the_address_that_answers(send: Send) -> None:
    names = Names(["127.0.0.2", "127.0.0.1"])
    async with Receiver() as receiver:
        url = f"http://hooks.example:{receiver.port}/"
        assert await send(event(url), LOCAL, names) == Outcome("delivered")


async def test_a_name_that_does_not_resolve_is_a_failure(send: Send) -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    outcome = await send(event("https://hooks.example/"), STRICT, resolve=unknown)
    assert outcome.kind == "failed"
    assert outcome.reason.startswith("gaierror")


# TLS


def certified(name: str, folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A certificate that its holder signed: the server's side, and the side that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "both.pem").write_bytes(pem + secret)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "both.pem")
    return server, ssl.create_default_context(cadata=pem.decode())


async def test_tls_names_and_verifies_the_host_of_the_url(send: Send, tmp_path: Path) -> None:
    server, trusting = certified("hooks.example", tmp_path)
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    async with Receiver(tls=server) as receiver:
        names = Names(["127.0.0.1"])
        url = f"https://hooks.example:{receiver.port}/hook"
        assert await send(event(url), LOCAL, names, tls=trusting) == Outcome("delivered")
        assert asked == ["hooks.example"]

        other = f"https://other.example:{receiver.port}/hook"
        for refused in (
            await send(event(other), LOCAL, names, tls=trusting),
            await send(event(url), LOCAL, names),
        ):
            assert refused.kind == "failed"
            assert "CERTIFICATE_VERIFY_FAILED" in refused.reason
        assert len(receiver.received) == 1
