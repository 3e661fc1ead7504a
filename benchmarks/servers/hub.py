"""The Hugging Face hub's HTTP API, as much as its client needs to pull a model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from benchmarks.servers.faults import Faults
from benchmarks.servers.listener import (
    Answer,
    Loopback,
    RefusedError,
    Request,
    file_answer,
    hash_blocks,
    json_answer,
    place,
)

LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".pth", ".onnx", ".ckpt"})
LFS_BYTES = 10_000_000
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CDN = re.compile(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)")
COMMIT = re.compile(r"[0-9a-f]{40}")

_hashing = threading.Lock()


@cache
def _sha256(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    digest = hashlib.sha256()
    hash_blocks(path, digest.update)
    return digest.hexdigest()


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _refused(status: int, code: str, commit: str = "") -> RefusedError:
    headers = {"X-Error-Code": code, "X-Error-Message": code}
    if commit:
        headers["X-Repo-Commit"] = commit
    return RefusedError(json_answer({"error": code}, status, headers))


class RepoFile:
    """A file of a revision."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(folder).as_posix()
        self.size = path.stat().st_size
        self.is_lfs = path.suffix in LFS_SUFFIXES or self.size > LFS_BYTES

    @property
    def sha256(self) -> str:
        stat = self.path.stat()
        with _hashing:  # a second request waits for the first one's answer
            return _sha256(self.path, stat.st_size, stat.st_mtime_ns, stat.st_ino)

    @property
    def pointer(self) -> bytes:
        """What git keeps of an LFS file."""
        spec = "version https://git-lfs.github.com/spec/v1"
        return f"{spec}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        return _git_blob(self.pointer if self.is_lfs else self.path.read_bytes())

    def entry(self) -> dict[str, Any]:
        """As in trees and paths-info."""
        entry = {"type": "file", "path": self.name, "size": self.size, "oid": self.oid}
        if not self.is_lfs:
            return entry
        pointer = len(self.pointer)
        return entry | {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": pointer}}

    def sibling(self, blobs: bool) -> dict[str, Any]:
        """As in a model's information."""
        entry: dict[str, Any] = {"rfilename": self.name}
        if not blobs:
            return entry
        entry |= {"size": self.size, "blobId": self.oid}
        if not self.is_lfs:
            return entry
        pointer = len(self.pointer)
        return entry | {"lfs": {"sha256": self.sha256, "size": self.size, "pointerSize": pointer}}


class HubServer(Loopback):
    """Serves root/org/repo/<revision>/..., and LFS files by way of a second port.

    A text file root/org/repo/<branch> holds a branch's revision.

    Args:
        root: the folder of all repositories.
        gated: repositories whose files want one of `tokens`: 401 without, 403 with another.
        tokens: the tokens that open them.
        page_size: entries of one page of a tree.
        faults: a plan to share with another server.
    """

    def __init__(
        self,
        root: Path,
        *,
        gated: Collection[str] = (),
        tokens: Collection[str] = (),
        page_size: int = 1000,
        faults: Faults | None = None,
    ) -> None:
        super().__init__(faults)
        self.root = root
        self.gated = set(gated)
        self.tokens = set(tokens)
        self.page_size = page_size
        self.url = ""
        self.cdn_url = ""

    def start(self) -> None:
        self.cdn_url = self.listen(self._cdn)
        self.url = self.listen(self._hub)

    def add_repo(
        self,
        repo: str,
        files: Mapping[str, bytes | int | Path],
        revision: str | None = None,
        branch: str = "main",
    ) -> str:
        """Write a revision and point the branch at it.

        Args:
            repo: org/name.
            files: content; an int is the size of a sparse file, a Path is linked.
            revision: 40 hex digits; by default they follow from `files`.
            branch: its name.
        """
        if revision is None:
            plan = sorted((name, repr(content)) for name, content in files.items())
            revision = hashlib.sha1(json.dumps(plan).encode()).hexdigest()
        folder = self.root / repo / revision
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            place(folder / name, content)
        (self.root / repo / branch).write_text(revision)
        return revision

    def _hub(self, request: Request) -> Answer:
        path = request.raw_path
        if match := API.fullmatch(path):
            repo, verb, revision, rest = (unquote(part or "") for part in match.groups())
            commit = self._commit(repo, revision or "main")
            if verb == "tree":
                return self._tree(request, repo, commit, rest)
            if verb == "paths-info":
                return self._paths_info(request, repo, commit)
            return self._info(request, repo, commit)
        if match := RESOLVE.fullmatch(path):
            repo, revision, name = map(unquote, match.groups())
            return self._resolve(request, repo, revision, name)
        raise _refused(404, "RepoNotFound")

    def _commit(self, repo: str, revision: str) -> str:
        folder = self.root / repo
        if not folder.is_dir():
            raise _refused(404, "RepoNotFound")
        if not COMMIT.fullmatch(revision) and (folder / revision).is_file():
            revision = (folder / revision).read_text().strip()
        if not COMMIT.fullmatch(revision) or not (folder / revision).is_dir():
            raise _refused(404, "RevisionNotFound")
        return revision

    def _files(self, repo: str, commit: str) -> Iterator[RepoFile]:
        folder = self.root / repo / commit
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield RepoFile(folder, path)

    def _file(self, repo: str, commit: str, name: str) -> RepoFile:
        folder = self.root / repo / commit
        path = folder / name
        if ".." in PurePosixPath(name).parts or not path.is_file():
            raise _refused(404, "EntryNotFound", commit)
        return RepoFile(folder, path)

    def _info(self, request: Request, repo: str, commit: str) -> Answer:
        blobs = request.query.get("blobs", "").lower() == "true"
        return json_answer(
            {
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": commit,
                "private": False,
                "gated": "manual" if repo in self.gated else False,
                "disabled": False,
                "tags": [],
                "siblings": [file.sibling(blobs) for file in self._files(repo, commit)],
            }
        )

    def _tree(self, request: Request, repo: str, commit: str, under: str) -> Answer:
        start = int(request.query.get("cursor", 0))
        recursive = request.query.get("recursive", "").lower() == "true"
        folder = self.root / repo / commit
        top = folder / under
        if ".." in PurePosixPath(under).parts or not top.is_dir():
            raise _refused(404, "EntryNotFound", commit)
        paths = sorted(top.rglob("*") if recursive else top.iterdir())
        stop = start + self.page_size
        headers = {}
        if stop < len(paths):
            query = urlencode(request.query | {"cursor": str(stop)})
            headers["Link"] = f'<{self.url}{request.raw_path}?{query}>; rel="next"'
        return json_answer([_entry(folder, path) for path in paths[start:stop]], headers=headers)

    def _paths_info(self, request: Request, repo: str, commit: str) -> Answer:
        form = request.body.read().decode()
        kind = request.headers.get("Content-Type", "")
        paths = json.loads(form)["paths"] if "json" in kind else parse_qs(form).get("paths", [])
        folder = self.root / repo / commit
        found = [folder / path for path in paths if ".." not in PurePosixPath(path).parts]
        return json_answer([_entry(folder, path) for path in found if path.exists()])

    def _resolve(self, request: Request, repo: str, revision: str, name: str) -> Answer:
        commit = self._commit(repo, revision)
        self._let_in(request, repo)
        file = self._file(repo, commit, name)
        headers = {"X-Repo-Commit": commit}
        if not file.is_lfs:
            headers["ETag"] = f'"{file.oid}"'
            return file_answer(request, file.path.open("rb"), headers)
        headers["X-Linked-Size"] = str(file.size)
        headers["X-Linked-ETag"] = f'"{file.sha256}"'
        headers["Accept-Ranges"] = "bytes"
        headers["Location"] = f"{self.cdn_url}/cdn/{repo}/{commit}/{quote(name)}"
        return Answer(302, b"Found", headers)

    def _let_in(self, request: Request, repo: str) -> None:
        if repo not in self.gated:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer":
            raise _refused(401, "GatedRepo")
        if token not in self.tokens:
            raise _refused(403, "GatedRepo")

    def _cdn(self, request: Request) -> Answer:
        match = CDN.fullmatch(request.path)
        if match is None:
            return Answer(404)
        if request.headers.get("Authorization"):
            return Answer(400, b"a token has leaked")
        file = self._file(*match.groups())
        return file_answer(request, file.path.open("rb"), {"ETag": f'"{file.sha256}"'})


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    if path.is_file():
        return RepoFile(folder, path).entry()
    name = path.relative_to(folder).as_posix()
    return {"type": "directory", "path": name, "size": 0, "oid": _git_blob(name.encode())}
