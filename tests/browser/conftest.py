"""One application with the starter models, one Chromium, and pages that may not do anything odd."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright
from ray import serve
from ray.serve import RunTarget

from deployments.catalogue import load_registry
from deployments.settings import KeyLimits, Settings
from serve_app.access.editing import create_key
from serve_app.ingress import Ingress
from tests.serve.conftest import (
    address,
    cluster,
    grpc_port,
    local_config,
    models_root,
    network_reports,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext, Page

__all__ = [
    "address",
    "cluster",
    "grpc_port",
    "local_config",
    "models_root",
    "network_reports",
]
CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)
Visit = Any
"""`visit(url, allowed=(), **options)` opens a page. At the test's end it must have been quiet."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; make setup-browser")
    with sync_playwright() as tools:
        launched = tools.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield launched
        launched.close()


@dataclass
class Ears:
    """What a page says and asks for."""

    host: str
    allowed: tuple[str, ...]
    heard: list[str]

    def listen(self, context: BrowserContext) -> None:
        context.on("weberror", lambda error: self.heard.append(f"error: {error.error}"))
        context.on("console", lambda said: self._say(said.type, said.text))
        context.on("dialog", lambda dialog: (self.heard.append("a dialog"), dialog.dismiss()))
        context.on("request", lambda request: self._ask(request.url))

    def _say(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(words in text for words in self.allowed):
            self.heard.append(f"{kind}: {text}")

    def _ask(self, url: str) -> None:
        if url.startswith("http") and urlsplit(url).netloc != self.host:
            self.heard.append(f"request: {url}")


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    ears: list[Ears] = []
    with ExitStack() as open_pages:

        def go(url: str, allowed: tuple[str, ...] = (), **options: Any) -> Page:
            context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
            open_pages.callback(context.close)
            ears.append(Ears(urlsplit(url).netloc, allowed, []))
            ears[-1].listen(context)
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.goto(url)
            page.wait_for_selector("#tasks li")
            return page

        yield go
    assert [line for one in ears for line in one.heard] == []


@dataclass(frozen=True)
class Guarded:
    """The same models below a prefix, without jobs, for clients with a key."""

    url: str
    token: str
    key_id: str
    keys: Path


@pytest.fixture(scope="package")
def guarded(address: str, tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    key, token = create_key(keys, "a person", KeyLimits())
    settings = Settings()
    registry = load_registry(*settings.models)
    handles = {
        model.name: serve.get_deployment_handle(model.task.deployment, "imagen")
        for model in registry.values()
    }
    kind: Any = serve.deployment(Ingress)
    ingress = kind.options(
        name="Ingress",
        ray_actor_options={"num_cpus": 0},
        user_config={"access": {"keys": str(keys)}},
    )
    bound = ingress.bind(handles, registry, settings, {})
    serve.run_many([RunTarget(bound, "guarded", "/guarded")], wait_for_applications_running=True)
    return Guarded(f"{address}/guarded/", token, key.id, keys)
