"""What serves the playground, and what the reference tells it about fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from serve_app.jobs.options import JobOptions
from serve_app.page import PATH
from serve_app.protocols.native import request_body
from tests.unit.fakes import REGISTRY, app_of, chunks, raw, send

if TYPE_CHECKING:
    from deployments.registry import ModelSpec

FILES = Path("serve_app/playground")
HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def fields_of(task: str) -> dict[str, Any]:
    models = [model for model in REGISTRY.models if model.task == task]
    body = request_body(models, with_jobs=True)["requestBody"]["content"]["multipart/form-data"]
    return body["schema"]["properties"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("root", ["", "/below"])
async def test_a_browser_gets_the_page_at_the_root(method: str, root: str) -> None:
    sent = await raw(app_of(), f"{root}/", chunks([b""]), HTML, method=method, root_path=root)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert sent[0]["status"] == 200
    assert headers["content-type"].startswith("text/html")
    assert headers["etag"]
    assert headers["vary"] == "Accept"


async def test_without_its_slash_a_prefix_leads_to_the_page() -> None:
    [start, *_] = await raw(
        app_of(), "/below", chunks([b""]), HTML, method="GET", root_path="/below"
    )
    assert (start["status"], dict(start["headers"])[b"location"]) == (307, b"/below/")


@pytest.mark.parametrize("path", [PATH, f"{PATH}/"])
@pytest.mark.parametrize("root", ["", "/below"])
async def test_the_pages_own_path_leads_to_it(path: str, root: str) -> None:
    [start, *_] = await raw(
        app_of(), root + path, chunks([b""]), HTML, method="GET", root_path=root
    )
    assert start["status"] == 307
    assert dict(start["headers"])[b"location"] == f"{root}/".encode()


@pytest.mark.parametrize("file", sorted(FILES.glob("*.*")), ids=lambda file: file.name)
async def test_each_file_may_load_only_its_neighbours_and_is_not_sent_twice(file: Path) -> None:
    answer = await send(app_of(), "GET", f"{PATH}/{file.name}")
    assert answer.content == file.read_bytes()
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = {"if-none-match": answer.headers["etag"]}
    assert (await send(app_of(), "GET", f"{PATH}/{file.name}", headers=again)).status_code == 304


async def test_only_the_pages_files_are_served_and_docs_keep_their_own_policy() -> None:
    for path in ("../page.py", "%2e%2e/page.py", "/etc/passwd", "nothing.js", "samples"):
        assert (await send(app_of(), "GET", f"{PATH}/{path}")).status_code == 404
    assert "content-security-policy" not in (await send(app_of(), "GET", "/docs")).headers


def test_the_page_is_small_and_names_no_other_host() -> None:
    files = [file for file in FILES.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 150_000
    for file in files:
        hosts = set(re.findall(r"(?:https?:)?//([\w.-]+\.\w+)", file.read_text()))
        assert hosts <= {"www.w3.org"}, file  # the name of SVG
    page = (FILES / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", page)


def test_fields_say_whom_they_concern_what_they_are_and_what_their_values_mean() -> None:
    aged, background = fields_of("aged"), fields_of("background")
    hints = {
        name: field["x-imagen"] for name, field in (aged | background).items() if name != "image"
    }
    groups = {name: hint["group"] for name, hint in hints.items()}
    assert (groups["steps"], groups["strict"], groups["webhook"]) == ("task", "file", "job")
    roles = {hint["role"]: name for name, hint in hints.items() if "role" in hint}
    assert roles == {"seed": "seed", "count": "n", "preview": "preview"}
    assert hints["color"]["needs"] == {"output": "color"}
    assert hints["color"]["default"] == "#ffffff"
    assert "default" not in background["color"], "a form that sends it by default is refused"
    assert hints["background"]["needs"] == {"output": "rgba"}, "with another it is refused"
    assert "preview" not in background, "the model has no steps"
    assert set(hints["output"]["choices"]) == set(background["output"]["enum"])
    upscale = fields_of("upscale")
    assert upscale["width"]["x-imagen"]["choices"] == {"0": "by height or scale"}
    assert "choices" not in upscale["scale"]["x-imagen"]
    assert background["color"]["format"] == "color"


def test_fields_that_take_a_file_or_a_text_say_both() -> None:
    mask, background = fields_of("comic")["mask"], fields_of("background")["background"]
    binary = {"type": "string", "format": "binary"}
    assert mask["anyOf"] == [binary, {"type": "string", "enum": ["alpha"]}]
    assert binary.items() <= mask.items(), "/docs shows one control, which takes a file"
    assert mask["x-imagen"]["choices"]["alpha"].startswith("what is transparent")
    assert [one["format"] for one in background["anyOf"]] == ["color", "binary"]
    assert (mask["x-imagen"]["file"], background["x-imagen"]["file"]) == ("picture", "picture")


def test_what_is_said_of_a_mask_needs_one() -> None:
    fields = fields_of("comic")
    changes, feather = fields["mask_changes"], fields["mask_feather_px"]
    assert changes["x-imagen"]["needs"] == {"mask": fields["mask"]["x-imagen"]["file"]}
    assert feather["x-imagen"]["needs"] == {"mask": True}
    assert (changes["x-imagen"]["default"], feather["x-imagen"]["default"]) == ("white", 0)
    assert feather["default"] == 0, "or /docs fills in the largest one, which is refused"


def test_without_jobs_the_reference_has_neither_their_fields_nor_their_headers() -> None:
    described = request_body(REGISTRY.models[:1], with_jobs=False)
    assert described["parameters"] == []
    assert "webhook" not in str(described)


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
def test_with_jobs_the_reference_has_their_fields(spec: ModelSpec) -> None:
    needs = {"n": "seed", "preview": "steps"}
    unread = {name for name, other in needs.items() if other not in spec.parameters}
    of_job = JobOptions.model_fields.keys() - unread
    picture = {"image"} if spec.task.needs_picture else set[str]()
    assert fields_of(spec.task).keys() == {"model", *picture, *spec.parameters, *of_job}
    assert all(field["description"] for field in fields_of(spec.task).values())
