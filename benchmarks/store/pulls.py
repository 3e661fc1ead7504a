"""Ways to pull a model from a bucket and from a hub, and the servers they pull from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from deployments.store.bucket import Reader
    from deployments.store.manifest import Manifest

NAME, REPO, BUCKET, PREFIX = "bench-model", "org/bench", "models", "m/v1"
THREADS: Final = 8
RANGE_BYTES: Final = 32 * 2**20
BLOCK_BYTES: Final = 2**20
MB: Final = 10**6
SIZES_MB: Final = {
    "unet/a.safetensors": 1000,
    "unet/b.safetensors": 300,
    "text_encoder/a.safetensors": 300,
    "text_encoder_2/a.safetensors": 250,
    "vae/a.safetensors": 147.6,
    "tokenizer/vocab.txt": 2,
    "tokenizer/merges.txt": 0.4,
}
FROM_BUCKET: Final = ("ours gs", "download_many threads", "download_many processes", "bare GET gs")
FROM_HUB: Final = ("ours hf", "snapshot_download", "bare GET hf")

Job = dict[str, Any]
"""`files` (path to size and SHA-256), the servers' addresses `gcs`, `hub` and `cdn`, `revision`."""
Get = tuple[str, Path, int]
"""A URL path, the file it goes to, and its size in bytes."""


def prepare(way: str, job: Job, target: Path) -> Callable[[], object]:
    """Import and connect; returns the pull itself, which is timed."""
    if way == "ours gs":
        from deployments.store.gcs import GcsBucket

        return _ours(job, target, GcsBucket(f"gs://{BUCKET}/{PREFIX}"))
    if way.startswith("download_many"):
        return _download_many(job, target, way.rpartition(" ")[2])
    if way.startswith("bare"):
        return _bare(job, target, way.endswith("gs"))
    import_module("huggingface_hub.hf_api")  # which the package imports when it is first used
    if way == "ours hf":
        from deployments.store.hub import HubReader

        return _ours(job, target, HubReader(f"hf://{REPO}@{job['revision']}"))
    return _snapshot_download(job, target)


def _ours(job: Job, target: Path, source: Reader) -> Callable[[], object]:
    from deployments.settings import StoreSettings
    from deployments.store.cache import Store

    manifest = _manifest(job)
    store = Store(StoreSettings(root=target, threads=THREADS, range_bytes=RANGE_BYTES))
    return lambda: store.pull(manifest, {f.path: (source, f.path) for f in manifest.files})


def _snapshot_download(job: Job, target: Path) -> Callable[[], object]:
    from huggingface_hub import snapshot_download

    return lambda: snapshot_download(
        REPO,
        revision=job["revision"],
        endpoint=job["hub"],
        cache_dir=target,
        max_workers=THREADS,
        token=False,
    )


def _download_many(job: Job, target: Path, kind: str) -> Callable[[], object]:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    from google.cloud.storage import transfer_manager

    bucket = storage.Client(project="x", credentials=AnonymousCredentials()).bucket(BUCKET)
    pairs: list[tuple[Any, str]] = []
    for path in job["files"]:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        pairs.append((bucket.blob(f"{PREFIX}/{path}"), str(target / path)))
    worker = transfer_manager.THREAD if kind == "threads" else transfer_manager.PROCESS
    download: Any = transfer_manager.download_many
    return lambda: download(pairs, worker_type=worker, max_workers=THREADS, raise_exception=True)


def _bare(job: Job, target: Path, from_bucket: bool) -> Callable[[], object]:
    if from_bucket:
        base, url = f"/download/storage/v1/b/{BUCKET}/o/", job["gcs"]
        paths = {p: base + quote(f"{PREFIX}/{p}", safe="") + "?alt=media" for p in job["files"]}
    else:
        url = job["cdn"]
        paths = {p: f"/cdn/{REPO}/{job['revision']}/{p}" for p in job["files"]}
    gets = [(paths[p], target / p, size) for p, (size, _) in job["files"].items()]
    return lambda: _bare_get(url, gets)


def _bare_get(url: str, gets: Sequence[Get]) -> None:
    """Get ranges with http.client and write them in place: no hashing, no checks."""
    local = threading.local()
    host = urlsplit(url).netloc

    def one(path: str, descriptor: int, start: int, stop: int) -> None:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection(host)
            local.view = memoryview(bytearray(BLOCK_BYTES))
        local.connection.request("GET", path, headers={"Range": f"bytes={start}-{stop - 1}"})
        response = local.connection.getresponse()
        while count := response.readinto(local.view):
            os.pwrite(descriptor, local.view[:count], start)
            start += count
        if start != stop:
            raise RuntimeError(f"{path} ended early")

    with ThreadPoolExecutor(THREADS) as pool:
        tasks: list[Any] = []
        for path, place, size in gets:
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            for start in range(0, size, RANGE_BYTES):
                stop = min(start + RANGE_BYTES, size)
                tasks.append(pool.submit(one, path, descriptor, start, stop))
        for task in tasks:
            task.result()


def _manifest(job: Job) -> Manifest:
    from deployments.store.manifest import FileEntry, Licence, Manifest

    files = sorted(job["files"].items())
    return Manifest(
        model=NAME,
        sources=("bench",),
        licence=Licence(id="none", commercial=False),
        files=tuple(FileEntry(path=p, size=size, sha256=sha) for p, (size, sha) in files),
    )


@contextmanager
def served(folder: Path, gigabytes: float) -> Generator[Job]:
    """Random files of so many GB, on a bucket and a hub in a process of their own."""
    files = make_files(folder / "source", gigabytes)
    command = [sys.executable, "-m", "benchmarks.store.pulls", str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield {"files": files, **json.loads(server.stdout.readline())}
        server.communicate("")


def make_files(folder: Path, gigabytes: float) -> dict[str, tuple[int, str]]:
    """Write random files in the proportions of `SIZES_MB`; returns size and SHA-256 by path."""
    from deployments.store.folder import hash_file

    made: dict[str, tuple[int, str]] = {}
    scale = gigabytes * 1000 / sum(SIZES_MB.values())
    for path, size_mb in SIZES_MB.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        left = int(size_mb * MB * scale)
        with place.open("wb") as file:
            while left > 0:
                left -= file.write(os.urandom(min(left, 16 * BLOCK_BYTES)))
        hashes = hash_file(place)
        made[path] = (hashes.size, str(hashes.sha256))
    return made


def serve(folder: Path) -> None:
    """Serve the files from both servers until stdin ends."""
    from benchmarks.servers.gcs import GcsServer
    from benchmarks.servers.hub import HubServer

    source = folder / "source"
    files = {path: source / path for path in SIZES_MB}
    with (
        GcsServer(BUCKET, root=folder / "gcs") as bucket,
        HubServer(folder / "hub") as hub,
    ):
        for path, place in files.items():
            bucket.put(f"{PREFIX}/{path}", place)
        revision = hub.add_repo(REPO, files)
        urls = {"gcs": bucket.url, "hub": hub.url, "cdn": hub.cdn_url, "revision": revision}
        print(json.dumps(urls), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
