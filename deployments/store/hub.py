"""hf://org/repo@<40 hex digits>: a repository of the Hugging Face hub at a pinned revision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from deployments.errors import Missing, SourceFailed
from deployments.origins import check_pinned, parse_hub
from deployments.store import environment
from deployments.store.bucket import RemoteFile
from deployments.store.web import check_status, client, http_errors, stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class HubReader:
    """Reads a repository through the hub's HTTP API, without its library.

    `HF_ENDPOINT` names another hub; `HF_TOKEN` is sent where it is set (gated models).

    Raises:
        ConfigError: the revision is not pinned.
    """

    def __init__(self, url: str) -> None:
        check_pinned(url)
        self.url = url
        self._repo, self._revision = parse_hub(url)

    def stat(self, paths: Sequence[str]) -> list[RemoteFile]:
        held = {f.path: f for f in list_repository(self._repo, self._revision)}
        absent = [path for path in paths if path not in held]
        if absent:
            raise Missing(
                f"{self._repo} has no {absent[0]} at that revision.",
                value=self.url,
                remedy="Correct `files` in the model registry.",
            )
        return [held[path] for path in paths]

    def read(
        self, file: RemoteFile, start: int, stop: int, write: Callable[[bytes], object]
    ) -> None:
        place = f"{self._repo}/resolve/{self._revision}/{quote(file.path)}"
        url = f"{environment.hub_endpoint()}/{place}"
        stream(url, _authorization(), start, stop, write)


def resolve_revision(repo: str) -> str:
    """The commit that `main` is at now.

    Raises:
        Transient, SourceFailed: as `Reader.stat`.
    """
    return str(_ask(f"/api/models/{repo}")["sha"])


def list_repository(repo: str, revision: str) -> list[RemoteFile]:
    """Every file of a repository, with the SHA-256 of the large ones.

    Raises:
        Transient, SourceFailed: as `Reader.stat`.
    """
    answer = _ask(f"/api/models/{repo}/revision/{revision}?blobs=true")
    return [
        RemoteFile(file["rfilename"], file.get("size", -1), (file.get("lfs") or {}).get("sha256"))
        for file in answer.get("siblings", [])
    ]


def _ask(path: str) -> dict[str, Any]:
    """The JSON object at a path of the hub's API, of which `sha` is known to be there."""
    if environment.hub_offline():
        raise SourceFailed(
            "The hub is switched off by HF_HUB_OFFLINE.", value=path, remedy="Unset it to pull."
        )
    url = environment.hub_endpoint() + path
    with http_errors(url):
        response = client().get(url, headers=_authorization())
    remedy = "Check repository and revision; a gated model needs HF_TOKEN."
    try:
        check_status(response, url, remedy)
    except Missing as error:
        fact = "The hub has no such repository or revision."
        raise Missing(fact, value=url, remedy=remedy) from error
    try:
        answer: Any = response.json()
        return {"sha": answer["sha"], **answer}
    except (ValueError, KeyError, TypeError) as error:
        raise SourceFailed(
            "The answer does not come from a model hub.",
            value=url,
            remedy="Check HF_ENDPOINT, and any proxy.",
        ) from error


def _authorization() -> dict[str, str]:
    token = environment.hub_token()
    return {"Authorization": f"Bearer {token}"} if token else {}
