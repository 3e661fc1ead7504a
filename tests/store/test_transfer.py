"""Every source against every fault: whole in the end, or a clear error and nothing published."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.servers.files import FileServer
from deployments.errors import ModelCorrupt, SourceFailed
from deployments.store import locks, transfer, web
from deployments.store.folder import list_files
from deployments.store.folder_bucket import FolderBucket
from deployments.store.transfer import Throttle
from deployments.store.web import WebReader
from tests.store import common
from tests.store.common import KIB, LARGE, NAME, SCHEMES, SERVED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.servers.faults import Kind
    from deployments.store.events import Event
    from tests.store.common import Held

FILES = common.random_files()
MANIFEST = common.manifest_of(FILES)
TOTAL = MANIFEST.total_bytes
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def at(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Held]:
    with (
        pytest.MonkeyPatch.context() as patch,
        common.held(request.param, FILES, tmp_path / "source", patch) as held,
    ):
        yield held


class Clock:
    """Time for `transfer`: it passes only while a thread sleeps."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return 1000 + sum(self.pauses_s)

    def sleep(self, pause_s: float) -> None:
        with self._lock:
            self.pauses_s.append(pause_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(transfer, "time", clock)
    return clock


def pull(held: Held, root: Path, **changes: object) -> Path:
    return common.store_of(root, **changes).pull(MANIFEST, common.places_of(held.source, FILES))


def assert_whole(root: Path) -> None:
    store = common.store_of(root)
    held = store.check(NAME, MANIFEST.digest, "full")
    folder = store.folder(NAME, MANIFEST.digest)
    assert {f.path: (folder / f.path).read_bytes() for f in held.files} == FILES


def assert_nothing(root: Path) -> None:
    assert common.store_of(root).models() == []


@pytest.mark.parametrize("at", SCHEMES, indirect=True)
def test_every_byte_comes_once(at: Held, root: Path) -> None:
    pull(at, root)
    assert_whole(root)
    if at.faults:
        assert at.bytes_sent() == TOTAL


@pytest.mark.parametrize("at", SERVED, indirect=True)
@pytest.mark.parametrize("kind", ["reset", "truncate", "500", "503", "429"])
def test_a_fault_that_passes_costs_no_more_than_its_range(at: Held, kind: Kind, root: Path) -> None:
    assert at.faults
    at.faults.add(kind, at.part, times=3, after_bytes=30 * KIB, seconds=0)
    pull(at, root)
    assert_whole(root)
    assert not at.faults.pending()
    assert at.bytes_sent() < TOTAL + 3 * 64 * KIB


@pytest.mark.parametrize("at", SERVED, indirect=True)
def test_a_stall_ends_by_the_read_timeout(
    at: Held, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "TIMEOUT_S", (5.0, 0.3))
    assert at.faults
    at.faults.add("stall", at.part, after_bytes=30 * KIB, seconds=60)
    start_s = time.monotonic()
    pull(at, root)
    assert time.monotonic() - start_s < 20
    assert_whole(root)


@pytest.mark.parametrize("at", SERVED, indirect=True)
def test_retry_after_is_waited_for(at: Held, root: Path, clock: Clock) -> None:
    assert at.faults
    at.faults.add("429", at.part, seconds=7)
    pull(at, root)
    assert max(clock.pauses_s) >= 7
    assert_whole(root)


@pytest.mark.parametrize("at", SERVED, indirect=True)
def test_a_listing_is_tried_again_too(at: Held, root: Path) -> None:
    assert at.faults
    at.faults.add("503", times=2)
    pull(at, root)
    assert_whole(root)


@pytest.mark.parametrize("at", SERVED, indirect=True)
def test_wrong_bytes_once_are_fetched_again(at: Held, root: Path) -> None:
    assert at.faults
    at.faults.add("flip", at.part, after_bytes=10 * KIB)
    events: list[Event] = []
    store = common.store_of(root, events.append)
    store.pull(MANIFEST, common.places_of(at.source, FILES))
    assert_whole(root)
    assert [e.kind for e in events].count("verify_failure") == 1


@pytest.mark.parametrize("at", SERVED, indirect=True)
def test_wrong_bytes_for_ever_publish_nothing(at: Held, root: Path) -> None:
    assert at.faults
    at.faults.add("flip", at.part, times=math.inf, after_bytes=10)
    with pytest.raises(ModelCorrupt, match=r"expected sha256 \w{64}, actual \w{64}") as caught:
        pull(at, root)
    assert ".safetensors" in caught.value.message
    assert NAME in caught.value.message
    assert_nothing(root)
    (staging,) = common.staged(root)
    left = {name: (staging / name).read_bytes() for name in list_files(staging)}
    assert LARGE not in left
    assert left.items() <= FILES.items()


def test_only_the_wrong_file_is_fetched_again(tmp_path: Path, root: Path) -> None:
    events: list[Event] = []
    with FileServer(common.write_files(tmp_path / "source", FILES)) as server:
        source = WebReader(server.url)
        places, store = common.places_of(source, FILES), common.store_of(root, events.append)
        server.faults.add("flip", LARGE, times=math.inf)
        with pytest.raises(ModelCorrupt, match=LARGE):
            store.pull(MANIFEST, places)
        sent = dict(server.faults.bytes_sent)
        assert sent.pop(f"/{LARGE}") == 2 * len(FILES[LARGE])
        assert sum(sent.values()) == TOTAL - len(FILES[LARGE])
        # Mended, it is all that the next pull asks for.
        server.faults.clear()
        server.faults.reset_counters()
        store.pull(MANIFEST, places)
        assert server.faults.bytes_sent.total() == len(FILES[LARGE])
    assert [e.kind for e in events].count("verify_failure") == 1
    assert_whole(root)


def test_every_further_try_is_an_event(tmp_path: Path, root: Path) -> None:
    events: list[Event] = []
    with FileServer(common.write_files(tmp_path / "source", FILES)) as server:
        source = WebReader(server.url)
        server.faults.add("503", times=2, method="HEAD", seconds=0)
        server.faults.add("503", LARGE, times=3, method="GET", seconds=0)
        common.store_of(root, events.append).pull(MANIFEST, common.places_of(source, FILES))
    assert [(e.kind, e.model) for e in events].count(("retry", NAME)) == 5


MANY_FILES = """
import sys
from pathlib import Path
from deployments.store.folder_bucket import FolderBucket
from tests.store import common
folder, root = map(Path, sys.argv[1:])
files = {path.name: path.read_bytes() for path in folder.iterdir()}
manifest = common.manifest_of(files)
common.store_of(root).pull(manifest, common.places_of(FolderBucket(f"file://{folder}"), files))
common.store_of(root).check(manifest.model, manifest.digest, "full")
"""


def test_a_model_of_more_files_than_a_process_may_open(tmp_path: Path, root: Path) -> None:
    files = {f"{i}.bin": os.urandom(100) for i in range(2000)}
    source = common.write_files(tmp_path / "source", files)
    subprocess.run(
        [sys.executable, "-c", MANY_FILES, source, root],
        cwd=PROJECT,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )


@pytest.mark.parametrize("at", SCHEMES, indirect=True)
def test_a_file_replaced_in_mid_pull_publishes_nothing(at: Held, root: Path) -> None:
    if at.faults:
        at.faults.add("overwrite", at.part, skip=2, callback=at.overwrite)
        pulled = lambda: pull(at, root, threads=1)  # noqa: E731
    else:
        pulled = lambda: _overwritten_while_it_is_read(at, root)  # noqa: E731
    with pytest.raises((ModelCorrupt, SourceFailed)):
        pulled()
    assert_nothing(root)


def _overwritten_while_it_is_read(at: Held, root: Path) -> None:
    def listen(event: Event) -> None:
        if event.kind == "bytes" and not done:
            done.append(at.overwrite())

    done: list[None] = []
    store = common.store_of(root, listen, threads=1)
    store.pull(MANIFEST, common.places_of(at.source, FILES))


@pytest.mark.parametrize("at", SERVED, indirect=True)
def test_a_dead_server_is_given_up(at: Held, root: Path) -> None:
    assert at.faults
    at.faults.add("503", at.part, times=math.inf)
    with pytest.raises(SourceFailed, match="failed 3 times in a row") as caught:
        pull(at, root, attempts=3, threads=1)
    assert caught.value.exit_code == 7
    asked = [e for e in at.faults.log if e.status == 503]
    assert len(asked) == 3
    assert_nothing(root)


@pytest.mark.parametrize("at", SCHEMES, indirect=True)
def test_a_missing_file_is_not_tried_again(at: Held, root: Path) -> None:
    places = {path: (at.source, f"{path}.none") for path in FILES}
    with pytest.raises(SourceFailed):
        common.store_of(root).pull(MANIFEST, places)
    assert_nothing(root)


def test_progress_starts_the_count_of_failures_anew(tmp_path: Path, root: Path) -> None:
    with FileServer(common.write_files(tmp_path / "source", FILES)) as server:
        source = WebReader(server.url)
        server.faults.add("truncate", LARGE, times=20, after_bytes=10 * KIB)
        store = common.store_of(root, attempts=2, threads=1)
        store.pull(MANIFEST, common.places_of(source, FILES))
        assert not server.faults.pending()
    assert_whole(root)


def test_a_server_that_ignores_ranges(tmp_path: Path, root: Path) -> None:
    with FileServer(common.write_files(tmp_path / "source", FILES), ranges=False) as server:
        source = WebReader(server.url)
        common.store_of(root).pull(MANIFEST, common.places_of(source, FILES))
    assert_whole(root)


def test_a_token_does_not_leave_the_hub(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with common.held("hf", FILES, tmp_path / "source", monkeypatch) as at:
        assert at.faults
        pull(at, root)
        sent = {e.path.split("/")[1]: e.headers.get("authorization") for e in at.faults.log}
    assert_whole(root)
    assert sent == {"api": "Bearer hf_secret", "org": "Bearer hf_secret", "cdn": None}


def test_without_a_token_none_is_sent(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for scheme in ("hf", "https"):
        with common.held(scheme, FILES, tmp_path / scheme, monkeypatch) as at:
            assert at.faults
            pull(at, root / scheme)
            assert not [e for e in at.faults.log if "authorization" in e.headers]


def test_no_more_connections_than_threads(tmp_path: Path, root: Path) -> None:
    now, most, lock = 0, 0, threading.Lock()

    class Counting(WebReader):
        def read(self, *arguments: object) -> None:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            try:
                super().read(*arguments)  # type: ignore[arg-type]
            finally:
                with lock:
                    now -= 1

    with FileServer(common.write_files(tmp_path / "source", FILES)) as server:
        server.faults.add("stall", times=math.inf, after_bytes=KIB, seconds=0.1)
        source = Counting(server.url)
        common.store_of(root, threads=3).pull(MANIFEST, common.places_of(source, FILES))
    assert most == 3
    assert_whole(root)


def test_the_rate_is_kept(tmp_path: Path, root: Path) -> None:
    rate = 150 * KIB
    with FileServer(common.write_files(tmp_path / "source", FILES)) as server:
        source = WebReader(server.url)
        start_s = time.monotonic()
        store = common.store_of(root, max_bytes_per_s=rate)
        store.pull(MANIFEST, common.places_of(source, FILES))
        took_s = time.monotonic() - start_s
    # The bucket of one second is full at the start.
    assert TOTAL / took_s < 1.7 * rate


def test_threads_share_one_rate(clock: Clock) -> None:
    throttle, start_s = Throttle(1000), clock.monotonic()
    threads = [
        threading.Thread(target=lambda: [throttle.take(100) for _ in range(5)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.monotonic() - start_s > 0.9, "2000 bytes, less the second that is free"


def test_a_long_pause_for_the_rate_gives_signs_of_life(clock: Clock) -> None:
    throttle, beats, start_s = Throttle(100), list[float](), clock.monotonic()
    throttle.take(350, lambda: beats.append(clock.monotonic() - start_s))
    assert beats == pytest.approx([1.0, 2.0, 2.5]), "350 bytes, less the second that is free"


@pytest.mark.slow
def test_who_waits_for_a_slow_pull_sees_it_move(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_BEAT_S", 0.1)
    files = {"a.bin": os.urandom(64 * KIB)}
    manifest = common.manifest_of(files)
    source = FolderBucket(f"file://{common.write_files(tmp_path / 'source', files)}")
    rate = 64 * KIB / 5  # one piece, which counts after four seconds
    begun = threading.Event()
    store = common.store_of(root, lambda _: begun.set(), max_bytes_per_s=rate, lock_timeout_s=2)
    first = threading.Thread(target=store.pull, args=(manifest, common.places_of(source, files)))
    first.start()
    assert begun.wait(10)
    store.pull(manifest, {})  # LockTimeout, if the first seemed dead
    first.join()
