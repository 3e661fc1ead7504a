"""Clients who begin to send and stop: nobody else waits for them, and they are cut off."""

from __future__ import annotations

import resource
import socket
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import UPLOAD_PAUSE_S
from tests.serve.test_http import is_problem, jpeg, opened, post

if TYPE_CHECKING:
    from collections.abc import Iterator

SENDERS = 600
ROUTE = b"POST /api/v1/images/background/remove HTTP/1.1\r\nHost: imagen\r\n"
FORM = b"Content-Type: multipart/form-data; boundary=cut\r\n"
PART = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
END = b"\r\n--cut--\r\n"
KILOBYTE = FORM + b"Content-Length: 50000\r\n\r\n" + PART + bytes(1000)
STALLED = {
    "an upload": ROUTE + KILOBYTE,
    "an upload of unknown length": ROUTE
    + FORM
    + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(PART)
    + PART
    + b"\r\n",
    "an upload to no route": ROUTE.replace(b"/background", b"/foreground") + KILOBYTE,
    "a body that nobody reads": ROUTE.replace(b"POST", b"GET") + KILOBYTE,
    "half a header": ROUTE + FORM,
    "nothing": b"",
}


def connected(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60)


@contextmanager
def stalled(address: str, begin: bytes) -> Iterator[list[socket.socket]]:
    """So many clients that have sent this and send no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    with ExitStack() as stack:
        senders = [stack.enter_context(connected(address)) for _ in range(SENDERS)]
        for sender in senders:
            sender.sendall(begin)
        yield senders
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def all_there_is(sender: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    found = bytearray()
    while piece := sender.recv(65536):
        found += piece
    return bytes(found)


@pytest.mark.parametrize("begin", STALLED.values(), ids=STALLED)
def test_a_picture_comes_while_six_hundred_others_have_stopped_sending(
    address: str, begin: bytes
) -> None:
    with stalled(address, begin):
        for _ in range(3):
            assert opened(post(address, "background", jpeg(96, 64))).size == (96, 64)
    assert opened(post(address, "background", jpeg(96, 64))).size == (96, 64)


def test_who_stops_sending_is_told_so_and_cut_off(address: str) -> None:
    with connected(address) as sender:
        sender.sendall(STALLED["an upload"])
        answer = all_there_is(sender)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"urn:imagen:problem:slow_upload" in answer
    assert b"\r\nconnection: close\r\n" in answer.lower()


def test_a_slow_but_steady_upload_is_answered(address: str) -> None:
    body = PART + jpeg(512, 512) + END  # some 4 kB a second
    with connected(address) as sender:
        sender.sendall(ROUTE + FORM + b"Content-Length: %d\r\n\r\n" % len(body))
        step = len(body) // 6 + 1
        for position in range(0, len(body), step):
            sender.sendall(body[position : position + step])
            time.sleep(UPLOAD_PAUSE_S / 4)
        assert sender.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_other_answers_do_not_wait_for_a_body_that_nobody_reads(address: str) -> None:
    with connected(address) as sender:
        sender.sendall(STALLED["a body that nobody reads"])
        assert sender.recv(65536).startswith(b"HTTP/1.1 405 ")
        assert is_problem(post(address, "comic", b"no picture"), 415)
