"""Every test starts and ends without HTTP connections, and with the hub allowed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from deployments.store import web

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def fresh_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Tests of other folders switch the hub off, in this process.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    close_clients()
    yield
    close_clients()


def close_clients() -> None:
    if web._make_client.cache_info().currsize:
        web.client().close()
        web._make_client.cache_clear()
    gcs = sys.modules.get("deployments.store.gcs")  # slow to import
    if gcs and gcs._make_account.cache_info().currsize:
        gcs._account().client.close()
        gcs._make_account.cache_clear()
