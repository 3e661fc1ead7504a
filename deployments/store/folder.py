"""Checking a folder against its manifest, byte by byte."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from crc32c import crc32c

from deployments.errors import ModelCorrupt, ModelNotCached, StoreUnwritable
from deployments.origins import MANIFEST
from deployments.store.manifest import FileEntry, Manifest, decode

if TYPE_CHECKING:
    from pathlib import Path


Verify = Literal["quick", "crc32c", "full"]
"""quick: names and sizes. crc32c: every byte. full: every byte, by CRC32C and SHA-256."""
_BLOCK_BYTES = 256 * 2**20
_THREADS = 4


class Hashes:
    """CRC32C and, unless switched off, SHA-256 of bytes that are fed in order."""

    def __init__(self, *, sha256: bool = True) -> None:
        self.size = 0
        self._crc = 0
        self._sha = hashlib.sha256() if sha256 else None

    def update(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        self._crc = crc32c(data, self._crc)
        if self._sha:
            self._sha.update(data)

    @property
    def crc32c(self) -> str:
        return f"{self._crc:08x}"

    @property
    def sha256(self) -> str | None:
        return self._sha.hexdigest() if self._sha else None


def hash_file(path: Path, *, sha256: bool = True) -> Hashes:
    """Hash a file from front to back.

    The file is mapped and hashed in pieces of 256 MiB, without the GIL. A loop of reads would
    need the GIL so often that it could not run beside the work of another thread.
    """
    hashes = Hashes(sha256=sha256)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return hashes
        mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        with mapped, memoryview(mapped) as view:
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            for start in range(0, size, _BLOCK_BYTES):
                with view[start : start + _BLOCK_BYTES] as block:
                    hashes.update(block)
    return hashes


def read_manifest(folder: Path, name: str) -> Manifest:
    """The manifest of a model folder; does not look at the other files.

    Raises:
        ModelNotCached: there is no manifest.
        ModelCorrupt: the manifest is damaged.
        StoreUnwritable: this user may not read it.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotCached(
            f"Model {name} is not in the store.",
            value=folder,
            remedy=f"Run `imagen models pull {name}`.",
        ) from error
    except PermissionError as error:
        raise StoreUnwritable(
            f"Model {name} cannot be read by this user.",
            value=folder,
            remedy="Give it read access to the store, from the root down.",
        ) from error
    return decode(data, folder / MANIFEST)


def check_folder(folder: Path, digest: str, name: str, verify: Verify = "crc32c") -> Manifest:
    """Check that a folder is what its digest says: exactly these files, with these bytes.

    Args:
        digest: the manifest's, or its first hex digits, 16 at least.

    Returns:
        Its manifest.

    Raises:
        ModelNotCached: the folder or one of its files is missing.
        ModelCorrupt: an extra file, a link, or wrong bytes; names the file, expected and actual.
    """
    manifest = read_manifest(folder, name)
    if not manifest.digest.startswith(digest):
        raise ModelCorrupt(
            f"The manifest of {name} has another digest: expected {digest},"
            f" actual {manifest.digest[: len(digest)]}.",
            value=folder,
            remedy="Pull it again.",
        )
    check_files(folder, manifest, verify)
    return manifest


def check_files(folder: Path, manifest: Manifest, verify: Verify) -> None:
    """Compare a folder with a manifest that is known to be true; raises as `check_folder`."""
    _check_names(folder, manifest)
    each: Callable[[FileEntry], None] = lambda entry: _check(folder, entry, manifest.model, verify)  # noqa: E731
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(each, manifest.files))


def list_files(folder: Path) -> list[str]:
    """Relative POSIX paths of all files below a folder, sorted.

    Raises:
        ModelCorrupt: a symbolic link, or something that is neither file nor folder.
    """
    paths: list[str] = []
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            mode = os.lstat(os.path.join(parent, name)).st_mode
            if stat.S_ISREG(mode):
                paths.append(os.path.relpath(os.path.join(parent, name), folder))
            elif not stat.S_ISDIR(mode):
                raise ModelCorrupt(
                    "A model folder holds plain files only.",
                    value=os.path.join(parent, name),
                    remedy="Replace the link by the file it points to.",
                )
    return sorted(path.replace(os.sep, "/") for path in paths)


def _check_names(folder: Path, manifest: Manifest) -> None:
    present = set(list_files(folder)) - {MANIFEST}
    listed = {f.path for f in manifest.files}
    if missing := sorted(listed - present):
        raise ModelNotCached(
            f"Model {manifest.model} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files." if len(missing) > 1 else "."),
            value=folder,
            remedy=f"Run `imagen models pull {manifest.model}`.",
        )
    if extra := sorted(present - listed):
        raise ModelCorrupt(
            f"Model {manifest.model} holds {extra[0]}, which its manifest does not list.",
            value=folder,
            remedy="Remove the file, or pull the model again.",
        )


def _check(folder: Path, entry: FileEntry, name: str, verify: Verify) -> None:
    path = folder / entry.path
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise mismatch(name, path, f"{entry.size} bytes", f"{size} bytes")
        if verify == "quick":
            return
        hashes = hash_file(path, sha256=verify == "full" or entry.crc32c is None)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EACCES):
            raise
        raise mismatch(name, path, f"{entry.size} bytes", error.strerror or "nothing") from error
    compare(name, path, entry, hashes)


def compare(name: str, where: object, entry: FileEntry, hashes: Hashes) -> None:
    """Raises ModelCorrupt unless the hashes equal the entry's."""
    if entry.crc32c not in (None, hashes.crc32c):
        raise mismatch(name, where, f"crc32c {entry.crc32c}", hashes.crc32c)
    if hashes.sha256 not in (None, entry.sha256):
        raise mismatch(name, where, f"sha256 {entry.sha256}", str(hashes.sha256))


def mismatch(name: str, where: object, expected: str, actual: str) -> ModelCorrupt:
    """The error of a file that differs from its manifest."""
    return ModelCorrupt(
        f"A file of {name} is not what its manifest says: {where}: expected {expected},"
        f" actual {actual}.",
        remedy=f"Run `imagen models pull {name}`, which replaces damaged files.",
    )
