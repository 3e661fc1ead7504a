"""The official clients against the servers on loopback, and what each fault does."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import httpx2
import huggingface_hub
import pytest
from google.api_core.exceptions import NotFound, PreconditionFailed, ServiceUnavailable
from google.cloud import storage
from google.cloud.storage import transfer_manager
from google.cloud.storage.exceptions import DataCorruption
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from benchmarks.servers.faults import Faults
from benchmarks.servers.files import FileServer
from benchmarks.servers.gcs import GcsServer
from benchmarks.servers.hub import HubServer

REPO = "org/model"
CONFIG = b'{"a": 1}\n'
WEIGHTS = os.urandom(300_000)
SPARSE = 12_000_000
TOKEN = "hf_of_the_test"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    # Read from the environment at import, which other tests change.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer(tmp_path / "hub", tokens=[TOKEN], page_size=2) as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def revision(hub: HubServer) -> str:
    files = {
        "config.json": CONFIG,
        "unet/weights.safetensors": WEIGHTS,
        "vae/über.bin": SPARSE,
        "vae/zeros.txt": SPARSE,
    }
    return hub.add_repo(REPO, files)


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    with GcsServer(page_size=3) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(gcs: GcsServer) -> Iterator[storage.Bucket]:
    client = storage.Client(project="test")
    yield client.bucket(gcs.bucket)
    client.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "a.bin").write_bytes(WEIGHTS)
    with FileServer(tmp_path) as server:
        yield server


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_hub_metadata(hub: HubServer, revision: str) -> None:
    api = HfApi(endpoint=hub.url, token=False)
    info = api.model_info(REPO, revision="main", files_metadata=True)
    assert info.sha == revision
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    weights = siblings["unet/weights.safetensors"]
    assert weights.lfs is not None
    assert (weights.lfs.sha256, weights.lfs.size) == (sha256(WEIGHTS), len(WEIGHTS))
    config = siblings["config.json"]
    assert config.lfs is None
    assert config.blob_id == hashlib.sha1(b"blob 9\0" + CONFIG).hexdigest()
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert set(tree) == {*siblings, "unet", "vae"}
    assert hub.faults.requests[f"/api/models/{REPO}/tree/main"] == 3
    assert tree["vae/zeros.txt"].lfs.sha256 == sha256(bytes(SPARSE))
    infos = api.get_paths_info(REPO, ["unet/weights.safetensors", "unet", "none"])
    assert [found.path for found in infos] == ["unet/weights.safetensors", "unet"]


def test_hub_snapshot(hub: HubServer, revision: str, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    folder = Path(
        huggingface_hub.snapshot_download(
            REPO, endpoint=hub.url, cache_dir=tmp_path / "cache", token=TOKEN
        )
    )
    assert folder.name == revision
    assert (folder / "config.json").read_bytes() == CONFIG
    assert (folder / "unet/weights.safetensors").read_bytes() == WEIGHTS
    assert (folder / "vae/über.bin").read_bytes() == bytes(SPARSE)
    cdn = f"/cdn/{REPO}/{revision}/unet/weights.safetensors"
    assert hub.faults.bytes_sent[cdn] == len(WEIGHTS)
    authorized = {entry.path for entry in hub.faults.log if "authorization" in entry.headers}
    assert f"/{REPO}/resolve/{revision}/config.json" in authorized
    assert not [path for path in authorized if path.startswith("/cdn/")]


def test_hub_refusals(hub: HubServer, revision: str, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.url, token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="0" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "none.json", cache_dir=tmp_path)
    hub.gated.add(REPO)
    for token, status in ((False, 401), ("hf_wrong", 403)):
        with pytest.raises(GatedRepoError) as refused:
            api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path, token=token)
        assert refused.value.response.status_code == status
    url = f"{hub.cdn_url}/cdn/{REPO}/{revision}/unet/weights.safetensors"
    assert httpx.get(url, headers={"Authorization": "Bearer x"}).status_code == 400
    assert httpx.get(url, headers={"Range": "bytes=-3"}).content == WEIGHTS[-3:]
    assert httpx.get(url, headers={"Range": "bytes=300000-"}).status_code == 416


def pull(hub: HubServer, name: str, cache: Path) -> bytes:
    path = huggingface_hub.hf_hub_download(
        REPO, name, endpoint=hub.url, cache_dir=cache, token=False
    )
    return Path(path).read_bytes()


def test_hub_client_resumes(hub: HubServer, revision: str, tmp_path: Path) -> None:
    hub.faults.add("truncate", "/cdn/", after_bytes=11_000_000)
    assert pull(hub, "vae/zeros.txt", tmp_path) == bytes(SPARSE)
    pulled = [entry for entry in hub.faults.log if entry.path.startswith("/cdn/")]
    assert [(entry.status, entry.fault) for entry in pulled] == [(200, "truncate"), (206, "")]
    assert pulled[1].headers["range"] == f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"


def test_hub_client_meets_faults(hub: HubServer, revision: str, tmp_path: Path) -> None:
    hub.faults.add("reset", "/cdn/", after_bytes=100_000)
    with pytest.raises(httpx2.ReadError):  # which it does not try again
        pull(hub, "unet/weights.safetensors", tmp_path)
    assert hub.faults.log[-1].sent == 100_000
    hub.faults.add("503", "config.json", method="HEAD")
    assert pull(hub, "config.json", tmp_path) == CONFIG
    hub.faults.add("flip", after_bytes=3)
    wrong = pull(hub, "unet/weights.safetensors", tmp_path)  # of which it knows the hash
    assert wrong == WEIGHTS[:3] + bytes([WEIGHTS[3] ^ 0xFF]) + WEIGHTS[4:]
    assert not hub.faults.pending()


@pytest.mark.parametrize("size", [0, 1, 70_000, 9_000_000])
def test_gcs_round_trip(bucket: storage.Bucket, tmp_path: Path, size: int) -> None:
    content = (os.urandom(997) + b"\r\n\n\r--x\r\n") * (size // 997 + 1)
    source = tmp_path / "source"
    source.write_bytes(content[:size])  # the last size makes the upload resumable
    blob = bucket.blob("dir/a b.bin")
    blob.upload_from_filename(str(source), if_generation_match=0)
    with pytest.raises(PreconditionFailed):
        blob.upload_from_filename(str(source), if_generation_match=0)
    found = bucket.get_blob("dir/a b.bin", generation=blob.generation)
    assert found is not None
    assert (found.size, found.generation) == (size, blob.generation)
    assert found.download_as_bytes(checksum="crc32c") == content[:size]
    assert blob.download_as_bytes(checksum="md5") == content[:size]
    if size > 10:
        part = found.download_as_bytes(start=3, end=9, if_generation_match=found.generation)
        assert part == content[3:10]
    blob.delete()
    assert bucket.get_blob("dir/a b.bin") is None


@pytest.mark.parametrize("skip", [0, 1])
def test_gcs_resumable_upload_goes_on_after_a_503(
    gcs: GcsServer, bucket: storage.Bucket, skip: int
) -> None:
    blob = bucket.blob("chunks", chunk_size=262_144)
    gcs.faults.add("503", "/upload/", method="PUT", skip=skip)
    blob.upload_from_file(io.BytesIO(WEIGHTS))  # of no known size, so resumable
    assert not gcs.faults.pending()
    assert blob.download_as_bytes() == WEIGHTS


def test_gcs_generations(gcs: GcsServer, bucket: storage.Bucket) -> None:
    first = gcs.put("a", b"first")
    old = bucket.get_blob("a")
    assert old is not None
    assert old.generation == first == gcs.generation("a")
    new = bucket.blob("a")
    new.upload_from_string(b"second")
    assert new.generation > first
    assert bucket.get_blob("a", generation=first) is None
    with pytest.raises(NotFound):
        old.download_as_bytes()
    with pytest.raises(PreconditionFailed):
        bucket.blob("a").download_as_bytes(if_generation_match=first)
    with pytest.raises(PreconditionFailed):
        new.delete(if_generation_match=first)
    assert bucket.blob("a").download_as_bytes(if_generation_match=new.generation) == b"second"


def test_gcs_lists_pages(gcs: GcsServer, bucket: storage.Bucket) -> None:
    generations = {f"m/{number}": gcs.put(f"m/{number}", b"x" * number) for number in range(7)}
    gcs.put("n/other", b"")
    listed = {blob.name: blob for blob in bucket.list_blobs(prefix="m/")}
    assert {name: blob.generation for name, blob in listed.items()} == generations
    assert listed["m/5"].size == 5
    assert listed["m/5"].crc32c
    assert gcs.faults.requests[f"/storage/v1/b/{gcs.bucket}/o"] == 3


def test_gcs_transfer_manager(gcs: GcsServer, bucket: storage.Bucket, tmp_path: Path) -> None:
    gcs.put("large", SPARSE)
    gcs.put("small", WEIGHTS)
    blob = bucket.get_blob("large")
    transfer_manager.download_chunks_concurrently(
        blob, str(tmp_path / "large"), chunk_size=5_000_000, worker_type="thread", max_workers=3
    )
    assert (tmp_path / "large").read_bytes() == bytes(SPARSE)
    pairs = [(bucket.blob(name), str(tmp_path / name)) for name in ("large", "small")]
    results = transfer_manager.download_many(
        pairs, worker_type="thread", max_workers=2, raise_exception=True
    )
    assert results == [None, None]
    assert (tmp_path / "small").read_bytes() == WEIGHTS


def test_gcs_object_replaced_in_mid_pull(gcs: GcsServer, bucket: storage.Bucket) -> None:
    gcs.put("a", WEIGHTS)
    blob = bucket.get_blob("a")
    assert blob is not None
    gcs.faults.add("overwrite", "/download/", skip=1, callback=lambda: gcs.put("a", b"other"))
    assert blob.download_as_bytes(start=0, end=99) == WEIGHTS[:100]
    with pytest.raises(NotFound):
        blob.download_as_bytes(start=100, end=199)


def test_gcs_body_being_sent_stays_of_one_generation(gcs: GcsServer) -> None:
    gcs.put("a", SPARSE)
    path = f"/download/storage/v1/b/{gcs.bucket}/o/a?alt=media"
    with httpx.stream("GET", gcs.url + path) as answer:
        body = answer.iter_raw(1000)
        start = next(body)
        client = storage.Client(project="test")
        client.bucket(gcs.bucket).blob("a").upload_from_string(b"x" * SPARSE)
        client.close()
        assert start + b"".join(body) == bytes(SPARSE)


def test_gcs_faults_reach_the_client(gcs: GcsServer, bucket: storage.Bucket) -> None:
    gcs.put("a", WEIGHTS)
    gcs.faults.add("flip", "/download/", after_bytes=1000)
    with pytest.raises(DataCorruption):
        bucket.blob("a").download_as_bytes()
    gcs.faults.add("503", "/download/")
    with pytest.raises(ServiceUnavailable):
        bucket.blob("a").download_as_bytes(retry=None)
    gcs.faults.add("reset", "/download/", after_bytes=1000)
    assert bucket.blob("a").download_as_bytes() == WEIGHTS


def test_file_server(files: FileServer, tmp_path: Path) -> None:
    with httpx.Client(base_url=files.url) as client:
        whole = client.get("/a.bin")
        assert (whole.status_code, whole.content) == (200, WEIGHTS)
        etag = whole.headers["ETag"]
        part = client.get("/a.bin", headers={"Range": "bytes=5-9", "If-Range": etag})
        assert (part.status_code, part.content) == (206, WEIGHTS[5:10])
        assert part.headers["Content-Range"] == "bytes 5-9/300000"
        stale = client.get("/a.bin", headers={"Range": "bytes=5-9", "If-Range": '"x"'})
        assert (stale.status_code, stale.content) == (200, WEIGHTS)
        assert client.get("/a.bin", headers={"If-None-Match": etag}).status_code == 304
        assert client.head("/a.bin").headers["Content-Length"] == "300000"
        assert client.get("/%2e%2e/%2e%2e/etc/passwd").status_code == 404
    with FileServer(tmp_path, ranges=False) as plain:
        answer = httpx.get(f"{plain.url}/a.bin", headers={"Range": "bytes=5-9"})
        assert (answer.status_code, answer.content) == (200, WEIGHTS)


def received(url: str) -> tuple[bytes, type[Exception] | None]:
    content = b""
    try:
        with httpx.stream("GET", f"{url}/a.bin") as answer:
            for block in answer.iter_raw():
                content += block
    except httpx.TransportError as error:
        return content, type(error)
    return content, None


def test_each_fault(files: FileServer) -> None:
    url, faults = files.url, files.faults
    faults.add("truncate", after_bytes=1000)
    assert received(url) == (WEIGHTS[:1000], httpx.RemoteProtocolError)
    faults.add("reset", "a.bin", after_bytes=2000)
    assert received(url) == (WEIGHTS[:2000], httpx.ReadError)
    faults.add("flip", after_bytes=3000)
    wrong = bytes([WEIGHTS[3000] ^ 0xFF])
    assert received(url) == (WEIGHTS[:3000] + wrong + WEIGHTS[3001:], None)
    faults.add("stall", after_bytes=10, seconds=0.3)
    began = time.monotonic()
    assert received(url) == (WEIGHTS, None)
    assert time.monotonic() - began > 0.3
    faults.add("429", seconds=7)
    faults.add("500", times=2)
    answers = [httpx.get(f"{url}/a.bin") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [429, 500, 500, 200]
    assert answers[0].headers["Retry-After"] == "7"
    assert faults.requests["/a.bin"] == 8
    assert faults.bytes_sent["/a.bin"] == 3000 + 3 * 300_000 + 3 * len(b"refused")


def test_overwrite_calls_back_before_the_answer(files: FileServer, tmp_path: Path) -> None:
    files.faults.add("overwrite", callback=lambda: (tmp_path / "a.bin").write_bytes(b"new"))
    assert received(files.url) == (b"new", None)


def test_faults_choose_their_requests(files: FileServer) -> None:
    files.faults.add("503", "b.bin")
    files.faults.add("truncate", after_bytes=300_000)  # no body is longer
    files.faults.add("503", method="GET", skip=1)
    assert httpx.head(f"{files.url}/a.bin").status_code == 200
    assert httpx.get(f"{files.url}/a.bin").status_code == 200
    assert httpx.get(f"{files.url}/a.bin").status_code == 503
    assert len(files.faults.pending()) == 2
    files.faults.clear()
    assert received(files.url) == (WEIGHTS, None)
    with pytest.raises(ValueError, match="overwrite"):
        Faults().add("overwrite")


def test_a_server_stops_in_mid_stall(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(WEIGHTS)
    server = FileServer(tmp_path)
    server.start()
    server.faults.add("stall", seconds=60)
    with httpx.stream("GET", f"{server.url}/a.bin"):
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 5
