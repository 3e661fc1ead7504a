"""What the tests of the store share: a model of random bytes, and each source that can hold it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.settings import StoreSettings
from deployments.store.cache import Store
from deployments.store.events import ignore
from deployments.store.manifest import FileEntry, Licence, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from deployments.store.cache import Places
    from deployments.store.events import Listener
    from deployments.store.sources import Source
    from tests.servers.faults import Faults

KIB = 1024
NAME = "tiny-model"
REPO = "org/tiny"
LARGE = "unet/weights.safetensors"
SCHEMES = ("file", "https", "hf", "gs")
SERVED = ("https", "hf", "gs")


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


def places_of(source: Source, files: Mapping[str, bytes]) -> Places:
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
        self, source: Source, faults: Faults | None, part: str, overwrite: Any = None
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
        from deployments.store.sources import LocalSource

        yield Held(LocalSource(f"file://{folder}"), None, LARGE, lambda: _flip(folder / LARGE))
    elif scheme == "https":
        with _web(folder) as found:
            yield found
    elif scheme == "hf":
        with _hub(files, folder, patch) as found:
            yield found
    else:
        with _bucket(files, folder, patch) as found:
            yield found


@contextmanager
def _web(folder: Path) -> Iterator[Held]:
    from deployments.store.sources import WebSource
    from tests.servers.files import FileServer

    with FileServer(folder) as server:
        source = WebSource(server.url)
        yield Held(source, server.faults, LARGE, lambda: _flip(folder / LARGE))
        source._session.close()


@contextmanager
def _hub(files: Mapping[str, bytes], folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Held]:
    import huggingface_hub
    from huggingface_hub import constants

    from deployments.store.hub import HubSource
    from tests.servers.hub import HubServer

    # Read from the environment at import, which other tests change.
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer(folder.with_name("hub")) as server:
        revision = server.add_repo(REPO, files)
        patch.setenv("HF_ENDPOINT", server.url)
        place = server.root / REPO / revision / LARGE
        source = HubSource(f"hf://{REPO}@{revision}")
        yield Held(source, server.faults, f"/cdn/{REPO}/{revision}/{LARGE}", lambda: _flip(place))
        source._session.close()
    huggingface_hub.close_session()


@contextmanager
def _bucket(files: Mapping[str, bytes], folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Held]:
    import warnings

    from tests.servers.gcs import GcsServer

    with warnings.catch_warnings():
        # google-api-core warns at import where grpcio is installed without grpcio-status.
        warnings.simplefilter("ignore", ImportWarning)
        from deployments.store import gcs
    with GcsServer() as server:
        for path, data in files.items():
            server.put(f"m/v1/{path}", data)
        for name, value in server.env.items():
            patch.setenv(name, value)
        gcs._client.cache_clear()
        other = bytes(byte ^ 0xFF for byte in files[LARGE])
        yield Held(
            gcs.BucketSource("gs://models/m/v1"),
            server.faults,
            "/download/",
            lambda: server.put(f"m/v1/{LARGE}", other),
        )
        gcs._client().close()
        gcs._client.cache_clear()


def _flip(path: Path) -> None:
    """Other bytes, in a new file: whoever has the old one open keeps it."""
    new = path.with_name("new")
    new.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))
    new.replace(path)
