"""`/docs`, as a newcomer clicks through it; and the way there."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.serve.test_http import ROUTES, jpeg

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def prefilled(field: dict[str, Any]) -> str:
    """What Swagger UI puts into a form's field, as it was seen to do in a browser."""
    if examples := field.get("examples"):
        return str(examples[0])
    if "default" in field:
        return str(field["default"])
    field = field.get("anyOf", [field])[0]
    if "enum" in field:
        return field["enum"][0]
    if "pattern" in field:
        return "#1AFF80"  # by chance, of what the pattern allows
    return str(field.get("maximum", "string"))


@pytest.mark.parametrize("route", [*ROUTES.values(), "generate"])
def test_try_it_out_gives_a_picture_untouched(address: str, route: str) -> None:
    description = httpx.get(f"{address}/openapi.json", timeout=30).json()
    path = f"/api/v1/images/{route}"
    body = description["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]
    properties = body["schema"]["properties"]
    fields = {n: (None, prefilled(f)) for n, f in properties.items() if f.get("format") != "binary"}
    photo = {"image": ("photo.jpg", jpeg())} if "image" in properties else {}
    response = httpx.post(f"{address}{path}", files=fields | photo, timeout=120)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("image/")


@pytest.fixture
def page() -> Iterator[Any]:
    """An empty page of a browser."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def operations(page: Any, root: str) -> list[Any]:
    """What `/docs` of an application can try out without the id of a job."""
    page.goto(f"{root}/docs")
    page.wait_for_selector(".opblock")
    blocks = page.query_selector_all(".opblock")
    paths = [block.query_selector(".opblock-summary-path").inner_text() for block in blocks]
    return [block for block, path in zip(blocks, paths, strict=True) if "{" not in path]


def try_out(page: Any, block: Any, photo: Path) -> tuple[str, int]:
    """Which URL an operation asks, with what its form is filled with, and the answer's status."""
    block.query_selector(".opblock-summary-control").click()
    block.wait_for_selector(".try-out__btn").click()
    block.wait_for_selector(".execute")
    if chooser := block.query_selector("input[type=file]"):
        chooser.set_input_files(photo)
    with page.expect_response("**", timeout=120_000) as response:
        block.query_selector(".execute").click()
    block.query_selector(".opblock-summary-control").click()
    return response.value.url, response.value.status


def test_try_it_out_in_a_browser(page: Any, address: str, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg())
    answered = dict(try_out(page, block, photo) for block in operations(page, address))
    assert len(answered) == len(ROUTES) + 12
    # Probes, which say so when a model is away for a moment on a busy machine.
    for probe in ("readyz", "v2/health/ready"):
        assert answered.pop(f"{address}/{probe}") in (200, 503)
    # The example that Swagger UI makes up has a parameter that no model has.
    made_up = {f"{address}/v1/images/{name}" for name in ("generations", "edits")}
    assert answered == {url: 400 if url in made_up else 200 for url in answered}


def test_below_a_prefix_the_browser_asks_below_it(page: Any, scripted: str, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(jpeg())
    url, status = try_out(page, operations(page, scripted)[0], photo)
    assert url.startswith(f"{scripted}/api/v1/images/")
    assert status == 200


@pytest.mark.parametrize("prefix", ["address", "scripted"])
def test_whoever_asks_for_the_root_is_sent_to_the_reference(
    prefix: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(prefix)
    for url in (root, f"{root}/"):
        page = httpx.get(url, follow_redirects=True, timeout=30)
        assert str(page.url) == f"{root}/docs"
        assert "swagger-ui" in page.text


def test_below_a_prefix_the_models_tell_routes_that_are_there(cluster: str, scripted: str) -> None:
    models = httpx.get(f"{scripted}/api/v1/models", timeout=30).json()["models"]
    for model in models:
        url = f"{cluster}{model['route']}"
        assert url.startswith(scripted)
        form = {"image": jpeg()} if model["task"] in ROUTES else {"prompt": (None, "a star")}
        assert httpx.post(url, files=form, timeout=30).status_code == 200


def test_below_a_prefix_a_wrong_route_is_told_the_right_ones(scripted: str) -> None:
    problem = httpx.get(f"{scripted}/nowhere", timeout=30).json()
    assert "/scripted/api/v1/images/style/comic" in problem["remedy"]
