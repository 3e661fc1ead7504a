"""Any body becomes the right form or a clear refusal, and any error the same kind of answer."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from deployments import errors
from deployments.contract import ImageJob, parse
from deployments.errors import (
    ImagenError,
    InvalidParameter,
    MalformedRequest,
    NotAcceptable,
    RequestError,
    UnsupportedMedia,
)
from deployments.notes import Code, note
from deployments.tasks import Task
from serve_app.intake import choose_format
from serve_app.problem import error_response
from serve_app.protocols import multipart, native
from tests.unit.fakes import chunks, result_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

    from deployments.contract import OutputFormat

MULTIPART = "multipart/form-data; boundary=cut"
IMAGE = bytes(range(256)) * 3


def scope() -> Scope:
    """Of a request with an id."""
    return {"type": "http", "path": "/", "state": {"request_id": "id"}}


async def read(parts: Sequence[bytes], content_type: str | None = MULTIPART) -> multipart.Form:
    headers = [] if content_type is None else [(b"content-type", content_type.encode("latin-1"))]
    body = chunks(parts)
    request = Request(
        {"type": "http", "method": "POST", "path": "/", "headers": headers}, lambda: anext(body)
    )
    return await multipart.read_form(request)


async def refusal(
    kind: type[ImagenError], body: bytes, content_type: str | None = MULTIPART
) -> ImagenError:
    with pytest.raises(kind) as caught:
        await read([body], content_type)
    assert type(caught.value) is kind
    assert caught.value.message
    assert caught.value.value
    return caught.value


def part(name: str | bytes, data: bytes, *, filename: str = "") -> bytes:
    name = name.encode() if isinstance(name, str) else name
    file = f'; filename="{filename}"'.encode() if filename else b""
    head = b'--cut\r\nContent-Disposition: form-data; name="' + name + b'"' + file
    return head + b"\r\n\r\n" + data + b"\r\n"


def test_a_file_that_nobody_chose_is_no_file() -> None:
    """A page sends an empty part with an empty name for it."""
    unset = b'--cut\r\nContent-Disposition: form-data; name="background"; filename=""\r\n\r\n\r\n'
    form = asyncio.run(read([body_of(PHOTO, unset)]))
    assert form == multipart.Form(IMAGE)


def body_of(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--cut--\r\n"


PHOTO = part("image", IMAGE, filename="photo.png")
WHOLE = body_of(PHOTO, part("prompt", "café 🐈".encode()), part("steps", b"20"))


# Bodies


async def test_a_form_is_read_as_it_was_sent() -> None:
    form = await read([WHOLE])
    assert form.image == IMAGE
    assert form.fields == {"prompt": "café 🐈", "steps": "20"}


async def test_a_body_that_comes_byte_by_byte_gives_the_same_form() -> None:
    assert await read([bytes([byte]) for byte in WHOLE]) == await read([WHOLE])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cuts=st.lists(st.integers(0, len(WHOLE)), max_size=8))
def test_a_body_cut_anywhere_gives_the_same_form(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    parts = [WHOLE[a:b] for a, b in pairwise(edges)]
    assert asyncio.run(read(parts)) == multipart.Form(IMAGE, {"prompt": "café 🐈", "steps": "20"})


async def test_an_image_that_holds_almost_a_boundary_stays_whole() -> None:
    tricky = b"\r\n--cu\r\n--cut-ish"[:-5] + b"x\r\n--\r\n\r\n"
    assert (await read([body_of(part("image", tricky))])).image == tricky


async def test_the_image_may_come_last_and_without_a_file_name() -> None:
    form = await read([body_of(part("steps", b"20"), part("image", IMAGE))])
    assert (form.image, form.fields) == (IMAGE, {"steps": "20"})


async def test_a_background_is_a_file_or_a_colour() -> None:
    large = b"x" * (multipart.MAX_FIELD_BYTES + 1)
    form = await read([body_of(PHOTO, part("background", large, filename="beach.jpg"))])
    assert (form.background, form.fields) == (large, {"background": "picture"})
    form = await read([body_of(PHOTO, part("mask", large, filename="mask.png"))])
    assert (form.mask, form.fields) == (large, {"mask": "picture"})
    with pytest.raises(InvalidParameter, match="more than once"):
        await read([body_of(PHOTO, part("mask", b"x", filename="m.png"), part("mask", b"alpha"))])
    form = await read([body_of(PHOTO, part("background", b"teal"))])
    assert (form.background, form.fields) == (None, {"background": "teal"})


async def test_an_empty_image_is_left_for_the_image_reader_to_refuse() -> None:
    assert (await read([body_of(part("image", b"", filename="photo.png"))])).image == b""


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data; boundary=cut", 'Multipart/Form-Data; charset=utf-8; boundary="cut"'],
)
async def test_a_content_type_may_be_written_in_many_ways(content_type: str) -> None:
    assert (await read([WHOLE], content_type)).image == IMAGE


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "image/png",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=cut",
        "text/plain; boundary=cut",
        "\xe9\xff",
    ],
)
async def test_a_body_that_is_not_a_form_is_unsupported(content_type: str | None) -> None:
    error = await refusal(UnsupportedMedia, b'{"image": ""}', content_type)
    assert error.value == (content_type or "no content-type").split(";")[0]
    assert "curl -F image=" in error.remedy


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "x" * 300,
        "multipart/form-data; boundary=other",
        "multipart/form-data; boundary=\xe9",
    ],
)
async def test_a_boundary_missing_or_wrong_is_malformed(content_type: str) -> None:
    assert "curl -F image=" in (await refusal(MalformedRequest, WHOLE, content_type)).remedy


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\r\n",
        b"not multipart",
        WHOLE[:10],
        WHOLE[: len(WHOLE) // 2],
        WHOLE[: -len("--cut--\r\n")],
        WHOLE[:-6],
        WHOLE.replace(b"\r\n", b"\n"),
        b"--cut\r\nContent Disposition: x\r\n\r\n\r\n--cut--",
        b"--cut\r\n" + b"X: y\r\n" * 100 + b"\r\n\r\n--cut--",
        b"--cut\r\nX: " + b"y" * 100_000 + b"\r\n\r\n\r\n--cut--",
    ],
)
async def test_a_broken_body_is_malformed(body: bytes) -> None:
    await refusal(MalformedRequest, body)


async def test_every_truncation_is_malformed() -> None:
    body = body_of(part("image", b"ab"), part("steps", b"20"))
    closed = body.index(b"--cut--") + len(b"--cut--")
    for length in range(closed):
        await refusal(MalformedRequest, body[:length])


async def test_a_form_without_an_image_is_malformed_and_says_what_it_had() -> None:
    error = await refusal(MalformedRequest, body_of(part("photo", IMAGE), part("steps", b"2")))
    assert error.value == "photo, steps"
    assert "-F image=@photo.jpg" in error.remedy


@pytest.mark.parametrize("name", ["image", "steps"])
async def test_a_field_twice_is_refused_by_name(name: str) -> None:
    body = body_of(PHOTO, part("steps", b"2"), part(name, b"3"))
    assert name in (await refusal(InvalidParameter, body)).message


@pytest.mark.parametrize(
    "data",
    [
        "café".encode("latin-1"),
        b"\xff\xfe",
        b"\xed\xa0\x80",  # a lone surrogate, as CESU-8 writes it
        b"cat \xed\xa0\xbd\xed\xb8\xba",  # a pair of them
        b"\xc0\x80",
    ],
)
async def test_text_that_is_not_utf_8_is_refused_by_name(data: bytes) -> None:
    error = await refusal(InvalidParameter, body_of(PHOTO, part("prompt", data)))
    assert "prompt" in error.message
    assert error.value.encode()
    assert "UTF-8" in error.remedy


async def test_a_field_may_be_as_long_as_the_limit_and_no_longer() -> None:
    longest = b"x" * multipart.MAX_FIELD_BYTES
    assert (await read([body_of(PHOTO, part("prompt", longest))])).fields["prompt"]
    error = await refusal(InvalidParameter, body_of(PHOTO, part("prompt", longest + b"x")))
    assert "prompt" in error.message
    assert str(multipart.MAX_FIELD_BYTES) in error.message


async def test_a_field_too_long_is_refused_before_it_has_all_arrived() -> None:
    start = part("prompt", b"x" * (multipart.MAX_FIELD_BYTES + 1))
    with pytest.raises(InvalidParameter):
        await read([start, b"never ends"])


async def test_a_form_may_have_as_many_parts_as_the_limit_and_no_more() -> None:
    full = [PHOTO, *(part(f"f{n}", b"") for n in range(multipart.MAX_PARTS - 1))]
    assert len((await read([body_of(*full)])).fields) == multipart.MAX_PARTS - 1
    error = await refusal(MalformedRequest, body_of(*full, part("one more", b"")))
    assert f"more than {multipart.MAX_PARTS} parts" in error.message


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"Content-Type: image/png\r\n",
        b"Content-Disposition: form-data\r\n",
        b'Content-Disposition: form-data; name=""\r\n',
        b'Content-Disposition: form-data; filename="photo.png"\r\n',
    ],
)
async def test_a_part_without_a_name_is_malformed(head: bytes) -> None:
    await refusal(MalformedRequest, b"--cut\r\n" + head + b"\r\ndata\r\n--cut--\r\n")


@pytest.mark.parametrize("encoding", ["base64", "Quoted-Printable"])
async def test_a_part_that_is_encoded_is_malformed(encoding: str) -> None:
    line = f"Content-Transfer-Encoding: {encoding}\r\n\r\n".encode()
    error = await refusal(
        MalformedRequest,
        body_of(PHOTO, part("prompt", b"aGk=").replace(b"\r\n\r\n", b"\r\n" + line)),
    )
    assert encoding in error.value
    plain = part("prompt", b"hi").replace(
        b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: 8BIT\r\n\r\n"
    )
    assert (await read([body_of(PHOTO, plain)])).fields == {"prompt": "hi"}


async def test_a_name_that_is_no_text_becomes_a_field_nobody_knows() -> None:
    form = await read([body_of(PHOTO, part(b"\xff\xfe", b"1"))])
    with pytest.raises(InvalidParameter, match="is not a parameter of comic"):
        parse(Task.COMIC.request, form.fields)


async def test_an_image_may_be_named_as_lists_are() -> None:
    assert (await read([body_of(part("image[]", IMAGE))])).image == IMAGE
    both = body_of(PHOTO, part("image[]", IMAGE))
    assert "image" in (await refusal(InvalidParameter, both)).message


@pytest.mark.parametrize("preamble", [b"\r\n", b"--other\r\n", b"--cutlet\r\n", b"a\r\nb\r\n"])
@pytest.mark.parametrize("padding", [b"", b" ", b"\t \t"])
@pytest.mark.parametrize("piece", [1, 7, 10_000])
async def test_what_rfc_2046_allows_around_the_boundaries_is_left_out(
    preamble: bytes, padding: bytes, piece: int
) -> None:
    body = WHOLE.replace(b"--cut\r\n", b"--cut" + padding + b"\r\n")
    body = preamble + body.replace(b"--cut--", b"--cut--" + padding) + b"an epilogue"
    pieces = [body[at : at + piece] for at in range(0, len(body), piece)]
    assert await read(pieces) == await read([WHOLE])


async def test_a_preamble_has_an_end() -> None:
    long = b"x" * 70_000
    error = await refusal(MalformedRequest, long + b"\r\n" + WHOLE)
    assert "curl -F image=" in error.remedy
    assert (await read([long[:60_000] + b"\r\n" + WHOLE])).image == IMAGE


fragments = st.sampled_from(
    [
        b"--cut",
        b"--cut--",
        b"\r\n",
        b"\r",
        b"\n",
        b": ",
        b'Content-Disposition: form-data; name="image"',
        b'Content-Disposition: form-data; name="steps"',
        b"Content-Disposition: form-data; name*=utf-8''%ff",
        b"Content-Type: text/plain; charset=utf-16",
        b"Content-Transfer-Encoding: base64",
        b"\xed\xa0\x80",
    ]
)


async def attempt(
    parts: Sequence[bytes], content_type: str = MULTIPART
) -> multipart.Form | RequestError:
    """What came of it; any other error goes on."""
    try:
        return await read(parts, content_type)
    except RequestError as error:
        return error


bodies = st.lists(fragments | st.binary(max_size=12), max_size=24)


@settings(deadline=None, max_examples=400)
@given(parts=bodies)
def test_no_body_raises_anything_but_our_own_errors(parts: list[bytes]) -> None:
    for pieces in ([b"".join(parts)], parts, [PHOTO, *parts, b"\r\n--cut--"]):
        outcome = asyncio.run(attempt(pieces or [b""]))
        if isinstance(outcome, RequestError):
            assert json.loads(bytes(error_response(outcome, scope()).body))["fact"]
        else:
            assert "image" not in outcome.fields


@settings(deadline=None, max_examples=200)
@given(
    content_type=st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=60)
    | st.text("multipart/form-data; boundary=*'\"\\,", max_size=60).map(
        lambda tail: "multipart/form-data; " + tail
    )
)
def test_no_content_type_raises_anything_but_our_own_errors(content_type: str) -> None:
    asyncio.run(attempt([WHOLE], content_type))


# The output format


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "png"),
        ("  ", "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("image/webp", "webp"),
        ("image/jpeg", "jpeg"),
        ("IMAGE/JPEG", "jpeg"),
        ("image/webp, image/jpeg", "webp"),
        ("image/webp;q=0.5, image/jpeg;q=0.8", "jpeg"),
        ("image/webp; q=0.5 , image/jpeg ; q=0.8", "jpeg"),
        ("image/webp, */*;q=0.8", "webp"),
        ("*/*, image/png;q=0.1", "webp"),
        ("*/*, image/png;q=0", "webp"),
        ("image/*;q=0, image/jpeg", "jpeg"),
        ("*/*;q=0, image/*", "png"),
        ("text/html, image/png;q=0.001", "png"),
        ("image/webp;level=1;q=0.2, image/png;q=0.1", "webp"),
        ("image/webp;q=high, image/png;q=0.1", "png"),
        ("image/webp;q=nan, image/png;q=0.1", "png"),
        ("image/avif,image/webp,image/apng,image/*,*/*;q=0.8", "png"),
        (",,image/jpeg,,", "jpeg"),
    ],
)
def test_the_format_is_the_one_the_client_likes_best(accept: str, expected: OutputFormat) -> None:
    assert choose_format(None, accept, transparent=False) == expected


@pytest.mark.parametrize(
    "accept",
    ["text/html", "image/avif", "image/png;q=0", "*/*;q=0", "image/*;q=0.0", "image", ";"],
)
def test_a_client_that_takes_no_format_of_ours_is_told_which_there_are(accept: str) -> None:
    with pytest.raises(NotAcceptable) as caught:
        choose_format(None, accept, transparent=False)
    assert caught.value.value == accept
    assert "image/png, image/webp, image/jpeg" in caught.value.remedy


@pytest.mark.parametrize("wanted", ["png", "webp", "jpeg"])
def test_the_parameter_goes_before_the_header(wanted: OutputFormat) -> None:
    for accept in ("text/html", "image/png", "*/*;q=0"):
        assert choose_format(wanted, accept, transparent=False) == wanted


def test_a_transparent_result_is_never_a_jpeg() -> None:
    assert choose_format(None, "image/jpeg, */*;q=0.1", transparent=True) == "png"
    assert choose_format(None, "image/jpeg, image/webp;q=0.1", transparent=True) == "webp"
    with pytest.raises(NotAcceptable) as caught:
        choose_format(None, "image/jpeg", transparent=True)
    assert "jpeg" not in caught.value.remedy


@given(accept=st.text(st.characters(max_codepoint=255), max_size=60))
def test_no_accept_header_is_a_surprise(accept: str) -> None:
    try:
        chosen = choose_format(None, accept, transparent=False)
    except NotAcceptable:
        return
    assert chosen in ("png", "webp", "jpeg")


# Answers


JOB = ImageJob(parse(Task.COMIC.request, {}), IMAGE, "webp", 60.0)


def test_a_picture_says_what_happened() -> None:
    notes = (
        note(Code.FRAMES_DROPPED, "The first of 3 frames was used."),
        note(Code.PROFILE_CONVERTED, "Converted from Gr\u00fcn\r\nX: 1."),
    )
    response = native.image_response(result_of(JOB, "comic-starter", notes=notes))
    assert response.body == IMAGE
    assert response.headers["content-type"] == "image/webp"
    assert response.headers["x-imagen-model"] == "comic-starter@0123abcd"
    assert response.headers["x-imagen-seed"] == "7"
    assert response.headers["x-imagen-batch-size"] == "3"
    assert response.headers["x-imagen-gpu-seconds"] == "0.2500"
    assert response.headers["x-imagen-size"] == "24x16"
    assert response.headers.getlist("x-imagen-note") == [
        "frames_dropped: The first of 3 frames was used.",
        "profile_converted: Converted from Gr\\xfcn  X: 1.",
    ]
    assert response.headers["server-timing"] == "decode;dur=1.0, denoise;dur=1500.0"
    assert response.headers["vary"] == "Accept"
    assert response.headers["cache-control"] == "no-store"


def test_a_seed_of_zero_is_told_and_no_seed_is_not() -> None:
    assert (
        native.image_response(result_of(JOB, "comic-starter", seed=0)).headers["x-imagen-seed"]
        == "0"
    )
    bare = native.image_response(result_of(JOB, "upscale-starter", seed=None))
    assert not {"x-imagen-seed", "x-imagen-note"} & set(bare.headers)


def test_an_error_is_told_with_fact_value_and_remedy() -> None:
    finding = errors.Problem(parameter="steps", fact="too many", value="151", remedy="Fewer.")
    error = InvalidParameter("Too many.", value=151, remedy="Send fewer.", problems=(finding,))
    assert error.details("request-1") == {
        "type": "urn:imagen:problem:invalid_parameter",
        "title": error.status.phrase,
        "status": 422,
        "code": "invalid_parameter",
        "detail": "Too many (got 151). Send fewer.",
        "fact": "Too many.",
        "value": "151",
        "remedy": "Send fewer.",
        "request_id": "request-1",
        "errors": [finding],
    }


def test_an_error_of_one_finding_has_no_list() -> None:
    assert "errors" not in errors.NotFound("No.").details("id")


@pytest.mark.parametrize(("wait_s", "header"), [(2, "2"), (0.1, "1"), (2.01, "3"), (0, "0")])
def test_a_wait_is_told_in_whole_seconds_rounded_up(wait_s: float, header: str) -> None:
    response = error_response(errors.Full("Full.", retry_after_s=wait_s), scope())
    assert response.status_code == 429
    assert response.headers["retry-after"] == header
    assert response.headers["content-type"] == "application/problem+json"


def test_an_error_keeps_the_headers_it_is_given() -> None:
    response = error_response(errors.MethodNotAllowed("No."), scope(), {"Allow": "POST"})
    assert response.headers["allow"] == "POST"
    assert "retry-after" not in response.headers


def test_a_value_no_encoding_has_is_still_an_answer() -> None:
    response = error_response(errors.NotFound("No.", value="\ud800\xe9\n"), scope())
    assert json.loads(bytes(response.body))["value"] == r"\ud800é\n"
