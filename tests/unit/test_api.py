"""The HTTP API as its clients see it, with models that do as they are told."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import struct
import zlib
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.openapi.models import OpenAPI
from PIL import Image

from deployments import errors
from deployments.catalogue import Registry
from deployments.contract import complete, parse
from deployments.errors import ImagenError, Problem, RequestError, ServiceError
from deployments.notes import Code, note
from deployments.settings import ClientSettings
from deployments.tasks import Task
from serve_app.api import create_app
from serve_app.intake import Call, Details, Intake
from serve_app.jobs.queue import JobQueue
from serve_app.protocols import native, openai
from tests.unit.fakes import (
    OPEN_TO_ALL,
    REGISTRY,
    SERVED,
    FakeBackends,
    app_of,
    chunks,
    picture_file,
    post,
    raw,
    result_of,
    send,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from starlette.types import Message

    from serve_app.intake import State

# As `images` sets on import; pytest puts its own filters before it.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

COMIC = Task.COMIC.route
JOB_ROUTES = {
    f"/api/v1/jobs{rest}"
    for rest in (
        "",
        *(f"/{{job_id}}{end}" for end in ("", "/retry", "/result", "/results/{k}", "/events")),
    )
} | {"/files/{path}", "/api/v1/webhook-secret"}
OPENAI_ROUTES = {*openai.IMAGE_ROUTES, "/v1/models", "/v1/models/{name}"}
ROUTES = {*(task.route for task in REGISTRY), "/api/v1/models", "/healthz", "/readyz"}
KSERVE_MODEL = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
KSERVE_ROUTES = {
    *("/v2", "/v2/health/live", "/v2/health/ready"),
    *(f"{model}{below}" for model in KSERVE_MODEL for below in ("", "/ready", "/infer")),
}
ROUTES |= JOB_ROUTES | OPENAI_ROUTES | KSERVE_ROUTES
IMG2IMG_TASKS = (Task.ENHANCE, Task.COMIC, Task.AGED)
PHOTO = picture_file()
MASK = picture_file(mode="L")
BELOW_FILES = ("/playground/", "/docs/static/")
MULTIPART = {"content-type": "multipart/form-data; boundary=cut"}
OPEN_PART = b'--cut\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
LEAKS = ("Traceback", "/work", "/home", "/usr", ".py", "ZeroDivisionError", "0x")


def refused(response: httpx.Response, status: int, backends: FakeBackends | None = None) -> Any:
    """The problem in a response, held to what every problem promises."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert not any(leak in response.text for leak in LEAKS)
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"] == f"urn:imagen:problem:{problem['code']}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["value"]
    for sentence in ("fact", "remedy", "detail"):
        assert re.fullmatch(r"\S.*[^.\s]\.", problem[sentence], re.DOTALL), problem[sentence]
        assert ". (" not in problem[sentence]
    if backends is not None:
        assert backends.jobs == []
    return problem


@cache
def png_of(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, packed as tight as a bomb."""
    packer = zlib.compressobj(9)
    row = bytes((width + 7) // 8 + 1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


# Pictures


@pytest.mark.parametrize("task", SERVED)
async def test_every_route_answers_with_a_picture_and_what_happened(task: Task) -> None:
    response = await post(app_of(), task.route, PHOTO, headers={"X-Request-Id": "mine-1"})
    assert response.status_code == 200
    assert response.content == PHOTO
    assert response.headers["content-type"] == "image/png"
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    assert response.headers["x-imagen-model"] == f"{task}-starter@0123abcd"
    assert response.headers["x-imagen-seed"] == "7"
    assert response.headers["x-imagen-batch-size"] == "3"
    assert response.headers["x-imagen-gpu-seconds"] == "0.2500"
    assert response.headers["x-imagen-size"] == "24x16"
    assert response.headers["server-timing"] == "decode;dur=1.0, denoise;dur=1500.0"
    assert response.headers["vary"] == "Accept"


@pytest.mark.parametrize("task", SERVED)
async def test_a_picture_may_come_and_go_as_base64_in_json(task: Task) -> None:
    backends = FakeBackends()
    body = {"image": base64.b64encode(PHOTO).decode(), "metadata": "none"}
    headers = {"Accept": "application/json"}
    answer = await send(app_of(backends), "POST", task.route, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert backends.jobs[0].image == PHOTO
    assert backends.jobs[0].request.metadata == "none"
    found = answer.json()
    assert base64.b64decode(found["image"]) == PHOTO
    assert (found["seed"], found["model"]) == (7, f"{task}-starter@0123abcd")
    # Clients that take anything, as most do by default, get the picture itself.
    for accept in ("*/*", "application/json, text/plain, */*", "application/json;q=0, image/png"):
        headers = {"Accept": accept}
        answer = await send(app_of(backends), "POST", task.route, json=body, headers=headers)
        assert answer.headers["content-type"] == "image/png", accept


@pytest.mark.parametrize("task", SERVED)
async def test_the_model_gets_the_very_bytes_that_were_sent(task: Task) -> None:
    backends = FakeBackends()
    await post(app_of(backends, timeout_s=60), task.route, PHOTO)
    [job] = backends.jobs
    assert job.image == PHOTO
    assert job.request == task.request()
    assert job.request.model_fields_set == set()
    assert 50 < job.timeout_s <= 60


async def test_the_model_gets_the_parameters_that_were_sent() -> None:
    backends = FakeBackends()
    data = {"prompt": "Ein Fuchs, 狐 🦊", "steps": "20", "strength": "0.25", "seed": "4294967295"}
    assert (await post(app_of(backends), COMIC, PHOTO, data=data)).status_code == 200
    assert backends.jobs[0].request.model_dump(exclude_unset=True) == {
        "prompt": "Ein Fuchs, 狐 🦊",
        "steps": 20,
        "strength": 0.25,
        "seed": 2**32 - 1,
    }


async def test_pictures_sent_at_once_are_not_mixed_up() -> None:
    app = app_of(FakeBackends(delay_s=0.01))
    sent = [picture_file(width=width) for width in range(8, 28)]
    tasks = [SERVED[n % 5] for n in range(len(sent))]
    answers = await asyncio.gather(
        *(post(app, task.route, image) for task, image in zip(tasks, sent, strict=True))
    )
    assert [answer.content for answer in answers] == sent
    models = [answer.headers["x-imagen-model"] for answer in answers]
    assert models == [f"{task}-starter@0123abcd" for task in tasks]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(sent)


@pytest.mark.parametrize(
    ("accept", "data", "expected"),
    [
        ("*/*", {}, "png"),
        ("image/webp", {}, "webp"),
        ("image/png;q=0.5, image/jpeg", {}, "jpeg"),
        ("image/webp", {"output_format": "jpeg"}, "jpeg"),
        ("text/html", {"output_format": "webp"}, "webp"),
    ],
)
async def test_the_result_has_the_format_the_client_wants(
    accept: str, data: dict[str, str], expected: str
) -> None:
    backends = FakeBackends()
    headers = {"Accept": accept}
    response = await post(app_of(backends), COMIC, PHOTO, data=data, headers=headers)
    assert response.headers["content-type"] == f"image/{expected}"
    assert backends.jobs[0].output_format == expected


async def test_an_accept_header_in_several_lines_is_read_as_one() -> None:
    headers = [("Accept", "application/json"), ("Accept", "image/webp")]
    response = await post(app_of(), COMIC, PHOTO, headers=headers)
    assert response.headers["content-type"] == "image/webp"


async def test_a_format_nobody_has_is_refused() -> None:
    backends = FakeBackends()
    response = await post(app_of(backends), COMIC, PHOTO, headers={"Accept": "text/html"})
    assert refused(response, 406, backends)["value"] == "text/html"


async def test_a_cut_out_is_never_sent_as_jpeg() -> None:
    backends = FakeBackends()
    app, path = app_of(backends), Task.BACKGROUND.route
    refused(await post(app, path, PHOTO, headers={"Accept": "image/jpeg"}), 406, backends)
    refused(await post(app, path, PHOTO, data={"output_format": "jpeg"}), 422, backends)
    mask = await post(app, path, PHOTO, data={"output": "mask"}, headers={"Accept": "image/jpeg"})
    assert mask.headers["content-type"] == "image/jpeg"


async def test_a_transparent_picture_may_become_a_jpeg_where_the_client_takes_nothing_else() -> (
    None
):
    headers = {"Accept": "image/jpeg"}
    response = await post(app_of(), COMIC, picture_file(mode="RGBA"), headers=headers)
    assert response.headers["content-type"] == "image/jpeg"


async def test_a_background_picture_reaches_the_model() -> None:
    backends, beach = FakeBackends(), picture_file(30, 20)
    app, path = app_of(backends), Task.BACKGROUND.route
    files = {"image": PHOTO, "background": ("beach.png", beach)}
    response = await send(app, "POST", path, files=files, headers={"Accept": "image/jpeg"})
    assert response.headers["content-type"] == "image/jpeg", "because it is opaque"
    (job,) = backends.jobs
    assert (job.background, job.background_px, job.image) == (beach, 600, PHOTO)


async def test_a_background_that_does_not_fit_is_refused() -> None:
    backends, beach = FakeBackends(), picture_file(30, 20)
    app, path = app_of(backends, max_input_px=500), Task.BACKGROUND.route
    files = {"image": PHOTO, "background": ("beach.png", beach)}
    refused(await send(app, "POST", path, files=files), 413, backends)
    refused(await send(app, "POST", COMIC, files=files), 422, backends)
    files["background"] = ("beach.png", b"no picture")
    refused(await send(app, "POST", path, files=files), 415, backends)
    refused(await post(app, path, PHOTO, data={"background": "picture"}), 400, backends)


@pytest.mark.parametrize("path", [Task.ENHANCE.route, COMIC, Task.AGED.route])
async def test_a_mask_reaches_the_model(path: str) -> None:
    backends, mask = FakeBackends(), picture_file(mode="L")
    files = {"image": PHOTO, "mask": ("mask.png", mask)}
    data = {"mask_feather_px": "4"}
    assert (await send(app_of(backends), "POST", path, files=files, data=data)).status_code == 200
    (job,) = backends.jobs
    request: Any = job.request
    assert (job.image, job.mask, request.mask) == (PHOTO, mask, "picture")
    assert (request.mask_changes, request.mask_feather_px) == ("white", 4)


async def test_a_mask_that_does_not_fit_is_refused() -> None:
    backends = FakeBackends()
    app = app_of(backends, max_input_px=500)

    async def ask(mask: bytes, path: str = COMIC, **data: str) -> httpx.Response:
        files = {"image": PHOTO, "mask": ("mask.png", mask)}
        return await send(app, "POST", path, files=files, data=data)

    other = await ask(picture_file(12, 8))
    refused(other, 422, backends)
    assert other.json()["value"] == "12 x 8 px for a picture of 24 x 16 px"
    refused(await ask(picture_file(40, 20)), 413, backends)
    refused(await ask(b"no picture"), 415, backends)
    refused(await ask(b""), 400, backends)
    refused(await ask(PHOTO, Task.UPSCALE.route), 422, backends)
    refused(await ask(PHOTO, mask_feather_px="129"), 422, backends)
    refused(await post(app, COMIC, PHOTO, data={"mask": "picture"}), 400, backends)
    refused(await post(app, COMIC, PHOTO, data={"mask": "beta"}), 422, backends)
    refused(await post(app, COMIC, PHOTO, data={"mask_feather_px": "4"}), 422, backends)
    clear = {"mask_changes": "transparent"}
    refused(await post(app, COMIC, PHOTO, data=clear), 422, backends)
    refused(await post(app, COMIC, PHOTO, data={**clear, "mask": "alpha"}), 422, backends)


async def test_a_mask_and_a_background_may_be_base64_in_json() -> None:
    backends = FakeBackends()
    app = app_of(backends)
    image, other = (base64.b64encode(file).decode() for file in (PHOTO, MASK))
    url = f"data:image/png;base64,{other}"
    for path, name in ((COMIC, "mask"), (Task.BACKGROUND.route, "background")):
        for sent in (other, url):
            answer = await send(app, "POST", path, json={"image": image, name: sent})
            assert answer.status_code == 200, answer.text
            job = backends.jobs.pop()
            assert getattr(job, name) == MASK
            assert getattr(job.request, name) == "picture"
        for wrong in (f"{other}?", "https://example.com/mask.png"):
            refused(
                await send(app, "POST", path, json={"image": image, name: wrong}), 422, backends
            )
    body = {"image": image, "background": "lightgoldenrodyellow"}
    assert (await send(app, "POST", Task.BACKGROUND.route, json=body)).status_code == 200
    assert (
        await send(app, "POST", COMIC, json={"image": image, "mask": "alpha"})
    ).status_code == 200
    asked: list[Any] = [job.request for job in backends.jobs]
    assert (asked[0].background, asked[1].mask) == ("#fafad2", "alpha")


async def test_the_pixels_of_a_mask_are_charged() -> None:
    charged: list[int] = []

    async def charge(pixels: int) -> None:
        charged.append(pixels)

    intake = Intake(FakeBackends(), REGISTRY, ClientSettings())
    for mask, fields in ((None, {}), (MASK, {"mask": "picture"})):
        await intake.check(Call(Task.COMIC, fields, PHOTO, mask=mask, charge=charge))
    assert charged == [24 * 16, 2 * 24 * 16]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
async def test_every_kind_of_picture_is_taken(kind: str) -> None:
    backends = FakeBackends()
    image = picture_file(kind=kind)
    assert (await post(app_of(backends), COMIC, image)).status_code == 200
    assert backends.jobs[0].image == image


async def test_a_result_without_chance_has_no_seed_and_notes_are_told() -> None:
    backends = FakeBackends()
    await post(app_of(backends), COMIC, PHOTO)
    notes = (note(Code.FRAMES_DROPPED, "The first of 12 frames was used."),)
    backends.result = result_of(backends.jobs[0], "comic-starter", seed=None, notes=notes)
    response = await post(app_of(backends), COMIC, PHOTO)
    assert "x-imagen-seed" not in response.headers
    assert response.headers["x-imagen-note"] == "frames_dropped: The first of 12 frames was used."


async def test_a_polyglot_is_passed_on_as_the_picture_it_is() -> None:
    payload = b"<html><script>alert(1)</script></html>"
    backends = FakeBackends()
    response = await post(app_of(backends), COMIC, picture_file(kind="GIF") + payload)
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"


# Bad input. Whatever is refused here never reaches a model.


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        (b"", 400, "malformed_request"),
        (PHOTO[:30], 400, "damaged_image"),
        (picture_file(kind="JPEG")[:40], 400, "damaged_image"),
        (b"%PDF-1.7 and so on", 415, "unsupported_media"),
        (b"<html><script>alert(1)</script></html>" + PHOTO, 415, "unsupported_media"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", 400, "damaged_image"),
        (b"\0" * 1000, 415, "unsupported_media"),
    ],
)
@pytest.mark.parametrize("task", SERVED)
async def test_what_is_no_sound_picture_is_refused(
    task: Task, image: bytes, status: int, code: str
) -> None:
    backends = FakeBackends()
    problem = refused(await post(app_of(backends), task.route, image), status, backends)
    assert problem["code"] == code


@pytest.mark.parametrize(("path", "name"), [(COMIC, "mask"), (Task.BACKGROUND.route, "background")])
async def test_an_error_says_which_of_the_files_is_damaged(path: str, name: str) -> None:
    files = {"image": PHOTO, name: (f"{name}.png", PHOTO[:30])}
    backends = FakeBackends()
    problem = refused(await send(app_of(backends), "POST", path, files=files), 400, backends)
    assert problem["detail"].startswith(f"Of the {name}: The PNG file is damaged")


@pytest.mark.parametrize("task", SERVED)
async def test_a_decompression_bomb_is_refused(task: Task) -> None:
    bomb = png_of(30_000, 30_000)
    assert len(bomb) < 130_000
    backends = FakeBackends()
    problem = refused(await post(app_of(backends), task.route, bomb), 413, backends)
    assert problem["value"] == "30000 x 30000 = 900.0 MP"


@pytest.mark.parametrize(
    ("size", "fields", "value", "remedy"),
    [
        ((65, 64), {}, "260 x 256 = 66560 px", "scale=3 at most, or width=258 at most"),
        ((120, 128), {"scale": "3"}, "360 x 384 = 138240 px", "scale=2 at most, or width=247"),
        ((200, 200), {"scale": "2"}, "400 x 400 = 160000 px", "Send width=256 at most"),
        ((65, 64), {"width": "260"}, "260 x 256 = 66560 px", "gives 258 x 254 px"),
        ((300, 300), {"scale": "2"}, "600 x 600 = 360000 px", "a picture of at most 256 x 256 px"),
    ],
)
async def test_an_upscale_beyond_the_largest_result_is_refused_with_what_fits(
    size: tuple[int, int], fields: dict[str, str], value: str, remedy: str
) -> None:
    backends, limit_px = FakeBackends(), 256 * 256
    app = app_of(backends, max_output_px=limit_px)
    response = await post(app, Task.UPSCALE.route, png_of(*size), data=fields)
    problem = refused(response, 413, backends)
    assert problem["value"] == value
    assert remedy in problem["remedy"]
    for name, most in re.findall(r"(scale|width)=(\d+)", problem["remedy"]):
        found = await post(app, Task.UPSCALE.route, png_of(*size), data={name: most})
        assert found.status_code == 200
        above = {name: str(int(most) + 1)}
        response = await post(app, Task.UPSCALE.route, png_of(*size), data=above)
        assert response.status_code == 413


async def test_a_model_that_sees_all_of_a_picture_at_once_takes_no_larger_one() -> None:
    backends = FakeBackends()
    spec = REGISTRY[Task.UPSCALE].model_copy(update={"max_picture_px": 64 * 64})
    app = create_app(backends, Registry([spec], {}), ClientSettings(access=OPEN_TO_ALL))
    for fields in ({}, {"scale": "2"}):
        response = await post(app, Task.UPSCALE.route, png_of(80, 60), data=fields)
        problem = refused(response, 413, backends)
        assert problem["value"] == "80 x 60 = 4800 px"
        assert problem["remedy"] == "Send a picture of at most 73 x 55 px."
    assert (await post(app, Task.UPSCALE.route, png_of(73, 55))).status_code == 200


async def test_full_detail_of_too_large_a_picture_is_refused_if_it_was_asked_for() -> None:
    backends, photo = FakeBackends(), png_of(9000, 5000)
    for task in (Task.ENHANCE, Task.COMIC, Task.AGED):
        response = await post(app_of(backends), task.route, photo, data={"detail": "full"})
        problem = refused(response, 413, backends)
        assert "the picture takes more than 128 tiles" in problem["fact"]
        assert "detail=working, or a picture of at most" in problem["remedy"]
        for data in ({"detail": "working"}, {}):
            assert (await post(app_of(), task.route, photo, data=data)).status_code == 200


async def test_the_largest_result_concerns_upscaling_only() -> None:
    app = app_of(max_output_px=64 * 64)
    for task in set(SERVED) - {Task.UPSCALE}:
        assert (await post(app, task.route, png_of(100, 100))).status_code == 200


async def test_a_phone_photo_is_welcome_everywhere_and_upscaled_twice() -> None:
    app, photo = app_of(), png_of(4000, 3000)
    for task in set(SERVED) - {Task.UPSCALE}:
        assert (await post(app, task.route, photo)).status_code == 200
    problem = refused(await post(app, Task.UPSCALE.route, photo), 413)
    assert "scale=2 at most" in problem["remedy"]
    twice = await post(app, Task.UPSCALE.route, photo, data={"scale": "2"})
    assert twice.status_code == 200


async def test_a_side_the_wanted_format_cannot_hold_is_refused_before_any_work() -> None:
    backends = FakeBackends()
    data, strip = {"output_format": "webp"}, png_of(4096, 1)
    response = await post(app_of(backends), Task.UPSCALE.route, strip, data=data)
    assert "webp holds at most 16383 px" in refused(response, 422, backends)["fact"]


@pytest.mark.parametrize(
    ("task", "data", "named"),
    [
        (Task.COMIC, {"steps": "151"}, "steps"),
        (Task.COMIC, {"strength": "nan"}, "strength"),
        (Task.AGED, {"guidance_scale": "inf"}, "guidance_scale"),
        (Task.ENHANCE, {"prompt": "x" * 10_000}, "prompt"),
        (Task.ENHANCE, {"prompt": "bell\x07"}, "prompt"),
        (Task.UPSCALE, {"noise_level": "351"}, "noise_level"),
        (Task.UPSCALE, {"strength": "0.5"}, "strength"),
        (Task.BACKGROUND, {"output": "alpha"}, "output"),
        (Task.BACKGROUND, {"color": "reddish"}, "color"),
        (Task.COMIC, {"stepps": "20"}, "stepps"),
        (Task.COMIC, {"steps": "9", "strength": "0.1"}, "request"),
    ],
)
async def test_a_wrong_parameter_is_refused_by_name(
    task: Task, data: dict[str, str], named: str
) -> None:
    backends = FakeBackends()
    response = await post(app_of(backends), task.route, PHOTO, data=data)
    assert [p["parameter"] for p in refused(response, 422, backends)["errors"]] == [named]


async def test_lone_surrogates_in_a_prompt_are_refused() -> None:
    text = b'\r\n--cut\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xed\xa0\x80'
    body = OPEN_PART + PHOTO + text + b"\r\n--cut--\r\n"
    backends = FakeBackends()
    response = await send(app_of(backends), "POST", COMIC, content=body, headers=MULTIPART)
    assert "prompt" in refused(response, 422, backends)["fact"]


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-type": "application/json"}, b'{"image": "..."}', 422),
        ({"content-type": "application/json"}, b'{"image": "', 400),
        ({"content-type": "text/plain"}, b'{"image": "..."}', 415),
        ({"content-type": "image/png"}, PHOTO, 415),
        ({}, PHOTO, 415),
        ({}, b"", 415),
        ({"content-type": "multipart/form-data"}, OPEN_PART, 400),
        ({"content-type": "multipart/form-data; boundary=" + "x" * 999}, OPEN_PART, 400),
        (MULTIPART, b"", 400),
        (MULTIPART, OPEN_PART + PHOTO, 400),
        (MULTIPART, b"--cat" + OPEN_PART[5:] + PHOTO + b"\r\n--cat--\r\n", 400),
        (MULTIPART, b"--cut--\r\n", 400),
        (MULTIPART, b"\xff" * 1000, 400),
    ],
)
async def test_a_body_that_is_no_form_is_refused(
    headers: dict[str, str], content: bytes, status: int
) -> None:
    backends = FakeBackends()
    response = await send(app_of(backends), "POST", COMIC, content=content, headers=headers)
    refused(response, status, backends)


async def test_the_picture_in_a_field_of_another_name_is_explained() -> None:
    files = {"photo": ("photo.png", PHOTO)}
    backends = FakeBackends()
    response = await send(app_of(backends), "POST", COMIC, files=files)
    problem = refused(response, 400, backends)
    assert problem["value"] == "photo"
    assert "-F image=@photo.jpg" in problem["remedy"]


async def test_a_declared_body_beyond_the_limit_is_refused() -> None:
    backends = FakeBackends()
    problem = refused(
        await post(app_of(backends, max_body_bytes=1024), COMIC, bytes(2048)), 413, backends
    )
    assert "1024 bytes" in problem["fact"]


async def test_a_streamed_body_beyond_the_limit_is_refused() -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield OPEN_PART
        for _ in range(4):
            yield bytes(512)

    backends = FakeBackends()
    app = app_of(backends, max_body_bytes=1024)
    response = await send(app, "POST", COMIC, content=stream(), headers=MULTIPART)
    refused(response, 413, backends)


async def test_a_client_that_leaves_while_it_sends_makes_no_noise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backends = FakeBackends()

    async def leaving() -> AsyncIterator[Message]:
        yield {"type": "http.request", "body": OPEN_PART, "more_body": True}
        while True:
            yield {"type": "http.disconnect"}

    with caplog.at_level(logging.WARNING):
        await raw(app_of(backends), COMIC, leaving(), MULTIPART)
    assert backends.jobs == []
    assert caplog.records == []


# Models that fail


SERVICE_ERRORS = ServiceError.__subclasses__()


@pytest.mark.parametrize("kind", SERVICE_ERRORS)
async def test_a_models_own_error_is_told_as_it_is(kind: type[ImagenError]) -> None:
    error = kind("The fact.", value="42", remedy="The remedy.", retry_after_s=2.5)
    response = await post(app_of(FakeBackends(error=error)), COMIC, PHOTO)
    problem = refused(response, kind.status)
    assert problem["code"] == kind.code
    assert (problem["fact"], problem["value"], problem["remedy"]) == (
        "The fact.",
        "42",
        "The remedy.",
    )
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("kind", SERVICE_ERRORS)
async def test_a_client_who_may_try_again_is_always_told_when(kind: type[ImagenError]) -> None:
    error = kind("The fact.", value="42", remedy="Try again.")
    response = await post(app_of(FakeBackends(error=error)), COMIC, PHOTO)
    refused(response, kind.status)
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("kind", RequestError.__subclasses__())
async def test_what_a_model_refuses_is_the_clients_error(kind: type[ImagenError]) -> None:
    finding = Problem(parameter="steps", fact="wrong", value="3", remedy="Another.")
    error = kind("The fact.", value="3", remedy="The remedy.", problems=(finding,))
    response = await post(app_of(FakeBackends(error=error)), COMIC, PHOTO)
    assert refused(response, kind.status)["errors"] == [finding]
    assert "retry-after" not in response.headers


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero in /home/imagen/deployments/engine/engine.py"),
        RuntimeError('Traceback (most recent call last):\n  File "/srv/app/x.py", line 1'),
        KeyError("/usr/lib/python3"),
        ExceptionGroup("several", [ValueError("/home/a.py"), OSError("/home/b.py")]),
    ],
)
async def test_an_unforeseen_error_is_told_without_its_insides(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    response = await post(app_of(FakeBackends(error=error)), COMIC, PHOTO)
    problem = refused(response, 503)
    assert response.headers["retry-after"] == "5"
    assert problem["request_id"] in caplog.text
    assert type(error).__name__ in caplog.text


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        ("ready", 504, "too_late"),
        ("starting", 503, "not_ready"),
        ("idle", 503, "not_ready"),
        ("failed", 503, "not_ready"),
    ],
)
async def test_a_missed_deadline_is_explained_by_the_models_state(
    state: State, status: int, code: str
) -> None:
    backends = FakeBackends(delay_s=30, state="ready", other_states={"comic-starter": state})
    response = await post(app_of(backends, timeout_s=0.05), COMIC, PHOTO)
    problem = refused(response, status)
    assert problem["code"] == code
    assert int(response.headers["retry-after"]) > 0
    if state != "ready":
        assert state in problem["fact"]


async def test_a_missed_deadline_stops_the_work() -> None:
    stopped = asyncio.Event()

    class Watched(FakeBackends):
        def __getitem__(self, name: str) -> Any:
            async def backend(job: Any) -> None:
                try:
                    await asyncio.sleep(30)
                finally:
                    stopped.set()

            return backend

    await post(app_of(Watched(), timeout_s=0.5), COMIC, PHOTO)
    assert stopped.is_set()


async def test_an_upload_that_never_ends_is_the_clients_fault() -> None:
    async def trickle() -> AsyncIterator[Message]:
        head = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
        yield {"type": "http.request", "body": head, "more_body": True}
        while True:
            await asyncio.sleep(0.01)
            yield {"type": "http.request", "body": b"-", "more_body": True}

    async with asyncio.timeout(30):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        app = app_of(timeout_s=0.1)
        answer: list[Message] = []
        task = asyncio.create_task(raw(app, COMIC, trickle(), headers, answer.append))
        while len(answer) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
    assert answer[0]["status"] == 408
    assert json.loads(answer[1]["body"])["code"] == "slow_upload"


async def test_what_the_model_does_not_read_is_passed_on_for_its_note() -> None:
    backends = FakeBackends()
    response = await post(app_of(backends), Task.UPSCALE.route, PHOTO, data={"prompt": "a"})
    assert response.status_code == 200
    assert backends.jobs[0].request.model_dump(exclude_unset=True) == {"prompt": "a"}


async def test_a_strict_request_is_refused_even_when_its_model_is_not_ready() -> None:
    backends = FakeBackends(error=errors.NotReady("Starting."))
    data = {"prompt": "a", "strict": "true"}
    response = await post(app_of(backends), Task.UPSCALE.route, PHOTO, data=data)
    assert "prompt" in refused(response, 422)["fact"]
    assert backends.jobs == []


async def test_parameters_behind_the_question_mark_are_refused() -> None:
    backends = FakeBackends()
    response = await post(app_of(backends), f"{COMIC}?steps=5", PHOTO)
    assert "steps=5" in refused(response, 422)["value"]
    assert backends.jobs == []


# Other routes


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/api/v1/images",
        "/api/v1/images/sharpen",
        "/docs/static/x",
        "/docs/static/%00",
        "/playground/nope",
        "/playground/v1/models",
        "/a%0Ab",
    ],
)
async def test_an_unknown_route_is_refused_with_the_known_ones(method: str, path: str) -> None:
    if method != "GET" and path.startswith(BELOW_FILES):
        return
    problem = refused(await send(app_of(), method, path), 404)
    routes = ", ".join(task.route for task in REGISTRY)
    assert problem["remedy"] == f"Image routes: {routes}."


@pytest.mark.parametrize("path", [*(task.route for task in SERVED), "/healthz"])
async def test_a_slash_too_many_is_an_unknown_route(path: str) -> None:
    refused(await send(app_of(), "POST", path + "/"), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMIC, "POST"),
        ("PUT", Task.UPSCALE.route, "POST"),
        ("POST", "/healthz", "GET, HEAD"),
        ("PUT", "/api/v1/jobs/0", "GET, DELETE"),
        ("DELETE", "/api/v1/models", "GET"),
        ("POST", "/playground/app.js", "GET, HEAD"),
        ("POST", "/playground", "GET, HEAD"),
        ("DELETE", "/docs/static/swagger-ui.css", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_refused_with_the_right_one(
    method: str, path: str, allowed: str
) -> None:
    response = await send(app_of(), method, path)
    assert allowed in refused(response, 405)["remedy"]
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/nowhere", "/healthz/", COMIC + "/"])
@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({"host": "[", "x-request-id": "a"}, b""),
        ({"host": "\xff\xfe:port"}, b""),
        ({}, b"\xff\xfe"),
        ({"content-length": "9" * 5000}, b""),
        ({"content-length": "-1"}, b""),
        ({"content-length": "\xb2"}, b""),
    ],
)
async def test_odd_headers_and_queries_are_never_the_servers_fault(
    path: str, headers: dict[str, str], query: bytes
) -> None:
    [start, *_] = await raw(app_of(), path, chunks([b""]), headers, query_string=query)
    assert 400 <= start["status"] < 500


async def test_the_process_lives() -> None:
    backends = FakeBackends(state="failed", states_error=RuntimeError())
    response = await send(app_of(backends), "GET", "/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "alive"})
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("state", "ready"), [("ready", True), ("idle", True), ("starting", False), ("failed", False)]
)
async def test_readiness_needs_every_model(state: State, ready: bool) -> None:
    backends = FakeBackends(other_states={"aged-starter": state})
    response = await send(app_of(backends), "GET", "/readyz")
    assert response.status_code == (200 if ready else 503)
    body = response.json()
    assert body["status"] == ("ready" if ready else "not ready")
    assert body["models"] == dict.fromkeys(map(str, REGISTRY), "ready") | {"aged": state}
    assert response.headers.get("retry-after") == (None if ready else "13")


async def test_a_model_nobody_knows_of_is_starting() -> None:
    class Forgetful(FakeBackends):
        async def states(self) -> dict[str, State]:
            return {"comic-starter": "ready"}

    response = await send(app_of(Forgetful()), "GET", "/readyz")
    assert response.status_code == 503
    assert response.json()["models"]["aged"] == "starting"
    models = (await send(app_of(Forgetful()), "GET", "/api/v1/models")).json()["models"]
    assert [model["state"] for model in models].count("starting") == 5


async def test_readiness_that_cannot_be_asked_for_is_a_problem() -> None:
    backends = FakeBackends(states_error=RuntimeError("controller at /usr/lib gone"))
    refused(await send(app_of(backends), "GET", "/readyz"), 503)


async def test_the_models_are_listed_with_route_licence_and_state() -> None:
    backends = FakeBackends(other_states={"aged-starter": "failed"})
    response = await send(app_of(backends), "GET", "/api/v1/models")
    models = {model["task"]: model for model in response.json()["models"]}
    assert set(models) == set(map(str, REGISTRY))
    for task, model in models.items():
        spec = REGISTRY[Task(task)]
        assert model["name"] == spec.name
        assert model["route"] == Task(task).route
        assert model["licence"] == spec.licence
        assert model["state"] == ("failed" if task == "aged" else "ready")
        assert set(model["parameters"]) == spec.parameters
    assert models["upscale"]["scale"] == 4
    # Nobody chooses what the model ignores: it is no parameter, and has no default to show.
    assert models["comic"]["defaults"] | {"prompt": "comic style"} == REGISTRY[Task.COMIC].defaults
    assert "prompt" not in models["comic"]["parameters"] + list(models["comic"]["defaults"])
    assert REGISTRY[Task.COMIC].origins[0].source not in response.text


async def test_readiness_tells_what_is_served_and_what_is_pulled() -> None:
    served = {"serving": "0123456789abcdef", "wanted": "fedcba9876543210", "error": "damaged"}
    details = Details({"comic-starter": [served]}, {"comic-starter": 43.21})
    response = await send(app_of(FakeBackends(known_details=details)), "GET", "/readyz")
    assert response.status_code == 200, "the former model goes on serving"
    assert response.json()["replicas"] == {"comic": [served]}
    assert response.json()["pulling_percent"] == {"comic-starter": 43.2}


async def test_readiness_tells_how_many_jobs_wait_and_asks_no_redis_for_it() -> None:
    def nobody() -> Any:
        raise AssertionError("a probe would wait for Redis")

    queue = JobQueue(nobody, "test", keep_s=1, lease_s=1)
    app = app_of()
    assert (await send(app, "GET", "/readyz")).json()["jobs_waiting"] == {}
    app.state.jobs = SimpleNamespace(queue=queue)
    assert (await send(app, "GET", "/readyz")).json()["jobs_waiting"] == {}
    queue.seen = {Task.COMIC: (3, 1, 2.5), Task.GENERATE: (0, 0, 0.0)}
    waiting = (await send(app, "GET", "/readyz")).json()["jobs_waiting"]
    assert waiting == {"comic": 3, "generate": 0}


# Below a prefix, as Serve hands it over: in the path, and as root_path


@pytest.mark.parametrize(("path", "root"), [("/", ""), ("/below", "/below"), ("/below/", "/below")])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_root_leads_to_the_reference(path: str, root: str, method: str) -> None:
    [start, *_] = await raw(app_of(), path, chunks([b""]), method=method, root_path=root)
    assert start["status"] == 307
    assert dict(start["headers"])[b"location"] == f"{root}/docs".encode()


async def test_a_picture_is_not_posted_to_the_root() -> None:
    refused(await post(app_of(), "/", PHOTO), 404)


async def test_answers_are_counted_by_the_route_below_the_prefix() -> None:
    paths: list[str] = []
    app = app_of(on_answer=lambda path, *_: paths.append(path))
    for root in ("", "/below"):
        await raw(app, f"{root}/healthz", chunks([b""]), method="GET", root_path=root)
    assert paths == ["/healthz", "/healthz"]


async def test_answers_are_counted_by_protocol_and_by_the_name_of_their_route() -> None:
    told: list[tuple[str, str]] = []
    app = app_of(on_answer=lambda path, *rest: told.append((path, rest[-1])))
    comic = Task.COMIC.route
    await post(app, comic, PHOTO)
    await send(app, "POST", comic, json={"image": base64.b64encode(PHOTO).decode()})
    await send(app, "POST", "/v1/images/edits", json={})
    await send(app, "GET", "/v1/models/comic")
    await send(app, "GET", "/v2x")
    assert told == [
        (comic, "native"),
        (comic, "json"),
        ("/v1/images/edits", "openai"),
        ("/v1/models/{name}", "openai"),
        ("/v2x", "native"),
    ]


@pytest.mark.parametrize("root", ["", "/below"])
@pytest.mark.parametrize("below", BELOW_FILES)
@pytest.mark.parametrize("rest", ["healthz", "api/v1/images/enhance", "v1/models"])
async def test_a_path_below_the_pages_files_is_taken_for_no_other_route(
    root: str, below: str, rest: str, caplog: pytest.LogCaptureFixture
) -> None:
    paths: list[str] = []
    app = app_of(on_answer=lambda path, *_: paths.append(path))
    with caplog.at_level(logging.INFO, "ray.serve.imagen.access"):
        [start, body, *_] = await raw(
            app, f"{root}{below}{rest}", chunks([b""]), method="GET", root_path=root
        )
    assert start["status"] == 404
    assert dict(start["headers"])[b"content-type"] == b"application/problem+json"
    assert f"Image routes: {root}/api/v1/" in json.loads(body["body"])["remedy"]
    assert paths == [below + rest]
    assert len(caplog.records) == 1


# Documentation


async def test_the_reference_page_needs_no_other_server() -> None:
    app = app_of()
    page = await send(app, "GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {name.rpartition(".")[2] for name in files} >= {"js", "css"}
    for name in files:
        response = await send(app, "GET", name)
        assert response.status_code == 200
        assert len(response.content) > 100
    assert "/openapi.json" in page.text


async def test_the_description_is_valid_openapi() -> None:
    description = (await send(app_of(), "GET", "/openapi.json")).json()
    OpenAPI.model_validate(description)
    assert set(description["paths"]) == ROUTES
    names = [op["operationId"] for path in description["paths"].values() for op in path.values()]
    assert len(set(names)) == len(names)
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(description))
    assert set(references) <= set(description["components"]["schemas"])


@pytest.mark.parametrize("task", SERVED)
async def test_the_description_lists_the_form_fields_of_every_route(task: Task) -> None:
    description = (await send(app_of(), "GET", "/openapi.json")).json()
    operation = description["paths"][task.route]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["image"]
    assert form["additionalProperties"] is False
    spec = REGISTRY[task]
    assert form["properties"].keys() == {"image", "model", *spec.parameters}, "there are no jobs"
    assert all(field["description"] for field in form["properties"].values())
    for name in spec.defaults.keys() - spec.ignores:
        assert form["properties"][name]["default"] == spec.defaults[name]
    defaults = {
        name: str(field["default"])
        for name, field in form["properties"].items()
        if field.get("default") is not None and name in spec.parameters
    }
    complete(parse(task.request, defaults), spec.defaults, spec.parameters)
    if task in IMG2IMG_TASKS:
        assert form["properties"]["steps"]["maximum"] == 150
        assert form["properties"]["strength"]["exclusiveMinimum"] == 0.0


@pytest.mark.parametrize("task", SERVED)
async def test_the_description_lists_every_answer_of_every_route(task: Task) -> None:
    description = (await send(app_of(), "GET", "/openapi.json")).json()
    answers = description["paths"][task.route]["post"]["responses"]
    kinds = [*RequestError.__subclasses__(), *SERVICE_ERRORS]
    elsewhere = {
        *(errors.NotFound, errors.MethodNotAllowed, errors.LinkRefused),
        errors.NoSuchJob,
        errors.Unauthorized,  # where keys are asked for: test_access.py
    }
    assert set(answers) == {
        "200",
        "202",
        *(str(int(k.status)) for k in kinds if k not in elsewhere),
    }
    pictures = {"image/png", "image/webp", "image/jpeg"}
    assert set(answers["200"]["content"]) == pictures | {"application/json"}
    of_jobs = {"location", "preference-applied"}
    promised = {name.lower() for name in answers["200"]["headers"]} - of_jobs
    backends = FakeBackends()
    await post(app_of(backends), task.route, PHOTO)
    backends.result = result_of(
        backends.jobs[0], f"{task}-starter", notes=(note(Code.SEED_DRAWN, "Drawn."),)
    )
    response = await post(app_of(backends), task.route, PHOTO)
    assert promised <= set(response.headers)
    assert {name for name in response.headers if name.startswith("x-")} <= promised


@pytest.mark.parametrize("prefer", ["respond-async", "wait=5"])
async def test_a_service_without_jobs_says_so_for_good(prefer: str) -> None:
    backends = FakeBackends()
    asked = await post(app_of(backends), COMIC, PHOTO, headers={"prefer": prefer})
    problem = refused(asked, 422, backends)
    assert (problem["code"], problem["value"]) == ("invalid_parameter", prefer)
    assert "jobs.enabled" in problem["remedy"]
    for path in ("/api/v1/jobs", f"/api/v1/jobs/{'0' * 32}", "/api/v1/webhook-secret", "/files/x"):
        answer = await send(app_of(backends), "GET", path)
        assert refused(answer, 404)["fact"] == "This service keeps no jobs."
        assert "retry-after" not in answer.headers


async def test_a_problem_has_the_form_the_description_promises() -> None:
    app = app_of()
    description = (await send(app, "GET", "/openapi.json")).json()
    answers = description["paths"][COMIC]["post"]["responses"]
    promised = answers["422"]["content"]["application/problem+json"]["schema"]
    problem = refused(await post(app, COMIC, PHOTO, data={"steps": "0"}), 422)
    assert set(promised["required"]) <= set(problem) <= set(promised["properties"])


def test_the_bomb_of_these_tests_is_a_real_png() -> None:
    image = Image.open(io.BytesIO(png_of(100, 50)))
    image.load()
    assert image.size == (100, 50)


# A registry of fewer tasks


async def test_a_task_without_a_model_answers_404_with_the_remedy() -> None:
    registry = Registry([spec for spec in REGISTRY.models if spec.task != Task.AGED], {})
    app = create_app(FakeBackends(), registry, ClientSettings(access=OPEN_TO_ALL))
    problem = refused(await post(app, Task.AGED.route, PHOTO), 404)
    assert problem["fact"] == "No model serves the task aged here."
    assert "imagen run --serve aged=" in problem["remedy"]
    assert Task.AGED.route not in problem["remedy"]
    assert Task.COMIC.route in problem["remedy"]
    assert set((await send(app, "GET", "/readyz")).json()["models"]) == set(registry)
    models = (await send(app, "GET", "/api/v1/models")).json()["models"]
    assert {model["task"] for model in models} == set(registry)


# A registry of two models of one task


SECOND = REGISTRY[Task.UPSCALE].model_copy(update={"name": "upscale-second", "summary": "Another"})
KNOWN = {model.name: model.task for model in REGISTRY.models} | {"upscale-third": Task.UPSCALE}
TWO = Registry([*REGISTRY.models, SECOND], KNOWN)


def app_of_two(**options: Any) -> Any:
    return create_app(FakeBackends(**options), TWO, ClientSettings(access=OPEN_TO_ALL))


@pytest.mark.parametrize("model", [None, "upscale-starter", "upscale-second"])
async def test_a_request_picks_one_of_the_models_of_a_task(model: str | None) -> None:
    fields = {"model": model} if model else {}
    answer = await post(app_of_two(), Task.UPSCALE.route, PHOTO, data=fields)
    assert answer.status_code == 200
    assert answer.headers["x-imagen-model"].startswith(f"{model or 'upscale-starter'}@")


@pytest.mark.parametrize(
    ("model", "fact"),
    [
        ("upscale-fourth", "There is no such model for upscale."),
        ("", "There is no such model for upscale."),
        ("comic-starter", "comic-starter serves comic, not upscale."),
        ("upscale-third", "upscale-third is known here, but it is not served."),
    ],
)
async def test_a_model_that_is_not_served_is_refused(model: str, fact: str) -> None:
    answer = await post(app_of_two(), Task.UPSCALE.route, PHOTO, data={"model": model})
    problem = refused(answer, 422)
    assert (problem["fact"], problem["value"]) == (fact, model or "nothing")
    assert [one["parameter"] for one in problem["errors"]] == ["model"]
    assert "Send one of: upscale-starter, upscale-second." in problem["remedy"]
    hint = "imagen run --serve upscale=upscale-starter,upscale-second,upscale-third"
    assert (hint in problem["remedy"]) == (model == "upscale-third")


async def test_every_model_of_a_task_is_listed_with_its_own_state() -> None:
    app = app_of_two(other_states={"upscale-second": "starting"})
    models = (await send(app, "GET", "/api/v1/models")).json()["models"]
    found = [(m["name"], m["default"], m["state"]) for m in models if m["task"] == "upscale"]
    assert found == [("upscale-starter", True, "ready"), ("upscale-second", False, "starting")]
    ready = await send(app, "GET", "/readyz")
    assert (ready.status_code, ready.json()["models"]["upscale-second"]) == (503, "starting")


async def test_the_reference_offers_every_model_of_a_route() -> None:
    description = (await send(app_of_two(), "GET", "/openapi.json")).json()
    route = description["paths"][Task.UPSCALE.route]["post"]
    form = route["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert form["model"]["enum"] == ["upscale-starter", "upscale-second"]
    assert "upscale-second: Another." in route["description"]


def test_a_form_of_several_models_sends_no_field_that_its_default_model_does_not_read() -> None:
    diffusion = SECOND.model_copy(update={"family": "upscale_diffusion"})
    body = native.request_body([REGISTRY[Task.UPSCALE], diffusion], with_jobs=True)["requestBody"]
    form = body["content"]["multipart/form-data"]["schema"]["properties"]
    assert "default" not in form["prompt"]
    assert form["n"]
