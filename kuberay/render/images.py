"""kuberay/images.lock: the digest of each image, as its registry gives it for a tag."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import httpx
from pydantic import Field

from deployments.errors import ConfigError, SourceFailed
from deployments.settings import Strict, parse_settings, resolve
from kuberay.render.environment import Environment, Image, read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path


UNRESOLVED = "unresolved"
_HEADER = """\
# The digest of each image in the manifests, and of `python`, the base of ours. `make image-lock`
# writes it from the answers of the registries. `sha256:unresolved` is a placeholder: clusters
# and Docker refuse it, and so does `imagen kuberay validate` without --allow-placeholder.
"""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# An index first: one digest for all architectures.
_ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_DOCKER_HUB = "registry-1.docker.io"
_TIMEOUT_S = 30


class _Lock(Strict):
    images: dict[str, Annotated[str, Field(pattern=f"^sha256:([0-9a-f]{{64}}|{UNRESOLVED})$")]]


def load_digests(lock: Path) -> dict[str, str]:
    """The digests in the lock file, by name of the image.

    Raises:
        ConfigError: the file cannot be read, or a value is not a digest.
    """
    return parse_settings(_Lock, {"images": read_yaml(lock)}, str(lock)).images


def write_digests(lock: Path, digests: Mapping[str, str]) -> None:
    """Replace the lock file."""
    lines = "".join(f"{name}: {digest}\n" for name, digest in sorted(digests.items()))
    resolve(lock).write_text(_HEADER + lines, encoding="utf-8")


def pulled(environments: Iterable[Environment], names: Sequence[str] = ()) -> dict[str, Image]:
    """The images that come from registries, by name: all, or those of `names`.

    Raises:
        ConfigError: there is no image of such a name.
    """
    every = [item for one in environments for item in one.images.items()]
    images = {name: image for name, image in every if not image.local}
    if unknown := [name for name in names if name not in images]:
        raise ConfigError(
            "There is no such image.",
            value=", ".join(unknown),
            remedy=f"Name one of {', '.join(sorted(images))}.",
        )
    return {name: images[name] for name in names or images}


def look_up(
    images: Mapping[str, Image], tag: str | None, token: str | None, client: httpx.Client
) -> dict[str, str]:
    """Ask the registries for the digests of the images' tags.

    Args:
        images: by name.
        tag: of those whose source names none.
        token: of Google Cloud, sent to its registries only.
        client: to ask with.

    Raises:
        ConfigError: a repository is not filled in, or an image has no tag.
        SourceFailed: a registry refuses, or returns no digest.
    """
    found: dict[str, str] = {}
    for name, image in images.items():
        chosen_tag = image.tag or tag
        if UNRESOLVED in image.repository or not chosen_tag:
            raise ConfigError(
                f"The image {name} cannot be looked up: it has no registry, or no tag.",
                value=f"{image.repository}:{chosen_tag or ''}",
                remedy="Fill in `images` in configs/gke.yaml, and give --tag.",
            )
        found[name] = _digest(image.repository, chosen_tag, token, client)
    return found


def _digest(repository: str, tag: str, token: str | None, client: httpx.Client) -> str:
    host, _, path = repository.partition("/")
    url = f"https://{_DOCKER_HUB if host == 'docker.io' else host}/v2/{path}/manifests/{tag}"
    google = host.endswith(("-docker.pkg.dev", ".gcr.io")) or host == "gcr.io"
    try:
        answer = client.head(url, headers={"Accept": _ACCEPT}, timeout=_TIMEOUT_S)
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            bearer = _bearer(answer, token if google else None, client)
            headers = {"Accept": _ACCEPT, "Authorization": f"Bearer {bearer}"}
            answer = client.head(url, headers=headers, timeout=_TIMEOUT_S)
        answer.raise_for_status()
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise SourceFailed(
            f"The registry does not return the digest of {repository}:{tag}: {error!r}.",
            remedy="Push the image first; for a registry of Google, renew the token.",
        ) from error
    digest = answer.headers.get("docker-content-digest", "")
    if not _DIGEST.fullmatch(digest):
        raise SourceFailed(f"The registry returns no digest of {repository}:{tag}.", value=digest)
    return digest


def _bearer(refusal: httpx.Response, token: str | None, client: httpx.Client) -> str:
    """A token for reading, from the server that the refusal names; anonymous without `token`."""
    challenge = refusal.headers.get("www-authenticate", "")
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    credentials = ("oauth2accesstoken", token) if token else None
    answer = client.get(
        fields["realm"],
        params={key: fields[key] for key in ("service", "scope") if key in fields},
        auth=credentials,
        timeout=_TIMEOUT_S,
    )
    answer.raise_for_status()
    given: Any = answer.json()
    return str(given.get("token") or given["access_token"])
