"""Webhooks: which URLs are taken, and one delivery to a receiver that may be hostile.

A URL comes from a client, so that `serve_app/addresses.py` checks where it leads.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict
from standardwebhooks import Webhook

from deployments.errors import InvalidParameter
from serve_app.addresses import Place, Reach, Resolve, Rules, check_url, system_addresses

if TYPE_CHECKING:
    import ssl

    from deployments.settings import WebhookSettings

AT_A_TIME = 64
"""Deliveries of one process at a time."""


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
    return check_url(url, _rules(settings))


def _rules(settings: WebhookSettings) -> Rules:
    return Rules(
        what="The webhook",
        example="https://example.com/hook",
        secrets="Leave it out. Every event is signed; check the signature instead.",
        allow_http=settings.allow_http,
        allow_private=settings.allow_private,
        private_setting="webhooks.allow_private",
    )


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
        self._tls = tls or httpx.create_ssl_context()
        self._reach = Reach(_rules(settings), AT_A_TIME, resolve)

    def close(self) -> None:
        """Let the threads go."""
        self._reach.close()

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
        return await self._reach.at(
            event.url, event.owner, self._settings.timeout_s, partial(self._post_to, event)
        )

    async def _post_to(self, event: Event, place: Place, connect_s: float) -> int:
        now = datetime.now(UTC)
        signature = Webhook(webhook_secret(self._master, event.owner))
        headers = {
            **place.headers,
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
                place.target,
                content=event.body.encode(),
                headers=headers,
                extensions=place.extensions,
            ) as response,
        ):
            # The status is the whole answer. The body is not read, whatever its size.
            return response.status_code
