"""Folders and files on this machine's disks: making, syncing, deleting, measuring."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NETWORK = (
    *("nfs", "cifs", "smb", "lustre", "gpfs", "ceph"),
    *("fuse", "9p", "beegfs", "gluster", "afs"),
)
"""How the types of network file systems begin."""


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, readable for every user whatever our umask."""
    with suppress(FileExistsError):  # also made by another thread just now
        try:
            folder.mkdir()
        except FileNotFoundError:
            make_folder(folder.parent)
            folder.mkdir()
        folder.chmod(0o755)


def sync_path(path: Path | str) -> None:
    """Bring a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def unprotect(folder: Path) -> None:
    """Make a folder and those in it writable again; leaves links alone."""
    if not is_folder(folder):  # walking a link would change what it points to
        return
    for parent, _, _ in os.walk(folder):
        os.chmod(parent, 0o755)  # noqa: S103 - was 0555


def delete_folder(folder: Path) -> None:
    """Delete a folder whose folders may be read-only, or a file; of a link, only the link."""
    with suppress(FileNotFoundError):
        if not is_folder(folder):
            folder.unlink()
            return
        unprotect(folder)
        shutil.rmtree(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; of a file or a link, its own."""
    total = 0
    if folder.is_symlink() or folder.is_file():
        with suppress(OSError):
            total = folder.lstat().st_size
        return total
    for parent, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def network_filesystem(path: Path, table: str = "/proc/mounts") -> str | None:
    """The type of the network file system that holds a path; None for a local or unknown one."""
    kind = filesystem(path, table)
    return kind if kind.startswith(_NETWORK) else None


def filesystem(path: Path, table: str = "/proc/mounts") -> str:
    """The type of the file system that holds a path, such as ext4; empty if it is unknown."""
    longest, kind = -1, ""
    here = os.path.realpath(path)
    with suppress(OSError), open(table, encoding="utf-8") as mounts:
        for line in mounts:
            _, place, name, *_ = line.split()
            # A space is written \\040 there; letters beyond Latin-1 must come through unharmed.
            place = place.encode("latin-1", "backslashreplace").decode("unicode_escape")
            inside = here == place or here.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= longest:
                longest, kind = len(place), name
    return kind
