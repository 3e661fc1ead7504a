"""A model is in the store whole, or not at all, whatever happens to the disk."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.servers.files import FileServer
from deployments.errors import ModelCorrupt, SourceFailed, StoreUnwritable
from deployments.origins import MANIFEST
from deployments.store import disk, staging
from deployments.store.disk import network_filesystem
from deployments.store.folder import list_files
from deployments.store.folder_bucket import FolderBucket
from deployments.store.web import WebReader
from tests.store import common
from tests.store.common import LARGE, NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.store.cache import Places, Store
    from deployments.store.events import Event

PROJECT = Path(__file__).parents[2]
FILES = common.random_files()
WHOLE = common.manifest_of(FILES)
OTHER_FILES = common.random_files(seed=1)
OTHER = common.manifest_of(OTHER_FILES, "older-model")
NOBODY = 65534


@pytest.fixture
def places(tmp_path: Path) -> Places:
    folder = common.write_files(tmp_path / "source", FILES)
    return common.places_of(FolderBucket(f"file://{folder}"), FILES)


@pytest.fixture
def other_places(tmp_path: Path) -> Places:
    folder = common.write_files(tmp_path / "other", OTHER_FILES)
    return common.places_of(FolderBucket(f"file://{folder}"), OTHER_FILES)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with FileServer(common.write_files(tmp_path / "served", FILES)) as server:
        yield server


@pytest.fixture
def web(server: FileServer) -> Places:
    source = WebReader(server.url)
    return common.places_of(source, FILES)


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def store(tmp_path: Path, events: list[Event]) -> Store:
    return common.store_of(tmp_path / "root", events.append)


def amounts(events: list[Event], kind: str) -> list[float]:
    return [e.amount for e in events if e.kind == kind]


def test_a_pull_publishes_plain_read_only_files(store: Store, places: Places) -> None:
    folder = store.pull(WHOLE, places)
    assert folder == store.root / "store" / NAME / WHOLE.short
    assert list_files(folder) == sorted([MANIFEST, *FILES])
    for parent, folders, files in os.walk(folder):
        assert stat.S_IMODE(os.stat(parent).st_mode) == 0o555
        assert not any(Path(parent, name).is_symlink() for name in folders + files)
        assert all(stat.S_IMODE(os.stat(Path(parent, f)).st_mode) == 0o444 for f in files)
    assert store.check(NAME, WHOLE.digest, "full").digest == WHOLE.digest
    assert store.models() == [(NAME, WHOLE.short)]
    assert store.refs() == {NAME: WHOLE.digest}
    assert common.staged(store.root) == []


def test_a_second_pull_asks_for_nothing(
    store: Store, server: FileServer, web: Places, events: list[Event]
) -> None:
    first = store.pull(WHOLE, web)
    assert sum(amounts(events, "bytes")) == amounts(events, "miss")[0] == WHOLE.total_bytes
    server.faults.reset_counters()
    events.clear()
    assert store.pull(WHOLE, web) == first
    assert store.find(NAME, WHOLE.digest) == first
    assert server.faults.log == []
    assert len(amounts(events, "hit")) == 2
    assert amounts(events, "miss") == []


def test_what_an_interrupted_pull_finished_is_not_fetched_again(
    store: Store, server: FileServer, web: Places, events: list[Event]
) -> None:
    server.faults.add("503", "vae/", times=1000, method="GET")
    with pytest.raises(SourceFailed, match="503"):
        common.store_of(store.root, attempts=2, threads=1).pull(WHOLE, web)
    assert store.models() == []
    assert len(common.staged(store.root)) == 1
    server.faults.clear()
    server.faults.reset_counters()
    store.pull(WHOLE, web)
    # The small files come after what failed.
    again = len(FILES["vae/weights.safetensors"]) + len(FILES["model_index.json"])
    # By exchange, because a refusal of before may still be on its way.
    assert sum(one.sent for one in server.faults.log) == again
    assert f"/{LARGE}" not in server.faults.requests
    assert sum(amounts(events, "adopted")) + again == WHOLE.total_bytes
    assert common.staged(store.root) == []


@pytest.mark.parametrize("to", ["folder", "nowhere"])
def test_a_link_is_deleted_and_not_what_it_points_to(tmp_path: Path, to: str) -> None:
    folder = common.write_files(tmp_path / "folder", {"a": b"1"})
    folder.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / to)
    disk.unprotect(link)
    disk.delete_folder(link)
    assert not link.is_symlink()
    assert (folder / "a").read_bytes() == b"1"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_file_in_the_staging_is_deleted(store: Store, places: Places) -> None:
    common.write_files(store.root / ".staging", {f"{WHOLE.short}.stray": b"x"})
    store.pull(WHOLE, places)
    assert common.staged(store.root) == []


def test_only_folders_named_by_a_digest_are_models(store: Store, places: Places) -> None:
    folder = store.pull(WHOLE, places)
    top, digest = store.root / "store", "0" * 16
    common.write_files(top, {"stray": b"", f"{NAME}/stray": b"", f"{NAME}/{digest}": b""})
    (folder.parent / "not-a-digest").mkdir()
    (folder.parent / ("1" * 16)).symlink_to(folder)
    (top / "linked").symlink_to(folder.parent)
    assert store.models() == [(NAME, WHOLE.short)]


def test_half_a_file_is_not_taken_over(store: Store, places: Places) -> None:
    stale = store.root / ".staging" / f"{WHOLE.short}.host.1"
    common.write_files(stale, {LARGE: bytes(len(FILES[LARGE])), "model_index.json": b"x"})
    store.pull(WHOLE, places)
    store.check(NAME, WHOLE.digest, "full")
    assert common.staged(store.root) == []


def test_stale_staging_goes_before_the_disk_is_measured(
    store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = store.root / ".staging" / f"{WHOLE.short}.host.1"
    common.write_files(stale, {LARGE: b"half"})
    seen: list[bool] = []
    monkeypatch.setattr(store.staging, "_check_space", lambda *_: seen.append(stale.exists()))
    store.pull(WHOLE, places)
    assert seen == [False]


def test_an_older_model_stays(store: Store, places: Places, other_places: Places) -> None:
    store.pull(OTHER, other_places)
    store.pull(WHOLE, places)
    store.check("older-model", OTHER.digest)
    assert store.refs() == {NAME: WHOLE.digest, "older-model": OTHER.digest}


def assert_refused_and_clean(store: Store, places: Places, match: str) -> None:
    with pytest.raises(StoreUnwritable, match=match) as caught:
        store.pull(WHOLE, places)
    assert caught.value.exit_code == 5
    assert caught.value.remedy
    assert common.staged(store.root) == []
    assert store.models() == [("older-model", OTHER.short)]
    store.check("older-model", OTHER.digest)


def test_a_model_that_does_not_fit_is_refused_before_the_first_byte(
    store: Store,
    places: Places,
    other_places: Places,
    events: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.pull(OTHER, other_places)
    events.clear()
    usage = shutil.disk_usage(store.root)._replace(total=10**6, used=600_000, free=400_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreUnwritable, match="does not fit") as caught:
        store.pull(WHOLE, places)
    assert f"{WHOLE.total_bytes} bytes needed, 50000 kept free" in caught.value.message
    assert amounts(events, "bytes") == []
    store.check("older-model", OTHER.digest)


@pytest.mark.parametrize("name", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_in_mid_pull(
    store: Store,
    places: Places,
    other_places: Places,
    name: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.pull(OTHER, other_places)
    real, calls = getattr(os, name), [0]

    def full(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > 3:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, name, full)
    assert_refused_and_clean(store, places, os.strerror(code))


def test_a_disk_that_fills_at_the_manifest(
    store: Store, places: Places, other_places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pull(OTHER, other_places)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert_refused_and_clean(store, places, "No space left")


def test_a_disk_that_takes_only_a_part(
    store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    store.pull(WHOLE, places)
    store.check(NAME, WHOLE.digest, "full")


def test_a_disk_that_is_really_full(
    tmp_path: Path, places: Places, other_places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    with common.mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=600k", "none"):
        store = common.store_of(tmp_path / "disk/root")
        store.pull(OTHER, other_places)
        assert_refused_and_clean(store, places, "does not fit")
        # Somebody else may fill it after it was measured.
        monkeypatch.setattr(store.staging, "_check_space", lambda *_: None)
        assert_refused_and_clean(store, places, "No space left")


def test_a_read_only_disk_serves_what_it_holds(
    tmp_path: Path, places: Places, other_places: Places
) -> None:
    root = tmp_path / "root"
    folder = common.store_of(root).pull(WHOLE, places)
    seen = tmp_path / "seen"
    with common.mounted(seen, "--bind", "-o", "ro", str(root)):
        if os.access(seen, os.W_OK):
            subprocess.run(["mount", "-o", "remount,bind,ro", seen], check=True)
        store = common.store_of(seen)
        assert store.find(NAME, WHOLE.digest) == seen / folder.relative_to(root)
        with store.lease(WHOLE.digest):
            store.check(NAME, WHOLE.digest, "full")
        with pytest.raises(StoreUnwritable) as caught:
            store.pull(OTHER, other_places)
        assert caught.value.exit_code == 5
        with pytest.raises(StoreUnwritable):
            store.remove(NAME, WHOLE.digest)
        (folder / "model_index.json").chmod(0o644)
        (folder / "model_index.json").write_bytes(b"longer than it was")
        with pytest.raises(ModelCorrupt, match=r"model_index\.json"):
            store.find(NAME, WHOLE.digest)


AS_NOBODY = """
import encodings.unicode_escape, os, sys
from pathlib import Path
from deployments.errors import StoreUnwritable
from deployments.store.manifest import Manifest
from deployments.store.folder_bucket import FolderBucket
from tests.store import common
os.setgid(65534)
os.setuid(65534)  # after the imports, which may lie in root's home
root, source, manifest = sys.argv[1:]
manifest = Manifest.model_validate_json(Path(manifest).read_bytes())
store = common.store_of(Path(root))
"""
READS = """
assert store.find(manifest.model, manifest.digest)
with store.lease(manifest.digest):
    store.check(manifest.model, manifest.digest, "full")
try:
    store.pull(manifest, {})
except StoreUnwritable as error:
    sys.exit(error.exit_code)
"""
PULLS = """
source = FolderBucket("file://" + source)
store.pull(manifest, {f.path: (source, f.path) for f in manifest.files})
store.check(manifest.model, manifest.digest, "full")
assert not common.staged(Path(root))
"""


def as_nobody(code: str, tmp_path: Path) -> int:
    """Root is stopped by no mode bits."""
    if os.geteuid():
        pytest.skip("only root can become another")
    (tmp_path / "manifest.json").write_bytes(WHOLE.encode())
    for parent in [tmp_path, *tmp_path.parents]:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o055)
    arguments = [tmp_path / "root", tmp_path / "source", tmp_path / "manifest.json"]
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY + code, *arguments], cwd=PROJECT
    ).returncode


def test_a_user_who_may_only_read(store: Store, places: Places, tmp_path: Path) -> None:
    store.pull(WHOLE, places)
    assert as_nobody(READS, tmp_path) == 5


def test_a_pull_that_died_before_its_last_rename_is_taken_over(
    tmp_path: Path, places: Places
) -> None:
    del places
    stale = tmp_path / "root" / ".staging" / f"{WHOLE.short}.host.1"
    common.write_files(stale, FILES)
    for parent, _, files in os.walk(tmp_path / "root"):
        os.chown(parent, NOBODY, NOBODY)
        for name in files:
            os.chown(Path(parent, name), NOBODY, NOBODY)
    for name in ("unet", "vae"):
        (stale / name).chmod(0o555)
    assert as_nobody(PULLS, tmp_path) == 0


def test_a_lock_that_cannot_be_written(store: Store, places: Places) -> None:
    (store.root / ".locks" / f"{WHOLE.short}.lock").mkdir(parents=True)
    with pytest.raises(StoreUnwritable, match="lock"):
        store.pull(WHOLE, places)


def test_another_digest_is_refused(store: Store, places: Places) -> None:
    folder = store.pull(WHOLE, places)
    wrong = "0" * 64
    folder.chmod(0o755)
    folder.rename(store.folder(NAME, wrong))
    with pytest.raises(ModelCorrupt, match="expected 0000"):
        store.check(NAME, wrong)
    assert not store.holds(NAME, wrong)
    assert store.find(NAME, WHOLE.digest) is None


def test_a_folder_that_another_process_published_meanwhile_is_kept(
    store: Store, places: Places, tmp_path: Path
) -> None:
    other = common.store_of(tmp_path / "elsewhere").pull(WHOLE, places)
    target = store.folder(NAME, WHOLE.digest)
    publish = store._publish

    def late(*arguments: Any) -> None:
        shutil.copytree(other, target)
        marks.append(target.stat().st_ino)
        publish(*arguments)

    marks: list[int] = []
    store._publish = late  # type: ignore[method-assign]
    assert store.pull(WHOLE, places) == target
    assert target.stat().st_ino == marks[0]
    store.check(NAME, WHOLE.digest, "full")
    assert common.staged(store.root) == []


def test_a_damaged_folder_in_the_way_is_replaced(store: Store, places: Places) -> None:
    target = store.folder(NAME, WHOLE.digest)
    publish = store._publish

    def late(*arguments: Any) -> None:
        common.write_files(target, {"half": b"a"})
        publish(*arguments)

    store._publish = late  # type: ignore[method-assign]
    store.pull(WHOLE, places)
    store.check(NAME, WHOLE.digest, "full")
    assert len(list((store.root / ".quarantine").iterdir())) == 1


@pytest.mark.parametrize("verify", ["quick", "crc32c"])
def test_a_damaged_folder_goes_to_quarantine_and_is_pulled_anew(
    store: Store, places: Places, verify: Any, events: list[Event]
) -> None:
    folder = store.pull(WHOLE, places)
    damaged = b"x" * (len(FILES[LARGE]) - (verify == "quick"))
    (folder / LARGE).chmod(0o644)
    (folder / LARGE).write_bytes(damaged)
    assert store.find(NAME, WHOLE.digest, verify) is None
    assert len(amounts(events, "verify_failure")) == 1
    kept = list((store.root / ".quarantine").glob(f"{NAME}.{WHOLE.short}.*"))
    assert [(place / LARGE).read_bytes() for place in kept] == [damaged]
    assert store.pull(WHOLE, places) == folder
    store.check(NAME, WHOLE.digest, "full")


def test_a_leased_model_is_not_removed(store: Store, places: Places) -> None:
    folder = store.pull(WHOLE, places)
    with store.lease(WHOLE.digest):
        assert not store.remove(NAME, WHOLE.digest)
        assert folder.is_dir()
    assert store.remove(NAME, WHOLE.digest)
    assert not folder.exists()
    assert store.refs() == {}
    assert store.remove(NAME, WHOLE.digest)


def test_what_a_conversion_made_is_published_once(store: Store) -> None:
    calls: list[Path] = []

    def fill(folder: Path) -> None:
        calls.append(common.write_files(folder, FILES))

    for _ in range(2):
        assert store.add(WHOLE, fill) == store.folder(NAME, WHOLE.digest)
    store.check(NAME, WHOLE.digest, "full")
    assert len(calls) == 1
    assert common.staged(store.root) == []


def test_a_conversion_that_gives_something_else_is_refused(store: Store) -> None:
    with pytest.raises(ModelCorrupt, match=r"model_index\.json"):
        store.add(WHOLE, lambda f: common.write_files(f, FILES | {"model_index.json": b"other"}))
    assert store.models() == []
    assert common.staged(store.root) == []


def test_a_thread_that_waits_finds_the_model(
    store: Store, server: FileServer, web: Places, events: list[Event]
) -> None:
    threads = [threading.Thread(target=store.pull, args=(WHOLE, web)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.faults.bytes_sent.total() == WHOLE.total_bytes
    assert len(amounts(events, "waited")) == 4


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", None),
        ("/models", "nfs4"),
        ("/models/a/b", "nfs4"),
        ("/models2", None),
        ("/a b/c", "fuse.gcsfuse"),
        ("/größe/漢/x", "lustre"),
        ("/local/deep", None),
    ],
)
def test_network_file_systems_are_recognised(tmp_path: Path, path: str, kind: str | None) -> None:
    table = tmp_path / "mounts"
    table.write_text(
        "/dev/vda / ext4 rw 0 0\n"
        "server:/x /models nfs4 rw 0 0\n"
        "bucket /a\\040b fuse.gcsfuse rw 0 0\n"
        "mds /größe/漢 lustre rw 0 0\n"
        "server:/y /local nfs rw 0 0\n"
        "/dev/vdb /local/deep xfs rw 0 0\n",
        encoding="utf-8",
    )
    assert network_filesystem(Path(path), str(table)) == kind


def test_without_a_table_of_mounts_the_type_is_unknown(tmp_path: Path) -> None:
    assert network_filesystem(tmp_path, str(tmp_path / "none")) is None


def test_on_a_network_disk_nothing_is_taken_over(
    store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "network_filesystem", lambda _: "nfs4")
    living = store.root / ".staging" / f"{WHOLE.short}.host.1"
    common.write_files(living, FILES)
    store.pull(WHOLE, places)
    assert sorted(list_files(living)) == sorted(FILES)
