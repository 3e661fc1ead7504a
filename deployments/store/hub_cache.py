"""hf:// from the cache that Hugging Face's own library keeps on this machine.

<cache>/models--<org>--<name>/refs/main                       a commit
<cache>/models--<org>--<name>/snapshots/<commit>/<file>       a link into blobs/, or a file
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from deployments.origins import parse_hub
from deployments.store.bucket import RemoteFile, check_path
from deployments.store.folder_bucket import read_file
from deployments.store.hub import HubReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_HERE = "cached"
"""The pin of a file that this machine has."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubCache:
    """A cache folder, with links resolved.

    Nothing in it is trusted: what is read is hashed, and compared with the lock file, as from any
    source.

    Args:
        folder: the `hub` folder, or the folder above it, such as ~/.cache/huggingface.

    Raises:
        ConfigError: it holds no model.
    """

    def __init__(self, folder: Path) -> None:
        found = [place for place in (folder, folder / "hub") if any(place.glob("models--*"))]
        if not found:
            raise ConfigError(
                "This is no Hugging Face cache: it has no folder models--….",
                value=folder,
                remedy="Name its `hub` folder, such as ~/.cache/huggingface/hub.",
            )
        self._folder = found[0]

    def revision(self, repo: str) -> str | None:
        """The commit that `main` was at when the cache was filled; None if it does not say."""
        try:
            text = (self._repo(repo) / "refs" / "main").read_text(encoding="utf-8").strip()
        except OSError:
            return None
        return text if re.fullmatch(r"[0-9a-f]{40}", text) else None

    def find(self, repo: str, revision: str, path: str) -> Path | None:
        """Where a file of a commit is, behind its links; None if it is not there."""
        place = (self._repo(repo) / "snapshots" / revision / check_path(path)).resolve()
        return place if place.is_file() else None

    def _repo(self, repo: str) -> Path:
        return self._folder / f"models--{repo.replace('/', '--')}"


class CachedHubReader:
    """Reads a repository from a cache, and from the hub what the cache lacks.

    Raises:
        ConfigError: the revision is not pinned.
    """

    def __init__(self, url: str, cache: HubCache) -> None:
        self.url = url
        self._hub = HubReader(url)
        self._cache = cache
        self._repo, self._revision = parse_hub(url)

    def stat(self, paths: Sequence[str]) -> list[RemoteFile]:
        held = {path: self._cache.find(self._repo, self._revision, path) for path in paths}
        rest = [path for path, place in held.items() if place is None]
        known = {file.path: file for file in (self._hub.stat(rest) if rest else ())}
        return [known.get(path) or _cached(path, held[path]) for path in paths]

    def read(
        self, file: RemoteFile, start: int, stop: int, write: Callable[[bytes], object]
    ) -> None:
        place = self._cache.find(self._repo, self._revision, file.path)
        if file.pin == _HERE and place:
            read_file(place, start, stop, write)
        else:
            self._hub.read(file, start, stop, write)


def _cached(path: str, place: Path | None) -> RemoteFile:
    assert place is not None  # noqa: S101 - the hub has answered for the others
    # The hub named a large file's blob by its SHA-256 when it was fetched.
    sha256 = place.name if _SHA256.fullmatch(place.name) else None
    return RemoteFile(path, place.stat().st_size, sha256, pin=_HERE)
