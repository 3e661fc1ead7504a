"""Folders and Google's buckets keep the same promises."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from google.auth.credentials import AnonymousCredentials
from google.oauth2 import service_account

from benchmarks.servers.gcs import GcsServer
from deployments.errors import ConfigError, Missing, SourceFailed, StoreUnwritable, Unsignable
from deployments.store import gcs
from deployments.store.bucket import find
from deployments.store.folder_bucket import FolderBucket
from deployments.store.provider import open_bucket
from tests.store import common

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deployments.store.bucket import Bucket


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    with GcsServer(page_size=2) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["file", "gs"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    url = f"file://{tmp_path / 'bucket'}"
    if request.param == "gs":
        url = f"gs://{request.getfixturevalue('server').bucket}/results"
    return open_bucket(url, common.settings_of(tmp_path))


def content(bucket: Bucket, path: str) -> bytes:
    file = bucket.stat([path])[0]
    pieces = bytearray()
    bucket.read(file, 0, file.size, pieces.extend)
    return bytes(pieces)


def test_bytes_and_files_are_put_whole(bucket: Bucket, tmp_path: Path) -> None:
    local = common.write_files(tmp_path, {"a.bin": os.urandom(70_000)}) / "a.bin"
    assert bucket.put("jobs/1/a b.bin", local)
    assert bucket.put("jobs/1/empty", b"")
    assert content(bucket, "jobs/1/a b.bin") == local.read_bytes()
    assert content(bucket, "jobs/1/empty") == b""


def test_nothing_is_overwritten(bucket: Bucket, tmp_path: Path) -> None:
    local = common.write_files(tmp_path, {"other": b"other"}) / "other"
    assert bucket.put("a", b"first")
    assert not bucket.put("a", b"second")
    assert not bucket.put("a", local)
    assert content(bucket, "a") == b"first"


def test_of_many_writers_one_wins(bucket: Bucket) -> None:
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        return bucket.put("a", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert content(bucket, "a") == b"%d" % won.index(True)


def test_a_list_is_sorted_and_complete(bucket: Bucket) -> None:
    assert list(bucket.list()) == []
    paths = ["a/1", "a/10", "a/b/c", "ab", "b"]
    for path in reversed(paths):
        bucket.put(path, path.encode())
    assert [file.path for file in bucket.list()] == paths
    assert [file.path for file in bucket.list("a/")] == ["a/1", "a/10", "a/b/c"]
    assert [file.path for file in bucket.list("a/1")] == ["a/1", "a/10"]
    assert list(bucket.list("c/")) == []
    assert [file.size for file in bucket.list("a/b")] == [5]


def test_stat_gives_what_list_gives(bucket: Bucket) -> None:
    for path in ("a", "b", "c"):
        bucket.put(path, path.encode() * 3)
    listed = list(bucket.list())
    assert bucket.stat(["c", "a"]) == [listed[2], listed[0]]
    assert bucket.stat(["b"]) == [listed[1]]
    with pytest.raises(Missing, match="none"):
        bucket.stat(["a", "none"])


def test_what_is_deleted_is_gone_and_can_be_put_again(bucket: Bucket) -> None:
    bucket.put("a/b", b"1")
    bucket.delete("a/b")
    bucket.delete("a/b")
    assert find(bucket, "a/b") is None
    assert list(bucket.list()) == []
    assert bucket.put("a/b", b"2")
    assert content(bucket, "a/b") == b"2"


def test_a_killed_writers_part_is_not_listed(tmp_path: Path) -> None:
    bucket = FolderBucket(f"file://{tmp_path}")
    common.write_files(tmp_path, {".upload-0123": b"half"})
    assert list(bucket.list()) == []


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/etc/passwd", "a//b", "", "."])
def test_a_path_stays_in_its_folder(tmp_path: Path, path: str) -> None:
    bucket = FolderBucket(f"file://{tmp_path / 'bucket'}")
    for act in (lambda: bucket.put(path, b""), lambda: bucket.delete(path)):
        with pytest.raises(ConfigError, match="path is wrong"):
            act()
    with pytest.raises(ConfigError, match="path is wrong"):
        bucket.stat([path])


def test_a_list_stays_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    bucket = FolderBucket(f"file://{tmp_path / 'bucket'}")
    with pytest.raises(ConfigError, match="path is wrong"):
        list(bucket.list("../"))


def test_a_name_that_uploads_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="path is wrong"):
        FolderBucket(f"file://{tmp_path}").put(".upload-x", b"")


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, where a folder should be")
    bucket = FolderBucket(f"file://{tmp_path / 'file'}")
    with pytest.raises(StoreUnwritable, match="target folder cannot be written"):
        bucket.put("a", b"")


def test_a_folder_signs_nothing(tmp_path: Path) -> None:
    with pytest.raises(Unsignable, match="no URLs") as caught:
        FolderBucket(f"file://{tmp_path}").sign("a", 60)
    assert caught.value.remedy


def test_credentials_without_a_key_sign_nothing(server: GcsServer) -> None:
    with pytest.raises(Unsignable, match="cannot sign") as caught:
        gcs.GcsBucket(f"gs://{server.bucket}/m").sign("a", 60)
    assert "service account" in caught.value.remedy


def test_a_service_account_signs_a_url_that_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    class Signer:
        key_id = "1"

        def sign(self, message: bytes) -> bytes:
            return b"signature"

    account = service_account.Credentials(Signer(), "me@example.org", "https://token")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr("google.auth.default", lambda **_: (account, None))
    url = gcs.GcsBucket("gs://models/results").sign("1/a b.png", 600)
    assert url.startswith("https://storage.googleapis.com/models/results/1/a%20b.png?")
    assert "X-Goog-Algorithm=GOOG4-RSA-SHA256" in url
    assert "X-Goog-Expires=600" in url
    assert f"X-Goog-Signature={b'signature'.hex()}" in url


def test_reads_carry_the_credentials_token(
    server: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Token(AnonymousCredentials):
        def before_request(self, request: object, method: str, url: str, headers: dict) -> None:
            headers["Authorization"] = "Bearer t"

    server.put("m/a", b"12345")
    monkeypatch.setattr(gcs, "AnonymousCredentials", Token)
    assert content(gcs.GcsBucket(f"gs://{server.bucket}/m"), "a") == b"12345"
    sent = [e for e in server.faults.log if e.path.startswith("/download/")]
    assert [e.headers["authorization"] for e in sent] == ["Bearer t"]


def test_no_such_bucket(server: GcsServer, tmp_path: Path) -> None:
    with pytest.raises(SourceFailed, match="There is no such bucket"):
        open_bucket("gs://no-such-bucket/m", common.settings_of(tmp_path))
