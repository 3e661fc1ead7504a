"""Every door of the running application, by real clients of its protocol, alone and at once."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.serve.test_http import ROUTES, SEEDED, jpeg

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "ink drawing"
MOST_DIFFERENCE = 1.0
"""Mean of levels out of 255: rows that share a pass differ in their last bits."""


class Answer(NamedTuple):
    """A picture, and how many rows shared the last pass that made it."""

    picture: bytes
    batch_size: int


Door = Callable[[str, str, bytes], Answer] if TYPE_CHECKING else Any


def fields_of(task: str) -> dict[str, Any]:
    """What every door sends beside the picture."""
    return {"prompt": PROMPT, "steps": 4, "seed": 7} if task in SEEDED else {}


def native(address: str, task: str, image: bytes) -> Answer:
    route = f"{address}/api/v1/images/{ROUTES[task]}"
    answer = httpx.post(route, files={"image": image}, data=fields_of(task), timeout=120)
    assert answer.status_code == 200, answer.text
    return Answer(answer.content, int(answer.headers["x-imagen-batch-size"]))


def in_json(address: str, task: str, image: bytes) -> Answer:
    body = {"image": base64.b64encode(image).decode(), **fields_of(task)}
    route, accept = f"{address}/api/v1/images/{ROUTES[task]}", {"Accept": "application/json"}
    answer = httpx.post(route, json=body, headers=accept, timeout=120)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return Answer(base64.b64decode(found["image"]), found["batch_size"])


def by_openai(address: str, task: str, image: bytes) -> Answer:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        made = client.images.edit(
            model=task,
            image=("photo.jpg", image, "image/jpeg"),
            prompt=PROMPT,
            extra_body={name: value for name, value in fields_of(task).items() if name != "prompt"},
        )
    assert made.data is not None
    (one,) = made.data
    said: Any = one.model_extra
    return Answer(base64.b64decode(one.b64_json or ""), said["imagen"]["batch_size"])


def by_triton(address: str, task: str, image: bytes) -> Answer:
    with triton_client(address) as client:
        found = client.infer(task, [tensor("IMAGE", image)], parameters=fields_of(task))
    said = found.get_response()["parameters"]
    return Answer(found.as_numpy("IMAGE")[0], said["batch_size"])


DOORS: dict[str, Door] = {
    "native": native,
    "json": in_json,
    "openai": by_openai,
    "kserve": by_triton,
}


def triton_client(address: str) -> Any:
    return triton.InferenceServerClient(urlsplit(address).netloc, network_timeout=120)


def tensor(name: str, data: bytes, shape: tuple[int, ...] = (1,)) -> Any:
    made = triton.InferInput(name, list(shape), "BYTES")
    made.set_data_from_numpy(np.array([data], dtype=np.object_).reshape(shape))
    return made


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA"), dtype=np.float32)


def test_clients_of_triton_find_the_service_and_its_models(address: str) -> None:
    with triton_client(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("comic")
        assert not client.is_model_ready("nobody")
        assert client.get_server_metadata()["name"] == "imagen"
        (output,) = client.get_model_metadata("upscale-starter")["outputs"]
        assert (output["name"], output["datatype"]) == ("IMAGE", "BYTES")


@pytest.mark.parametrize("binary", [True, False])
def test_a_client_of_triton_gets_its_picture_upscaled(address: str, binary: bool) -> None:
    wanted = [triton.InferRequestedOutput("IMAGE", binary_data=binary)]
    with triton_client(address) as client:
        found = client.infer(
            "upscale", [tensor("IMAGE", jpeg(48, 32), (1, 1))], outputs=wanted, request_id="mine"
        )
    assert found.get_response()["id"] == "mine"
    (element,) = found.as_numpy("IMAGE").reshape(-1)
    data = element if binary else base64.b64decode(element)
    assert Image.open(io.BytesIO(data)).size == (192, 128)


def test_a_client_of_triton_changes_what_is_white_in_its_mask(address: str) -> None:
    image, mask = jpeg(96, 64), Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    file = io.BytesIO()
    mask.save(file, "PNG")
    inputs = [tensor("IMAGE", image), tensor("MASK", file.getvalue())]
    with triton_client(address) as client:
        assert "MASK" in [one["name"] for one in client.get_model_metadata("aged")["inputs"]]
        found = client.infer("aged", inputs, parameters=fields_of("aged"))
    changed = np.abs(pixels(found.as_numpy("IMAGE")[0]) - pixels(image))
    assert changed[:, 48:].max() == 0
    assert changed[:, :48].mean() > 1


def test_a_client_of_triton_reads_what_was_wrong(address: str) -> None:
    with triton_client(address) as client:
        inputs = [tensor("IMAGE", jpeg())]
        with pytest.raises(InferenceServerException, match="steps") as refused:
            client.infer("comic", inputs, parameters={"steps": 0})
        assert refused.value.status() == "400"
        with pytest.raises(InferenceServerException, match="no such model"):
            client.infer("nobody", inputs)
        with pytest.raises(InferenceServerException, match="not read"):
            client.infer("comic", inputs, request_compression_algorithm="gzip")


@pytest.mark.parametrize("rounds", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_all_doors_at_once_give_the_same_pictures_and_share_passes(
    address: str, rounds: int
) -> None:
    images = {name: jpeg(seed=seed) for seed, name in enumerate(DOORS)}
    alone = {
        (name, task): pixels(native(address, task, image).picture)
        for name, image in images.items()
        for task in ROUTES
    }

    def one_by_one(name: str, task: str) -> list[Answer]:
        """Never two requests of a door to a model, so that a shared pass is shared by doors."""
        return [DOORS[name](address, task, images[name]) for _ in range(rounds)]

    with ThreadPoolExecutor(len(alone)) as threads:
        running = {key: threads.submit(one_by_one, *key) for key in alone}
        answers = {key: future.result() for key, future in running.items()}
    for key, found in answers.items():
        for answer in found:
            difference = np.abs(pixels(answer.picture) - alone[key]).mean()
            assert difference < MOST_DIFFERENCE, (key, difference)
    shared = {name for (name, _), found in answers.items() if any(a.batch_size > 1 for a in found)}
    assert shared == set(DOORS)
