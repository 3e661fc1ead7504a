"""Folders, Google's buckets and S3 keep the same promises."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from google.auth.credentials import AnonymousCredentials

from benchmarks.servers.gcs import GcsServer
from benchmarks.servers.s3 import S3Server
from deployments.errors import ConfigError, Missing, SourceFailed, StoreUnwritable, Unsignable
from deployments.store import gcs
from deployments.store.bucket import RemoteFile, Transient, find
from deployments.store.bucket import read_whole as content
from deployments.store.folder_bucket import FolderBucket
from deployments.store.provider import open_bucket
from deployments.store.s3 import S3Bucket
from tests.store import common

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deployments.store.bucket import Bucket


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    with common.served(GcsServer(page_size=2), monkeypatch) as server:
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with common.served(S3Server(), monkeypatch) as server:
        yield server


@pytest.fixture(params=["file", "gs", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    url = f"file://{tmp_path / 'bucket'}"
    if request.param == "gs":
        url = f"gs://{request.getfixturevalue('server').bucket}/results"
    elif request.param == "s3":
        url = f"s3://{request.getfixturevalue('s3').bucket}/results"
    return open_bucket(url, common.settings_of(tmp_path))


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


@pytest.mark.parametrize("kind", [FolderBucket, S3Bucket])
@pytest.mark.parametrize("path", ["../a", "a/../../b", "/etc/passwd", "a//b", "", "."])
def test_a_path_stays_in_its_folder(kind: type[Bucket], tmp_path: Path, path: str) -> None:
    scheme = "s3:/" if kind is S3Bucket else "file://"
    bucket = kind(f"{scheme}{tmp_path / 'bucket'}")
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


@pytest.mark.parametrize("name", [".upload-x", ".link-key"])
def test_a_name_of_the_folders_own_is_refused_and_not_listed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    bucket = FolderBucket(f"file://{tmp_path}")
    assert list(bucket.list()) == []
    for act in (lambda: bucket.put(name, b""), lambda: bucket.stat([name])):
        with pytest.raises(ConfigError, match="path is wrong"):
            act()


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, where a folder should be")
    bucket = FolderBucket(f"file://{tmp_path / 'file'}")
    with pytest.raises(StoreUnwritable, match="target folder cannot be written"):
        bucket.put("a", b"")


def test_a_folder_signs_nothing(tmp_path: Path) -> None:
    with pytest.raises(Unsignable, match="no URLs") as caught:
        FolderBucket(f"file://{tmp_path}").sign("a", 60)
    assert caught.value.remedy


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


@pytest.mark.usefixtures("server", "s3")
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_no_such_bucket(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(SourceFailed, match="There is no such bucket"):
        open_bucket(f"{scheme}://no-such-bucket/m", common.settings_of(tmp_path))


def test_a_file_for_a_bucket_that_is_gone_is_not_called_missing(s3: S3Server) -> None:
    with pytest.raises(SourceFailed, match="There is no such bucket"):
        S3Bucket("s3://no-such-bucket/m").put("a", b"")


@pytest.mark.parametrize("act", ["put", "stat", "list", "delete", "read"])
def test_wrong_s3_credentials_are_named(
    act: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    bucket = S3Bucket("s3://models/m")
    acts: dict[str, Callable[[], object]] = {
        "put": lambda: bucket.put("a", b""),
        "stat": lambda: bucket.stat(["a"]),
        "list": lambda: list(bucket.list()),
        "delete": lambda: bucket.delete("a"),
        "read": lambda: bucket.read(RemoteFile("a", 1), 0, 1, print),
    }
    with pytest.raises(SourceFailed, match="HTTP 403") as caught:
        acts[act]()
    assert "AWS_ACCESS_KEY_ID" in caught.value.remedy
    assert "X-Amz-Signature" not in str(caught.value)


def test_an_s3_endpoint_without_tls_must_be_allowed(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    for act in (lambda b: b.put("a", b""), lambda b: list(b.list()), lambda b: b.sign("a", 9)):
        with pytest.raises(ConfigError, match="does not encrypt"):
            act(S3Bucket("s3://models/m"))


def test_s3_takes_no_file_above_its_limit(s3: S3Server, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 5 * 2**30 + 1)
    with pytest.raises(ConfigError, match="at most 5 GiB") as caught:
        S3Bucket("s3://models/m").put("large", large)
    assert "smaller files" in caught.value.remedy
    assert s3.faults.log == []


def test_an_s3_conflict_is_tried_again(s3: S3Server) -> None:
    s3.faults.add("409", method="PUT")
    bucket = S3Bucket("s3://models/m")
    with pytest.raises(Transient, match="being written"):
        bucket.put("a", b"1")
    assert bucket.put("a", b"1")
