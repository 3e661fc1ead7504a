"""Every door of the running application, by real clients of its protocol, alone and at once."""

from __future__ import annotations

import base64
import copy
import io
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import grpc
import httpx
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from deployments.settings import KeyLimits
from deployments.tasks import Task
from serve_app.access.editing import create_key
from serve_app.v2 import kserve_pb2 as pb
from tests.serve.conftest import clients_of, deploy
from tests.serve.test_http import SEEDED, jpeg

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPTS = {Task.GENERATE: "a red circle"}
OTHER_PROMPT = "ink drawing"
MOST_DIFFERENCE = 1.0
"""Mean of levels out of 255: rows that share a pass differ in their last bits."""


class Server(NamedTuple):
    """Where the application listens, and a key of its clients."""

    address: str
    token: str = "any"
    grpc_port: int = 0

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


class Asked(NamedTuple):
    """One picture of one task; a task that needs none gets none."""

    task: Task
    image: bytes
    mask: bytes | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """What every door sends beside the pictures."""
        if self.task not in SEEDED and self.task.needs_picture:
            return {}
        return {"prompt": PROMPTS.get(self.task, OTHER_PROMPT), "steps": 4, "seed": 7}

    @property
    def files(self) -> dict[str, bytes]:
        mask = {"mask": self.mask} if self.mask and self.task in SEEDED else {}
        return {"image": self.image, **mask} if self.task.needs_picture else {}


class Answer(NamedTuple):
    """A picture, and how many rows shared the last pass that made it."""

    picture: bytes
    batch_size: int


Door = Callable[[Server, Asked], Answer] if TYPE_CHECKING else Any


def native(server: Server, asked: Asked) -> Answer:
    form = {name: (None, str(value)) for name, value in asked.fields.items()}
    answer = httpx.post(
        f"{server.address}{asked.task.route}",
        files=form | {name: (name, file) for name, file in asked.files.items()},
        headers=server.headers,
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    return Answer(answer.content, int(answer.headers["x-imagen-batch-size"]))


def in_json(server: Server, asked: Asked) -> Answer:
    files = {name: base64.b64encode(file).decode() for name, file in asked.files.items()}
    headers = server.headers | {"Accept": "application/json"}
    answer = httpx.post(
        f"{server.address}{asked.task.route}",
        json=asked.fields | files,
        headers=headers,
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return Answer(base64.b64decode(found["image"]), found["batch_size"])


def by_openai(server: Server, asked: Asked) -> Answer:
    extra = {name: value for name, value in asked.fields.items() if name != "prompt"}
    prompt = asked.fields.get("prompt", OTHER_PROMPT)
    root = f"{server.address}/v1"
    with openai.OpenAI(base_url=root, api_key=server.token, max_retries=0) as client:
        if asked.task.needs_picture:
            made = client.images.edit(
                model=asked.task,
                image=("photo.jpg", asked.image, "image/jpeg"),
                prompt=prompt,
                extra_body=extra,
            )
        else:
            made = client.images.generate(model=asked.task, prompt=prompt, extra_body=extra)
    assert made.data is not None
    (one,) = made.data
    said: Any = one.model_extra
    return Answer(base64.b64decode(one.b64_json or ""), said["imagen"]["batch_size"])


def by_triton(server: Server, asked: Asked) -> Answer:
    inputs = [tensor(name.upper(), file) for name, file in asked.files.items()]
    with triton_client(server.address) as client:
        found = client.infer(asked.task, inputs, parameters=asked.fields, headers=server.headers)
    said = found.get_response()["parameters"]
    return Answer(found.as_numpy("IMAGE")[0], said["batch_size"])


def by_grpc(server: Server, asked: Asked) -> Answer:
    """Triton's own client for gRPC needs a process of its own (see test_grpc.py)."""
    message = pb.ModelInferRequest(model_name=asked.task)
    for name, value in asked.fields.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(message.parameters[name], kind, value)
    for name, file in asked.files.items():
        message.inputs.add(name=name.upper(), datatype="BYTES", shape=[1])
        message.raw_input_contents.append(struct.pack("<I", len(file)) + file)
    told = (("application", "imagen"), ("authorization", f"Bearer {server.token}"))
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        found = call(message, metadata=told, timeout=120)
    at = [output.name for output in found.outputs].index("IMAGE")
    return Answer(found.raw_output_contents[at][4:], found.parameters["batch_size"].int64_param)


DOORS: dict[str, Door] = {
    "native": native,
    "json": in_json,
    "openai": by_openai,
    "kserve": by_triton,
    "grpc": by_grpc,
}
ROUNDS = int(os.environ.get("IMAGEN_SOAK_ROUNDS", "2"))
MASKED = {"json", "grpc"}
"""Doors whose edits have a mask, so that rows with one and rows without share passes."""


def left_half() -> bytes:
    mask, file = Image.new("L", (96, 64)), io.BytesIO()
    mask.paste(255, (0, 0, 48, 64))
    mask.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def server(
    address: str, local_config: dict[str, Any], grpc_port: int, tmp_path: Path
) -> Iterator[Server]:
    """The application while it asks for keys, and so may listen for gRPC."""
    _, token = create_key(
        tmp_path / "keys.yaml", "everyone", KeyLimits(requests_per_s=1000, pictures=100)
    )
    application = local_config["applications"][0]
    changed = copy.deepcopy(application)
    keys = {"auth": "keys", "keys": str(tmp_path / "keys.yaml")}
    clients_of(changed).update(access=keys, grpc={"enabled": True})
    deploy(changed)
    yield Server(address, token, grpc_port)
    deploy(application)


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
    image, asked = jpeg(96, 64), Asked(Task.AGED, jpeg(96, 64), left_half())
    with triton_client(address) as client:
        assert "MASK" in [one["name"] for one in client.get_model_metadata("aged")["inputs"]]
    changed = np.abs(pixels(by_triton(Server(address), asked).picture) - pixels(image))
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


def test_all_doors_at_once_give_the_same_pictures_and_share_passes(server: Server) -> None:
    """Six tasks through five doors: 60 requests, or 210 with `make soak-doors`."""
    everything = {
        (name, task): Asked(task, jpeg(seed=seed), left_half() if name in MASKED else None)
        for seed, name in enumerate(DOORS)
        for task in Task
    }
    alone = {key: pixels(native(server, asked).picture) for key, asked in everything.items()}

    def one_by_one(name: str, asked: Asked) -> list[Answer]:
        """Never two requests of a door to a model, so that a shared pass is shared by doors."""
        return [DOORS[name](server, asked) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(everything)) as threads:
        running = {
            key: threads.submit(one_by_one, key[0], asked) for key, asked in everything.items()
        }
        answers = {key: future.result() for key, future in running.items()}
    for key, found in answers.items():
        for answer in found:
            difference = np.abs(pixels(answer.picture) - alone[key]).mean()
            assert difference < MOST_DIFFERENCE, (key, difference)
    shared = {name for (name, _), found in answers.items() if any(a.batch_size > 1 for a in found)}
    assert shared == set(DOORS)
