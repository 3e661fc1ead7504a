"""The KServe V2 protocol, as bytes: what Triton's clients send, and what no client should."""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.plan import Target
from benchmarks.load.protocols import call, read_answer
from benchmarks.load.workload import Request
from deployments.errors import RequestError
from deployments.notes import Code, note
from deployments.settings import AccessSettings, ClientSettings
from deployments.tasks import Task
from serve_app.api import create_app
from serve_app.protocols.tensors import read_infer
from tests.unit.fakes import REGISTRY, FakeBackends, app_of, picture_file, result_of, send

if TYPE_CHECKING:
    from pathlib import Path

    import httpx
    from fastapi import FastAPI

PICTURE = picture_file()
COMIC = "/v2/models/comic/infer"
LENGTH = "inference-header-content-length"


def element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def tensor(name: str = "IMAGE", data: bytes = PICTURE, **changes: Any) -> dict[str, Any]:
    size = {"binary_data_size": len(data) + 4}
    return {"name": name, "shape": [1], "datatype": "BYTES", "parameters": size} | changes


def in_json(**changes: Any) -> dict[str, Any]:
    text = base64.b64encode(PICTURE).decode()
    return {"name": "IMAGE", "shape": [1], "datatype": "BYTES", "data": [text]} | changes


@pytest.fixture
def backends() -> FakeBackends:
    return FakeBackends()


@pytest.fixture
def app(backends: FakeBackends) -> FastAPI:
    return app_of(backends)


async def infer(
    app: FastAPI, head: dict[str, Any], rest: bytes = b"", path: str = COMIC, **headers: str
) -> httpx.Response:
    text = json.dumps(head).encode()
    given = {LENGTH: str(len(text)), **headers} if rest else headers
    return await send(app, "POST", path, content=text + rest, headers=given)


async def test_a_picture_as_bytes_comes_back_as_bytes(app: FastAPI, backends: FakeBackends) -> None:
    parameters = {"strength": 0.4, "seed": 7, "prompt": "ink", "binary_data_output": True}
    head = {"id": "mine", "inputs": [tensor(shape=[1, 1])], "parameters": parameters}
    answer = await infer(app, head, element(PICTURE))
    assert answer.status_code == 200, answer.text
    size = int(answer.headers[LENGTH])
    said = json.loads(answer.content[:size])
    assert answer.content[size:] == element(PICTURE), "what the model was given"
    assert (said["id"], said["model_name"]) == ("mine", "comic")
    assert said["outputs"][0]["shape"] == [1, 1]
    (job,) = backends.jobs
    assert (job.request.strength, job.request.seed) == (0.4, 7)  # type: ignore[attr-defined]


async def test_a_picture_as_json_comes_back_as_json(app: FastAPI) -> None:
    answer = await infer(app, {"inputs": [in_json(data=[in_json()["data"]], shape=[1, 1])]})
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    assert base64.b64decode(output["data"][0]) == PICTURE
    assert output["parameters"] == {"content_type": "base64"}


async def test_parameters_may_be_a_tensor(app: FastAPI, backends: FakeBackends) -> None:
    values = json.dumps({"steps": 5}).encode()
    head = {"inputs": [tensor(), tensor("PARAMETERS", values)]}
    answer = await infer(app, head, element(PICTURE) + element(values))
    assert answer.status_code == 200, answer.text
    assert backends.jobs[0].request.steps == 5  # type: ignore[attr-defined]


async def test_a_background_is_an_input_of_its_own(app: FastAPI, backends: FakeBackends) -> None:
    beach = picture_file(30, 30)
    head = {"inputs": [tensor(), tensor("BACKGROUND", beach)]}
    path = "/v2/models/background/infer"
    answer = await infer(app, head, element(PICTURE) + element(beach), path)
    assert answer.status_code == 200, answer.text
    assert backends.jobs[0].background == beach
    twice = {**head, "parameters": {"background": "#ff0000"}}
    answer = await infer(app, twice, element(PICTURE) + element(beach), path)
    assert answer.status_code == 400
    assert len(backends.jobs) == 1


MASK = picture_file(mode="L")


async def masked(
    app: FastAPI, mask: bytes, parameters: dict[str, str], model: str = "comic"
) -> httpx.Response:
    head = {"inputs": [tensor(), tensor("MASK", mask)], "parameters": parameters}
    return await infer(app, head, element(PICTURE) + element(mask), f"/v2/models/{model}/infer")


async def test_a_mask_is_an_input_of_its_own(app: FastAPI, backends: FakeBackends) -> None:
    answer = await masked(app, MASK, {"mask_changes": "transparent"})
    assert answer.status_code == 200, answer.text
    (job,) = backends.jobs
    request: Any = job.request
    assert (job.image, job.mask) == (PICTURE, MASK)
    assert (request.mask, request.mask_changes) == ("picture", "transparent")


@pytest.mark.parametrize(
    ("model", "mask", "parameters", "told"),
    [
        ("comic", picture_file(32, 24), {}, "another size"),
        ("comic", b"no picture", {}, "Of the mask: "),
        ("background", MASK, {}, "mask is not a parameter of background"),
        ("comic", MASK, {"mask": "alpha"}, "mask is an input and a parameter"),
    ],
)
async def test_a_mask_that_does_not_fit_is_refused(
    model: str,
    mask: bytes,
    parameters: dict[str, str],
    told: str,
    app: FastAPI,
    backends: FakeBackends,
) -> None:
    answer = await masked(app, mask, parameters, model)
    assert answer.status_code in (400, 415)
    assert told in answer.json()["error"]
    assert not backends.jobs


async def test_the_answer_says_what_the_model_did(app: FastAPI, backends: FakeBackends) -> None:
    await infer(app, {"inputs": [in_json()]})
    lost = note(Code.PARAMETER_UNUSED, "steps was ignored.")
    backends.result = result_of(backends.jobs[0], "comic-starter", notes=(lost,))
    answer = await infer(app, {"inputs": [in_json()]})
    said = answer.json()["parameters"]
    assert said["notes"] == f"{lost.code}: {lost.text}" == answer.headers["x-imagen-note"]
    assert (said["seed"], said["batch_size"], said["model"]) == (7, 3, "comic-starter@0123abcd")
    assert answer.headers["server-timing"]


@pytest.mark.parametrize("name", ["comic", "comic-starter", "comic/versions/1"])
async def test_a_model_is_named_by_itself_or_its_task(name: str, app: FastAPI) -> None:
    assert (await infer(app, {"inputs": [in_json()]}, path=f"/v2/models/{name}/infer")).is_success
    assert (await send(app, "GET", f"/v2/models/{name}/ready")).json() == {"ready": True}
    known = (await send(app, "GET", f"/v2/models/{name}")).json()
    assert [one["name"] for one in known["inputs"]] == ["IMAGE", "MASK", "PARAMETERS"]
    assert known["outputs"] == [{"name": "IMAGE", "datatype": "BYTES", "shape": [1]}]


async def test_the_service_and_its_models_tell_when_they_are_ready() -> None:
    app = app_of(FakeBackends(other_states={"comic-starter": "starting"}))
    assert (await send(app, "GET", "/v2/health/live")).status_code == 200
    assert (await send(app, "GET", "/v2/models/aged/ready")).status_code == 200
    for path in ("/v2/health/ready", "/v2/models/comic/ready"):
        answer = await send(app, "GET", path)
        assert answer.status_code == 503
        assert "starting" in answer.json()["error"]
        assert answer.headers["retry-after"] == "13"
    assert (await send(app, "GET", "/v2")).json()["extensions"] == ["binary_tensor_data"]


CONFLICT = {"inputs": [in_json(), in_json(name="PARAMETERS", data=['{"steps": 1}'])]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "needs a picture"),
    ({"inputs": [in_json()], "inputz": []}, "inputz is not a parameter"),
    ({"inputs": [in_json(shape=[2])]}, "one element"),
    ({"inputs": [in_json(shape=[])]}, "one element"),
    ({"inputs": [in_json(shape=[1] * 9)]}, "shape"),
    ({"inputs": [in_json(shape=[-1])]}, "one element"),
    ({"inputs": [in_json(shape=[1, 1, 1])]}, "one element"),
    ({"inputs": [in_json(shape="1")]}, "shape"),
    ({"inputs": [in_json(datatype="FP32")]}, "not of type BYTES"),
    ({"inputs": [in_json(name="MASKS")]}, "no such input"),
    ({"inputs": [in_json(), in_json()]}, "more than once"),
    ({"inputs": [in_json(data=["not base64!"])]}, "not base64"),
    ({"inputs": [in_json(), in_json(name="PARAMETERS", data=["\ud800"])]}, "not JSON"),
    ({"inputs": [in_json(), in_json(name="PARAMETERS", data=["[]"])]}, "JSON object"),
    ({"inputs": [in_json(data=[1])]}, "one text"),
    ({"inputs": [in_json(data=[in_json()["data"][0]] * 2)]}, "one text"),
    ({"inputs": [in_json(data=[])]}, "one text"),
    ({"inputs": [in_json(extra=1)]}, "extra is not a parameter of an input"),
    ({"inputs": [in_json(parameters={"shared_memory_region": "x"})]}, "shared_memory_region"),
    ({"inputs": [in_json(parameters={"binary_data_size": 8})]}, "both data and"),
    ({"inputs": [in_json()], "outputs": [{"name": "LABELS"}]}, "no such output"),
    ({"inputs": [in_json()], "outputs": [{"name": "IMAGE", "parameters": {"x": 1}}]}, "x is not"),
    ({"inputs": [in_json()], "outputs": [{"name": "IMAGE"}] * 2}, "one output"),
    ({"inputs": [in_json()], "parameters": {"stepz": 3}}, "stepz is not a parameter"),
    ({"inputs": [in_json()], "parameters": {"priority": 3}}, "priority is not a parameter"),
    ({"inputs": [in_json()], "parameters": {"steps": 0}}, "steps"),
    ({"inputs": [in_json()], "parameters": {"steps": [3]}}, "steps must be"),
    ({"inputs": [in_json()], "parameters": {"n": 100}}, "n is not a parameter"),
    ({"inputs": [in_json()], "parameters": {"prompt": "a" * 65_537}}, "longer than"),
    ({"inputs": [in_json()], "parameters": {"model": "aged"}}, "names the model"),
    ({**CONFLICT, "parameters": {"steps": 2}}, "in the request's parameters and in PARAMETERS"),
    ({"inputs": [in_json(), in_json(name="BACKGROUND")]}, "background"),
    ({"id": "a" * 300, "inputs": [in_json()]}, "id"),
]


@pytest.mark.parametrize(("head", "words"), REFUSED)
async def test_what_is_wrong_is_refused_in_the_protocols_shape(
    head: dict[str, Any], words: str, app: FastAPI, backends: FakeBackends
) -> None:
    answer = await infer(app, head)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"
    assert not backends.jobs


SIZE = len(PICTURE) + 4


@pytest.mark.parametrize(
    ("size", "rest"),
    [
        (SIZE, element(PICTURE)[:-1]),
        (SIZE, element(PICTURE) + b"x"),
        (SIZE + 1, element(PICTURE)),
        (SIZE, struct.pack("<I", 2**32 - 1) + PICTURE),
        (SIZE, struct.pack("<I", len(PICTURE) - 1) + PICTURE),
        (3, b"abc"),
        (2**70, element(PICTURE)),
        (0, b"x"),
    ],
)
async def test_a_lying_length_is_refused(size: int, rest: bytes, app: FastAPI) -> None:
    answer = await infer(app, {"inputs": [tensor(parameters={"binary_data_size": size})]}, rest)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("length", ["", "0", "-1", "x", "99999", "9" * 5000, "1", "\u0663"])
async def test_a_lying_length_of_the_json_is_refused(length: str, app: FastAPI) -> None:
    answer = await send(
        app, "POST", COMIC, content=b'{"inputs":[]}', headers=[(LENGTH.encode(), length.encode())]
    )
    assert answer.status_code == 400, answer.text
    assert isinstance(answer.json()["error"], str)


async def test_two_lengths_of_the_json_are_refused(app: FastAPI, backends: FakeBackends) -> None:
    head = json.dumps({"inputs": [tensor()]}).encode()
    lengths = [(LENGTH, str(len(head))), (LENGTH, "5")]
    answer = await send(app, "POST", COMIC, content=head + element(PICTURE), headers=lengths)
    assert answer.status_code == 400, answer.text
    assert f"{len(head)}, 5" in answer.json()["error"]
    assert not backends.jobs


async def test_imagen_bench_speaks_it(app: FastAPI) -> None:
    target = Target(protocol="kserve")
    for steps, code in ((5, None), (0, "invalid_parameter")):
        request = Request(0, "comic", Task.COMIC, None, (24, 16), {"steps": steps})
        made = call(target, request, PICTURE)
        answer = await send(app, "POST", made.path, content=made.body, headers=made.headers)
        found = read_answer(target, answer.status_code, answer.headers, answer.content)
        assert found.code == code
        assert "steps" in found.detail if code else found.batch_size == 3


async def test_what_would_be_ignored_is_refused(app: FastAPI) -> None:
    head = {"inputs": [in_json()]}
    packed = {"content-encoding": "gzip"}
    assert (await infer(app, head, **packed)).status_code == 415
    assert (await infer(app, head, path=f"{COMIC}?steps=3")).status_code == 400


async def test_no_picture_and_too_large_a_body_keep_their_status(app: FastAPI) -> None:
    text = base64.b64encode(b"no picture").decode()
    assert (await infer(app, {"inputs": [in_json(data=[text])]})).status_code == 415
    small = app_of(max_body_bytes=1024)
    answer = await infer(small, {"inputs": [in_json()], "id": "a" * 2000})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


@pytest.mark.parametrize("path", ["nobody/infer", "comic/versions/2/infer", "nobody", "x/y/z"])
async def test_what_is_not_there_is_404(path: str, app: FastAPI) -> None:
    method = "POST" if path.endswith("infer") else "GET"
    answer = await send(app, method, f"/v2/models/{path}", json={})
    assert answer.status_code == 404
    assert "error" in answer.json()


async def test_probes_need_no_key_and_models_do(tmp_path: Path) -> None:
    access = AccessSettings(auth="keys", keys=tmp_path / "keys.yaml")
    app = create_app(FakeBackends(), REGISTRY, ClientSettings(access=access))
    assert (await send(app, "GET", "/v2/health/ready")).status_code == 200
    for method, path in (("GET", "/v2"), ("POST", COMIC)):
        answer = await send(app, method, path)
        assert answer.status_code == 401
        assert "API key" in answer.json()["error"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
_HEADS = st.fixed_dictionaries(
    {},
    optional={
        name: _JSON | st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(tensor(), _JSON)))
        for name in ("id", "inputs", "outputs", "parameters")
    },
)


@given(head=_HEADS, rest=st.binary(max_size=20), off=st.integers(-3, 3) | st.none())
def test_no_body_raises_anything_but_a_refusal(
    head: dict[str, Any], rest: bytes, off: int | None
) -> None:
    text = json.dumps(head).encode()
    with contextlib.suppress(RequestError):
        read_infer(text + rest, None if off is None else str(len(text) + off))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shape": []}, "(got [])"),
        ({"shape": [True]}, "(got true)"),
        ({"shape": None}, "(got null)"),
        ({"datatype": ""}, "is not of type BYTES. Send"),
        ({"data": []}, "(got [])"),
        ({"data": None}, "(got no data)"),
        ({"data": ["a", "b"]}, '(got ["a", "b"])'),
        ({"data": [5]}, "(got [5])"),
        ({"data": ["https://example.com/a.png"]}, "(got https://example.com/a.png)"),
    ],
)
async def test_an_error_of_a_tensor_shows_what_was_found(
    changes: dict[str, Any], told: str, app: FastAPI
) -> None:
    answer = await infer(app, {"inputs": [in_json(**changes)]})
    assert answer.status_code == 400
    assert told in answer.json()["error"]


async def test_a_size_without_bytes_is_told_in_words(app: FastAPI) -> None:
    head = {"inputs": [tensor(parameters={"binary_data_size": 2})]}
    answer = await infer(app, head, b"ab")
    assert "(got binary_data_size 2, 2 bytes there, no length)" in answer.json()["error"]


@pytest.mark.parametrize("wrong", [b"{", b"[]", b"", b'{"a": 1, "a": 2}'])
async def test_a_wrong_json_among_the_tensors_is_told_from_the_body(
    wrong: bytes, app: FastAPI
) -> None:
    head = {"inputs": [tensor(), tensor("PARAMETERS", wrong)]}
    answer = await infer(app, head, element(PICTURE) + element(wrong))
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("Of the input PARAMETERS: ")


async def test_an_unknown_route_below_v2_is_refused_with_those_there_are(app: FastAPI) -> None:
    answer = await send(app, "GET", "/v2/repository/index")
    assert answer.status_code == 404
    assert "/v2/models/{name}/infer" in answer.json()["error"]
    assert "/api/v1" not in answer.json()["error"]
