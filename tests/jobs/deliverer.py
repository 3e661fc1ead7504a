"""A process that delivers webhooks until it is killed: url, namespace, timeout_s."""

from __future__ import annotations

import asyncio
import sys

from deployments.settings import WebhookSettings
from serve_app.jobs.connection import connect
from serve_app.jobs.outbox import Outbox, deliver_forever
from serve_app.jobs.webhooks import Sender


async def main(url: str, namespace: str, timeout_s: float) -> None:
    settings = WebhookSettings(allow_http=True, allow_private=True, timeout_s=timeout_s)
    redis = connect(url)
    outbox = Outbox(lambda: redis, namespace, settings, lease_s=0)
    await deliver_forever(outbox, Sender(settings, b"master"))


asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
