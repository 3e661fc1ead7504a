"""Every refusal that a client can bring about says what is wrong, what was found and what to do."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve.test_http import is_problem, jpeg

PHOTO = jpeg()
HEAD = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
IMAGE = HEAD % b"image"
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
END = b"\r\n--x--\r\n"
COMIC, BACKGROUND = "/style/comic", "/background/remove"


def form(*fields: tuple[str, str], image: bytes = PHOTO) -> dict[str, Any]:
    """A request with a picture; a field may come more than once."""
    parts = [("image", ("photo.jpg", image)), *((name, (None, text)) for name, text in fields)]
    return {"files": parts}


def raw(content: bytes, **headers: str) -> dict[str, Any]:
    return {"content": content, "headers": MULTIPART | headers}


@pytest.mark.parametrize(
    ("status", "path", "options"),
    [
        # The body
        (400, COMIC, raw(b"")),
        (400, COMIC, raw(IMAGE + PHOTO)),
        (400, COMIC, raw(b"\xff" * 1000)),
        (400, COMIC, raw(b"--x" + END)),
        (400, COMIC, raw(IMAGE, **{"content-type": "multipart/form-data"})),
        (400, COMIC, raw(b"--x\r\n\r\n" + PHOTO + END)),
        (400, COMIC, raw(HEAD % b"photo" + PHOTO + END)),
        (400, COMIC, form(*((f"field{i}", "1") for i in range(50)))),
        (400, COMIC, form(image=b"")),
        (413, COMIC, form(image=bytes(33 * 2**20))),
        (415, COMIC, raw(PHOTO, **{"content-type": "image/jpeg"})),
        (415, COMIC, {}),
        # The picture
        (400, COMIC, form(image=PHOTO[:30])),
        (400, COMIC, form(image=PHOTO[: len(PHOTO) // 2])),
        (413, "/upscale", form(image=jpeg(2000, 1600))),
        (415, COMIC, form(image=b"no picture")),
        (415, COMIC, form(image=b"\0\0\0\x0cJXL \r\n\x87\n")),
        (400, COMIC, form(image=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")),
        # The fields
        (422, COMIC, form(("steps", "1"), ("steps", "2"))),
        (422, COMIC, form(("steps", ""))),
        (422, COMIC, form(("steps", "151"))),
        (422, COMIC, form(("steps", "many"), ("strength", "2"), ("wat", ""))),
        (422, COMIC, form(("steps", "3"), ("strength", "0.1"))),
        (422, COMIC, form(("strength", "0.01"))),
        (422, COMIC, form(("strength", "nan"))),
        (422, COMIC, form(("seed", "-2"))),
        (422, COMIC, form(("prompt", "bell\x07"))),
        (422, COMIC, form(("prompt", "x" * 70_000))),
        (422, COMIC, raw(IMAGE + PHOTO + b"\r\n" + HEAD % b"prompt" + b"\xed\xa0\x80" + END)),
        (422, COMIC, form(("output_size", "large"))),
        (422, "/upscale", form(("prompt", "a cat"), ("strict", "true"))),
        (422, BACKGROUND, form(("color", "#1AFF80"))),
        (422, BACKGROUND, form(("color", "reddish"), ("output", "color"))),
        (422, BACKGROUND, form(("output_format", "jpeg"))),
        # The rest
        (404, "/sharpen", form()),
        (405, COMIC, {"method": "PUT"}),
        (406, COMIC, form() | {"headers": {"accept": "text/html"}}),
        (422, COMIC, form() | {"params": {"steps": "5"}}),
    ],
)
def test_it_is_told(address: str, status: int, path: str, options: dict[str, Any]) -> None:
    request = {"method": "POST", "timeout": 60} | options
    assert is_problem(httpx.request(url=f"{address}/api/v1/images{path}", **request), status)
