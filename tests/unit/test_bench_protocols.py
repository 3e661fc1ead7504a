"""What goes over the wire in each protocol, and what is read of the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.load.plan import Target
from benchmarks.load.protocols import call, read_answer, stages_s
from benchmarks.load.workload import Request
from deployments.tasks import Task
from tests.unit.bench_server import HEADERS, JSON_LENGTH, PICTURE, elements, kserve_answer

REQUEST = Request(
    0, "comic", Task.COMIC, None, (4, 4), {"steps": 4, "prompt": "a fox & ü", "flag": True}
)


def target(**values: Any) -> Target:
    return Target.model_validate(values)


def test_kserve_sends_two_binary_tensors() -> None:
    made = call(target(protocol="kserve", shape=[1, 1]), REQUEST, b"\xff\xd8photo")
    assert made.path == "/v2/models/comic/infer"
    length = int(made.headers[JSON_LENGTH])
    head = json.loads(made.body[:length])
    assert [(i["name"], i["datatype"], i["shape"]) for i in head["inputs"]] == [
        ("IMAGE", "BYTES", [1, 1]),
        ("PARAMETERS", "BYTES", [1, 1]),
    ]
    sizes = [i["parameters"]["binary_data_size"] for i in head["inputs"]]
    assert sum(sizes) == len(made.body) - length
    image, parameters = elements(made.body[length:])
    assert image == b"\xff\xd8photo"
    assert json.loads(parameters) == REQUEST.parameters
    assert head["outputs"] == [{"name": "IMAGE", "parameters": {"binary_data": True}}]


@pytest.mark.parametrize("before", [None, b"12345"])
def test_a_kserve_answer_is_a_picture(before: bytes | None) -> None:
    headers, body = kserve_answer(PICTURE, before)
    assert read_answer(target(protocol="kserve"), 200, headers, body).code is None


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        kserve_answer(b"no picture"),
        ({}, PICTURE),
        ({JSON_LENGTH: "9"}, b"{}"),
        ({JSON_LENGTH: "2"}, b"{}"),
        ({JSON_LENGTH: "x"}, b"{}"),
    ],
)
def test_a_kserve_answer_without_a_picture_is_recognised(
    headers: dict[str, str], body: bytes
) -> None:
    assert read_answer(target(protocol="kserve"), 200, headers, body).code == "no picture"


def test_raw_sends_the_photo_as_the_body_and_parameters_in_the_query() -> None:
    made = call(target(protocol="raw", paths={"comic": "/v1/comic?a=1"}), REQUEST, b"\xff\xd8photo")
    assert made.path == "/v1/comic?a=1&steps=4&prompt=a+fox+%26+%C3%BC&flag=true"
    assert made.body == b"\xff\xd8photo"
    assert made.headers == {"Content-Type": "image/jpeg"}


def test_an_explicit_path_goes_before_the_targets() -> None:
    request = Request(0, "/other", None, "/other", (4, 4), {})
    assert call(target(protocol="raw"), request, b"").path == "/other"
    assert call(target(protocol="kserve"), request, b"").path == "/other"


def test_an_answer_tells_batch_gpu_time_and_stages() -> None:
    answer = read_answer(target(), 200, HEADERS, PICTURE)
    assert (answer.batch_size, answer.gpu_seconds) == (2, 0.5)
    assert answer.stages_s == {"decode": 0.01, "denoise": 1.5}


@pytest.mark.parametrize("value", ["", "many", "nan", "inf"])
def test_headers_that_are_no_numbers_are_not_measured(value: str) -> None:
    headers = {"X-Imagen-Batch-Size": value, "X-Imagen-Gpu-Seconds": value}
    answer = read_answer(target(), 200, headers, PICTURE)
    assert (answer.code, answer.batch_size, answer.gpu_seconds) == (None, None, None)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (429, b'{"code": "full", "detail": "Every queue is full."}', "full"),
        (500, b"Internal Server Error", "HTTP 500"),
        (400, b"[1]", "HTTP 400"),
        (302, b"", "HTTP 302"),
        (200, b"<html>busy</html>", "no picture"),
        (200, b"", "no picture"),
    ],
)
def test_what_is_no_picture_has_a_code(status: int, body: bytes, code: str) -> None:
    assert read_answer(target(), status, {}, body).code == code


@pytest.mark.parametrize(
    ("header", "stages"),
    [
        ("", {}),
        ("cache", {}),
        ('db;desc="x";dur=5', {"db": 0.005}),
        ("a;dur=x, b;dur=2000", {"b": 2.0}),
    ],
)
def test_server_timing_is_read_as_far_as_it_can_be(header: str, stages: dict[str, float]) -> None:
    assert stages_s(header) == stages
