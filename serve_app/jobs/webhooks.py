"""Webhooks: which URLs are taken, and one delivery to a receiver that may be hostile.

A URL comes from a client and the request comes from inside our network, so a receiver must never
be an address that only we can reach. A name is resolved once, each of its addresses is checked, and
the connection goes to an address that was checked: a name that changes in between gains nothing.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import re
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import httpx
from pydantic import BaseModel, ConfigDict
from standardwebhooks import Webhook

from deployments.errors import InvalidParameter

if TYPE_CHECKING:
    import ssl

    from deployments.settings import WebhookSettings

AT_A_TIME = 64
"""Deliveries of one process at a time."""
MAX_URL_CHARACTERS = 2000
_MAX_ADDRESSES = 4
_NAMES_OF_OWNER = 16
"""Names of one owner that are resolved at a time."""
_PORTS = (80, 443, *range(1024, 65_536))
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_HERE = re.compile(r"(.+\.)?localhost\.?")

Resolve = Callable[[str, int], list[str]]
"""The addresses of a host name and port, as text; raises OSError."""

_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Python 3.11 calls these global.
_REFUSED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "168.63.129.16/32",  # Azure's platform: configuration and secrets of a machine
        "192.0.0.0/24",  # IETF protocols; Oracle's metadata
        "192.88.99.0/24",  # relays of 6to4
        "2002::/16",  # 6to4: holds any IPv4 address
        "3fff::/20",  # documentation
    )
)


class Event(BaseModel):
    """One event of a job, as its transition wrote it.

    Attributes:
        id: of the message; the same id never has two contents.
        url: where it goes.
        owner: of the job; chooses the secret.
        type: such as job.completed.
        created: Unix time, seconds.
        data: the job as the API shows it.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    url: str
    owner: str
    type: str
    created: float
    data: dict[str, Any]

    @property
    def body(self) -> str:
        """What the receiver gets; the same in every attempt."""
        when = datetime.fromtimestamp(self.created, UTC).isoformat(timespec="milliseconds")
        content = {
            "type": self.type,
            "timestamp": when.replace("+00:00", "Z"),
            "data": self.data,
        }
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended.

    Attributes:
        kind: gone means that the receiver wants no more of it (410).
        reason: what went wrong, for operators; empty if delivered.
    """

    kind: Literal["delivered", "gone", "failed"]
    reason: str = ""


def webhook_secret(master: bytes, owner: str) -> str:
    """The secret that signs the webhooks of an owner, in the form of Standard Webhooks."""
    key = hmac.new(master, owner.encode(), hashlib.sha256).digest()
    return f"whsec_{base64.b64encode(key).decode()}"


def check_webhook(url: str, settings: WebhookSettings) -> str:
    """The URL in its normal form. Resolves no name: that happens at each delivery.

    Raises:
        InvalidParameter: the URL is too long or malformed, or no event may go there.
    """
    if len(url) > MAX_URL_CHARACTERS:
        _refuse(
            f"The webhook is longer than {MAX_URL_CHARACTERS} characters.",
            f"{len(url)} characters",
            "Shorten it.",
        )
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        _refuse(
            "The webhook is no URL.",
            url.rpartition("@")[2],  # no password
            "Send a URL such as https://example.com/hook.",
        )
    schemes = ("https", "http") if settings.allow_http else ("https",)
    if parsed.scheme not in schemes:
        _refuse(
            f"The webhook does not begin with {' or '.join(f'{s}://' for s in schemes)}.",
            parsed.scheme,
            "Send a URL such as https://example.com/hook.",
        )
    if parsed.userinfo:
        _refuse(
            "The webhook holds a user or a password.",
            "not shown, because it may be secret",
            "Leave it out. Every event is signed; check the signature instead.",
        )
    _check_host(parsed, settings)
    return str(parsed)


def _check_host(url: httpx.URL, settings: WebhookSettings) -> None:
    host = url.raw_host.decode()
    literal = _literal(host)
    if literal is None and not _NAME.fullmatch(host):
        _refuse(
            "The webhook has no valid host.",
            url.host,
            "Send a URL such as https://example.com/hook.",
        )
    if url.port is not None and url.port not in _PORTS:
        _refuse(
            "The webhook's port is none that web servers use.",
            url.port,
            "Use 443, 80, or one of 1024 to 65535.",
        )
    if _HERE.fullmatch(host) and not settings.allow_private:
        _refuse_private(host)
    if literal is not None:
        _check_address(literal, host, settings)


def _literal(host: str) -> str | None:
    """The address that a host spells, in any way the system reads (127.1, 0x7f.1), else None."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return str(found[0][4][0])


def _check_address(address: str, host: str, settings: WebhookSettings) -> None:
    if not settings.allow_private and not _is_public(ipaddress.ip_address(address)):
        _refuse_private(host)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        # Leaves out multicast, site-local, and IPv4-mapped addresses, which Python may call global.
        if address not in _GLOBAL_IPV6:
            return False
    unicast = address.is_global and not address.is_multicast and not address.is_reserved
    return unicast and not any(address in network for network in _REFUSED)


def _refuse(fact: str, value: object, remedy: str) -> NoReturn:
    raise InvalidParameter(fact, value=value, remedy=remedy)


def _refuse_private(host: str) -> NoReturn:
    _refuse(
        "The webhook leads to an address that is not public.",
        host,
        "Send a URL that the internet can reach, or ask the operator for webhooks.allow_private.",
    )


def system_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, in the system's order of preference."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Sender:
    """Sends events, signed by Standard Webhooks.

    It keeps nothing between attempts, connections and cookies included, because receivers of
    different owners may share an address.

    Args:
        settings: what is allowed, and how long an attempt may take.
        master: the secret that each owner's secret comes from.
        resolve: the addresses of a name. It runs in a thread.
        tls: verifies receivers; None takes the certificates that httpx takes.
    """

    def __init__(
        self,
        settings: WebhookSettings,
        master: bytes,
        *,
        resolve: Resolve = system_addresses,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._master = master
        self._resolve = resolve
        self._tls = tls or httpx.create_ssl_context()
        # Threads of its own: names that resolve slowly hold up nothing else in the process.
        self._threads = ThreadPoolExecutor(AT_A_TIME, "webhook-names")
        self._resolving = Counter[str]()

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def send(self, event: Event) -> Outcome:
        """One attempt, which takes at most `timeout_s`; raises nothing that a receiver causes."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                status = await self._post(event)
        except InvalidParameter as error:
            return Outcome("failed", error.message)
        except TimeoutError:
            return Outcome("failed", f"no answer within {self._settings.timeout_s:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return Outcome("failed", f"{type(error).__name__}: {error}"[:200])
        if 200 <= status < 300:
            return Outcome("delivered")
        return Outcome("gone" if status == 410 else "failed", f"status {status}")

    async def _post(self, event: Event) -> int:
        """The status that the first address which takes a connection answers with."""
        url = httpx.URL(check_webhook(event.url, self._settings))
        host = url.raw_host.decode()
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = await self._addresses(host, port, event.owner)
        for address in addresses:
            _check_address(address, host, self._settings)
        # A receiver with a dead address among several is reached through another.
        *others, last = addresses[:_MAX_ADDRESSES]
        connect_s = self._settings.timeout_s / (len(others) + 1)
        for address in others:
            try:
                return await self._post_to(address, url, event, connect_s)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._post_to(last, url, event, connect_s)

    async def _addresses(self, host: str, port: int, owner: str) -> list[str]:
        """Resolve a name. An owner whose names resolve slowly keeps a few threads at most.

        Raises:
            OSError: too many names of this owner are being resolved, or there is no such name.
        """
        if self._resolving[owner] >= _NAMES_OF_OWNER:
            raise OSError("too many names of this key resolve slowly")
        self._resolving[owner] += 1
        found = self._threads.submit(self._resolve, host, port)
        # When the thread is free again, which may be long after this attempt was given up.
        found.add_done_callback(lambda _: self._resolving.subtract([owner]))
        return await asyncio.wrap_future(found)

    async def _post_to(self, address: str, url: httpx.URL, event: Event, connect_s: float) -> int:
        now = datetime.now(UTC)
        signature = Webhook(webhook_secret(self._master, event.owner))
        headers = {
            "Host": url.netloc.decode(),
            "Content-Type": "application/json",
            "User-Agent": "imagen-webhooks",
            "webhook-id": event.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signature.sign(event.id, now, event.body),
        }
        timeout = httpx.Timeout(self._settings.timeout_s, connect=connect_s)
        async with (
            httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=timeout) as client,
            client.stream(
                "POST",
                url.copy_with(host=address),
                content=event.body.encode(),
                headers=headers,
                # TLS names and verifies the host of the URL, not the address.
                extensions={"sni_hostname": url.raw_host.decode().rstrip(".")},
            ) as response,
        ):
            # The status is the whole answer. The body is not read, whatever its size.
            return response.status_code
