"""Models and nodes: filled once, offline, exchanged under traffic, and never kept from sleeping."""

from __future__ import annotations

import copy
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import ray
from ray.util import list_named_actors
from safetensors.torch import load_file, save_file

from deployments.catalogue import load_registry
from deployments.gpu.target import this_target
from deployments.settings import ROOT, Settings, StoreSettings
from deployments.store import compiled
from deployments.store.cache import Store
from deployments.store.compiled import CompiledKey
from deployments.store.folder import hash_file, list_files
from deployments.store.folder_bucket import FolderBucket
from deployments.store.lockfile import build_manifest, load_lock, lock_path, update_lock
from deployments.store.manifest import FileEntry
from deployments.store.node_init import NAMESPACE, ensure_on_node, pulling
from deployments.store.provider import Provider
from deployments.store.publish import publish, publish_compiled
from deployments.tasks import Task
from deployments.telemetry import ModelMetrics
from tests.serve.conftest import deploy, wait_until_running
from tests.serve.test_deployment import replicas
from tests.serve.test_http import ROUTES, draw, jpeg, post

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow
STARTER = Path("configs/models/starter.yaml")
UPSCALE = load_registry(STARTER)[Task.UPSCALE]


@pytest.fixture
def configured(address: str, local_config: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
    """Deploy with another user_config of Upscale; the former one afterwards."""

    def deploy_with(user_config: dict[str, Any]) -> None:
        changed = copy.deepcopy(local_config["applications"][0])
        next(d for d in changed["deployments"] if d["name"] == "Upscale")["user_config"] = (
            user_config
        )
        deploy(changed)

    yield deploy_with
    deploy(local_config["applications"][0])
    wait_for(lambda: served(address)["error"] == "" and at_rest(address))


@pytest.fixture(scope="module")
def other(models_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of other weights for upscale, in the store."""
    return add_variant(models_root, tmp_path_factory.mktemp("other"), 1.001)


def add_variant(root: Path, work: Path, factor: float) -> str:
    folder = shutil.copytree(ROOT / "starter_models/upscale", work / "upscale")
    weights = {k: v * factor for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    hashed = [(path, hash_file(folder / path)) for path in list_files(folder)]
    files = [FileEntry(path=p, size=h.size, sha256=str(h.sha256)) for p, h in hashed]
    manifest = build_manifest(UPSCALE, ("file://variant",), files)
    source = FolderBucket(f"file://{folder}")
    places = {f.path: (source, f.path) for f in files}
    Store(StoreSettings(root=root)).pull(manifest, places)
    return manifest.short


def served(address: str) -> dict[str, str]:
    found = httpx.get(f"{address}/readyz", timeout=30).json()["replicas"].get("upscale")
    return found[0] if found else {"serving": "", "wanted": "", "error": "no answer"}


def at_rest(address: str) -> bool:
    status = served(address)
    return status["serving"] == status["wanted"] == locked()


def locked() -> str:
    return locked_in_full()[:16]


def locked_in_full() -> str:
    return Provider(load_lock(STARTER), StoreSettings()).digest(UPSCALE)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.3)


def test_all_six_models_serve_with_the_network_blocked(address: str, network_reports: Path) -> None:
    for task in ROUTES:
        assert post(address, task, jpeg()).status_code == 200
    assert draw(address, "a red star").status_code == 200
    assert len(list(network_reports.glob("*.blocked"))) >= 7, "six models and the ingress"
    assert [path.read_text() for path in network_reports.glob("*.touched")] == []


def test_the_node_holds_each_model_once_and_its_actor_has_ended(
    address: str, models_root: Path
) -> None:
    provider = Provider(load_lock(STARTER), StoreSettings(root=models_root))
    for spec in load_registry(STARTER).values():
        assert provider.store.check(spec.name, provider.digest(spec), "full")
    assert list((models_root / ".staging").iterdir()) == []
    wait_for(lambda: not [a for a in list_named_actors(True) if a["namespace"] == NAMESPACE])


@ray.remote(num_cpus=0)
def pull_and_tell(settings: Settings, name: str, digest: str) -> None:
    """Pull as a replica does, and live until the metrics were collected."""
    metrics = ModelMetrics()
    ensure_on_node(name, digest, settings, metrics.count_totals)
    time.sleep(40)


def test_metrics_tell_what_was_pulled_and_what_is_served(address: str, tmp_path: Path) -> None:
    settings = Settings(models=(STARTER,), store=StoreSettings(root=tmp_path / "store"))
    telling = pull_and_tell.remote(settings, UPSCALE.name, locked_in_full())
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        "ray_imagen_store_misses": 5,
        "ray_imagen_store_fetched_bytes": 5,
        "ray_imagen_store_seconds": 5,
        "ray_imagen_store_disk_free_bytes": 1,
        "ray_imagen_model_load_seconds": 5,
        "ray_imagen_model_serving": 5,
    }
    found: dict[str, list[str]] = {}

    def all_there() -> bool:
        lines = httpx.get(url, timeout=10, trust_env=False).text.splitlines()
        for name in wanted:
            found[name] = [line for line in lines if line.startswith(name)]
        return all(len(found[name]) >= count for name, count in wanted.items())

    wait_for(all_there, 90)
    served_now = [line for line in found["ray_imagen_model_serving"] if UPSCALE.name in line]
    assert any(f'digest="{locked()}"' in line and line.endswith(" 1.0") for line in served_now)
    ray.cancel(telling)


def test_other_weights_are_exchanged_under_traffic(
    address: str, configured: Callable[[Any], None], other: str
) -> None:
    before = replicas("Upscale")
    answers: list[httpx.Response] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            answers.append(post(address, "upscale", jpeg()))

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        configured({"digest": other})
        wait_for(lambda: served(address)["serving"] == other)
        time.sleep(1)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert {a.status_code for a in answers} == {200}
    models = [a.headers["x-imagen-model"] for a in answers]
    assert set(models) == {f"{UPSCALE.name}@{locked()}", f"{UPSCALE.name}@{other}"}
    assert len({a.content for a in answers}) == 2, "each picture is of one model or the other"
    assert replicas("Upscale") == before


def test_damaged_weights_are_refused_and_the_former_go_on(
    address: str, configured: Callable[[Any], None], models_root: Path, tmp_path: Path
) -> None:
    digest = add_variant(models_root, tmp_path, 1.002)
    weights = models_root / "store" / UPSCALE.name / digest / "model.safetensors"
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    before = replicas("Upscale")
    configured({"digest": digest})
    wait_for(lambda: served(address)["error"] != "")
    status = served(address)
    assert (status["serving"], status["wanted"]) == (locked(), digest)
    assert "model.safetensors" in status["error"]
    assert "expected crc32c" in status["error"]
    answer = post(address, "upscale", jpeg())
    assert answer.status_code == 200
    assert answer.headers["x-imagen-model"].endswith(locked())
    assert replicas("Upscale") == before
    quarantined = [p.name for p in (models_root / ".quarantine").iterdir()]
    assert any(name.startswith(f"{UPSCALE.name}.{digest}") for name in quarantined)


def test_a_replica_that_starts_with_an_unknown_digest_serves_the_locked_one(
    address: str, configured: Callable[[Any], None]
) -> None:
    unknown = "0123456789abcdef"
    configured({"digest": unknown})
    wait_for(lambda: served(address)["error"] != "")
    (before,) = replicas("Upscale")
    actors = [a for a in list_named_actors(True) if "imagen#Upscale" in a["name"]]
    assert len(actors) == 1
    ray.kill(ray.get_actor(actors[0]["name"], actors[0]["namespace"]))
    wait_for(lambda: served(address)["error"] == "no answer" or replicas_now() != before)
    wait_until_running("imagen")
    wait_for(lambda: served(address)["wanted"] == unknown, 120)
    status = served(address)
    assert status["serving"] == locked()
    assert "do not hold this digest" in status["error"]
    assert post(address, "upscale", jpeg()).status_code == 200


def replicas_now() -> str:
    try:
        return replicas("Upscale")[0]
    except (AssertionError, IndexError):
        return ""


@pytest.fixture
def slow(tmp_path: Path) -> Settings:
    """An empty store that takes some seconds to fill."""
    store = StoreSettings(root=tmp_path / "slow", max_bytes_per_s=3e6, range_bytes=64 * 1024)
    return Settings(models=(STARTER,), store=store)


@ray.remote(num_cpus=0)
def ask(settings: Settings, name: str) -> tuple[float, list[Any]]:
    """What a starting replica does, and it lives on until its node has every model."""
    totals: list[Any] = []
    specs = load_registry(*settings.models).values()
    spec = next(s for s in specs if s.name == name)
    start_s = time.monotonic()
    provider = Provider(load_lock(*settings.models), settings.store)
    ensure_on_node(name, provider.digest(spec), settings, totals.extend)
    waited_s = time.monotonic() - start_s
    deadline_s = time.monotonic() + 60
    while not totals and time.monotonic() < deadline_s:
        time.sleep(0.1)
        if all(provider.store.holds(s.name, provider.digest(s)) for s in specs):
            deadline_s = min(deadline_s, time.monotonic() + 3)  # in which it is told the totals
    return waited_s, totals


async def test_eight_replicas_make_one_pull_that_tells_its_progress(
    cluster: str, slow: Settings
) -> None:
    tasks = [ask.remote(slow, "comic-starter") for _ in range(8)]
    seen: list[dict[str, float]] = []
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and not (seen and not seen[-1] and len(seen) > 3):
        found = await pulling()
        if found or seen:
            seen.append(found)
        time.sleep(0.3)
    first = [f["comic-starter"] for f in seen if "comic-starter" in f]
    assert first == sorted(first)
    assert any(0 < percent < 100 for percent in first)
    results = ray.get(tasks)
    totals = [total for _, found in results for total in found]
    misses = [total for total in totals if total[:2] == ("miss", "comic-starter")]
    assert sum(count for *_, count, _ in misses) == 1
    fetched = sum(t[4] for t in totals if t[:2] == ("bytes", "comic-starter"))
    assert fetched == misses[0][4], "every byte came once"
    # What nobody waited for came too, afterwards.
    provider = Provider(load_lock(*slow.models), slow.store)
    for spec in load_registry(*slow.models).values():
        assert provider.store.holds(spec.name, provider.digest(spec))
    wait_for(lambda: not [a for a in list_named_actors(True) if a["namespace"] == NAMESPACE])


def test_a_node_gets_what_is_compiled_for_its_device_unless_it_is_damaged(
    cluster: str, tmp_path: Path
) -> None:
    registry = Path(shutil.copy(ROOT / STARTER, tmp_path))
    shutil.copy(lock_path(STARTER), tmp_path)
    mirror = f"file://{tmp_path / 'mirror'}"
    settings = StoreSettings(root=tmp_path / "maker")
    provider, digest = Provider(load_lock(registry), settings), locked_in_full()
    provider.ensure(UPSCALE)
    publish(UPSCALE, digest, provider.store, mirror, settings, smoke=False)
    key = CompiledKey(UPSCALE.name, digest, this_target("auto"), "full", "any")
    artefact = compiled.add(provider.store, key, b"code" * 1000)
    update_lock(registry, lambda lock: lock.with_artefact(UPSCALE.name, digest, artefact))
    lock = load_lock(registry)
    publish_compiled(UPSCALE.name, lock.models[UPSCALE.name], provider.store, mirror, settings)

    def found_on(node: str) -> bytes | None:
        filled = StoreSettings(root=tmp_path / node, mirror=mirror, prefetch=())
        ray.get(ask.remote(Settings(models=(registry,), store=filled), UPSCALE.name))
        store = Store(filled)
        assert store.check(UPSCALE.name, digest, "full"), "the model is there in any case"
        return compiled.find(store, lock, key)

    assert found_on("one") == b"code" * 1000
    (published,) = (tmp_path / "mirror" / "compiled").rglob("*.bin")
    published.chmod(0o644)
    published.write_bytes(b"evil" * 1000)
    assert found_on("two") is None
