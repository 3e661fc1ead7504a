"""A manifest has one form and one digest, and names nothing outside its folder."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.errors import ModelCorrupt
from deployments.origins import MANIFEST, safe_path
from deployments.store.manifest import FileEntry, Manifest, decode
from tests.store import common

FILES = common.random_files()
WHOLE = common.manifest_of(FILES)
NAMED = st.text(st.characters(codec="utf-8", exclude_characters="/\\"), min_size=1, max_size=8)


def entry(path: str) -> FileEntry:
    return FileEntry(path=path, size=1, sha256="0" * 64)


def with_crc32c(manifest: Manifest, crc32c: str) -> Manifest:
    files = tuple(f.model_copy(update={"crc32c": crc32c}) for f in manifest.files)
    return manifest.model_copy(update={"files": files})


def test_what_is_encoded_decodes() -> None:
    data = WHOLE.encode()
    assert decode(data, "here") == WHOLE
    assert decode(data, "here").encode() == data
    assert WHOLE.short == WHOLE.digest[:16]
    assert WHOLE.total_bytes == sum(map(len, FILES.values()))


@pytest.mark.parametrize("indent", [None, 1])
def test_another_spelling_is_refused(indent: int | None) -> None:
    other = json.dumps(json.loads(WHOLE.encode()), indent=indent).encode()
    with pytest.raises(ModelCorrupt, match="canonical"):
        decode(other, "here")


@given(st.integers(0, len(WHOLE.encode()) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_gives_another_digest(position: int, change: int) -> None:
    data = bytearray(WHOLE.encode())
    data[position] ^= change
    try:
        other = decode(bytes(data), "here")
    except ModelCorrupt:
        return
    assert other.digest != WHOLE.digest


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "..", "/a", "a/", "./a", "a/.", "a/./b", "a/../b", "../a", "a/..", "a//b"),
        *("a\\b", "C:\\a", "a\nb", "a\0b", "manifest.json", "Manifest.JSON"),
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        entry(path)


@given(st.lists(NAMED, min_size=1, max_size=4))
def test_a_path_that_is_accepted_stays_inside(parts: list[str]) -> None:
    path = "/".join(parts)
    try:
        safe_path(path)
    except ValueError:
        return
    assert all(part not in ("", ".", "..") and part.isprintable() for part in parts)
    assert path != MANIFEST


@pytest.mark.parametrize("paths", [["a", "a"], ["b", "a"], ["A", "a"], ["a", "a/b"], []])
def test_paths_that_collide_or_are_not_sorted_are_refused(paths: list[str]) -> None:
    with pytest.raises(ValidationError):
        common.manifest_of({}, files=[entry(path) for path in paths])


def test_the_digest_is_known_before_the_bytes() -> None:
    assert with_crc32c(WHOLE, "0badcafe").digest == WHOLE.digest


@pytest.mark.parametrize("path", sorted(FILES))
def test_the_digest_changes_with_every_file(path: str) -> None:
    assert common.manifest_of(FILES | {path: b"other"}).digest != WHOLE.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"sources": ("file://y",)},
        {"family": "sd"},
        {"variant": "fp16"},
        {"converted": "float16"},
    ],
)
def test_the_digest_changes_with_what_the_files_mean(changes: dict[str, object]) -> None:
    assert common.manifest_of(FILES, **changes).digest != WHOLE.digest


@pytest.mark.parametrize("model", ["", "../x", "A", "a/b", "a" * 64])
def test_a_model_name_is_a_folder_name(model: str) -> None:
    with pytest.raises(ValidationError):
        common.manifest_of(FILES, model=model)


def test_an_unknown_key_is_refused() -> None:
    values = json.loads(WHOLE.encode()) | {"run": "me"}
    with pytest.raises(ModelCorrupt, match="run"):
        decode(json.dumps(values, sort_keys=True, separators=(",", ":")).encode(), "here")
