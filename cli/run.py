"""`imagen run`: `serve run`, with a word when it is ready, and where."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
import yaml
from rich.console import Console

from cli.config import address_of, check_reach, clients_of, config_serving, grpc_environment
from cli.console import Output
from cli.ending import ending
from cli.serving import Serve, serve_of
from deployments.errors import ConfigError
from deployments.settings import ROOT, AccessSettings, resolve

if TYPE_CHECKING:
    from collections.abc import Generator

console = Console()
_BIN = Path(sys.executable).parent
_POLL_S = 0.5


def run(
    config: Annotated[Path, typer.Argument(help="A Serve config file")] = Path(
        "configs/local.yaml"
    ),
    serve: Serve = None,
    timeout_s: Annotated[float, typer.Option(help="Give up if not ready by then")] = 300,
) -> None:
    """Serve on this machine until Ctrl-C. Says when it is ready, and where."""
    with ending(Output(as_json=False)):
        address, clients = address_of(config), clients_of(config)
        if clients is not None:
            check_reach(config, clients)
        changed, extra = config_serving(config, serve_of(serve)), grpc_environment(config)
        if _answers(address):
            raise ConfigError(
                "Another server answers at this address.",
                value=address,
                remedy="Stop it, or change http_options.",
            )
    start_s = time.monotonic()
    # A shell makes background jobs ignore Ctrl-C, which the server would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    failed = True
    with _started(config, changed, extra) as (server, dashboard):
        try:
            if _wait_ready(server, address, timeout_s):
                seconds = time.monotonic() - start_s
                access = clients and clients.access
                _announce(address, dashboard.read_text(encoding="utf-8"), access, seconds)
                failed = server.wait() != 0
        except KeyboardInterrupt:
            console.print("Stopping.")
            failed = False
    raise typer.Exit(int(failed))


@contextmanager
def _started(
    config: Path, changed: dict[str, Any] | None, extra: dict[str, str]
) -> Generator[tuple[subprocess.Popen[bytes], Path]]:
    """`serve run`, stopped at the end; and the file that holds the address of Ray's dashboard.

    Args:
        config: the Serve config.
        changed: to run instead of it; None for the file as it is.
        extra: for the environment of Ray.
    """
    with TemporaryDirectory(prefix="imagen-run-") as folder:
        dashboard, file = Path(folder) / "dashboard", resolve(config)
        if changed is not None:
            file = Path(folder) / config.name
            file.write_text(yaml.safe_dump(changed), encoding="utf-8")
        command = [sys.executable, "-m", "cli.serve_run", str(file), str(dashboard)]
        # One malloc arena instead of one for each of Ray's many threads saves 15 MiB a process.
        environment = {"MALLOC_ARENA_MAX": "1"} | extra | os.environ
        # A session of its own: Ctrl-C reaches us alone, and we pass it on once.
        server = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)  # noqa: S603 - ours
        try:
            yield server, dashboard
        finally:
            _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
    try:
        server.wait(90)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(server.pid, signal.SIGKILL)


def _answers(address: str) -> bool:
    try:
        health = httpx.URL(address).join("/-/healthz")
        return _get(str(health), timeout_s=1).is_success
    except httpx.HTTPError:
        return False


def _wait_ready(server: subprocess.Popen[bytes], address: str, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and server.poll() is None:
        try:
            if _get(f"{address}/readyz", timeout_s=5).is_success:
                return True
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(_POLL_S)
    console.print("[red]Imagen did not become ready; see the lines above.")
    return False


def _get(url: str, *, timeout_s: float) -> httpx.Response:
    """An answer of our own server, whose certificate is for another name than this address."""
    return httpx.get(url, timeout=timeout_s, trust_env=False, verify=False)  # noqa: S501


def _announce(address: str, dashboard: str, access: AccessSettings | None, seconds: float) -> None:
    console.rule("[green]Imagen is ready")
    lines = [
        f"API        {address}  (ready after {seconds:.0f} s)",
        f"Playground {address}/",
        f"Reference  {address}/docs",
    ]
    if dashboard:
        lines.append(f"Dashboard  http://{dashboard}  (Ray)")
        if _asks_for_token(dashboard):
            lines.append(f"           It asks for a token: {_shown(_BIN / 'ray')} get-auth-token")
    header = ""
    if access is not None and access.auth == "keys":
        lines += ["Keys       Clients need an API key. This makes one:", f"  {_create(access)}"]
        header = '-H "Authorization: Bearer $IMAGEN_KEY" '
    lines += [
        "\nTry:",
        f"curl {header}-F image=@{_shown(ROOT / 'docs/photo.jpg')} -o comic.png \\",
        f"  {address}/api/v1/images/style/comic",
        "\nStop with Ctrl-C.",
    ]
    # Whole lines, however narrow the terminal: people copy them.
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _create(access: AccessSettings) -> str:
    """The command that makes a key, as to type it here."""
    file = f" --keys {shlex.quote(str(access.keys_file))}" if access.keys else ""
    return f"IMAGEN_KEY=$({_shown(_BIN / 'imagen')} keys create my-laptop{file})"


def _asks_for_token(dashboard: str) -> bool:
    try:
        url = f"http://{dashboard}/api/authentication_mode"
        answer: Any = httpx.get(url, timeout=5, trust_env=False)
        return answer.json()["authentication_mode"] == "token"
    except (httpx.HTTPError, ValueError, KeyError):
        return False


def _shown(path: Path) -> Path:
    """A path as to type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
