"""OpenAI's own client, unmodified but for its address, in front of the API."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from deployments.catalogue import Registry, load_catalogue, load_registry
from deployments.contract import ImageJob
from deployments.errors import Full
from deployments.notes import Code, note
from deployments.settings import ClientSettings
from deployments.tasks import Task
from serve_app.api import create_app
from tests.unit.fakes import OPEN_TO_ALL, REGISTRY, FakeBackends, picture_file, result_of, send

if TYPE_CHECKING:
    from fastapi import FastAPI

    from deployments.notes import Note

PICTURE = picture_file()
MASK = picture_file(mode="LA")
DRAWN = base64.b64encode(PICTURE).decode()
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def text_to_image() -> Any:
    """An entry for the task generate, like those of a registry."""
    comic = load_catalogue(Path("configs/models/starter.yaml")).find("comic-starter")
    changes: dict[str, Any] = {
        "name": "painter",
        "task": Task.GENERATE,
        "family": "text2img",
        "defaults": {},
    }
    changes["ignores"] = frozenset()
    values = comic.model_dump(exclude_defaults=True) | changes
    return type(comic).model_validate(values)


@pytest.fixture
def backends() -> FakeBackends:
    return FakeBackends()


@pytest.fixture
def app(backends: FakeBackends) -> FastAPI:
    registry = Registry([*REGISTRY.models, text_to_image()], {})
    return create_app(backends, registry, ClientSettings(access=OPEN_TO_ALL))


@pytest.fixture
def client(app: FastAPI) -> openai.AsyncOpenAI:
    transport = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return openai.AsyncOpenAI(
        base_url="http://imagen/v1", api_key="any", http_client=transport, max_retries=0
    )


def drawing(backends: FakeBackends, notes: tuple[Note, ...] = ()) -> None:
    """Let the model answer a request without a picture."""
    job = ImageJob(text_to_image().task.request(), PICTURE, "png", 60)
    backends.result = result_of(job, "painter", notes=notes)


async def test_pictures_of_a_text(client: openai.AsyncOpenAI, backends: FakeBackends) -> None:
    drawing(backends)
    made = await client.images.generate(
        model="painter", prompt="a red ball", n=3, size="768x512", extra_body={"steps": 4}
    )
    assert made.data is not None
    assert [one.b64_json for one in made.data] == [DRAWN] * 3
    assert made.output_format == "png"
    (job,) = backends.jobs
    assert job.n == 3
    assert (job.width_px, job.height_px) == (768, 512)
    assert (job.request.prompt, job.request.steps) == ("a red ball", 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["comic", "comic-starter"])
async def test_a_picture_is_edited_by_a_model_or_a_task(
    name: str, client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    made = await client.images.edit(
        model=name,
        image=("photo.png", PICTURE, "image/png"),
        prompt="ink",
        output_format="webp",
        extra_body={"strength": 0.4},
    )
    assert made.data is not None
    assert made.data[0].b64_json == DRAWN  # what the model was given
    (job,) = backends.jobs
    assert job.request.task == "comic"
    assert job.output_format == "webp"
    assert job.request.strength == 0.4  # type: ignore[attr-defined]


async def test_the_prompt_of_a_strict_edit_is_no_mistake(
    client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    """The client demands a prompt, also for a model that reads none."""
    file, strict = ("photo.png", PICTURE, "image/png"), {"strict": True}
    await client.images.edit(model="comic", image=file, prompt="ink", extra_body=strict)
    assert [one.text for one in backends.jobs[0].notes] == [
        "prompt was ignored: the model does not read it."
    ]


async def test_an_edit_may_be_json(app: FastAPI, backends: FakeBackends) -> None:
    images = [{"image_url": f"data:image/png;base64,{DRAWN}"}]
    body = {"model": "upscale", "images": images, "prompt": "", "n": None}
    answer = await send(app, "POST", EDITS, json=body)
    assert answer.status_code == 200, answer.text
    assert backends.jobs[0].image == PICTURE


async def test_a_background_is_made_transparent(
    client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    file = ("photo.png", PICTURE, "image/png")
    await client.images.edit(
        model="background", image=file, prompt="cut it out", background="opaque"
    )
    assert backends.jobs[0].request.output == "color"  # type: ignore[attr-defined]


async def test_previews_are_streamed(client: openai.AsyncOpenAI, backends: FakeBackends) -> None:
    drawing(backends)
    events = await client.images.generate(
        model="generate", prompt="a red ball", stream=True, partial_images=2
    )
    found = [event async for event in events]
    kinds = [event.type for event in found]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [base64.b64decode(event.b64_json) for event in found[:2]] == [b"preview"] * 2
    assert found[-1].b64_json == DRAWN


async def test_what_no_model_reads_is_a_note(
    client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    drawing(backends)
    unread: Any = {"quality": "high", "user": "me", "moderation": "low", "background": "opaque"}
    await client.images.generate(prompt="a red ball", partial_images=2, **unread)
    notes = backends.jobs[0].notes
    told = ["quality", "user", "moderation", "partial_images", "background=opaque"]
    assert [one.text.split()[0] for one in notes] == told
    assert {one.code for one in notes} == {Code.PARAMETER_UNUSED}


@pytest.mark.parametrize(("output_format", "quality"), [("jpeg", 30), ("webp", 0), ("png", 100)])
async def test_compression_is_the_quality_of_the_file(
    output_format: Any, quality: int, client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    drawing(backends)
    await client.images.generate(
        prompt="a red ball", output_format=output_format, output_compression=quality
    )
    assert backends.jobs[0].request.output_compression == quality


async def test_notes_come_back_beside_the_picture(app: FastAPI, backends: FakeBackends) -> None:
    told = note(Code.PROMPT_CUT, "Some words were cut.")
    drawing(backends, (told,))
    answer = await send(app, "POST", GENERATIONS, json={"prompt": "long"})
    facts = answer.json()["data"][0]["imagen"]
    assert facts["notes"] == [{"code": "prompt_cut", "text": "Some words were cut."}]


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    names = [model.id async for model in client.models.list()]
    assert names == [*(spec.name for spec in REGISTRY.values()), "painter"]
    assert (await client.models.retrieve("upscale")).id == REGISTRY[Task.UPSCALE].name
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-image-1")


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"model": "gpt-image-1"}, openai.NotFoundError, "no such model"),
        ({"model": "comic"}, openai.BadRequestError, "/v1/images/edits"),
        ({"prompt": ""}, openai.BadRequestError, "prompt must not be empty"),
        ({"n": 9}, openai.BadRequestError, "from 1 up to 8"),
        ({"size": "large"}, openai.BadRequestError, "size must be"),
        ({"size": "0x0"}, openai.BadRequestError, "size must be"),
        ({"size": "9999x9999"}, openai.BadRequestError, "width"),
        ({"size": "64x64", "extra_body": {"width": 9}}, openai.BadRequestError, "say the same"),
        ({"prompt": " "}, openai.BadRequestError, "prompt must not be empty"),
        ({"extra_query": {"steps": 3}}, openai.BadRequestError, "behind the"),
        ({"response_format": "url"}, openai.BadRequestError, r"keeps no pictures.*b64_json"),
        (
            {"response_format": "url", "stream": True},
            openai.BadRequestError,
            "pictures, not addresses",
        ),
        ({"output_compression": 50}, openai.BadRequestError, "PNG loses nothing"),
        ({"output_compression": 101, "output_format": "webp"}, openai.BadRequestError, "up to 100"),
        ({"extra_body": {"stepz": 3}}, openai.BadRequestError, "stepz"),
        ({"extra_body": {"steps": [3]}}, openai.BadRequestError, "steps must be"),
        ({"extra_body": {"image": DRAWN}}, openai.BadRequestError, "no picture.*/v1/images/edits"),
        (
            {"extra_body": {"mask": {"image_url": "data:image/png;base64,aGk="}}},
            openai.BadRequestError,
            "no picture.*field mask.*/v1/images/edits",
        ),
    ],
)
async def test_mistakes_are_openais_errors(
    changes: dict[str, Any],
    kind: type[openai.APIStatusError],
    told: str,
    client: openai.AsyncOpenAI,
    backends: FakeBackends,
) -> None:
    with pytest.raises(kind, match=told):
        await client.images.generate(**{"model": "painter", "prompt": "a ball", **changes})
    assert not backends.jobs


async def test_generations_are_no_form(app: FastAPI) -> None:
    answer = await send(app, "POST", GENERATIONS, files={"prompt": (None, "a ball")})
    assert answer.status_code == 415
    assert "asked for in JSON" in answer.json()["error"]["message"]


async def test_an_error_of_several_fields_names_none(app: FastAPI) -> None:
    body = {"model": "upscale", "image": DRAWN, "size": "96x64", "scale": 2}
    answer = await send(app, "POST", EDITS, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] is None


@pytest.mark.parametrize("path", [GENERATIONS, "/v2/models/generate/infer"])
async def test_headers_of_jobs_are_not_silently_ignored(
    path: str, app: FastAPI, backends: FakeBackends
) -> None:
    drawing(backends)
    body: dict[str, Any] = {"parameters": {"prompt": "a"}} if "v2" in path else {"prompt": "a"}
    headers = {"Prefer": "respond-async", "Idempotency-Key": "mine"}
    answer = await send(app, "POST", path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    told = [one.text.split()[0] for one in backends.jobs[0].notes]
    assert told == ["Prefer", "Idempotency-Key"]


async def test_a_picture_stands_in_one_field_of_json(app: FastAPI, backends: FakeBackends) -> None:
    sent = {"image_url": f"DATA:image/png;base64,{DRAWN}"}
    for wrong in (
        {"image": sent, "images": [sent]},
        {"images": [{**sent, "file_id": "file-1"}]},
        {"image": {"file_id": "file-1"}},
        {"images": []},
        {"image": DRAWN, "mask": {"image_url": None}},
        {"image": DRAWN, "mask": {"image_url": ""}},
    ):
        answer = await send(app, "POST", EDITS, json={"model": "comic", **wrong})
        assert answer.status_code == 400, wrong
    assert not backends.jobs
    answer = await send(
        app, "POST", EDITS, json={"model": "comic", "image": None, "images": [sent]}
    )
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("not base64!", "invalid_parameter"),
        ("data:text/plain;base64,aGk=", "unsupported_media"),
        ("data:image/png,raw", "invalid_parameter"),
        ("data:" + ";" * 1_000_000, "invalid_parameter"),
        ("https://169.254.169.254/latest", "invalid_parameter"),
        (7, "invalid_parameter"),
        ([DRAWN, DRAWN], "invalid_parameter"),
        (None, "malformed_request"),
        ("aGVsbG8=", "unsupported_media"),
    ],
)
async def test_what_is_no_picture_is_refused(
    image: object, code: str, app: FastAPI, backends: FakeBackends
) -> None:
    answer = await send(app, "POST", EDITS, json={"model": "comic", "image": image})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["code"] == code
    assert not backends.jobs


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_object_is_refused(body: bytes, app: FastAPI) -> None:
    answer = await send(app, "POST", GENERATIONS, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_full_service_says_when_to_come_again(
    client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    backends.error = Full("The queue is full.", value="comic", remedy="Wait.", retry_after_s=3)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.images.generate(prompt="a red ball")
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "full"


async def test_a_stream_that_never_begins_has_its_status(
    client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    backends.refusal = Full("The queue is full.", value="comic", remedy="Wait.", retry_after_s=3)
    with pytest.raises(openai.RateLimitError):
        await client.images.generate(prompt="a red ball", stream=True)


@pytest.mark.parametrize(
    ("more", "changes"), [({}, "transparent"), ({"mask_changes": "white"}, "white")]
)
async def test_a_mask_marks_what_is_transparent_unless_the_client_says_otherwise(
    more: dict[str, str], changes: str, client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    file, mask = ("photo.png", PICTURE, "image/png"), ("mask.png", MASK, "image/png")
    await client.images.edit(model="comic", image=file, mask=mask, prompt="ink", extra_body=more)
    (job,) = backends.jobs
    request: Any = job.request
    assert (job.image, job.mask) == (PICTURE, MASK)
    assert (request.mask, request.mask_changes) == ("picture", changes)


@pytest.mark.parametrize("of", [lambda url: url, lambda url: {"image_url": url}])
async def test_a_mask_may_be_json(of: Any, app: FastAPI, backends: FakeBackends) -> None:
    mask = of(f"data:image/png;base64,{base64.b64encode(MASK).decode()}")
    body = {"model": "aged", "image": DRAWN, "prompt": "old", "mask": mask}
    answer = await send(app, "POST", EDITS, json=body)
    assert answer.status_code == 200, answer.text
    (job,) = backends.jobs
    request: Any = job.request
    assert (job.mask, request.mask, request.mask_changes) == (MASK, "picture", "transparent")


async def test_a_pictures_own_alpha_is_a_mask_if_asked_for(
    client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    file = ("photo.png", PICTURE, "image/png")
    await client.images.edit(model="comic", image=file, prompt="ink", extra_body={"mask": "alpha"})
    request: Any = backends.jobs[0].request
    assert (request.mask, backends.jobs[0].mask) == ("alpha", None)


@pytest.mark.parametrize(
    ("model", "mask", "told"),
    [
        ("comic", picture_file(32, 24), "another size"),
        ("comic", b"no picture", "not an image"),
        ("background", MASK, "mask is not a parameter of background"),
    ],
)
async def test_a_mask_that_does_not_fit_is_openais_error(
    model: str, mask: bytes, told: str, client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    file = ("photo.png", PICTURE, "image/png")
    with pytest.raises(openai.APIStatusError, match=told):
        await client.images.edit(
            model=model, image=file, mask=("mask.png", mask, "image/png"), prompt="ink"
        )
    assert not backends.jobs


async def test_a_background_may_be_a_picture(app: FastAPI, backends: FakeBackends) -> None:
    url = f"data:image/png;base64,{base64.b64encode(MASK).decode()}"
    body = {"model": "background", "image": DRAWN, "prompt": "", "background": url}
    answer = await send(app, "POST", EDITS, json=body)
    assert answer.status_code == 200, answer.text
    files = {"image": PICTURE, "background": ("beach.png", MASK)}
    answer = await send(app, "POST", EDITS, files=files, data={"model": "background"})
    assert answer.status_code == 200, answer.text
    assert [job.background for job in backends.jobs] == [MASK, MASK]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "' + b"a" * 70_000 + b'"}',
        b"{" + b",".join(b'"%d": 1' % i for i in range(50)) + b"}",
        b"{" + b",".join(b'"%d": 1' % i for i in range(5_000)) + b"}",
        b'{"prompt": ' + b"[" * 2_000 + b"]" * 2_000 + b"}",
    ],
    ids=["twice", "long", "many", "very many", "nested"],
)
async def test_json_has_the_limits_of_a_form(body: bytes, app: FastAPI) -> None:
    answer = await send(app, "POST", GENERATIONS, content=body)
    assert answer.status_code == 400
    assert len(answer.content) < 2_000


async def test_an_error_in_mid_stream_is_an_event(
    client: openai.AsyncOpenAI, backends: FakeBackends
) -> None:
    backends.error = Full("The queue is full.", value="comic", remedy="Wait.")
    events = await client.images.generate(prompt="a red ball", stream=True)
    with pytest.raises(openai.APIError, match="queue is full"):
        _ = [event async for event in events]


@pytest.mark.parametrize("encoding", ["gzip", "identity, br", "Zstd"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=cut"])
@pytest.mark.parametrize(
    "path", ["/api/v1/images/style/comic", GENERATIONS, EDITS, "/v2/models/comic/infer"]
)
async def test_a_compressed_body_is_refused_as_what_it_is(
    path: str, kind: str, encoding: str, app: FastAPI
) -> None:
    headers = {"Content-Type": kind, "Content-Encoding": encoding}
    answer = await send(app, "POST", path, content=gzip.compress(b"{}"), headers=headers)
    assert answer.status_code == 415, answer.text
    assert f"Content-Encoding: {encoding}" in answer.text
    assert "Send it without Content-Encoding" in answer.text
    lines = [("Content-Type", kind), ("Content-Encoding", ""), ("Content-Encoding", encoding)]
    answer = await send(app, "POST", path, content=gzip.compress(b"{}"), headers=lines)
    assert answer.status_code == 415, answer.text


@pytest.mark.parametrize(("model", "told"), [("background", ["partial_images"]), ("comic", [])])
async def test_previews_of_a_model_without_steps_are_a_note(
    model: str, told: list[str], app: FastAPI, backends: FakeBackends
) -> None:
    body = {"model": model, "image": DRAWN, "stream": True, "partial_images": 2}
    assert (await send(app, "POST", EDITS, json=body)).status_code == 200
    assert [one.text.split()[0] for one in backends.jobs[0].notes] == told


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
async def test_what_is_no_number_is_no_text(
    number: str, app: FastAPI, backends: FakeBackends
) -> None:
    """Python reads them, although JSON has none."""
    for path, body in (
        (GENERATIONS, f'{{"prompt": {number}}}'),
        ("/v2/models/painter/infer", f'{{"parameters": {{"prompt": {number}}}}}'),
    ):
        answer = await send(app, "POST", path, content=body)
        assert answer.status_code == 400, answer.text
        assert "finite" in answer.text
    assert not backends.jobs


@pytest.mark.parametrize("fields", [{}, {"prompt": ""}, {"prompt": " \n"}])
async def test_nothing_is_drawn_of_an_empty_text(
    fields: dict[str, str], app: FastAPI, backends: FakeBackends
) -> None:
    route, infer = "/api/v1/images/generate", "/v2/models/generate/infer"
    answers = [
        await send(app, "POST", route, files={"steps": (None, "4")}, data=fields),
        await send(app, "POST", route, json=fields),
        await send(app, "POST", infer, json={"parameters": fields}),
        await send(app, "POST", GENERATIONS, json=fields),
    ]
    assert [answer.status_code for answer in answers] == [422, 422, 400, 400]
    assert all("Say what the picture shows." in answer.text for answer in answers)
    assert not backends.jobs


async def test_without_a_model_for_it_a_text_is_refused_with_the_remedy() -> None:
    without = load_registry(Path("configs/models/starter.yaml"), serve={"generate": None})
    app = create_app(FakeBackends(), without, ClientSettings(access=OPEN_TO_ALL))
    answer = await send(app, "POST", GENERATIONS, json={"prompt": "a red ball"})
    assert answer.status_code == 404
    assert "--serve generate=NAME" in answer.json()["error"]["message"]
    for path in ("/v2/models/generate", "/v2/models/generate/ready"):
        answer = await send(app, "GET", path)
        assert answer.status_code == 404
        assert "--serve generate=NAME" in answer.json()["error"]


async def test_an_unknown_route_below_v1_is_openais_error(app: FastAPI) -> None:
    answer = await send(app, "POST", "/v1/images/variations", json={})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "not_found"
    assert f"{GENERATIONS}, {EDITS}." in error["message"], "and no routes of other protocols"


async def test_only_the_picture_may_ever_be_an_address(app: FastAPI) -> None:
    address = "https://example.com/a.png"
    for name, told in (("image", "fetch.enabled"), ("mask", "as a data URL.")):
        body = {"model": "comic", "image": DRAWN, "prompt": "x", name: address}
        message = (await send(app, "POST", EDITS, json=body)).json()["error"]["message"]
        assert message.startswith(f"{name} is an address, and is not fetched")
        assert message.rstrip(".").endswith(told.rstrip("."))
