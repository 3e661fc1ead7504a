"""Garbage collection removes unused models, the oldest first, and nothing else."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.errors import StoreUnwritable
from deployments.settings import StoreSettings
from deployments.store import gc, locks
from deployments.store.cache import Store
from deployments.store.folder_bucket import FolderBucket
from deployments.store.gc import collect, make_room, used_percent
from tests.store.common import (
    KIB,
    NAME,
    manifest_of,
    places_of,
    random_files,
    settings_of,
    write_files,
)

WEEK_S = 7 * 24 * 3600


class Disk:
    """A disk of ten models' room; what is pulled into the store takes it up."""

    def __init__(self, store: Store, others: int) -> None:
        self._store = store
        self._others = others

    def __call__(self, _: Path) -> float:
        return 10.0 * (self._others + len(self._store.models()))


@pytest.fixture
def settings(tmp_path: Path) -> StoreSettings:
    return settings_of(tmp_path / "models")


@pytest.fixture
def store(settings: StoreSettings) -> Store:
    return Store(settings)


def fill(store: Store, tmp_path: Path, count: int) -> list[str]:
    """Versions of one model, from old to new; the last is what its ref names."""
    digests: list[str] = []
    for i in range(count):
        files = random_files(seed=i, large=KIB)
        folder = write_files(tmp_path / f"origin{i}", files)
        manifest = manifest_of(files)
        store.pull(manifest, places_of(FolderBucket(f"file://{folder}"), files))
        digests.append(manifest.digest)
        os.utime(store.folder(NAME, manifest.digest), (i, i))
    return digests


def held(store: Store) -> set[str]:
    return {short for _, short in store.models()}


def shorts(digests: list[str]) -> set[str]:
    return {digest[:16] for digest in digests}


def test_the_oldest_go_first_until_the_lower_watermark(
    store: Store, settings: StoreSettings, tmp_path: Path
) -> None:
    digests = fill(store, tmp_path, 5)
    removed = collect(store, [], settings, used=Disk(store, others=4))
    assert [r.digest for r in removed] == [d[:16] for d in digests[:2]], "from 90 to 70 percent"
    assert held(store) == shorts(digests[2:])
    assert all(r.kind == "model" and r.name == NAME and r.bytes > KIB for r in removed)
    assert not list((store.root / ".trash").iterdir())


def test_a_limit_below_the_disk_counts_as_the_disk(
    store: Store, settings: StoreSettings, tmp_path: Path
) -> None:
    digests = fill(store, tmp_path, 5)
    most_bytes = int(store.used_bytes / 0.9)
    limited = settings.model_copy(update={"max_bytes": most_bytes})
    assert 0 < Store(limited).free_bytes == most_bytes - store.used_bytes
    assert store.free_bytes > Store(limited).free_bytes
    removed = collect(store, [], limited, used=lambda _: 1.0)
    assert [r.digest for r in removed] == [d[:16] for d in digests[:2]], "from 90 to 70 percent"
    assert collect(store, [], limited, used=lambda _: 1.0) == []


def test_below_the_upper_watermark_no_model_goes(
    store: Store, settings: StoreSettings, tmp_path: Path
) -> None:
    digests = fill(store, tmp_path, 3)
    assert collect(store, [], settings, used=Disk(store, others=4)) == []
    assert held(store) == shorts(digests)


def test_now_removes_every_unused_model_and_no_other(
    store: Store, settings: StoreSettings, tmp_path: Path
) -> None:
    unused, locked, leased, pulled, current = fill(store, tmp_path, 5)
    with store.lease(leased), locks.exclusive(store.lock_path(pulled), "a pull", 0):
        removed = collect(store, {locked}, settings, now=True, used=lambda _: 1.0)
    assert [r.digest for r in removed] == [unused[:16]]
    assert held(store) == shorts([locked, leased, pulled, current])
    collect(store, {locked}, settings, now=True)
    assert held(store) == shorts([locked, current]), "neither loaded nor pulled any more"


def test_leftovers_go_however_empty_the_disk_is(
    store: Store, settings: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (digest,) = fill(store, tmp_path, 1)
    write_files(store.root / ".trash" / "x", {"a/b": b"12345"})
    dead, alive = "1" * 16, "2" * 16
    for short in (dead, alive):
        write_files(store.root / ".staging" / f"{short}.host.uuid", {"a/b": b"123"})
    write_files(store.root / ".quarantine" / "m.1.2", {"a": b"1234"})
    (store.root / ".trash" / "x" / "a").chmod(0o555)
    with locks.exclusive(store.lock_path(alive), "a pull", 0):
        removed = collect(store, [], settings)
    assert {(r.kind, r.digest, r.bytes) for r in removed} == {
        ("trash", "", 5),
        ("staging", dead, 3),
    }
    assert [p.name for p in (store.root / ".staging").iterdir()] == [f"{alive}.host.uuid"]
    assert list((store.root / ".quarantine").iterdir()), "kept for a week, to be looked at"
    later_s = time.time() + WEEK_S + 60
    monkeypatch.setattr(time, "time", lambda: later_s)
    removed = collect(store, [], settings)
    assert {r.kind for r in removed} == {"staging", "quarantine"}
    assert not list((store.root / ".quarantine").iterdir())
    assert held(store) == shorts([digest])


def test_strays_are_passed_over_or_unlinked_and_links_never_followed(
    store: Store, settings: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, current = fill(store, tmp_path, 2)
    outside = write_files(tmp_path / "outside", {"a": b"12345" * 1000})
    outside.chmod(0o700)
    write_files(store.root / "store", {"stray": b"", f"{NAME}/stray": b""})
    for name in (".trash", ".staging", ".quarantine"):
        (store.root / name / "link").symlink_to(outside)
        (store.root / name / "dangling").symlink_to(tmp_path / "nowhere")
        write_files(store.root / name, {"stray": b"123"})
    later_s = time.time() + WEEK_S + 60
    monkeypatch.setattr(time, "time", lambda: later_s)
    removed = collect(store, [], settings, now=True)
    assert {r.digest for r in removed if r.kind == "model"} == {old[:16]}
    for name in (".trash", ".staging", ".quarantine"):
        assert not list((store.root / name).iterdir())
        sizes = {r.name: r.bytes for r in removed if r.kind == name[1:]}
        assert sizes.keys() == {"link", "dangling", "stray"}
        assert sizes["stray"] == 3
        assert sizes["link"] == len(str(outside))
    assert (outside / "a").exists()
    assert stat.S_IMODE(outside.stat().st_mode) == 0o700
    assert held(store) == shorts([current])


def test_an_error_without_a_number_says_what_is_wrong(
    store: Store, settings: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(store.root / ".trash" / "x", {"a": b"1"})

    def refuse(_: object) -> None:
        raise OSError("of a kind without errno")

    monkeypatch.setattr(gc, "delete_folder", refuse)
    with pytest.raises(StoreUnwritable, match="removed: of a kind without errno"):
        collect(store, [], settings)


def test_removal_may_not_stop_above_its_start() -> None:
    assert StoreSettings(gc_start_percent=70, gc_stop_percent=70)
    with pytest.raises(ValidationError, match="gc_stop_percent must not be above"):
        StoreSettings(gc_start_percent=60)


def test_room_is_made_before_a_pull_without_losing_what_it_can_resume(
    store: Store, settings: StoreSettings, tmp_path: Path
) -> None:
    old, current = fill(store, tmp_path, 2)
    resumable = "3" * 64
    write_files(store.root / ".staging" / f"{resumable[:16]}.host.uuid", {"a": b"123"})
    write_files(store.root / ".staging" / f"{'4' * 16}.host.uuid", {"a": b"123"})
    assert make_room(store, [resumable], settings, used=lambda _: 79.9) == []
    removed = make_room(store, [resumable], settings, used=lambda _: 80.0)
    assert {(r.kind, r.digest) for r in removed} == {("staging", "4" * 16), ("model", old[:16])}
    assert held(store) == shorts([current])
    assert (store.root / ".staging" / f"{resumable[:16]}.host.uuid").is_dir()


def test_a_store_that_cannot_be_written_stops_gc_but_not_a_pull(
    store: Store, settings: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, tmp_path, 2)
    write_files(store.root / ".trash" / "x", {"a": b"1"})

    def refuse(_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(gc, "delete_folder", refuse)
    with pytest.raises(StoreUnwritable, match="Read-only"):
        collect(store, [], settings)
    assert make_room(store, [], settings, used=lambda _: 99.0) == []


def test_a_full_disk_does_not_keep_gc_from_its_locks(
    store: Store, settings: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, tmp_path, 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert len(collect(store, [], settings, used=lambda _: 100.0)) == 1


def test_on_a_network_file_system_models_go_only_when_asked_and_staging_never(
    store: Store,
    settings: StoreSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(store, tmp_path, 2)
    write_files(store.root / ".staging" / f"{'4' * 16}.host.uuid", {"a": b"123"})
    monkeypatch.setattr(gc, "network_filesystem", lambda _: "nfs4")
    assert collect(store, [], settings, used=lambda _: 99.0) == []
    assert [r.kind for r in collect(store, [], settings, now=True)] == ["model"]


def test_a_store_that_was_never_made_is_no_error(settings: StoreSettings) -> None:
    store = Store(settings)
    assert collect(store, [], settings, now=True) == []
    assert make_room(store, [], settings) == []
    assert not store.root.exists()


def test_how_full_a_disk_is(tmp_path: Path) -> None:
    assert 0 < used_percent(tmp_path) <= 100
