"""HTTP/1.1 for every server here: connections, ranges, faults, counters."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import socket
import socketserver
import struct
import termios
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO, Any, BinaryIO, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from benchmarks.servers.faults import BEFORE, BODIES, REFUSALS, Exchange, Fault, Faults

HOST = "127.0.0.1"
BLOCK = 1 << 20
SENDFILE = 4 * BLOCK
IN_MEMORY = 16 * BLOCK
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Request:
    """A request, its body read."""

    method: str
    target: str
    query: dict[str, str]
    headers: Message
    body: IO[bytes]

    @property
    def raw_path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def path(self) -> str:
        return unquote(self.raw_path)


@dataclass(frozen=True)
class FileRange:
    """Bytes of an open file, which the answer closes."""

    file: BinaryIO
    start: int
    length: int


@dataclass
class Answer:
    """What to send; a HEAD gets the headers of a GET."""

    status: int
    body: bytes | FileRange = b""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.body.length if isinstance(self.body, FileRange) else len(self.body)


class RefusedError(Exception):
    """Ends a request with the answer it carries."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def json_answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    named = {"Content-Type": "application/json", **(headers or {})}
    return Answer(status, json.dumps(content).encode(), named)


def file_answer(
    request: Request, file: BinaryIO, headers: dict[str, str], ranges: bool = True
) -> Answer:
    """All of a file, or the one range asked for, if `ranges` and If-Range allow it."""
    size = os.fstat(file.fileno()).st_size
    headers = {"Content-Type": "application/octet-stream", **headers}
    if not ranges:
        return Answer(200, FileRange(file, 0, size), headers)
    headers["Accept-Ranges"] = "bytes"
    asked = RANGE.fullmatch(request.headers.get("Range", ""))
    fresh = request.headers.get("If-Range", headers.get("ETag")) == headers.get("ETag")
    if asked is None or not any(asked.groups()) or not fresh:
        return Answer(200, FileRange(file, 0, size), headers)
    start, stop = _bounds(asked[1], asked[2], size)
    if start >= stop:
        file.close()
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Answer(206, FileRange(file, start, stop - start), headers)


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


def place(path: Path, content: bytes | int | Path) -> None:
    """Put a new file at `path`: bytes, an empty file of a size, or another file.

    Another file is linked, so gigabytes take no time; what is open stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(content, Path):
        _link(content, path)
    elif isinstance(content, int):
        path.touch()
        os.truncate(path, content)
    else:
        path.write_bytes(content)


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source.resolve(), path)
    except OSError:  # another file system
        with source.open("rb") as content, path.open("wb") as copy:
            while block := content.read(SENDFILE):
                copy.write(block)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        """The log of `Faults` says it."""

    def _serve(self) -> None:
        with SpooledTemporaryFile(max_size=IN_MEMORY) as body:
            self._receive(body)
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query, keep_blank_values=True))
            request = Request(self.command, self.path, query, self.headers, body)
            lower = {name.lower(): value for name, value in self.headers.items()}
            exchange = Exchange(request.method, request.path, query, lower)
            self.server.faults.begin(exchange)
            try:
                self._send(exchange, self._answer(request, exchange))
            except OSError:  # the client has left, or the server stops
                self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _receive(self, body: IO[bytes]) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        while left and (block := self.rfile.read(min(left, BLOCK))):
            body.write(block)
            left -= len(block)
        body.seek(0)

    def _answer(self, request: Request, exchange: Exchange) -> Answer:
        faults = self.server.faults
        if before := faults.take(BEFORE, request.method, request.path):
            exchange.fault = before.kind
            if before.callback:
                before.callback()
            else:
                self.server.stopping.wait(before.seconds)
        if refusal := faults.take(REFUSALS, request.method, request.path):
            exchange.fault = refusal.kind
            return _refusal(refusal)
        try:
            return self.server.answer(request)
        except RefusedError as refused:
            return refused.answer
        except Exception:  # a test reads what failed in the answer
            return Answer(500, traceback.format_exc().encode())

    def _send(self, exchange: Exchange, answer: Answer) -> None:
        exchange.status = answer.status
        body = answer.body
        try:
            fault = self._body_fault(exchange, answer)
            self._send_headers(answer)
            if self.command == "HEAD":
                return
            if isinstance(body, FileRange):
                self._send_file(exchange, body, fault)
            else:
                self.server.faults.count(exchange, len(body))
                self.wfile.write(body)
        finally:
            if isinstance(body, FileRange):
                body.file.close()

    def _body_fault(self, exchange: Exchange, answer: Answer) -> Fault | None:
        if self.command == "HEAD" or not isinstance(answer.body, FileRange):
            return None
        fault = self.server.faults.take(BODIES, self.command, exchange.path, answer.length)
        if fault is not None:
            exchange.fault = fault.kind
        return fault

    def _send_headers(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(answer.length))
        self.end_headers()

    def _send_file(self, exchange: Exchange, part: FileRange, fault: Fault | None) -> None:
        at = fault.after_bytes if fault else part.length
        self._copy(exchange, part, 0, at)
        if fault is None:
            return
        if fault.kind == "reset":
            self._reset()
        elif fault.kind == "truncate":
            self.close_connection = True
        else:
            if fault.kind == "flip":
                self._flip(exchange, part, at)
                at += 1
            else:
                self.server.stopping.wait(fault.seconds)
            self._copy(exchange, part, at, part.length)

    def _copy(self, exchange: Exchange, part: FileRange, at: int, stop: int) -> None:
        faults = self.server.faults
        while at < stop:
            want = min(stop - at, SENDFILE)
            sent = 0
            faults.count(exchange, want)  # before a client can have them
            try:
                sent = os.sendfile(
                    self.connection.fileno(), part.file.fileno(), part.start + at, want
                )
            finally:
                faults.count(exchange, sent - want)
            if not sent:
                raise BrokenPipeError("the file shrank")
            at += sent

    def _flip(self, exchange: Exchange, part: FileRange, at: int) -> None:
        (byte,) = os.pread(part.file.fileno(), 1, part.start + at)
        self.server.faults.count(exchange, 1)
        self.connection.sendall(bytes([byte ^ 0xFF]))

    def _reset(self) -> None:
        self._drain()
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        # A close() would wait for the handler's files; shutdown() would be polite.
        os.close(self.connection.detach())

    def _drain(self) -> None:
        """A reset discards what the kernel still holds; let the client have it first."""
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            queued = fcntl.ioctl(self.connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
            if queued == b"\0" * 4:
                return
            time.sleep(0.001)


def _refusal(fault: Fault) -> Answer:
    headers = {"Content-Type": "text/plain"}
    if fault.kind == "429":
        headers["Retry-After"] = str(math.ceil(fault.seconds))
    return Answer(int(fault.kind), b"refused", headers)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[Request], Answer], faults: Faults) -> None:
        self.answer = answer
        self.faults = faults
        self.stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        super().__init__((HOST, 0), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep alive, and so the threads they hold."""
        self.stopping.set()
        with self._open_lock:
            for connection in self._open:
                with contextlib.suppress(OSError):  # already gone
                    connection.shutdown(socket.SHUT_RDWR)


class _Listener:
    """A port on loopback and its thread."""

    def __init__(self, answer: Callable[[Request], Answer], faults: Faults) -> None:
        self._server = _Server(answer, faults)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://{HOST}:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()


class Loopback:
    """The context manager of a server, which listens in its `start`."""

    def __init__(self, faults: Faults | None) -> None:
        self.faults = faults or Faults()
        self._listeners: list[_Listener] = []

    def listen(self, answer: Callable[[Request], Answer]) -> str:
        """The URL of a new port that answers with `answer`."""
        self._listeners.append(_Listener(answer, self.faults))
        return self._listeners[-1].url

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        for listener in self._listeners:
            listener.stop()
        self._listeners.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def hash_blocks(path: Path, *updates: Callable[[bytes], object]) -> None:
    """Feed a file of any size to hashes."""
    with path.open("rb", buffering=0) as file:
        block = bytearray(8 * BLOCK)
        view = memoryview(block)
        while count := file.readinto(block):
            for update in updates:
                update(view[:count])  # type: ignore[arg-type]
