"""Google Cloud Storage: a public emulator behind a proxy that knows generations.

The emulator keeps objects and their metadata. It ignores generations and
preconditions, does one request at a time and reads whole files into memory, so the
proxy checks preconditions, numbers generations and sends media itself.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import re
import shutil
import socketserver
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.settings import STORAGE_DIR
from gcp_storage_emulator.storage import Storage

from benchmarks.servers.faults import Faults
from benchmarks.servers.listener import (
    BLOCK,
    HOST,
    Answer,
    Loopback,
    RefusedError,
    Request,
    file_answer,
    hash_blocks,
    json_answer,
    place,
)

OBJECT = re.compile(r"(?:/download)?(?:/storage/v1)?/b/([^/]+)/o/([^/]+)")
OBJECTS = re.compile(r"(?:/storage/v1)?/b/([^/]+)/o")
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
COPY = re.compile(r"(?:/storage/v1)?/b/.+/(?:copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)")
KEPT = ("content-type", "location", "range")
NOT_SENT_ON = frozenset({"connection", "content-length", "expect", "accept-encoding"})

Key = tuple[str, str]


def _error(status: int, message: str) -> RefusedError:
    errors = [{"message": message}]
    content = {"error": {"code": status, "message": message, "errors": errors}}
    return RefusedError(json_answer(content, status))


class _EmulatorServer(socketserver.TCPServer):
    allow_reuse_address = True


class _Emulator:
    """The emulator on a port of its own, its files in `folder`."""

    def __init__(self, folder: Path, bucket: str) -> None:
        for name in ("gcp_storage_emulator", "api.object", "api.bucket"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        storage = Storage(data_dir=str(folder))
        create_bucket(bucket, storage)
        # Otherwise a deleted object's body is copied and kept for a week.
        storage.buckets[bucket]["softDeletePolicy"]["retentionDurationSeconds"] = "0"
        self.files = folder / STORAGE_DIR
        self._server = _EmulatorServer((HOST, 0), partial(RequestHandler, storage))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def call(
        self,
        method: str,
        target: str,
        body: bytes | IO[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """One exchange: status, headers in lower case, body."""
        port = self._server.server_address[1]
        connection = HTTPConnection(HOST, port, blocksize=BLOCK)
        length = len(body) if isinstance(body, bytes) else length
        sent = {**(headers or {}), "Content-Length": str(length or 0)}
        with contextlib.closing(connection):
            connection.request(method, target, body or None, sent)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, named, answer.read()


class GcsServer(Loopback):
    """Google Cloud Storage with one bucket; `env` leads google-cloud-storage to it.

    Args:
        bucket: its name.
        root: where to keep the objects; by default a temporary folder.
        page_size: objects of one page of a list.
        faults: a plan to share with another server.
    """

    def __init__(
        self,
        bucket: str = "models",
        *,
        root: Path | None = None,
        page_size: int = 1000,
        faults: Faults | None = None,
    ) -> None:
        super().__init__(faults)
        self.bucket = bucket
        self.page_size = page_size
        self.url = ""
        self._root = root
        self._lock = threading.RLock()
        self._generations: dict[Key, int] = {}
        self._sizes: dict[Key, int] = {}
        self._sessions: dict[str, str] = {}

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client."""
        return {"STORAGE_EMULATOR_HOST": self.url}

    def start(self) -> None:
        self._folder = self._root or Path(tempfile.mkdtemp(prefix="gcs-"))
        self._emulator = _Emulator(self._folder.resolve(), self.bucket)
        self.url = self.listen(self._answer)

    def stop(self) -> None:
        super().stop()
        self._emulator.stop()
        if self._root is None:
            shutil.rmtree(self._folder)

    def put(self, name: str, content: bytes | int | Path) -> int:
        """Write an object without a client, and past the emulator's memory.

        An int is the size of a sparse object; a Path is linked. Returns the generation.
        """
        key = (self.bucket, name)
        with self._lock, self._aside(key):
            # The emulator fails on an upload of no bytes.
            target = f"/upload/storage/v1/b/{self.bucket}/o?uploadType=media&name={_quote(name)}"
            self._emulator.call("POST", target, b"-")
            path = self._path(key)
            place(path, content)
            self._emulator.call(
                "PATCH",
                f"/storage/v1/b/{self.bucket}/o/{_quote(name)}",
                json.dumps(_checksums(path)).encode(),
                {"Content-Type": "application/json"},
            )
            self._sizes[key] = path.stat().st_size
            return self._next_generation(key)

    def generation(self, name: str) -> int:
        """An object's current generation; 0 where there is none."""
        with self._lock:
            return int((self._meta((self.bucket, name)) or {}).get("generation", 0))

    def _answer(self, request: Request) -> Answer:
        path = request.raw_path
        with self._lock:
            if match := OBJECT.fullmatch(path):
                return self._object(request, (unquote(match[1]), unquote(match[2])))
            if match := UPLOAD.fullmatch(path):
                return self._upload(request, unquote(match[1]))
            if request.method == "GET" and OBJECTS.fullmatch(path):
                return self._list(request)
            if match := COPY.fullmatch(path):
                key = (unquote(match[1]), unquote(match[2]))
                self._check(request, self._meta(key))
                with self._aside(key):
                    return self._forward(request)
            return self._forward(request)

    def _object(self, request: Request, key: Key) -> Answer:
        meta = self._meta(key)
        if meta is None:
            raise _error(404, f"No such object: {'/'.join(key)}")
        self._check(request, meta)
        if request.method == "DELETE":
            self._forward(request)
            return Answer(204)
        if request.method not in ("GET", "HEAD"):
            return self._forward(request)
        if request.query.get("alt") != "media" and not request.path.startswith("/download/"):
            return json_answer(meta, headers={"ETag": meta["etag"]})
        return file_answer(request, self._path(key).open("rb"), _media_headers(meta))

    def _upload(self, request: Request, bucket: str) -> Answer:
        name = self._upload_name(request)
        key = (bucket, name)
        self._check(request, self._meta(key))
        with self._aside(key):
            answer = self._forward(request)
        session = answer.headers.get("Location")
        if session:
            upload_id = parse_qs(urlsplit(session).query)["upload_id"][0]
            self._sessions[upload_id] = name
        return answer

    def _upload_name(self, request: Request) -> str:
        if upload_id := request.query.get("upload_id"):
            if upload_id not in self._sessions:
                raise _error(404, "No such upload")
            return self._sessions[upload_id]
        if name := request.query.get("name"):
            return name
        content = request.body.read()
        request.body.seek(0)
        if request.query.get("uploadType") == "multipart":
            content = content.split(b"\r\n\r\n", 1)[1].split(b"\r\n--", 1)[0]
        return json.loads(content)["name"]

    def _list(self, request: Request) -> Answer:
        answer = self._forward(request)
        if answer.status != 200 or not isinstance(answer.body, bytes):
            return answer
        listing = json.loads(answer.body)
        start = int(request.query.get("pageToken", 0))
        stop = start + min(int(request.query.get("maxResults", self.page_size)), self.page_size)
        items = listing.pop("items", [])
        listing["items"] = items[start:stop]
        if start:
            listing["prefixes"] = []
        if stop < len(items):
            listing["nextPageToken"] = str(stop)
        return json_answer(listing)

    def _forward(self, request: Request) -> Answer:
        """Let the emulator answer, and put right what it says of objects."""
        sent = {n: v for n, v in request.headers.items() if n.lower() not in NOT_SENT_ON}
        length = int(request.headers.get("Content-Length") or 0)
        status, headers, body = self._emulator.call(
            request.method, request.target, request.body if length else b"", sent, length
        )
        kept = {name.title(): headers[name] for name in KEPT if name in headers}
        if kept.get("Range") == "bytes=0-0":  # the emulator's word for nothing yet
            del kept["Range"]
        if status >= 400 and not body:
            raise _error(status, f"{request.method} {request.path}")
        if status != 200 or "json" not in kept.get("Content-Type", ""):
            return Answer(status, body, kept)
        content = json.loads(body)
        for meta in _objects(content):
            self._put_right(meta, written=request.method in ("POST", "PUT"))
        return json_answer(content, headers=kept)

    def _put_right(self, meta: dict[str, Any], written: bool) -> None:
        key = (meta["bucket"], meta["name"])
        if written:
            self._sizes.pop(key, None)
            self._next_generation(key)
        generation = str(self._generations.setdefault(key, int(meta["generation"])))
        etag = f"{generation}/{meta['metageneration']}".encode()
        url = f"{self.url}/download/storage/v1/b/{key[0]}/o/{_quote(key[1])}"
        meta["generation"] = generation
        meta["size"] = str(self._sizes.get(key, meta["size"]))
        meta["id"] = f"{key[0]}/{key[1]}/{generation}"
        meta["mediaLink"] = f"{url}?generation={generation}&alt=media"
        meta["etag"] = base64.b64encode(etag).decode()

    def _next_generation(self, key: Key) -> int:
        last = max(self._generations.values(), default=0)
        self._generations[key] = max(last + 1, time.time_ns() // 1000)
        return self._generations[key]

    def _meta(self, key: Key) -> dict[str, Any] | None:
        status, _, body = self._emulator.call("GET", f"/storage/v1/b/{key[0]}/o/{_quote(key[1])}")
        if status != 200:
            return None
        meta = json.loads(body)
        self._put_right(meta, written=False)
        return meta

    def _check(self, request: Request, meta: dict[str, Any] | None) -> None:
        asked = request.query
        current = meta["generation"] if meta else "0"
        if asked.get("generation", current) != current:
            raise _error(404, f"No such object: generation {asked['generation']}")
        if asked.get("ifGenerationMatch", current) != current:
            raise _error(412, "At least one of the pre-conditions you specified did not hold.")
        if asked.get("ifGenerationNotMatch") == current:
            raise RefusedError(Answer(304 if request.method == "GET" else 412))
        metageneration = meta["metageneration"] if meta else "0"
        if asked.get("ifMetagenerationMatch", metageneration) != metageneration:
            raise _error(412, "At least one of the pre-conditions you specified did not hold.")

    def _path(self, key: Key) -> Path:
        return self._emulator.files / key[0] / key[1].lstrip("/")

    @contextlib.contextmanager
    def _aside(self, key: Key) -> Generator[None]:
        """Keep an object's file from being written over while it may be being sent."""
        path, aside = self._path(key), self._folder / "aside"
        if not path.is_file():
            yield
            return
        path.rename(aside)
        try:
            yield
        finally:
            if path.is_file():
                aside.unlink()
            else:
                aside.rename(path)


def _quote(name: str) -> str:
    return quote(name, safe="")


def _objects(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The object resources in an answer."""
    if content.get("kind") == "storage#objects":
        return content.get("items", [])
    meta = content.get("resource", content)
    return [meta] if meta.get("kind") == "storage#object" else []


def _media_headers(meta: dict[str, Any]) -> dict[str, str]:
    return {
        "Content-Type": meta.get("contentType") or "application/octet-stream",
        "ETag": meta["etag"],
        "x-goog-generation": meta["generation"],
        "x-goog-metageneration": meta["metageneration"],
        "x-goog-hash": f"crc32c={meta['crc32c']},md5={meta['md5Hash']}",
        "x-goog-stored-content-encoding": "identity",
        "x-goog-stored-content-length": meta["size"],
    }


def _checksums(path: Path) -> dict[str, str]:
    crc32c, md5 = google_crc32c.Checksum(), hashlib.md5()
    hash_blocks(path, lambda block: crc32c.update(bytes(block)), md5.update)
    return {
        "crc32c": base64.b64encode(crc32c.digest()).decode(),
        "md5Hash": base64.b64encode(md5.digest()).decode(),
    }
