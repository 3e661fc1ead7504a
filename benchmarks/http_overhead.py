"""What HTTP costs on the way to the fastest model, ours beside LitServe: `make bench-http`.

The overhead is the p50 through the whole stack, less the p50 of the same work called in one process
(decode, fit, model, restore, encode), at the same concurrency. Above 1 that is so many threads that
call it in a closed loop, as clients call the server: through the engine for ours; for LitServe,
through a worker thread that forms batches as LitServe's does.

The servers and the direct calls take turns in short blocks, so that a drift of the machine meets
all of them. Ours is started once for each way in which Serve can be set up, with only the
background model awake.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import psutil
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.peers.server import NotStarted, running
from benchmarks.peers.systems import OUR_BIN, OURS, PEERS_BIN, SYSTEMS, System, ray_environment
from deployments.settings import ROOT, Settings
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.load import Report

RESULTS: Final = ROOT / "benchmarks/results"
TASK: Final = Task.BACKGROUND
DEPLOYMENT: Final = "BackgroundRemove"
LIT: Final = ("litserve", "litserve unbatched")
# Requests of a block by concurrency: two or three seconds each on two cores.
BLOCKS: Final = {1: 24, 8: 32, 32: 64}
_WARM_UP: Final = ((1, 10), (8, 64))
_TIMEOUT_S: Final = 60
console = Console(width=None if sys.stdout.isatty() else 130)

if find_spec("litserve"):  # only in the peers' environment
    from benchmarks.peers import litserve_server

    class Unbatched(litserve_server.Api):
        """LitServe as it is quickest for one client: no batches, hence no window to wait for."""

        def __init__(self) -> None:
            super().__init__("background/remove", TASK)
            self.max_batch_size = 1
            self.batch_timeout = 0.0

        def predict(self, upload: Any) -> Any:
            return super().predict([upload])[0]


@dataclass
class Block:
    """A closed loop of some clients.

    Attributes:
        seconds: of each request.
        wall_s: of all.
        failed: requests without a picture.
        stages_s: mean of each Server-Timing stage.
        cpu_s: of the server, by process; steadier than latency on a busy machine.
        batch_sizes: pictures by the batch they came from; ours alone says.
    """

    seconds: list[float]
    wall_s: float
    failed: int = 0
    stages_s: dict[str, float] = field(default_factory=dict[str, float])
    cpu_s: dict[str, float] = field(default_factory=dict[str, float])
    batch_sizes: dict[int, int] = field(default_factory=dict[int, int])


Ask = Callable[[int, int], Block]
"""Drives a system with so many clients and requests."""
Runs = dict[tuple[str, int], list[Block]]
"""The blocks of a system at a concurrency, in order."""


# Ours, in the ways Serve can carry a request.


def local_config(threads: int | None) -> dict[str, Any]:
    """configs/local.yaml, with another number of torch threads if one is given."""
    config = yaml.safe_load((ROOT / "configs/local.yaml").read_text(encoding="utf-8"))
    if threads:
        config["applications"][0]["args"]["torch_threads"] = threads
    return config


def ours(variant: str, threads: int | None) -> System:
    """Imagen as in configs/local.yaml, with the other four models asleep."""
    system = SYSTEMS[OURS]

    def command(port: int, folder: Path) -> list[str]:
        found = system.command(port, folder)
        file = folder / "serve.yaml"
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        values["applications"] = _asleep(local_config(threads)["applications"])
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return found

    def environment(folder: Path) -> dict[str, str]:
        return ray_environment(folder) | VARIANTS[variant]

    return System(f"Imagen, {variant}", command, environment=environment)


def _asleep(applications: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for deployment in applications[0]["deployments"]:
        if deployment["name"] not in ("Ingress", DEPLOYMENT):
            deployment["autoscaling_config"] = {"min_replicas": 0, "max_replicas": 1}
    return applications


_GRPC: Final = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**28),
}
# What `serve run` is started with beside configs/local.yaml. Imagen itself sets none of it.
VARIANTS: Final[dict[str, dict[str, str]]] = {
    "default": {},
    "grpc handles": _GRPC | {"RAY_SERVE_PROXY_USE_GRPC": "0"},
    "grpc everywhere": _GRPC,
}


def litserve(name: str) -> System:
    """LitServe with the background model alone."""
    command = [str(PEERS_BIN / "python"), "-m", "benchmarks.http_overhead", "--litserve", name]
    return System(name, lambda port, _: [*command, "--port", str(port)], ready="/health")


def serve_litserve(name: str, port: int) -> None:
    """Run in the peers' environment until stopped."""
    server: Any = litserve_server
    if name == "litserve unbatched":
        server.Api = lambda path, task: Unbatched()
    server.TASKS = {path: task for path, task in server.TASKS.items() if task is TASK}
    server.main(port)


# The same work in one process: no server, no HTTP.


def direct_of_ours(threads: int | None) -> Callable[[bytes], float]:
    """One request through our engine; its seconds."""
    from benchmarks.latency import measure
    from deployments.engine.engine import Engine
    from deployments.engine.grouping import GroupLimits
    from deployments.loader import build
    from deployments.registry import load_registry
    from deployments.store.provider import Provider

    application = local_config(threads)["applications"][0]
    settings = Settings.model_validate(application["args"])
    spec = load_registry(settings.models)[TASK]
    tuning = next(d for d in application["deployments"] if d["name"] == DEPLOYMENT)["user_config"]
    provider = Provider(settings.models, settings.store)
    pipeline = build(spec, provider.ensure(spec), settings)
    engine = Engine(pipeline, GroupLimits(tuning["max_batch_size"]))
    return lambda image: measure(spec, pipeline, engine, image)["total"]


def direct_of_litserve(most: int, window_s: float) -> Callable[[bytes], float]:
    """One request through what LitServe's worker does, in batches formed as it forms them."""
    from benchmarks.peers.work import load

    work, waiting = load(TASK), queue.SimpleQueue[tuple[bytes, Future[bytes]]]()

    def collect() -> list[tuple[bytes, Future[bytes]]]:
        batch, end_s = [waiting.get()], time.perf_counter() + window_s
        with suppress(queue.Empty):
            while len(batch) < most:
                batch.append(waiting.get(timeout=max(end_s - time.perf_counter(), 0)))
        return batch

    def serve_forever() -> None:
        while True:
            batch = collect()
            pictures = work.serve([(image, {}) for image, _ in batch])
            for (_, future), picture in zip(batch, pictures, strict=True):
                future.set_result(picture)

    threading.Thread(target=serve_forever, daemon=True).start()

    def call(image: bytes) -> float:
        start_s, future = time.perf_counter(), Future[bytes]()
        waiting.put((image, future))
        future.result()
        return time.perf_counter() - start_s

    return call


def _batched() -> Callable[[bytes], float]:
    from benchmarks.peers.work import MAX_BATCH

    return direct_of_litserve(MAX_BATCH[TASK], 0.01)


DIRECT: Final[dict[str, Callable[[int | None], Callable[[bytes], float]]]] = {
    "direct ours": direct_of_ours,
    "direct litserve": lambda _: _batched(),
    "direct litserve unbatched": lambda _: direct_of_litserve(1, 0.0),
}


def serve_direct(name: str, photo: Path, threads: int | None) -> None:
    """A block for each line of stdin: concurrency and requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends us by closing stdin
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not come between
    image, call = photo.read_bytes(), DIRECT[name](threads)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        concurrency, requests = json.loads(line)
        start_s = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as threads:
            seconds = list(threads.map(call, itertools.repeat(image, requests)))
        wall_s = time.perf_counter() - start_s
        print(json.dumps({"seconds": seconds, "wall_s": wall_s}), file=answers, flush=True)


@contextmanager
def direct(name: str, photo: Path, threads: int | None) -> Iterator[Ask]:
    """A process that calls the work directly, as a function of concurrency and requests."""
    binaries = OUR_BIN if name == "direct ours" else PEERS_BIN
    command = [str(binaries / "python"), "-m", "benchmarks.http_overhead", "--direct", name]
    options = ["--threads", str(threads)] if threads else []
    process = subprocess.Popen(
        [*command, "--photo", str(photo), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    requests, answers = process.stdin, process.stdout

    def ask(concurrency: int, count: int) -> Block:
        print(json.dumps([concurrency, count]), file=requests, flush=True)
        return Block(**_answer(name, answers.readline()))

    try:
        _answer(name, answers.readline())
        yield ask
    finally:
        requests.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _answer(name: str, line: str) -> Any:
    if not line:
        raise NotStarted(f"{name}: the process ended")
    return json.loads(line)


# The measurement.


class Client:
    """Sends blocks to a server: closed loops of photos of one size."""

    def __init__(self, url: str, server: psutil.Process, side_px: int) -> None:
        self._url, self._server, self._side_px = url, server, side_px

    def __call__(self, concurrency: int, requests: int) -> Block:
        from benchmarks.load import run

        family = [self._server, *self._server.children(recursive=True)]
        before = {process: _cpu_s(process) for process in family}
        report = run(plan(self._side_px, concurrency, requests), self._url)
        if report.interrupted:
            raise KeyboardInterrupt
        return _block(report, before)


@contextmanager
def client(system: System, side_px: int) -> Iterator[Client]:
    """A started server to send blocks to; afterwards it is stopped."""
    others = psutil.Process().children()
    with running(system) as url:
        (server,) = set(psutil.Process().children()) - set(others)
        yield Client(url, server, side_px)


def plan(side_px: int, concurrency: int = 1, requests: int = 1) -> Any:
    from benchmarks.load import parse_plan

    values = {
        "name": "http",
        "mode": "closed",
        "concurrency": concurrency,
        "requests": requests,
        "timeout_s": _TIMEOUT_S,
        "sizes": [[side_px, side_px]],
        "mix": [{"task": str(TASK)}],
    }
    return parse_plan(values, "The plan of make bench-http")


def _block(report: Report, before: dict[psutil.Process, float]) -> Block:
    done = [record.latency_s for record in report.records if record.outcome == "ok"]
    cpu_s: dict[str, float] = {}
    for process, start_s in before.items():
        title = _title(process)
        cpu_s[title] = cpu_s.get(title, 0.0) + max(_cpu_s(process) - start_s, 0.0)
    failed = len(report.records) - len(done)
    return Block(done, report.wall_s, failed, report.stages_s, cpu_s, report.batch_sizes)


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has ended
        return 0.0
    return times.user + times.system


def _title(process: psutil.Process) -> str:
    """Ray's workers name their actor; anything else is called by its program."""
    try:
        title = " ".join(process.cmdline()).strip()
        if title.startswith("ray::"):
            # While it works, a worker's title ends in the method's name.
            return title.removeprefix("ray::").rpartition(":")[2].partition(".")[0]
        return process.name()
    except psutil.Error:
        return "ended"


def measure_variant(name: str, others: dict[str, Ask], options: Options) -> Runs:
    """Rounds over every system and concurrency, with ours set up in one way."""
    runs: Runs = {}
    with client(ours(name, options.threads), options.side_px) as ask:
        warm_up(ask)
        for turn in range(options.rounds):
            for concurrency, requests in options.blocks.items():
                for way, call in _order({"ours": ask, **others}, turn, concurrency):
                    runs.setdefault((way, concurrency), []).append(call(concurrency, requests))
    return runs


def _order(ways: dict[str, Ask], turn: int, concurrency: int) -> list[tuple[str, Ask]]:
    """All ways, then the other way round, so that no one always follows a slow block.

    For time's sake the second turn of many clients is of ours and the batched LitServe only.
    """
    if turn % 2 == 0:
        return list(ways.items())
    few = (LIT[0], "ours", f"direct {LIT[0]}", "direct ours")
    return [(n, ask) for n, ask in reversed(ways.items()) if concurrency == 1 or n in few]


def warm_up(ask: Ask) -> None:
    for concurrency, requests in _WARM_UP:
        ask(concurrency, requests)


@dataclass(frozen=True)
class Options:
    """Of a run: side of the square photo, rounds of each variant, requests by concurrency, and
    torch threads of ours.
    """

    side_px: int
    rounds: int
    blocks: dict[int, int]
    threads: int | None


def summarise(runs: Runs) -> list[dict[str, Any]]:
    """A row for each server and concurrency; p50 of all its blocks together."""
    rows: list[dict[str, Any]] = []
    for (way, concurrency), blocks in sorted(runs.items(), key=lambda item: item[0][1]):
        if way in DIRECT:
            continue
        p50_s, direct_s = _p50(blocks), _p50(runs[f"direct {way}", concurrency])
        done = sum(len(block.seconds) for block in blocks)
        rows.append(
            {
                "way": way,
                "concurrency": concurrency,
                "p50_ms": p50_s * 1e3,
                "p50_ms_of_blocks": [_p50([block]) * 1e3 for block in blocks],
                "direct_p50_ms": direct_s * 1e3,
                "overhead_ms": (p50_s - direct_s) * 1e3,
                "requests_per_s": done / sum(block.wall_s for block in blocks),
                "requests": done,
                "failed": sum(block.failed for block in blocks),
                "stages_ms": _stages_ms(blocks),
                "batch_sizes": dict(sum((Counter(b.batch_sizes) for b in blocks), Counter[int]())),
                **_cpu_ms(blocks),
            }
        )
    for row in rows:
        _compare(row, rows)
    return rows


def _compare(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Ours over the quicker LitServe at the same concurrency."""
    peers = [r for r in rows if r["way"] in LIT and r["concurrency"] == row["concurrency"]]
    if row["way"] != "ours" or not peers:
        return
    best_ms = min(peer["overhead_ms"] for peer in peers)
    row["overhead_less_litserve_ms"] = row["overhead_ms"] - best_ms
    row["p50_over_litserve"] = row["p50_ms"] / min(peer["p50_ms"] for peer in peers)
    most = max(peer["requests_per_s"] for peer in peers)
    row["requests_per_s_over_litserve"] = row["requests_per_s"] / most


def _p50(blocks: Sequence[Block]) -> float:
    seconds = [s for block in blocks for s in block.seconds]
    return statistics.median(seconds) if seconds else float("nan")


def _stages_ms(blocks: Sequence[Block]) -> dict[str, float]:
    """Of Server-Timing, medians of the blocks' means."""
    names = dict.fromkeys(name for block in blocks for name in block.stages_s)
    return {n: statistics.median(b.stages_s.get(n, 0.0) for b in blocks) * 1e3 for n in names}


def _cpu_ms(blocks: Sequence[Block]) -> dict[str, Any]:
    """Of the server for a request, all and by process."""
    requests = sum(len(block.seconds) + block.failed for block in blocks)
    names = dict.fromkeys(name for block in blocks for name in block.cpu_s)
    spent = {n: sum(b.cpu_s.get(n, 0.0) for b in blocks) / requests * 1e3 for n in names}
    return {"cpu_ms": sum(spent.values()), "cpu_ms_by_process": spent}


# What is shown and kept.


def show(variant: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"Serve: {variant}")
    for name in ("clients", "system"):
        table.add_column(name, no_wrap=True)
    for name in ("p50 ms", "of blocks", "direct", "overhead ms", "requests/s", "CPU ms", "failed"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = min(row["p50_ms_of_blocks"]), max(row["p50_ms_of_blocks"])
        table.add_row(
            str(row["concurrency"]),
            row["way"],
            f"{row['p50_ms']:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{row['direct_p50_ms']:.1f}",
            f"{row['overhead_ms']:.1f}",
            f"{row['requests_per_s']:.1f}",
            f"{row['cpu_ms']:.1f}",
            str(row["failed"]),
        )
    console.print(table)
    for row in rows:
        if "p50_over_litserve" in row:
            console.print(
                f"{row['concurrency']} clients: our overhead less LitServe's (the quicker of the"
                f" two) {row['overhead_less_litserve_ms']:+.1f} ms; p50"
                f" {row['p50_over_litserve']:.2f} x,"
                f" requests/s {row['requests_per_s_over_litserve']:.2f} x LitServe's"
            )


def machine() -> dict[str, Any]:
    names = ("ray", "torch", "pillow", "uvicorn", "fastapi", "aiohttp")
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in names} | _litserve_version(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _litserve_version() -> dict[str, str]:
    code = "from importlib.metadata import version; print(version('litserve'))"
    python = PEERS_BIN / "python"
    if not python.exists():
        return {}
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return {"litserve": done.stdout.strip()} if done.returncode == 0 else {}


def start_others(stack: ExitStack, photo: Path, options: Options) -> dict[str, Any]:
    """The direct calls and LitServe, warm; without LitServe if it is not installed."""
    names = list(DIRECT) if _litserve_version() else ["direct ours"]
    threads = options.threads
    ways: dict[str, Any] = {n: stack.enter_context(direct(n, photo, threads)) for n in names}
    if len(names) > 1:
        for name in LIT:
            ways[name] = stack.enter_context(client(litserve(name), options.side_px))
    else:
        console.print("LitServe is not installed (`make bench-peers` makes .venv-peers): skipped.")
    for way in ways.values():
        warm_up(way)
    return ways


def measure_all(variants: Sequence[str], options: Options) -> dict[str, Any]:
    """The rows of each variant, or why it did not start."""
    from tempfile import TemporaryDirectory

    from benchmarks.load.workload import photos

    found: dict[str, Any] = {}
    with ExitStack() as stack:
        photo = Path(stack.enter_context(TemporaryDirectory(prefix="bench-http-"))) / "photo.jpg"
        photo.write_bytes(photos(plan(options.side_px))[options.side_px, options.side_px])
        others = start_others(stack, photo, options)
        for variant in variants:
            try:
                found[variant] = summarise(measure_variant(variant, others, options))
            except NotStarted as error:
                console.print(f"{variant}: did not start\n{error}", style="red", markup=False)
                found[variant] = {"failed": str(error)}
            else:
                show(variant, found[variant])
    return found


def main(
    variants: Annotated[str, typer.Option(help="of Serve, by comma")] = ",".join(VARIANTS),
    side: Annotated[int, typer.Option(help="of the photo, px")] = 256,
    rounds: Annotated[int, typer.Option(help="of blocks, for each variant")] = 2,
    scale: Annotated[float, typer.Option(help="of the number of requests in a block")] = 1.0,
    threads: Annotated[int | None, typer.Option(help="of ours; else configs/local.yaml's")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; else benchmarks/results")] = None,
    as_litserve: Annotated[str | None, typer.Option("--litserve", hidden=True)] = None,
    as_direct: Annotated[str | None, typer.Option("--direct", hidden=True)] = None,
    port: Annotated[int, typer.Option(hidden=True)] = 0,
    photo: Annotated[Path, typer.Option(hidden=True)] = Path("unused"),
) -> None:
    """Measure, print the tables, and write everything down."""
    if as_litserve:
        return serve_litserve(as_litserve, port)
    if as_direct:
        return serve_direct(as_direct, photo, threads)
    chosen = variants.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        raise typer.BadParameter(f"no such variant: {', '.join(sorted(unknown))}")
    # So that servers under way are stopped, as they are at Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    blocks = {c: max(round(n * scale), c) for c, n in BLOCKS.items()}
    document: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "task": str(TASK),
        "photo_px": [side, side],
        "blocks": blocks,
        "rounds": rounds,
        "threads": threads,
    }
    start_s = time.monotonic()
    document["variants"] = measure_all(chosen, Options(side, rounds, blocks, threads))
    document["machine"]["load_after"] = os.getloadavg()[0]
    document["seconds"] = time.monotonic() - start_s
    file = output or RESULTS / f"http-{datetime.now(UTC).date()}.json"
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    facts = document["machine"]
    console.print(
        f"{facts['processor']}, {facts['cores']} cores, load {facts['load_before']:.1f} before and"
        f" {facts['load_after']:.1f} after; {document['seconds']:.0f} s; wrote {file}"
    )
    return None


if __name__ == "__main__":
    typer.run(main)
