"""`imagen torture` finds what a careless server gets wrong, and says where none is."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from typer.testing import CliRunner

from benchmarks.server import free_port
from benchmarks.torture.cases import CASES
from benchmarks.torture.judge import Target, judge
from cli.main import app

if TYPE_CHECKING:
    from collections.abc import Generator


class Echo(BaseHTTPRequestHandler):
    """Sends each picture back as it came, whatever is asked for."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
        part = body.split(boundary)[1]
        picture = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        self.send_response(200)
        self.send_header("Content-Length", str(len(picture)))
        self.end_headers()
        self.wfile.write(picture)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def echo() -> Generator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_sends_pictures_back_gets_sound_ones_right_alone() -> None:
    with echo() as url:
        verdicts = {one.case.name: one for one in judge(Target(url, {}, "file"), CASES)}
    assert len(verdicts) == len(CASES)
    assert verdicts["TIFF"].fault == ""
    assert verdicts["GIF of 3 frames"].fault == ""
    assert verdicts["GIF of 3 frames"].is_told is False
    assert verdicts["PNG of gamma 1.0"].fault == "(55, 55, 55) instead of (128, 128, 128)"
    assert "instead of" in verdicts["JPEG with EXIF orientation 3"].fault
    assert verdicts["PNG with a damaged IDAT"].fault == "200: not refused"
    assert "instead of image/jpeg" in verdicts["output_format=jpg"].fault


def test_the_command_lists_what_is_wrong_and_counts() -> None:
    with echo() as url:
        result = CliRunner().invoke(app, ["torture", url, "--pictures-only"])
    assert result.exit_code == 1
    assert "PNG of gamma 1.0" in result.stdout
    assert f"of {len(CASES)} answers are right." in result.stdout
    assert "losses" not in result.stdout


def test_without_a_server_or_with_a_wrong_path_it_says_so() -> None:
    nobody = CliRunner().invoke(app, ["torture", f"http://127.0.0.1:{free_port()}"])
    assert nobody.exit_code == 3
    wrong = CliRunner().invoke(app, ["torture", "http://127.0.0.1:1", "--path", "upscale"])
    assert wrong.exit_code == 2
