"""Addresses that clients name, and connections to them from inside our network.

Such an address must never be one that only we can reach. A name is resolved once, each of its
addresses is checked, and the connection goes to an address that was checked: a name that changes
in between gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn, TypeAlias, TypeVar

import httpx

from deployments.errors import InvalidParameter

T = TypeVar("T")
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


@dataclass(frozen=True, slots=True)
class Rules:
    """Which URLs are taken.

    Attributes:
        what: they are, as errors begin, such as "The webhook".
        example: of a good one.
        secrets: what to do instead of writing a user and a password into the URL.
        allow_http: whether plain http:// is taken.
        allow_private: whether addresses of private networks and of this machine are taken.
        private_setting: name of the setting that allows them.
    """

    what: str
    example: str
    secrets: str
    allow_http: bool
    allow_private: bool
    private_setting: str


def check_url(url: str, rules: Rules) -> str:
    """The URL in its normal form. Resolves no name: that happens at each connection.

    Raises:
        InvalidParameter: the URL is too long or malformed, or nothing may go there.
    """
    if len(url) > MAX_URL_CHARACTERS:
        _refuse(
            f"{rules.what} is longer than {MAX_URL_CHARACTERS} characters.",
            f"{len(url)} characters",
            "Shorten it.",
        )
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        _refuse(
            f"{rules.what} is no URL.",
            url.rpartition("@")[2],  # no password
            f"Send a URL such as {rules.example}.",
        )
    schemes = ("https", "http") if rules.allow_http else ("https",)
    if parsed.scheme not in schemes:
        _refuse(
            f"{rules.what} does not begin with {' or '.join(f'{s}://' for s in schemes)}.",
            parsed.scheme,
            f"Send a URL such as {rules.example}.",
        )
    if parsed.userinfo:
        _refuse(
            f"{rules.what} holds a user or a password.",
            "not shown, because it may be secret",
            rules.secrets,
        )
    _check_host(parsed, rules)
    return str(parsed)


def _check_host(url: httpx.URL, rules: Rules) -> None:
    host = url.raw_host.decode()
    literal = _literal(host)
    if literal is None and not _NAME.fullmatch(host):
        _refuse(
            f"{rules.what} has no valid host.",
            url.host,
            f"Send a URL such as {rules.example}.",
        )
    if url.port is not None and url.port not in _PORTS:
        _refuse(
            f"{rules.what} has a port that is none that web servers use.",
            url.port,
            "Use 443, 80, or one of 1024 to 65535.",
        )
    if _HERE.fullmatch(host) and not rules.allow_private:
        _refuse_private(host, rules)
    if literal is not None:
        _check_address(literal, host, rules)


def _literal(host: str) -> str | None:
    """The address that a host spells, in any way the system reads (127.1, 0x7f.1), else None."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return str(found[0][4][0])


def _check_address(address: str, host: str, rules: Rules) -> None:
    if not rules.allow_private and not _is_public(ipaddress.ip_address(address)):
        _refuse_private(host, rules)


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


def _refuse_private(host: str, rules: Rules) -> NoReturn:
    _refuse(
        f"{rules.what} leads to an address that is not public.",
        host,
        f"Send a URL that the internet can reach, or ask the operator for {rules.private_setting}.",
    )


def system_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, in the system's order of preference."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request goes.

    Attributes:
        url: of the client.
        address: of its host, that was checked.
    """

    url: httpx.URL
    address: str

    @property
    def target(self) -> httpx.URL:
        """The URL with the address as its host."""
        return self.url.copy_with(host=self.address)

    @property
    def headers(self) -> dict[str, str]:
        """That name the host of the URL."""
        return {"Host": self.url.netloc.decode()}

    @property
    def extensions(self) -> dict[str, str]:
        """TLS names and verifies the host of the URL, not the address."""
        return {"sni_hostname": self.url.raw_host.decode().rstrip(".")}


Attempt: TypeAlias = Callable[[Place, float], Awaitable[T]]
"""A request to a place, which may take so many seconds to connect."""


class Reach:
    """Connects to URLs of clients, at addresses that were checked.

    Args:
        rules: which URLs are taken.
        at_a_time: names that are resolved at a time.
        resolve: the addresses of a name. It runs in a thread.
    """

    def __init__(self, rules: Rules, at_a_time: int, resolve: Resolve) -> None:
        self._rules = rules
        self._resolve = resolve
        # Threads of its own: names that resolve slowly hold up nothing else in the process.
        self._threads = ThreadPoolExecutor(at_a_time, "names-of-clients")
        self._resolving = Counter[str]()

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def at(self, url: str, owner: str, timeout_s: float, attempt: Attempt[T]) -> T:
        """What an attempt gives at the first address of a URL that takes a connection.

        Args:
            url: as the client has it.
            owner: whose names are counted together.
            timeout_s: for connections, all together.
            attempt: gets an address, and the seconds that it may take to connect.

        Raises:
            InvalidParameter: nothing may go there.
            OSError: too many names of this owner are being resolved, or there is no such name.
        """
        parsed = httpx.URL(check_url(url, self._rules))
        host = parsed.raw_host.decode()
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        addresses = await self._addresses(host, port, owner)
        for address in addresses:
            _check_address(address, host, self._rules)
        # A host with a dead address among several is reached through another.
        *others, last = (Place(parsed, address) for address in addresses[:_MAX_ADDRESSES])
        connect_s = timeout_s / (len(others) + 1)
        for place in others:
            try:
                return await attempt(place, connect_s)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await attempt(last, connect_s)

    async def _addresses(self, host: str, port: int, owner: str) -> list[str]:
        """Resolve a name. An owner whose names resolve slowly keeps a few threads at most."""
        if self._resolving[owner] >= _NAMES_OF_OWNER:
            raise OSError("too many names of this key resolve slowly")
        self._resolving[owner] += 1
        found = self._threads.submit(self._resolve, host, port)
        # When the thread is free again, which may be long after this attempt was given up.
        found.add_done_callback(lambda _: self._resolving.subtract([owner]))
        return await asyncio.wrap_future(found)
