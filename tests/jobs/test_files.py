"""Pictures of jobs: whole or absent, never replaced, on a folder, on Google's storage and on S3."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest

from benchmarks.servers.gcs_links import FakeGcsLinks
from benchmarks.servers.s3 import S3Server
from deployments.errors import ConfigError, ImagenError, JobsUnavailable, LinkRefused, NoSuchJob
from deployments.settings import JobSettings
from deployments.store.folder_bucket import LINK_KEY
from serve_app.jobs.files import JobFiles, open_job_files
from serve_app.jobs.links import FolderLinks, folder_key
from tests.store import common
from tests.store.conftest import close_clients

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from benchmarks.servers.listener import Loopback

JOB = "0123456789abcdef" * 2
OTHER = "f" * 32
PICTURE = os.urandom(300_000)
DOCUMENT: dict[str, Any] = {"media_type": "image/webp", "seed": 7, "width_px": 512}


@pytest.fixture(autouse=True)
def fresh_clients() -> Iterator[None]:
    close_clients()
    yield
    close_clients()


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcsLinks]:
    with common.google_without_key(monkeypatch) as server:
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with common.served(S3Server(), monkeypatch) as server:
        yield server


@dataclass
class Site:
    files: JobFiles
    server: Loopback | None

    async def open(self, link: str) -> tuple[bytes, str]:
        """What a browser gets; LinkRefused where it is refused."""
        if self.server is None:
            file = await self.files.open_link(*parts(link))
            return file.path.read_bytes(), file.media_type
        async with httpx.AsyncClient() as client:
            answer = await client.get(link)
        if answer.status_code == 403:
            raise LinkRefused("refused")
        return answer.content, answer.headers["Content-Type"]


def parts(link: str) -> tuple[str, str, str]:
    query = dict(parse_qsl(urlsplit(link).query))
    return urlsplit(link).path.removeprefix("/files/"), query["expires"], query["signature"]


def settings_of(tmp_path: Path, url: str | None = None) -> JobSettings:
    return JobSettings(folder=tmp_path / "jobs", storage=url)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[JobFiles]:
    files = open_job_files(settings_of(tmp_path))
    yield files
    files.close()


@pytest.fixture(params=["file", "gs", "s3"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    if request.param == "file":
        yield Site(request.getfixturevalue("folder"), None)
        return
    server = request.getfixturevalue({"gs": "google", "s3": "s3"}[request.param])
    files = open_job_files(settings_of(tmp_path, f"{request.param}://models/jobs"))
    yield Site(files, server)
    files.close()


@pytest.fixture(params=["gs", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    server = request.getfixturevalue({"gs": "google", "s3": "s3"}[request.param])
    files = open_job_files(settings_of(tmp_path, f"{request.param}://models/jobs"))
    yield Site(files, server)
    files.close()


async def test_inputs_and_results_come_back(site: Site) -> None:
    await site.files.put_input(JOB, b"sent")
    await site.files.put_result(JOB, 0, PICTURE, DOCUMENT)
    await site.files.put_result(JOB, 1, b"second", DOCUMENT | {"media_type": "image/png"})
    assert await site.files.input(JOB) == b"sent"
    assert await site.files.result(JOB, 0) == (PICTURE, "image/webp")
    assert await site.files.result(JOB, 1) == (b"second", "image/png")
    assert await site.files.result_document(JOB, 0) == DOCUMENT | {"bytes": len(PICTURE)}


async def test_a_result_without_its_document_is_not_there_yet(site: Site) -> None:
    # A worker that was killed between the two.
    site.files._bucket.put(f"outputs/{JOB}/result-0.webp", b"first")
    assert await site.files.result_document(JOB, 0) is None
    for act in (site.files.result(JOB, 0), site.files.link(JOB, 0, 60)):
        with pytest.raises(NoSuchJob):
            await act
    # The worker that runs the job again: its document describes the picture that is there.
    await site.files.put_result(JOB, 0, b"of another length", DOCUMENT)
    assert await site.files.result(JOB, 0) == (b"first", "image/webp")
    assert await site.files.result_document(JOB, 0) == DOCUMENT | {"bytes": 5}


async def test_of_many_workers_one_result_stays(site: Site) -> None:
    pictures = [b"x" * size for size in range(1, 9)]
    await asyncio.gather(*(site.files.put_result(JOB, 0, p, DOCUMENT) for p in pictures))
    found, _ = await site.files.result(JOB, 0)
    assert found in pictures
    await site.files.put_result(JOB, 0, b"late", DOCUMENT)
    assert await site.files.result(JOB, 0) == (found, "image/webp")
    assert await site.files.result_document(JOB, 0) == DOCUMENT | {"bytes": len(found)}


async def test_an_input_is_not_replaced(site: Site) -> None:
    await site.files.put_input(JOB, b"first")
    await site.files.put_input(JOB, b"second")
    assert await site.files.input(JOB) == b"first"


async def test_a_link_opens_without_credentials_until_it_expires(site: Site) -> None:
    await site.files.put_result(JOB, 0, PICTURE, DOCUMENT)
    link = await site.files.link(JOB, 0, 2)
    assert await site.open(link) == (PICTURE, "image/webp")

    async def is_refused() -> None:
        while True:
            await site.open(link)
            await asyncio.sleep(0.2)

    with pytest.raises(LinkRefused):
        await asyncio.wait_for(is_refused(), 30)


async def test_an_altered_link_is_refused(site: Site) -> None:
    await site.files.put_result(JOB, 0, PICTURE, DOCUMENT)
    await site.files.put_result(OTHER, 0, b"secret", DOCUMENT)
    link = await site.files.link(JOB, 0, 60)
    other_end = "0" if link[-1] != "0" else "1"
    longer = link.replace("Expires=60", "Expires=600").replace("expires=1", "expires=2")
    for altered in (link.replace(JOB, OTHER), link[:-1] + other_end, longer):
        assert altered != link
        with pytest.raises(LinkRefused):
            await site.open(altered)


async def test_a_deleted_job_leaves_no_file(site: Site) -> None:
    await site.files.put_input(JOB, b"sent")
    await site.files.put_input(OTHER, b"sent")
    for k in range(3):
        await site.files.put_result(JOB, k, PICTURE, DOCUMENT)
    await site.files.delete(JOB)
    await site.files.delete(JOB)
    assert [file.path for file in site.files._bucket.list()] == [f"inputs/{OTHER}/image"]
    with pytest.raises(NoSuchJob):
        await site.files.input(JOB)


HOSTILE = ["", ".", "..", "../" + "0" * 29, "0" * 31, "0" * 33, JOB.upper(), JOB + "\n", "é" * 32]


@pytest.mark.parametrize("job_id", [*HOSTILE, f"{JOB}/../x", "٣" * 32])
async def test_nothing_but_an_id_reaches_a_path(
    folder: JobFiles, tmp_path: Path, job_id: str
) -> None:
    calls: tuple[Awaitable[object], ...] = (
        folder.put_input(job_id, b""),
        folder.input(job_id),
        folder.put_result(job_id, 0, b"", DOCUMENT),
        folder.result_document(job_id, 0),
        folder.result(job_id, 0),
        folder.link(job_id, 0, 60),
        folder.delete(job_id),
    )
    for call in calls:
        with pytest.raises(NoSuchJob) as caught:
            await call
        assert caught.value.remedy
    assert [path.name for path in (tmp_path / "jobs").rglob("*")] == ["files", LINK_KEY]


@pytest.mark.parametrize("k", [-1, 1000])
async def test_a_result_number_out_of_range_is_no_result(folder: JobFiles, k: int) -> None:
    with pytest.raises(NoSuchJob):
        await folder.result(JOB, k)


async def test_a_media_type_cannot_name_a_path(folder: JobFiles) -> None:
    for media_type in ("image/../../x", "image/svg+xml", "text/html", "image/json"):
        with pytest.raises(ValueError, match="not a media type"):
            await folder.put_result(JOB, 0, b"", {"media_type": media_type})


@pytest.mark.parametrize(
    "path",
    [
        LINK_KEY,
        f"../{LINK_KEY}",
        f"inputs/{JOB}/image",
        f"outputs/{JOB}/result-0.json",
        f"outputs/{JOB}/../{OTHER}/result-0.png",
        f"/outputs/{JOB}/result-0.png",
        f"outputs/{JOB}/result-0.png\n",
    ],
)
async def test_even_a_signed_link_opens_results_only(
    folder: JobFiles, tmp_path: Path, path: str
) -> None:
    await folder.put_input(JOB, b"sent")
    await folder.put_result(JOB, 0, b"x", DOCUMENT)
    link = FolderLinks(folder_key(tmp_path / "jobs/files")).sign(path, 60)
    with pytest.raises(LinkRefused):
        await folder.open_link(path, *parts(link)[1:])


@pytest.mark.parametrize(
    ("expires", "signature"), [("", ""), ("²", "é"), ("9" * 30, "0" * 64), ("\ud800", "\ud800")]
)
async def test_a_link_of_nonsense_is_refused(
    folder: JobFiles, expires: str, signature: str
) -> None:
    with pytest.raises(LinkRefused, match="altered"):
        await folder.open_link(f"outputs/{JOB}/result-0.png", expires, signature)


async def test_a_bucket_has_no_links_of_a_folder(remote: Site) -> None:
    with pytest.raises(LinkRefused):
        await remote.files.open_link(f"outputs/{JOB}/result-0.png", "1", "0")


async def test_a_link_to_a_picture_that_expired_says_so(folder: JobFiles) -> None:
    await folder.put_result(JOB, 0, b"x", DOCUMENT)
    link = await folder.link(JOB, 0, 60)
    await folder.delete(JOB)
    with pytest.raises(NoSuchJob):
        await folder.open_link(*parts(link))


def test_processes_that_start_together_share_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(folder_key, [tmp_path / "files"] * 16))
    assert len(keys) == 1
    assert [path.name for path in (tmp_path / "files").iterdir()] == [LINK_KEY]
    assert (tmp_path / "files").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "files" / LINK_KEY).stat().st_mode & 0o777 == 0o600


def test_a_damaged_key_is_named(tmp_path: Path) -> None:
    (tmp_path / LINK_KEY).write_bytes(b"short")
    with pytest.raises(ConfigError, match="damaged") as caught:
        folder_key(tmp_path)
    assert "Delete the file" in caught.value.remedy


async def test_a_sweep_takes_what_is_old(folder: JobFiles, tmp_path: Path) -> None:
    await folder.put_input(JOB, b"sent")
    await folder.put_result(JOB, 0, b"x", DOCUMENT)
    (tmp_path / "jobs/files/.upload-of-a-killed-writer").touch()
    assert await folder.sweep(3600) == 0
    for path in (tmp_path / "jobs").rglob("*"):
        os.utime(path, (0, 0))
    await folder.put_input(OTHER, b"young")
    assert await folder.sweep(3600) == 4
    assert sorted(path.name for path in (tmp_path / "jobs/files").rglob("*")) == sorted(
        [LINK_KEY, "inputs", "outputs", OTHER, "image"]
    )
    assert await folder.input(OTHER) == b"young"
    await folder.put_result(JOB, 0, b"again", DOCUMENT)


async def test_a_bucket_is_swept_by_its_own_lifecycle(remote: Site) -> None:
    await remote.files.put_input(JOB, b"sent")
    assert await remote.files.sweep(0) == 0
    assert await remote.files.input(JOB) == b"sent"


def assert_tells_no_place(error: ImagenError, *secrets: str) -> None:
    assert error.message.endswith(".")
    assert error.remedy.startswith("Try again")
    assert error.retry_after_s
    for secret in ("/", "models", "Signature", *secrets):
        assert secret not in f"{error.message} {error.value}"


async def test_a_full_disk(tmp_path: Path) -> None:
    with common.mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=400k", "none"):
        files = open_job_files(JobSettings(storage=f"file://{tmp_path}/disk/files"))
        await files.put_input(JOB, PICTURE)
        with pytest.raises(JobsUnavailable, match="takes no files") as caught:
            await files.put_result(JOB, 0, PICTURE, DOCUMENT)
        assert_tells_no_place(caught.value, str(tmp_path))
        assert await files.input(JOB) == PICTURE
        await files.delete(JOB)
        await files.put_result(JOB, 0, PICTURE, DOCUMENT)
        assert await files.result(JOB, 0) == (PICTURE, "image/webp")
        files.close()


async def test_a_read_only_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    files = open_job_files(JobSettings(storage=f"file://{tmp_path}/real"))
    await files.put_input(JOB, PICTURE)
    files.close()
    with common.mounted(tmp_path / "seen", "--bind", "-o", "ro", str(tmp_path / "real")):
        files = open_job_files(JobSettings(storage=f"file://{tmp_path}/seen"))
        for call in (files.put_input(OTHER, b"x"), files.delete(JOB), files.sweep(-1)):
            with pytest.raises(JobsUnavailable, match="takes no files") as caught:
                await call
            assert_tells_no_place(caught.value, str(tmp_path))
        assert await files.input(JOB) == PICTURE
        files.close()


CALLS: dict[str, Callable[[JobFiles], Awaitable[object]]] = {
    "put": lambda files: files.put_input(JOB, b"x"),
    "read": lambda files: files.input(JOB),
    "document": lambda files: files.result_document(JOB, 0),
    "link": lambda files: files.link(JOB, 0, 60),
    "delete": lambda files: files.delete(JOB),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_bucket_that_refuses(remote: Site, call: str) -> None:
    assert remote.server
    remote.server.faults.add("403", times=inf)
    with pytest.raises(JobsUnavailable, match="does not answer") as caught:
        await CALLS[call](remote.files)
    assert_tells_no_place(caught.value)


@pytest.mark.parametrize("call", CALLS)
async def test_a_bucket_that_hangs(remote: Site, call: str) -> None:
    assert remote.server
    files = JobFiles(remote.files._bucket, None, limit_s=0.3)
    remote.server.faults.add("silent", times=inf, seconds=3600)
    with pytest.raises(JobsUnavailable, match="does not answer") as caught:
        await CALLS[call](files)
    assert caught.value.value == "TimeoutError"
    assert_tells_no_place(caught.value)
    files.close()


async def test_a_bucket_that_stumbles_is_asked_again(remote: Site) -> None:
    assert remote.server
    await remote.files.put_input(OTHER, b"x")  # credentials are there
    remote.server.faults.add("503")
    await remote.files.put_input(JOB, b"x")
    remote.server.faults.add("500")
    assert await remote.files.input(JOB) == b"x"


async def test_an_account_that_may_not_sign(google: FakeGcsLinks, tmp_path: Path) -> None:
    google.may_sign = False
    files = open_job_files(settings_of(tmp_path, "gs://models/jobs"))
    await files.put_result(JOB, 0, b"x", DOCUMENT)
    with pytest.raises(JobsUnavailable, match="cannot sign links"):
        await files.link(JOB, 0, 60)
    files.close()


@pytest.mark.parametrize("url", ["gs://models/jobs", "s3://models/jobs"])
def test_opening_asks_a_bucket_nothing(url: str, tmp_path: Path) -> None:
    open_job_files(settings_of(tmp_path, url)).close()
