"""What the tests of the store share: a model of random bytes, and each source that can hold it."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from deployments.settings import StoreSettings
from deployments.store.cache import Store
from deployments.store.events import ignore
from deployments.store.manifest import FileEntry, Licence, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.servers.faults import Faults
    from benchmarks.servers.gcs import GcsServer
    from benchmarks.servers.gcs_links import FakeGcsLinks
    from benchmarks.servers.s3 import S3Server
    from deployments.store.bucket import Reader
    from deployments.store.events import Listener
    from deployments.store.staging import Places

    Server = TypeVar("Server", GcsServer, FakeGcsLinks, S3Server)

KIB = 1024
NAME = "tiny-model"
REPO = "org/tiny"
LARGE = "unet/weights.safetensors"
SCHEMES = ("file", "https", "hf", "gs", "s3")
SERVED = ("https", "hf", "gs", "s3")


def random_files(seed: int = 0, large: int = 300 * KIB) -> dict[str, bytes]:
    """A file of several ranges, smaller ones, and an empty one."""
    draw = random.Random(seed)
    return {
        "empty.txt": b"",
        "model_index.json": b'{"a": 1}\n',
        LARGE: draw.randbytes(large),
        "vae/weights.safetensors": draw.randbytes(70 * KIB),
    }


def manifest_of(content: Mapping[str, bytes], model: str = NAME, **changes: Any) -> Manifest:
    """The manifest of a model before anyone has pulled it: without CRC32C."""
    entries = [
        FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in sorted(content.items())
    ]
    licence = Licence(id="MIT", commercial=True)
    values = {"model": model, "sources": ("file://x",), "licence": licence, "files": entries}
    return Manifest(**(values | changes))


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def places_of(source: Reader, files: Mapping[str, bytes]) -> Places:
    return {path: (source, path) for path in files}


def settings_of(root: Path, **changes: Any) -> StoreSettings:
    """Small ranges, so that a small model has several; short pauses."""
    small = {"root": root, "range_bytes": 64 * KIB, "threads": 4, "backoff_s": 0.01}
    return StoreSettings(**(small | changes))


def store_of(root: Path, listener: Listener = ignore, **changes: Any) -> Store:
    return Store(settings_of(root, **changes), listener)


def staged(root: Path) -> list[Path]:
    return list((root / ".staging").glob("*"))


class Held:
    """A model at one source; `faults` is None for a plain folder."""

    def __init__(
        self, source: Reader, faults: Faults | None, part: str, overwrite: Any = None
    ) -> None:
        self.files: list[str] = []
        self.source = source
        self.faults = faults
        self.part = part
        """Part of the path under which the bytes of the large file are asked for."""
        self.overwrite = overwrite
        """Puts other bytes of the same size in the place of the large file."""

    def bytes_sent(self) -> int:
        """Of files, without listings."""
        assert self.faults is not None
        return sum(
            entry.sent
            for entry in self.faults.log
            if entry.method == "GET" and entry.status in (200, 206) and self._is_file(entry.path)
        )

    def _is_file(self, path: str) -> bool:
        return path.endswith(tuple(self.files)) and not path.startswith("/api/")


@contextmanager
def held(
    scheme: str, files: Mapping[str, bytes], folder: Path, patch: pytest.MonkeyPatch
) -> Iterator[Held]:
    """The files at a source of this scheme, behind a server of its own."""
    write_files(folder, files)
    with _held(scheme, files, folder, patch) as found:
        found.files += files
        yield found


@contextmanager
def _held(
    scheme: str, files: Mapping[str, bytes], folder: Path, patch: pytest.MonkeyPatch
) -> Iterator[Held]:
    if scheme == "file":
        from deployments.store.folder_bucket import FolderBucket

        yield Held(FolderBucket(f"file://{folder}"), None, LARGE, lambda: _flip(folder / LARGE))
    elif scheme == "https":
        with _web(folder) as found:
            yield found
    elif scheme == "hf":
        with _hub(files, folder, patch) as found:
            yield found
    elif scheme == "gs":
        with _bucket(files, folder, patch) as found:
            yield found
    else:
        with _s3(files, patch) as found:
            yield found


@contextmanager
def _web(folder: Path) -> Iterator[Held]:
    from benchmarks.servers.files import FileServer
    from deployments.store.web import WebReader

    with FileServer(folder) as server:
        source = WebReader(server.url)
        yield Held(source, server.faults, LARGE, lambda: _flip(folder / LARGE))


@contextmanager
def _hub(files: Mapping[str, bytes], folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Held]:
    from benchmarks.servers.hub import HubServer
    from deployments.store.hub import HubReader

    with HubServer(folder.with_name("hub")) as server:
        revision = server.add_repo(REPO, files)
        patch.setenv("HF_ENDPOINT", server.url)
        place = server.root / REPO / revision / LARGE
        source = HubReader(f"hf://{REPO}@{revision}")
        yield Held(source, server.faults, f"/cdn/{REPO}/{revision}/{LARGE}", lambda: _flip(place))


@contextmanager
def _bucket(files: Mapping[str, bytes], folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Held]:
    from benchmarks.servers.gcs import GcsServer
    from deployments.store import gcs

    with GcsServer() as server:
        for path, data in files.items():
            server.put(f"m/v1/{path}", data)
        for name, value in server.env.items():
            patch.setenv(name, value)
        other = bytes(byte ^ 0xFF for byte in files[LARGE])
        yield Held(
            gcs.GcsBucket("gs://models/m/v1"),
            server.faults,
            "/download/",
            lambda: server.put(f"m/v1/{LARGE}", other),
        )


@contextmanager
def _s3(files: Mapping[str, bytes], patch: pytest.MonkeyPatch) -> Iterator[Held]:
    from benchmarks.servers.s3 import S3Server
    from deployments.store.s3 import S3Bucket

    with S3Server() as server:
        for path, data in files.items():
            server.put(f"m/v1/{path}", data)
        for name, value in server.env.items():
            patch.setenv(name, value)
        other = bytes(byte ^ 0xFF for byte in files[LARGE])
        yield Held(
            S3Bucket("s3://models/m/v1"),
            server.faults,
            f"/m/v1/{LARGE}",
            lambda: server.put(f"m/v1/{LARGE}", other),
        )


def _flip(path: Path) -> None:
    """Put other bytes into a new file; a reader that has the old one open keeps it."""
    new = path.with_name("new")
    new.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))
    new.replace(path)


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A file system mounted for a while; skips the test where that is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(["mount", *options, place], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def served(server: Server, patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A bucket's server, running, with the environment that leads to it."""
    with server:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@contextmanager
def google_without_key(patch: pytest.MonkeyPatch) -> Iterator[FakeGcsLinks]:
    """Google's storage for a service account without a key: a metadata server, and IAM signs."""
    from google.auth import compute_engine, iam
    from google.auth.compute_engine import _metadata

    from benchmarks.servers.gcs_links import FakeGcsLinks
    from deployments.store import gcs

    with served(FakeGcsLinks(page_size=2), patch) as server:
        patch.setattr(_metadata, "_GCE_METADATA_HOST", server.url.removeprefix("http://"))
        patch.setattr(iam, "_IAM_SIGN_ENDPOINT", server.sign_endpoint)
        patch.setattr(gcs, "AnonymousCredentials", compute_engine.Credentials)
        try:
            yield server
        finally:
            if gcs._make_account.cache_info().currsize:
                gcs._make_account()._request.func.session.close()
