"""kuberay/images.lock: registries fill it, and nothing else does."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import httpx
import pytest

from deployments.errors import ConfigError, SourceFailed
from kuberay.render.environment import Image, load_environments
from kuberay.render.images import load_digests, look_up, pulled, write_digests
from tests.manifests.conftest import LOCK, SOURCE

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "sha256:" + "ab" * 32
GOOGLE = Image(repository="europe-docker.pkg.dev/mine/imagen/imagen-cpu")
HUB = Image(repository="docker.io/library/redis", tag="7.2")


class Registry:
    """A registry that asks for a token, like Docker Hub and those of Google."""

    def __init__(self, digest: str = DIGEST) -> None:
        self.digest = digest
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if request.url.path == "/token":
            return httpx.Response(200, json={"token": "for-reading"})
        if request.headers.get("authorization") != "Bearer for-reading":
            challenge = f'Bearer realm="https://{request.url.host}/token",service="s",scope="pull"'
            return httpx.Response(401, headers={"www-authenticate": challenge})
        return httpx.Response(200, headers={"docker-content-digest": self.digest})

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self))

    def credentials(self, host: str) -> list[str]:
        """The credentials that the token server of a host received."""
        return [
            base64.b64decode(one.headers["authorization"].removeprefix("Basic ")).decode()
            if "authorization" in one.headers
            else ""
            for one in self.asked
            if one.url.host == host and one.url.path == "/token"
        ]


def test_digests_are_what_registries_say() -> None:
    registry = Registry()
    images = {"imagen-cpu": GOOGLE, "redis": HUB}
    found = look_up(images, "abc123", "google's", registry.client)
    assert found == {"imagen-cpu": DIGEST, "redis": DIGEST}
    asked = {f"{one.url.host}{one.url.path}" for one in registry.asked if one.method == "HEAD"}
    assert asked == {
        "europe-docker.pkg.dev/v2/mine/imagen/imagen-cpu/manifests/abc123",
        "registry-1.docker.io/v2/library/redis/manifests/7.2",
    }


def test_googles_token_goes_to_google_alone() -> None:
    registry = Registry()
    look_up({"imagen-cpu": GOOGLE, "redis": HUB}, "abc123", "google's", registry.client)
    assert registry.credentials("europe-docker.pkg.dev") == ["oauth2accesstoken:google's"]
    assert registry.credentials("registry-1.docker.io") == [""]


@pytest.mark.parametrize("digest", ["", "sha256:short", "latest"])
def test_a_wrong_digest_is_refused(digest: str) -> None:
    with pytest.raises(SourceFailed, match="digest"):
        look_up({"redis": HUB}, None, None, Registry(digest).client)


def test_a_missing_image_is_named() -> None:
    nothing = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(404)))
    with pytest.raises(SourceFailed, match=r"redis:7\.2"):
        look_up({"redis": HUB}, None, None, nothing)


def test_placeholders_are_not_looked_up() -> None:
    images = pulled(load_environments(SOURCE).values())
    assert set(images) == {"imagen-cpu", "imagen-gpu", "python", "redis"}
    with pytest.raises(ConfigError, match="unresolved-project"):
        look_up(images, "abc123", None, Registry().client)


def test_the_base_is_looked_up_before_images_of_ours_exist() -> None:
    environments = load_environments(SOURCE).values()
    registry = Registry()
    base = pulled(environments, ["python"])
    assert look_up(base, None, None, registry.client) == {"python": DIGEST}
    assert registry.asked[0].url.path == "/v2/library/python/manifests/3.11-slim-bookworm"
    with pytest.raises(ConfigError, match="imagen-cpu, imagen-gpu, python, redis"):
        pulled(environments, ["pithon"])


def test_the_lock_is_written_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "images.lock"
    write_digests(path, {"redis": DIGEST, "imagen-cpu": DIGEST})
    assert load_digests(path) == {"imagen-cpu": DIGEST, "redis": DIGEST}


def test_the_committed_lock_has_a_line_for_each_image() -> None:
    assert set(load_digests(LOCK)) == set(pulled(load_environments(SOURCE).values()))


@pytest.mark.parametrize("text", ["redis: latest", "redis: sha256:1234", "- redis", "a: ["])
def test_a_lock_without_digests_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "images.lock").write_text(text)
    with pytest.raises(ConfigError):
        load_digests(tmp_path / "images.lock")
