"""Each kind of source: what it knows of its files, and what it refuses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import (
    DefaultCredentialsError,
    GoogleAuthError,
    RefreshError,
    TransportError,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from benchmarks.servers.files import FileServer
from benchmarks.servers.s3 import S3Server
from deployments.errors import ConfigError, ModelCorrupt, SourceFailed
from deployments.origins import check_pinned, parse_hub
from deployments.settings import ROOT, StoreSettings
from deployments.store.bucket import RemoteFile, Transient
from deployments.store.folder_bucket import FolderBucket, local_folder
from deployments.store.provider import open_bucket, open_reader
from deployments.store.web import WebReader, retry_after_s
from tests.store import common
from tests.store.common import LARGE, SCHEMES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.store.common import Held

FILES = common.random_files()
PINNED = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def at(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Held]:
    with (
        pytest.MonkeyPatch.context() as patch,
        common.held(request.param, FILES, tmp_path / "source", patch) as held,
    ):
        yield held


@pytest.mark.parametrize("at", SCHEMES, indirect=True)
def test_every_source_tells_sizes_in_order_and_reads_any_part(at: Held) -> None:
    remotes = at.source.stat([LARGE, "empty.txt", "model_index.json"])
    assert [(r.path, r.size) for r in remotes] == [
        (LARGE, len(FILES[LARGE])),
        ("empty.txt", 0),
        ("model_index.json", 9),
    ]
    for start, stop in [(0, 1), (0, len(FILES[LARGE])), (70_000, 200_000), (5, 5)]:
        pieces = bytearray()
        at.source.read(remotes[0], start, stop, pieces.extend)
        assert pieces == FILES[LARGE][start:stop]


@pytest.mark.parametrize("at", SCHEMES, indirect=True)
def test_what_is_missing_is_named(at: Held) -> None:
    with pytest.raises(SourceFailed) as caught:
        at.source.stat(["model_index.json", "none.bin"])
    assert "none.bin" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("at", ["hf"], indirect=True)
def test_the_hub_vouches_for_large_files(at: Held) -> None:
    large, small = at.source.stat([LARGE, "model_index.json"])
    assert large.sha256 == common.manifest_of({LARGE: FILES[LARGE]}).files[0].sha256
    assert small.sha256 is None


@pytest.mark.parametrize("at", ["gs"], indirect=True)
def test_a_bucket_pins_generations(at: Held) -> None:
    old = at.source.stat([LARGE])[0]
    at.overwrite()
    assert at.source.stat([LARGE])[0].pin != old.pin
    with pytest.raises(SourceFailed, match="replaced since it was listed"):
        at.source.read(old, 0, 10, lambda _: None)


@pytest.mark.parametrize("at", ["hf"], indirect=True)
def test_an_offline_hub_says_so(at: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceFailed, match="HF_HUB_OFFLINE"):
        at.source.stat([LARGE])


@pytest.mark.parametrize("at", ["file", "https"], indirect=True)
def test_an_error_of_the_reader_is_not_the_sources(at: Held) -> None:
    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        at.source.read(at.source.stat([LARGE])[0], 0, 100, full)


def test_a_relative_folder_is_the_projects() -> None:
    assert local_folder("file://starter_models/comic") == ROOT / "starter_models/comic"
    assert str(local_folder("file:///a/b")) == "/a/b"


@pytest.mark.parametrize("url", ["file:/a", "FILE:///a", "file://", "file:a"])
def test_a_folder_has_one_form(url: str) -> None:
    with pytest.raises(ConfigError, match="file:///folder"):
        local_folder(url)
    with pytest.raises(ConfigError):
        open_reader(url)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_in_a_source_is_refused(tmp_path: Path, link: str) -> None:
    folder = common.write_files(tmp_path / "source", FILES)
    place = folder / (LARGE if link == "file" else "unet")
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelCorrupt, match="no symbolic links"):
        FolderBucket(f"file://{folder}").stat([LARGE])


def test_a_pipe_in_a_source_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceFailed, match="plain file"):
        FolderBucket(f"file://{tmp_path}").stat(["pipe"])


@pytest.mark.parametrize("scheme", ["ftp://a/b", "a/b", "C:\\a", ""])
def test_an_unknown_scheme_is_refused(scheme: str) -> None:
    with pytest.raises(ConfigError, match="cannot come from"):
        open_reader(scheme)


def test_plain_http_is_for_loopback() -> None:
    with pytest.raises(ConfigError, match="not http"):
        open_reader("http://example.org/m")
    open_reader("http://127.0.0.1:1/m")
    open_reader("https://example.org/m")


@pytest.mark.parametrize("url", ["hf://org/m@main", "hf://org/m@v1", "hf://org/m@0123456"])
def test_a_hub_revision_must_be_pinned(url: str) -> None:
    with pytest.raises(ConfigError, match="not pinned") as caught:
        open_reader(url)
    assert "40 hex digits" in caught.value.remedy


@pytest.mark.parametrize("url", ["hf://org", "hf://org/m", "hf://org/m/x@main", "hf://../m@main"])
def test_a_hub_url_has_one_form(url: str) -> None:
    with pytest.raises(ConfigError):
        open_reader(url)


@pytest.mark.parametrize(
    "repo",
    [
        *("o/re--po", "o/re..po", "o/-repo", "o/repo-", "o/.repo", "o/repo.", "-o/repo"),
        *("o-/repo", "o/repo.git", "o--o/repo", f"o/{'x' * 97}"),
    ],
)
def test_a_repository_the_hub_library_refuses_is_refused_first(repo: str) -> None:
    with pytest.raises(HFValidationError):
        validate_repo_id(repo)
    with pytest.raises(ConfigError, match="hf://org/repo@revision"):
        parse_hub(f"hf://{repo}@unresolved")


@pytest.mark.parametrize("repo", ["o/r", "a-b/c.d_e-f", "_o/x_", f"o/{'x' * 96}", "o/a-.b"])
def test_a_repository_the_hub_library_takes_is_taken(repo: str) -> None:
    validate_repo_id(repo)
    assert parse_hub(f"hf://{repo}@unresolved") == (repo, "unresolved")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RefreshError("expired"), SourceFailed),
        (DefaultCredentialsError("none"), SourceFailed),
        (TransportError("no route"), Transient),
    ],
)
@pytest.mark.parametrize("when", ["found", "used"])
def test_credentials_that_do_not_work_are_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, error: GoogleAuthError, kind: type[Exception], when: str
) -> None:
    from deployments.store import gcs

    class Useless(Credentials):
        def refresh(self, request: object) -> None:
            raise error

    def find(*_: object, **__: object) -> tuple[Credentials, None]:
        if when == "found":
            raise error
        return Useless(), None

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr("google.auth.default", find)
    source = gcs.GcsBucket("gs://models/m")
    with pytest.raises(kind) as caught:
        source.stat([])
    if isinstance(caught.value, SourceFailed):
        assert "gcloud auth application-default login" in caught.value.remedy


def test_a_metadata_server_that_is_not_up_yet_is_asked_again() -> None:
    from deployments.store import gcs

    with pytest.raises(Transient), gcs._google_errors("gs://models/m"):
        raise RefreshError("no answer") from TransportError("no route")


def test_pinned_and_unresolved_revisions_are_distinguished() -> None:
    check_pinned(f"hf://org/m@{PINNED}")
    with pytest.raises(ConfigError) as caught:
        check_pinned("hf://org/m@unresolved")
    assert "imagen models resolve" in caught.value.remedy


def test_a_missing_file_is_not_asked_for_again(tmp_path: Path) -> None:
    with FileServer(tmp_path) as server:
        source = WebReader(server.url)
        with pytest.raises(SourceFailed):
            source.read(RemoteFile("none", 1), 0, 1, lambda _: None)


def test_a_server_that_is_not_there_may_come_back(tmp_path: Path) -> None:
    with FileServer(tmp_path) as server:
        url = server.url
    with pytest.raises(Transient):
        WebReader(url).stat(["a"])


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7), ("0", 0), ("9999", 60), ("-1", 0), ("Wed, 21 Oct", 0)]
)
def test_retry_after(value: str, seconds: float) -> None:
    assert retry_after_s({"Retry-After": value}) == seconds


def test_no_retry_after() -> None:
    assert retry_after_s({}) == 0


def test_a_public_s3_bucket_is_read_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(public=True) as server:
        for path, data in FILES.items():
            server.put(f"m/v 1/{path}", data)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        bucket = open_bucket("s3://models/m/v 1", StoreSettings())
        remotes = bucket.stat([LARGE, "model_index.json"])
        assert [r.size for r in remotes] == [len(FILES[LARGE]), 9]
        pieces = bytearray()
        bucket.read(remotes[0], 5, 70_000, pieces.extend)
        assert pieces == FILES[LARGE][5:70_000]
        server.public = False
        with pytest.raises(SourceFailed, match="403"):
            bucket.stat([LARGE])


def test_google_is_asked_anonymously_where_nothing_names_an_account(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from deployments.store import gcs

    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # this machine is not asked either
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    assert isinstance(gcs._credentials(), AnonymousCredentials)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gone.json"))
    with pytest.raises(DefaultCredentialsError):
        gcs._credentials()
