"""Pictures that clients name by address: fetched for them, within limits, from public hosts."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import httpx

from deployments.errors import Full, InvalidParameter, TooLarge
from serve_app.addresses import Place, Reach, Resolve, Rules, system_addresses

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from deployments.settings import FetchSettings

_NAMES = 64
"""That are resolved at a time in one process."""
_AT_A_TIME, _OF_OWNER = 32, 8
"""Pictures that are fetched at a time, in all and for one key: each takes an upload's place."""
_MOST_REDIRECTS = 3


class Fetcher:
    """Fetches pictures. It keeps nothing between them, connections and cookies included.

    Args:
        settings: what is allowed, and how long it may take.
        max_bytes: of a picture.
        resolve: the addresses of a name. It runs in a thread.
        tls: verifies hosts; None takes the certificates that httpx takes.
    """

    def __init__(
        self,
        settings: FetchSettings,
        max_bytes: int,
        *,
        resolve: Resolve = system_addresses,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout_s = settings.timeout_s
        self._max_bytes = max_bytes
        self._tls = tls or httpx.create_ssl_context()
        rules = Rules(
            what="The picture's address",
            example="https://example.com/photo.jpg",
            secrets="Send the picture itself, or an address that is signed.",
            allow_http=settings.allow_http,
            allow_private=settings.allow_private,
            private_setting="fetch.allow_private",
        )
        self._reach = Reach(rules, _NAMES, resolve)
        self._fetching = Counter[str]()

    async def fetch(self, url: str, owner: str, hold: Callable[[int], None]) -> bytes:
        """What lies at a URL, behind a few redirects, each of which is checked like the URL.

        Args:
            url: of the client.
            owner: whose names are counted together.
            hold: called with the bytes that have come; may raise Full.

        Raises:
            InvalidParameter: nothing may be fetched there, or nothing came.
            TooLarge: it is larger than a body may be.
            Full: too many are being fetched.
        """
        if self._fetching[owner] >= _OF_OWNER or self._fetching.total() >= _AT_A_TIME:
            raise Full(
                "Too many pictures are being fetched.",
                value=f"{self._fetching[owner]} for this key, {self._fetching.total()} in all",
                remedy="Try again, or send the picture itself.",
                retry_after_s=1,
            )
        self._fetching[owner] += 1
        try:
            return await self._fetched(url, owner, hold)
        finally:
            self._fetching[owner] -= 1
            self._fetching += Counter()  # forgets owners without any

    async def _fetched(self, url: str, owner: str, hold: Callable[[int], None]) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                for _ in range(_MOST_REDIRECTS + 1):
                    attempt = partial(self._get, hold)
                    found = await self._reach.at(url, owner, self._timeout_s, attempt)
                    if isinstance(found, bytes):
                        return found
                    url = found
        except TimeoutError as error:
            raise _failed(f"nothing whole within {self._timeout_s:g} s") from error
        # What the library says may name an address inside our network.
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise _failed("no connection, or one that broke") from error
        raise _failed(f"more than {_MOST_REDIRECTS} redirects")

    async def _get(
        self, hold: Callable[[int], None], place: Place, connect_s: float
    ) -> bytes | str:
        """The bytes, or the URL that the answer leads on to."""
        headers = place.headers | {"User-Agent": "imagen", "Accept-Encoding": "identity"}
        timeout = httpx.Timeout(self._timeout_s, connect=connect_s)
        async with (
            httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=timeout) as client,
            client.stream(
                "GET", place.target, headers=headers, extensions=place.extensions
            ) as response,
        ):
            if response.has_redirect_location:
                return str(place.url.join(response.headers["location"]))
            if response.status_code != 200:
                raise _failed(f"status {response.status_code}")
            return await self._read(response, hold)

    async def _read(self, response: httpx.Response, hold: Callable[[int], None]) -> bytes:
        data = bytearray()
        # As they come: what is packed would be no picture, and might unpack to anything.
        async for some in response.aiter_raw():
            hold(len(some))
            data += some
            if len(data) > self._max_bytes:
                raise TooLarge(
                    f"The picture at the address may have at most {self._max_bytes} bytes.",
                    value=f"more than {self._max_bytes} bytes",
                    remedy="Name a smaller picture, or one in a compressed format.",
                )
        return bytes(data)


def _failed(what: str) -> InvalidParameter:
    return InvalidParameter(
        "The picture could not be fetched from its address.",
        value=what,
        remedy="Check that anyone can open the address, or send the picture itself.",
    )
