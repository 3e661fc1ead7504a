"""Every fault of a model folder is detected and named."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest

from deployments.errors import ModelCorrupt, ModelNotCached
from deployments.origins import MANIFEST
from deployments.store.folder import Verify, check_folder, hash_file
from deployments.store.folder_bucket import FolderBucket
from tests.store import common
from tests.store.common import LARGE, NAME

FILES = common.random_files()
WHOLE = common.manifest_of(FILES)
READING: list[Verify] = ["crc32c", "full"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    source = FolderBucket(f"file://{common.write_files(folder / 'source', FILES)}")
    return common.store_of(folder / "root").pull(WHOLE, common.places_of(source, FILES))


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    copy = tmp_path / "store" / NAME / published.name
    shutil.copytree(published, copy)
    for parent, _, names in os.walk(copy):
        os.chmod(parent, 0o755)
        for name in names:
            os.chmod(Path(parent, name), 0o644)
    return copy


def refused(folder: Path, verify: Verify, kind: type[Exception] = ModelCorrupt) -> str:
    with pytest.raises(kind) as caught:
        check_folder(folder, WHOLE.digest, NAME, verify)
    return str(caught.value)


def test_crc32c_is_google_clouds() -> None:
    assert google_crc32c.value(b"123456789") == 0xE3069283


@pytest.mark.parametrize("verify", ["quick", "crc32c", "full"])
@pytest.mark.parametrize("length", [16, 64])
def test_a_whole_folder_passes(folder: Path, verify: Verify, length: int) -> None:
    manifest = check_folder(folder, WHOLE.digest[:length], NAME, verify)
    assert manifest.digest == WHOLE.digest
    assert all(f.crc32c == hash_file(folder / f.path).crc32c for f in manifest.files)


@pytest.mark.parametrize("path", [MANIFEST, *(path for path, data in FILES.items() if data)])
def test_a_flipped_byte_is_refused_and_named(folder: Path, path: str) -> None:
    draw = random.Random(path)
    good = (folder / path).read_bytes()
    for _ in range(40):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        (folder / path).write_bytes(data)
        message = refused(folder, "crc32c")
        if path == MANIFEST:
            assert str(folder) in message
        else:
            assert f"{folder / path}: expected crc32c" in message
            assert "actual" in message
            assert NAME in message
    (folder / path).write_bytes(good)
    check_folder(folder, WHOLE.digest, NAME, "full")


@pytest.mark.parametrize("verify", READING)
def test_a_zeroed_block_is_refused(folder: Path, verify: Verify) -> None:
    with (folder / LARGE).open("r+b") as file:
        file.seek(12_345)
        file.write(bytes(1000))
    assert LARGE in refused(folder, verify)


def test_quick_sees_names_and_sizes_only(folder: Path) -> None:
    data = (folder / LARGE).read_bytes()
    (folder / LARGE).write_bytes(bytes(len(data)))
    check_folder(folder, WHOLE.digest, NAME, "quick")
    (folder / LARGE).write_bytes(data[:-1])
    message = refused(folder, "quick")
    assert f"expected {len(data)} bytes, actual {len(data) - 1} bytes" in message


def test_a_checksum_that_was_changed_in_the_manifest_too_needs_full(folder: Path) -> None:
    data = bytes(reversed(FILES[LARGE]))
    (folder / LARGE).write_bytes(data)
    manifest = check_folder(folder, WHOLE.digest, NAME, "quick")
    crc32c = hash_file(folder / LARGE).crc32c
    files = [
        f.model_copy(update={"crc32c": crc32c}) if f.path == LARGE else f for f in manifest.files
    ]
    changed = manifest.model_copy(update={"files": tuple(files)})
    (folder / MANIFEST).write_bytes(changed.encode())
    assert f"{folder / LARGE}: expected sha256" in refused(folder, "full")


@pytest.mark.parametrize("verify", ["quick", *READING])
@pytest.mark.parametrize("path", [MANIFEST, LARGE])
def test_a_missing_file_is_not_cached(folder: Path, path: str, verify: Verify) -> None:
    (folder / path).unlink()
    message = refused(folder, verify, ModelNotCached)
    assert NAME in message
    assert "imagen models pull" in message


def test_a_missing_folder_is_not_cached(tmp_path: Path) -> None:
    assert NAME in refused(tmp_path / "none", "quick", ModelNotCached)


def add_file(folder: Path) -> Path:
    (folder / "extra.bin").write_bytes(b"")
    return folder / "extra.bin"


def link_file(folder: Path) -> Path:
    (folder / LARGE).rename(folder.with_name("elsewhere"))
    (folder / LARGE).symlink_to(folder.with_name("elsewhere"))
    return folder / LARGE


def link_folder(folder: Path) -> Path:
    (folder / "unet").rename(folder.with_name("elsewhere"))
    (folder / "unet").symlink_to(folder.with_name("elsewhere"))
    return folder / "unet"


def link_beside(folder: Path) -> Path:
    (folder / "vae/link").symlink_to("/etc")
    return folder / "vae/link"


def add_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize("verify", ["quick", *READING])
@pytest.mark.parametrize("damage", [add_file, link_file, link_folder, link_beside, add_pipe])
def test_what_does_not_belong_there_is_refused(
    folder: Path, damage: Callable[[Path], Path], verify: Verify
) -> None:
    assert damage(folder).name in refused(folder, verify)


def test_another_models_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ModelCorrupt, match="expected 0000000000000000, actual"):
        check_folder(folder, "0" * 16, NAME)


def test_a_disk_that_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("deployments.store.folder.hash_file", fail)
    assert "actual Input/output error" in refused(folder, "crc32c")
