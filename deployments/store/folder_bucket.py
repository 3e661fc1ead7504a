"""file:// URLs: a folder on a disk, perhaps one that many nodes mount."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.errors import (
    ConfigError,
    Missing,
    ModelCorrupt,
    SourceFailed,
    StoreUnwritable,
    Unsignable,
)
from deployments.settings import resolve
from deployments.store.bucket import ANY_BYTES, RemoteFile, check_path
from deployments.store.disk import make_folder, sync_path

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

_READ_BYTES = 2**20
_COPY_BYTES = 8 * 2**20
PART = ".upload-"
"""Begins the name of a file that is being written."""
LINK_KEY = ".link-key"
"""Names the file that holds the key of a folder's signed links (`serve_app/jobs/links.py`)."""
_OWN = (PART, LINK_KEY)


def local_folder(url: str) -> Path:
    """The folder of a file:// URL; a relative one (file://a/b) is taken from the project's root.

    Raises:
        ConfigError: the URL has another form, such as file:/a.
    """
    path = url.removeprefix("file://")
    if path in ("", url):
        raise ConfigError(
            "A folder is written file:///folder.", value=url, remedy="Correct the URL."
        )
    return resolve(Path(path))


class FolderBucket:
    """A folder: `file:///absolute` or `file://from/the/project's/root`.

    Files are written beside their final place and then hard-linked, because a link, unlike a
    rename, never replaces a file. A killed writer leaves only a file that `list` does not show.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = local_folder(url)

    def stat(self, paths: Sequence[str]) -> list[RemoteFile]:
        return [self._stat(path) for path in paths]

    def read(
        self, file: RemoteFile, start: int, stop: int, write: Callable[[bytes], object]
    ) -> None:
        read_file(self._place(file.path), start, stop, write)

    def place(self, path: str) -> tuple[Path, os.stat_result]:
        """Where a file is on this machine, with its size and time; raises as `Bucket`."""
        self._stat(path)
        place = self._place(path)
        with _reading(place):
            return place, place.stat()

    def put(self, path: str, content: Path | bytes, media_type: str = ANY_BYTES) -> bool:
        final = self._place(path)
        part = self._folder / f"{PART}{uuid.uuid4().hex}"
        with self._writing():
            make_folder(final.parent)
            try:
                _write(part, content)
                os.link(part, final)
                sync_path(final.parent)
            except FileExistsError:
                return False
            finally:
                part.unlink(missing_ok=True)
        return True

    def list(self, prefix: str = "") -> Iterator[RemoteFile]:
        above = prefix.rpartition("/")[0]
        top = self._place(above) if above else self._folder
        paths = [
            Path(parent, name).relative_to(self._folder).as_posix()
            for parent, _, names in os.walk(top)
            for name in names
            if not name.startswith(_OWN)
        ]
        return (self._stat(path) for path in sorted(paths) if path.startswith(prefix))

    def delete(self, path: str) -> None:
        with self._writing():
            self._place(path).unlink(missing_ok=True)

    def sign(self, path: str, expires_s: float) -> str:
        raise Unsignable(
            "A folder has no URLs that a client could use.",
            value=f"{self.url.rstrip('/')}/{path}",
            remedy="Use a gs:// or s3:// bucket, or serve the file over HTTP yourself.",
        )

    def expire(self, older_than_s: float) -> int:
        """Delete the files, and parts of killed writers, that are older; how many there were.

        Empty folders of that age go too, except those directly below this one.

        Raises:
            StoreUnwritable: the folder cannot be written.
        """
        before_s, count = time.time() - older_than_s, 0
        for parent, _, names in os.walk(self._folder, topdown=False):
            place = Path(parent)
            with self._writing(), suppress(FileNotFoundError):  # another sweeper was faster
                old = place.stat().st_mtime < before_s
                for file in (place / name for name in names if name != LINK_KEY):
                    if file.lstat().st_mtime < before_s:
                        file.unlink()
                        count += 1
                if old and self._folder not in (place, place.parent) and not any(place.iterdir()):
                    place.rmdir()
        return count

    def _place(self, path: str) -> Path:
        """Where a path is in this folder.

        Raises:
            ConfigError: it would leave the folder, or its name is reserved.
        """
        if check_path(path).rpartition("/")[2].startswith(_OWN):
            raise ConfigError(
                "A file's path is wrong.", value=path, remedy="Use a name that is not reserved."
            )
        return self._folder / path

    def _stat(self, path: str) -> RemoteFile:
        place = self._place(path)
        for part in (place, *place.parents):
            if part == self._folder:
                break
            if part.is_symlink():
                raise ModelCorrupt(
                    "A source must hold plain files, no symbolic links.",
                    value=part,
                    remedy="Replace the link by the file it points to.",
                )
        with _reading(place):
            status = os.stat(place)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a plain file")
        return RemoteFile(path, status.st_size)

    @contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnwritable(
                f"The target folder cannot be written: {error.strerror}.",
                value=error.filename or self._folder,
                remedy="Give this user write access and disk space. The file system must support"
                " hard links.",
            ) from error


def read_file(path: Path, start: int, stop: int, write: Callable[[bytes], object]) -> None:
    """Pass the bytes of a file from `start` up to `stop` to `write`, in pieces.

    Raises:
        Missing, SourceFailed: as `Reader.read`.
    """
    with _reading(path):
        opened = path.open("rb", buffering=0)
    with opened:
        while start < stop:
            with _reading(path):
                data = os.pread(opened.fileno(), min(_READ_BYTES, stop - start), start)
            if not data:
                break
            write(data)  # outside _reading: its errors are those of another disk
            start += len(data)


def _write(part: Path, content: Path | bytes) -> None:
    """Make a file and bring it to the disk."""
    with part.open("xb") as sink:
        os.fchmod(sink.fileno(), 0o644)  # others read it, whatever our umask
        if isinstance(content, bytes):
            sink.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, sink, _COPY_BYTES)
        sink.flush()
        os.fsync(sink.fileno())


@contextmanager
def _reading(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise (Missing if absent else SourceFailed)(
            f"A file of the source cannot be read: {error.strerror}.",
            value=path,
            remedy="Put the file there, or correct `source` and `files` in the model registry.",
        ) from error
