"""The hub's own client waits for ever; ours does not."""

from __future__ import annotations

import socket

import huggingface_hub
import pytest
from huggingface_hub import constants

from deployments.errors import SourceFailed
from deployments.settings import StoreSettings
from deployments.store import hub
from deployments.store.transfer import retrying


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        settings = StoreSettings(attempts=2, backoff_s=0)
        with pytest.raises(SourceFailed, match="failed 2 times"):
            retrying(lambda: hub.resolve_revision("org/model"), settings)
    huggingface_hub.close_session()
