"""hf://org/repo@<40 hex digits>: a repository of the Hugging Face hub at a pinned revision."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from deployments.errors import ConfigError, SourceFailed
from deployments.store.sources import (
    TIMEOUT_S,
    TRANSIENT,
    UNRESOLVED,
    Remote,
    Transient,
    retry_after_s,
    stream,
    web_session,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from huggingface_hub.hf_api import ModelInfo

# As the hub library wants them; at others it raises errors of its own.
_PART = r"\w(?:[\w.-]*\w)?"
_NOT = r"(?!.*(?:--|\.\.|\.git@|/[^/]{97,}@))"
_URL = re.compile(rf"^hf://{_NOT}({_PART}/{_PART})@(\w+)$", re.ASCII)
_REVISION = re.compile(r"^[0-9a-f]{40}$")


def parse(url: str) -> tuple[str, str]:
    """Repository and revision.

    Raises:
        ConfigError: it does not look like hf://org/repo@revision.
    """
    match = _URL.match(url)
    if not match:
        raise ConfigError(
            "A hub source is written hf://org/repo@revision.", value=url, remedy="Correct it."
        )
    return match[1], match[2]


def check_pinned(url: str) -> None:
    """Raises ConfigError unless the revision is a full commit id: a branch moves."""
    _, revision = parse(url)
    if not _REVISION.match(revision):
        unresolved = revision == UNRESOLVED
        raise ConfigError(
            "A hub revision is not pinned.",
            value=url,
            remedy="Run `imagen models resolve` online."
            if unresolved
            else "Write the commit's 40 hex digits; branches and tags move.",
        )


class HubSource:
    """Metadata come through huggingface_hub, bytes by plain ranged GETs.

    `HF_ENDPOINT` names another hub; `HF_TOKEN` is sent where it is set (gated models). Neither
    is used while serving.
    """

    def __init__(self, url: str) -> None:
        check_pinned(url)
        self.url = url
        self._repo, self._revision = parse(url)
        self._session = web_session(endpoint())

    def stat(self, paths: Sequence[str]) -> list[Remote]:
        found = {f.path: f for f in list_repository(self._repo, self._revision)}
        missing = [path for path in paths if path not in found]
        if missing:
            raise SourceFailed(
                f"{self._repo} has no {missing[0]} at that revision.",
                value=self.url,
                remedy="Correct `files` in the model registry.",
            )
        return [found[path] for path in paths]

    def read(self, file: Remote, start: int, stop: int, write: Callable[[bytes], object]) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self._repo, file.path, revision=self._revision, endpoint=endpoint())
        headers = build_hf_headers(token=os.environ.get("HF_TOKEN") or False)
        stream(self._session, url, headers, (start, stop), write)


def endpoint() -> str:
    """The hub to ask."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def resolve_revision(repo: str) -> str:
    """The commit that `main` is at now.

    Raises:
        Transient, SourceFailed: as `Source.stat`.
    """
    return str(_info(repo).sha)


def list_repository(repo: str, revision: str) -> list[Remote]:
    """Every file of a repository, with the SHA-256 of the large ones.

    Raises:
        Transient, SourceFailed: as `Source.stat`.
    """
    files = _info(repo, revision=revision, files_metadata=True).siblings or []
    return [
        Remote(f.rfilename, -1 if f.size is None else f.size, f.lfs.sha256 if f.lfs else None)
        for f in files
    ]


def _info(repo: str, **options: Any) -> ModelInfo:
    import httpx2  # huggingface_hub's own
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(endpoint=endpoint(), token=os.environ.get("HF_TOKEN") or False)
    try:
        # Of the library's calls this one takes a timeout, and does not try again by itself.
        return api.model_info(repo, timeout=TIMEOUT_S[1], **options)
    except OfflineModeIsEnabled as error:
        raise SourceFailed(
            "The hub is switched off by HF_HUB_OFFLINE.", value=repo, remedy="Unset it to pull."
        ) from error
    except HfHubHTTPError as error:
        status: int = error.response.status_code
        if status in TRANSIENT:
            after_s = retry_after_s(error.response.headers)
            raise Transient(f"the hub answered {status}", after_s) from error
        raise SourceFailed(
            f"The hub refused {repo}: HTTP {status}.",
            value=endpoint(),
            remedy="Check repository and revision; a gated model needs HF_TOKEN.",
        ) from error
    except (httpx2.TransportError, OSError) as error:
        raise Transient(f"the hub at {endpoint()} does not answer: {error}") from error
