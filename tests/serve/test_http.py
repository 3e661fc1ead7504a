"""The running application over real HTTP: six tasks, headers, errors."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from deployments import images
from tests.serve.conftest import FURTHER

if TYPE_CHECKING:
    from collections.abc import Mapping

ROUTES = {
    "upscale": "upscale",
    "enhance": "enhance",
    "comic": "style/comic",
    "aged": "style/aged",
    "background": "background/remove",
}
"""Of the tasks that need a picture."""
SEEDED = ("enhance", "comic", "aged")
Job = tuple[str, bytes, "Mapping[str, str]"]


def jpeg(width: int = 96, height: int = 64, seed: int = 0) -> bytes:
    """A smooth colourful picture that differs by seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def post(address: str, task: str, image: bytes, **fields: str) -> httpx.Response:
    return httpx.post(
        f"{address}/api/v1/images/{ROUTES[task]}",
        files={"image": ("photo.jpg", image)},
        data=fields,
        timeout=120,
    )


def opened(response: httpx.Response) -> Image.Image:
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(response.content))


def is_problem(response: httpx.Response, status: int) -> bool:
    body = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert response.status_code == status == body["status"], body
    assert body["value"], body
    for sentence in (body["fact"], body["remedy"], body["detail"]):
        assert re.fullmatch(r"\S.*[^.\s]\.", sentence, re.DOTALL), sentence
        assert ". (" not in sentence
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return True


def test_ready_and_models(address: str) -> None:
    ready = httpx.get(f"{address}/readyz", timeout=30)
    models = httpx.get(f"{address}/api/v1/models", timeout=30).json()["models"]
    assert ready.status_code == 200
    assert {m["state"] for m in models} == {"ready"}
    assert list(dict.fromkeys(m["task"] for m in models)) == [*ROUTES, "generate"]
    assert [m["name"] for m in models if m["task"] == "upscale"] == ["upscale-starter", FURTHER]
    assert set(ready.json()["models"]) == {*ROUTES, "generate", FURTHER}


def test_two_models_of_one_task_run_at_once_and_a_request_picks_one(address: str) -> None:
    names = ["upscale-starter", FURTHER] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: post(address, "upscale", jpeg(), model=name), names))
    served = [answer.headers["x-imagen-model"].partition("@")[0] for answer in answers]
    assert served == names
    pictures = [np.asarray(opened(answer)).astype(int) for answer in answers[:2]]
    assert np.abs(pictures[0] - pictures[1]).max() > 2
    written = images.read_metadata(answers[1].content)
    assert str(written["model"]).startswith(f"{FURTHER}@")


def test_a_model_that_is_not_served_is_refused_with_the_names_of_those_that_are(
    address: str,
) -> None:
    answer = post(address, "upscale", jpeg(), model="upscale-realesrgan-x4plus")
    assert is_problem(answer, 422)
    assert f"upscale-starter, {FURTHER}" in answer.json()["remedy"]
    assert "imagen run --serve" in answer.json()["remedy"]


def draw(address: str, prompt: str, **fields: str) -> httpx.Response:
    form = {"prompt": prompt, **fields}
    return httpx.post(
        f"{address}/api/v1/images/generate",
        files={name: (None, value) for name, value in form.items()},
        timeout=120,
    )


def test_a_text_becomes_the_picture_that_it_says(address: str) -> None:
    answer = draw(address, "a red circle", seed="1")
    picture = np.asarray(opened(answer).convert("RGB")).astype(int)
    assert picture.shape == (256, 256, 3)
    red, green, blue = picture[112:144, 112:144].mean((0, 1))
    assert red > 1.5 * max(green, blue), "in the middle"
    corner = picture[:24, :24].mean((0, 1))
    assert corner.max() - corner.min() < 60, "and nothing red beside it"
    assert answer.headers["x-imagen-model"].startswith("generate-starter@")
    again = draw(address, "a red circle", seed="1")
    other = draw(address, "a red circle", seed="2")
    assert opened(again).tobytes() == opened(answer).tobytes() != opened(other).tobytes()


@pytest.mark.parametrize("task", ROUTES)
def test_every_task_gives_a_picture_of_the_right_size(address: str, task: str) -> None:
    response = post(address, task, jpeg(96, 64))
    scale = 4 if task == "upscale" else 1
    picture = opened(response)
    assert picture.format == "PNG"
    assert picture.size == (96 * scale, 64 * scale)
    assert picture.mode == ("RGBA" if task == "background" else "RGB")
    assert response.headers["x-imagen-model"].startswith(f"{task}-starter@")
    assert response.headers["x-imagen-batch-size"] == "1"
    assert "denoise;dur=" in response.headers["server-timing"]
    assert len(response.headers.get_list("x-request-id")) == 1


def test_same_seed_same_picture_and_metadata_tells_it(address: str) -> None:
    first = post(address, "comic", jpeg(), seed="7", prompt="comic style")
    second = post(address, "comic", jpeg(), seed="7", prompt="comic style")
    other = post(address, "comic", jpeg(), seed="8", prompt="comic style")
    pixels = [np.asarray(opened(r)) for r in (first, second, other)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    written = images.read_metadata(first.content)
    assert written["model"] == first.headers["x-imagen-model"]
    parameters = written["parameters"]
    assert isinstance(parameters, dict)
    assert parameters["seed"] == 7 == int(first.headers["x-imagen-seed"])
    bare = images.read_metadata(post(address, "comic", jpeg(), metadata="none").content)
    # The mark of what a model made stays.
    assert bare == {"digital_source_type": "compositeWithTrainedAlgorithmicMedia"}


def test_a_random_seed_is_returned_and_reproduces(address: str) -> None:
    first = post(address, "aged", jpeg())
    again = post(address, "aged", jpeg(), seed=first.headers["x-imagen-seed"])
    assert np.array_equal(np.asarray(opened(first)), np.asarray(opened(again)))


@pytest.mark.parametrize("task", ["enhance", "comic", "aged", "background"])
def test_a_phone_photo_comes_back_at_its_own_size(address: str, task: str) -> None:
    fields = {"output_format": "png"}
    if task != "background":
        fields = {"output_format": "jpeg", "detail": "working"}  # full takes half a minute
    assert opened(post(address, task, jpeg(4032, 3024), **fields)).size == (4032, 3024)


def test_a_larger_photo_is_enhanced_at_full_detail_by_default(address: str) -> None:
    response = post(address, "enhance", jpeg(600, 500), seed="1")
    assert opened(response).size == (600, 500)
    assert response.headers.get_list("X-Imagen-Note") == [
        "tiled: The model worked on every pixel, in 2 tiles of 512 x 512 px."
    ]
    working = post(address, "enhance", jpeg(600, 500), seed="1", detail="working")
    assert working.headers["X-Imagen-Note"].startswith("working_size: ")


def ellipse(width: int, height: int) -> np.ndarray:
    """What a mask marks: about half of the picture."""
    y, x = np.mgrid[:height, :width]
    return ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2) < 0.16


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("task", SEEDED)
def test_only_what_a_mask_marks_is_changed(address: str, task: str) -> None:
    before, marked = jpeg(96, 64), ellipse(96, 64)
    files = {"image": before, "mask": png(marked.astype(np.uint8) * 255)}
    path = f"{address}/api/v1/images/{ROUTES[task]}"
    after, soft = (
        np.asarray(opened(httpx.post(path, files=files, data={"seed": "7", **data}, timeout=120)))
        for data in ({}, {"mask_feather_px": "9"})
    )
    was = np.asarray(Image.open(io.BytesIO(before)))
    assert (after[~marked] == was[~marked]).all()
    assert (soft[~marked] == was[~marked]).all()
    assert (after[marked] != was[marked]).mean() > 0.5
    apart, softer = (np.abs(one.astype(int) - was)[marked].mean() for one in (after, soft))
    assert softer < apart


def test_tiles_without_a_mark_are_left_out(address: str) -> None:
    mask = np.zeros((500, 900), np.uint8)
    mask[100:200, 50:150] = 255
    files = {"image": jpeg(900, 500), "mask": png(mask)}
    data = {"seed": "1", "detail": "full"}
    path = f"{address}/api/v1/images/{ROUTES['enhance']}"
    notes = httpx.post(path, files=files, data=data, timeout=120).headers.get_list("X-Imagen-Note")
    assert "masked: The mask marks 2 % of the picture; the rest stays as it was." in notes
    assert any("in the 1 of 2 tiles" in one for one in notes)


def test_openais_client_edits_what_is_transparent_in_its_mask(address: str) -> None:
    marked = ellipse(96, 64)
    alpha = np.where(marked, 0, 255).astype(np.uint8)
    mask = np.dstack([np.zeros((64, 96, 3), np.uint8), alpha])
    was = np.asarray(Image.open(io.BytesIO(jpeg())))
    cut = np.dstack([was, alpha])
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", timeout=120)
    with client:
        made = client.images.edit(
            model="comic",
            image=("photo.jpg", jpeg(), "image/jpeg"),
            mask=("mask.png", png(mask), "image/png"),
            prompt="comic style",
            extra_body={"seed": 7},
        )
        filled = client.images.edit(
            model="comic",
            image=("photo.png", png(cut), "image/png"),
            prompt="comic style",
            extra_body={"mask": "alpha"},
        )
        with pytest.raises(openai.APIStatusError, match="no transparent part"):
            client.images.edit(
                model="comic",
                image=("photo.jpg", jpeg(), "image/jpeg"),
                mask=("mask.png", png(mask[..., :3].copy()), "image/png"),
                prompt="comic style",
            )
    for answer in (made, filled):
        assert answer.data is not None
        after = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
        assert after.mode == "RGB"
        assert (np.asarray(after)[~marked] == was[~marked]).all()
        assert (np.asarray(after)[marked] != was[marked]).mean() > 0.5


def test_a_mask_that_marks_nothing_is_refused(address: str) -> None:
    files = {"image": jpeg(), "mask": png(np.zeros((64, 96), np.uint8))}
    answer = httpx.post(f"{address}/api/v1/images/style/comic", files=files, timeout=120)
    assert is_problem(answer, 422)
    assert "marks nothing" in answer.json()["fact"]


def test_too_large_to_upscale(address: str) -> None:
    photo = jpeg(4000, 3000)
    problem = post(address, "upscale", photo)
    assert is_problem(problem, 413)
    assert "scale=2 at most" in problem.json()["remedy"]


def test_one_damaged_picture_of_four_fails_alone(address: str) -> None:
    good = jpeg(512, 512)
    damaged = good[: len(good) // 2]

    async def four() -> list[httpx.Response]:
        return await gather(
            address,
            [("comic", good, {"seed": str(i)}) for i in range(3)] + [("comic", damaged, {})],
        )

    responses = asyncio.run(four())
    assert [r.status_code for r in responses] == [200, 200, 200, 400]
    assert is_problem(responses[3], 400)


def test_fifty_mixed_requests_are_never_mixed_up(address: str) -> None:
    # Beneath soft edges a cut-out has colours of its own, unless it is asked for the picture's.
    jobs = [
        (
            list(ROUTES)[i % 5],
            jpeg(64 + 2 * i, 64, seed=i),
            {"seed": str(i)} if 0 < i % 5 < 4 else {"edges": "original"} if i % 5 else {},
        )
        for i in range(50)
    ]
    responses = asyncio.run(gather(address, jobs))
    assert [r.status_code for r in responses] == [200] * 50
    for (task, image, _), response in zip(jobs, responses, strict=True):
        assert looks_like(opened(response), Image.open(io.BytesIO(image))), task


def looks_like(output: Image.Image, source: Image.Image) -> bool:
    """Same shape, and a luminance that follows the input's: no other input has either."""
    ratio = output.width / source.width
    if (output.width, output.height) != (source.width * ratio, source.height * ratio):
        return False
    a = np.asarray(output.convert("RGB").resize((32, 32)).convert("L"), np.float64).ravel()
    b = np.asarray(source.resize((32, 32)).convert("L"), np.float64).ravel()
    return float(np.corrcoef(a, b)[0, 1]) > 0.8


async def gather(
    address: str, jobs: list[tuple[str, bytes, Mapping[str, str]]]
) -> list[httpx.Response]:
    async with httpx.AsyncClient(timeout=120) as client:
        return await asyncio.gather(
            *(
                client.post(
                    f"{address}/api/v1/images/{ROUTES[task]}",
                    files={"image": image},
                    data=dict(fields),
                )
                for task, image, fields in jobs
            )
        )


def test_rows_share_a_batch(address: str) -> None:
    """Of some size: on a busy machine the engine may find that rows of one are quicker alone."""
    sizes = {1}
    for side_px in (512, 256, 320, 192, 448):
        jobs: list[tuple[str, bytes, Mapping[str, str]]] = [
            ("enhance", jpeg(side_px, side_px), {}) for _ in range(8)
        ]
        sizes |= {int(r.headers["x-imagen-batch-size"]) for r in asyncio.run(gather(address, jobs))}
        if max(sizes) > 1:
            break
    assert 1 < max(sizes) <= 4


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"steps": "0"}, 422),
        ({"strength": "nan"}, 422),
        ({"unknown": "1"}, 422),
        ({"strength": "0.01"}, 422),
    ],
)
def test_refusals_are_problems(address: str, fields: dict[str, str], status: int) -> None:
    assert is_problem(post(address, "comic", jpeg(), **fields), status)


def test_refusals_of_the_model_cross_the_process_boundary(address: str) -> None:
    response = post(address, "upscale", jpeg(), prompt="a cat", strict="true")
    assert is_problem(response, 422)
    assert "prompt" in response.json()["fact"]


def test_oversized_bodies_are_refused(address: str) -> None:
    def chunks() -> object:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"\0" * 2**20

    response = httpx.post(
        f"{address}/api/v1/images/style/comic",
        content=chunks(),  # type: ignore[arg-type]
        headers={"content-type": "multipart/form-data; boundary=x"},
        timeout=60,
    )
    assert is_problem(response, 413)


def test_a_client_that_leaves_frees_its_row(address: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{address}/api/v1/images/style/comic",
            files={"image": jpeg(512, 512)},
            data={"steps": "150", "strength": "1.0"},
            timeout=0.5,
        )
    assert post(address, "comic", jpeg()).status_code == 200


def test_docs_need_no_network(address: str) -> None:
    page = httpx.get(f"{address}/docs", timeout=30)
    assert page.status_code == 200
    assert "https://" not in page.text.replace("https://www.rfc-editor.org", "")
    assert httpx.get(f"{address}/docs/static/swagger-ui-bundle.js", timeout=30).status_code == 200
