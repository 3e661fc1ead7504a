"""The model store against what it replaces: pulls from a bucket and a hub, and loads.

Each way of pulling runs in a process of its own, in random order, from servers in another process
on this machine: `make bench-store`. Both share its cores, so that the figures compare the ways and
say nothing about a network. `fsync` is the time until every byte is on the disk, which our pulls
always include.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlsplit

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deployments.registry import ModelSpec
    from deployments.store.bucket import Reader
    from deployments.store.manifest import Manifest

RESULTS = Path(__file__).parent / "results"
NAME, REPO, BUCKET, PREFIX = "bench-model", "org/bench", "models", "m/v1"
THREADS = 8
RANGE_BYTES = 32 * 2**20
BLOCK_BYTES = 2**20
MB = 10**6
SIZES_MB = {
    "unet/a.safetensors": 1000,
    "unet/b.safetensors": 300,
    "text_encoder/a.safetensors": 300,
    "text_encoder_2/a.safetensors": 250,
    "vae/a.safetensors": 147.6,
    "tokenizer/vocab.txt": 2,
    "tokenizer/merges.txt": 0.4,
}
GCS = ("ours gs", "download_many threads", "download_many processes", "bare GET gs")
HUB = ("ours hf", "snapshot_download", "bare GET hf")
LOADS = ("load, verified", "from_pretrained")
RATIOS = (
    ("ours gs", "download_many threads", 1.0),
    ("ours gs", "download_many processes", 1.0),
    ("ours gs", "bare GET gs", 0.8),
    ("ours hf", "snapshot_download", 1.0),
    ("ours hf", "bare GET hf", 0.8),
)

Plan = dict[str, Any]
Get = tuple[str, Path, int]
"""A URL path, the file it goes to, and its size."""


# Ways to pull; each runs in a process of its own.


def ours(plan: Plan, target: Path, source: Reader) -> None:
    from deployments.settings import StoreSettings
    from deployments.store.cache import Store

    manifest = _manifest(plan)
    settings = StoreSettings(root=target, threads=THREADS, range_bytes=RANGE_BYTES)
    Store(settings).pull(manifest, {f.path: (source, f.path) for f in manifest.files})


def prepare(way: str, plan: Plan, target: Path) -> Callable[[], object]:
    """Everything but the work: imports, clients."""
    if way == "ours gs":
        from deployments.store import cache, gcs

        bucket = gcs.GcsBucket(f"gs://{BUCKET}/{PREFIX}")
        return lambda: ours(plan, target, bucket)
    if way == "ours hf":
        from huggingface_hub import HfApi

        from deployments.store import cache, hub  # noqa: F401

        repository = hub.HubReader(f"hf://{REPO}@{plan['revision']}")
        return lambda: ours(plan, target, repository)
    if way.startswith("download_many"):
        return _download_many(plan, target, way.rpartition(" ")[2])
    if way == "snapshot_download":
        from huggingface_hub import HfApi, snapshot_download  # noqa: F401

        return lambda: snapshot_download(
            REPO,
            revision=plan["revision"],
            endpoint=plan["hub"],
            cache_dir=target,
            max_workers=THREADS,
            token=False,
        )
    return _bare(plan, target, way.endswith("gs"))


def _download_many(plan: Plan, target: Path, kind: str) -> Callable[[], object]:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    from google.cloud.storage import transfer_manager

    bucket = storage.Client(project="x", credentials=AnonymousCredentials()).bucket(BUCKET)
    pairs: list[tuple[Any, str]] = []
    for path in plan["files"]:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        pairs.append((bucket.blob(f"{PREFIX}/{path}"), str(target / path)))
    worker = transfer_manager.THREAD if kind == "threads" else transfer_manager.PROCESS
    return lambda: transfer_manager.download_many(
        pairs, worker_type=worker, max_workers=THREADS, raise_exception=True
    )


def _bare(plan: Plan, target: Path, from_bucket: bool) -> Callable[[], object]:
    if from_bucket:
        base, url = f"/download/storage/v1/b/{BUCKET}/o/", plan["gcs"]
        paths = {p: base + quote(f"{PREFIX}/{p}", safe="") + "?alt=media" for p in plan["files"]}
    else:
        url = plan["cdn"]
        paths = {p: f"/cdn/{REPO}/{plan['revision']}/{p}" for p in plan["files"]}
    gets = [(paths[p], target / p, size) for p, (size, _) in plan["files"].items()]
    return lambda: _bare_get(url, gets)


def _bare_get(url: str, gets: Sequence[Get]) -> None:
    """Ranges by http.client, written where they belong; nothing else."""
    local = threading.local()
    host = urlsplit(url).netloc

    def one(path: str, descriptor: int, start: int, stop: int) -> None:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection(host)
            local.view = memoryview(bytearray(BLOCK_BYTES))
        local.connection.request("GET", path, headers={"Range": f"bytes={start}-{stop - 1}"})
        response = local.connection.getresponse()
        while count := response.readinto(local.view):
            os.pwrite(descriptor, local.view[:count], start)
            start += count
        if start != stop:
            raise RuntimeError(f"{path} ended early")

    with ThreadPoolExecutor(THREADS) as pool:
        tasks: list[Any] = []
        for path, place, size in gets:
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            for start in range(0, size, RANGE_BYTES):
                stop = min(start + RANGE_BYTES, size)
                tasks.append(pool.submit(one, path, descriptor, start, stop))
        for task in tasks:
            task.result()


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


# Ways to load.


def bench_spec(folder: str) -> ModelSpec:
    from deployments.registry import ModelSpec

    return ModelSpec.model_validate(
        {
            "name": NAME,
            "task": "comic",
            "family": "img2img",
            "dtype": "float16",
            "origins": [{"source": f"file://{folder}", "files": ["model_index.json"]}],
            "summary": "random weights of the size of Stable Diffusion 1.5",
            "licence": "none",
            "commercial": False,
            "buckets": ((512, 512),),
        }
    )


def prepare_load(way: str, plan: Plan) -> Callable[[], object]:
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from deployments.loader import load
    from deployments.pipelines import diffusion, img2img  # noqa: F401
    from deployments.settings import Settings, StoreSettings
    from deployments.store.cache import Store

    torch.set_num_threads(2)
    if way == "from_pretrained":
        return lambda: StableDiffusionImg2ImgPipeline.from_pretrained(
            plan["folder"],
            dtype=torch.float16,
            use_safetensors=True,
            local_files_only=True,
            **diffusion.NO_SAFETY_CHECKER,
        )
    settings = Settings(device="cpu", torch_threads=2, store=StoreSettings(root=plan["root"]))
    spec, store = bench_spec(plan["folder"]), Store(settings.store)
    return lambda: load(spec, plan["digest"], store, settings)


def _read_weights(kept: Any) -> None:
    """Read every weight once, as the copy to a device does: until then they are only mapped."""
    import torch

    pipeline = kept.pipeline._pipeline if hasattr(kept, "lease") else kept
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for weights in part.parameters():
            weights.data.view(torch.int16).max()


def make_pipeline(folder: Path) -> None:
    """The architecture of Stable Diffusion 1.5 with random float16 weights, but few words: 2 GB."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from starter_models.training.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    words = len(tokenizer)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                bos_token_id=words - 2,
                eos_token_id=words - 1,
                pad_token_id=words - 1,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
    for module in (unet, text, vae):
        module.to(torch.float16).to_empty(device="cpu")
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data.uniform_(-0.02, 0.02)
    pipeline = StableDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def publish_pipeline(folder: Path, root: Path) -> Plan:
    """Put a folder into a store."""
    from deployments.settings import StoreSettings
    from deployments.store.cache import Store
    from deployments.store.folder import hash_file, list_files
    from deployments.store.folder_bucket import FolderBucket
    from deployments.store.lockfile import build_manifest
    from deployments.store.manifest import FileEntry

    hashed = [(path, hash_file(folder / path)) for path in list_files(folder)]
    files = [FileEntry(path=p, size=h.size, sha256=str(h.sha256)) for p, h in hashed]
    source = FolderBucket(f"file://{folder}")
    manifest = build_manifest(bench_spec(str(folder)), (source.url,), files)
    held = Store(StoreSettings(root=root)).pull(manifest, {f.path: (source, f.path) for f in files})
    return {
        "folder": str(held),
        "root": str(root),
        "digest": manifest.digest,
        "bytes": manifest.total_bytes,
    }


# The processes.


def work(way: str, plan: Plan, target: Path) -> dict[str, float]:
    run = prepare_load(way, plan) if way in LOADS else prepare(way, plan, target)
    start_s = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start_s
    if way in LOADS:
        _read_weights(kept)
    else:
        _sync_files(target)
    used_s = time.perf_counter() - start_s
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del kept
    last = "read" if way in LOADS else "fsync"
    return {"seconds": seconds, last: used_s, "peak_mb": peak_kib * 1024 / MB}


def serve(folder: Path) -> None:
    """Both servers, until the standard input ends."""
    from tests.servers.gcs import GcsServer
    from tests.servers.hub import HubServer

    source = folder / "source"
    files = {path: source / path for path in SIZES_MB}
    with (
        GcsServer(BUCKET, root=folder / "gcs") as bucket,
        HubServer(folder / "hub") as hub,
    ):
        for path, place in files.items():
            bucket.put(f"{PREFIX}/{path}", place)
        revision = hub.add_repo(REPO, files)
        urls = {"gcs": bucket.url, "hub": hub.url, "cdn": hub.cdn_url, "revision": revision}
        print(json.dumps(urls), flush=True)
        sys.stdin.read()


def make_files(folder: Path, gigabytes: float) -> dict[str, tuple[int, str]]:
    """Random files in the proportions of `SIZES_MB`: size and SHA-256."""
    from deployments.store.folder import hash_file

    made: dict[str, tuple[int, str]] = {}
    scale = gigabytes * 1000 / sum(SIZES_MB.values())
    for path, size_mb in SIZES_MB.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        left = int(size_mb * MB * scale)
        with place.open("wb") as file:
            while left > 0:
                left -= file.write(os.urandom(min(left, 16 * BLOCK_BYTES)))
        hashes = hash_file(place)
        made[path] = (hashes.size, str(hashes.sha256))
    return made


def _manifest(plan: Plan) -> Manifest:
    from deployments.store.manifest import FileEntry, Licence, Manifest

    files = sorted(plan["files"].items())
    return Manifest(
        model=NAME,
        sources=("bench",),
        licence=Licence(id="none", commercial=False),
        files=tuple(FileEntry(path=p, size=size, sha256=sha) for p, (size, sha) in files),
    )


@contextmanager
def served(folder: Path, gigabytes: float) -> Iterator[Plan]:
    files = make_files(folder / "source", gigabytes)
    command = [sys.executable, "-m", "benchmarks.store", "--serve", str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield {"files": files, **json.loads(server.stdout.readline())}
        server.communicate("")


def run_one(way: str, plan: Plan, target: Path) -> dict[str, float]:
    """One run in a fresh process, with nothing left to write from the one before."""
    os.sync()
    environment = dict(os.environ)
    if way in LOADS:
        environment["HF_HUB_OFFLINE"] = "1"
    else:
        environment |= {"STORAGE_EMULATOR_HOST": plan["gcs"], "HF_ENDPOINT": plan["hub"]}
    command = [sys.executable, "-m", "benchmarks.store", "--work", way, "--target", str(target)]
    try:
        done = subprocess.run(
            command, input=json.dumps(plan), stdout=subprocess.PIPE, text=True, env=environment
        )
        done.check_returncode()
    finally:
        if target.exists():
            subprocess.run(["chmod", "-R", "u+w", target], check=True)
            shutil.rmtree(target)
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    ways: Sequence[str], plan: Plan, target: Path, runs: int
) -> dict[str, list[dict[str, float]]]:
    """Interleaved, each round in another order."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(runs):
        for way in random.sample(ways, len(ways)):
            found[way].append(run_one(way, plan, target))
    return found


def medians(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        way: {key: statistics.median(run[key] for run in samples) for key in samples[0]}
        for way, samples in found.items()
    }


def compare(table: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """How many times as fast as each other way ours is, as called and to the disk."""
    ratios: dict[str, dict[str, Any]] = {}
    for mine, other, target in RATIOS:
        called = table[other]["seconds"] / table[mine]["seconds"]
        synced = table[other]["fsync"] / table[mine]["fsync"]
        ratios[f"{mine} / {other}"] = {"called": called, "fsync": synced, "target": target}
    return ratios


def machine(folder: Path) -> dict[str, Any]:
    from deployments.store.disk import filesystem

    names = ("google-cloud-storage", "huggingface_hub", "diffusers", "torch", "requests")
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "filesystem": filesystem(folder),
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def show(title: str, table: dict[str, dict[str, float]], size: int, last: str) -> None:
    shown = Table(title=title)
    for name in ("way", "s", "MB/s", f"s with {last}", "MB/s", "peak MB"):
        shown.add_column(name, justify="left" if name == "way" else "right")
    for way, row in table.items():
        cells = [f"{row[key]:.2f} {size / row[key] / MB:.0f}" for key in ("seconds", last)]
        shown.add_row(way, *" ".join(cells).split(), f"{row['peak_mb']:.0f}")
    Console().print(shown)


def bench_pulls(folder: Path, places: dict[str, Path], gigabytes: float, runs: int) -> Plan:
    result: Plan = {}
    with served(folder, gigabytes) as plan:
        size = sum(size for size, _ in plan["files"].values())
        for way in (GCS[0], HUB[0]):  # the servers hash their files when they are first asked
            run_one(way, plan, places["disk"])
        for name, place in places.items():
            found = measure([*GCS, *HUB], plan, place, runs)
            table = medians(found)
            result[name] = {
                "bytes": size,
                "runs": found,
                "medians": table,
                "ratios": compare(table),
            }
            show(f"pull of {size / 1e9:.2f} GB, {name}", table, size, "fsync")
            for pair, ratio in result[name]["ratios"].items():
                print(
                    f"{pair}: {ratio['called']:.2f} x as fast as called,"
                    f" {ratio['fsync']:.2f} x with fsync; target {ratio['target']}"
                )
    return result


def bench_loads(folder: Path, runs: int) -> Plan:
    make_pipeline(folder / "pipeline")
    plan = publish_pipeline(folder / "pipeline", folder / "store")
    for way in LOADS:
        run_one(way, plan, folder / "none")
    found = measure(LOADS, plan, folder / "none", max(runs, 5))
    table = medians(found)
    show(f"warm load of {plan['bytes'] / 1e9:.2f} GB", table, plan["bytes"], "read")
    mine, bare = (table[way] for way in LOADS)
    ratios = {key: mine[key] / bare[key] for key in ("seconds", "read")}
    print(
        f"verified load: {ratios['seconds']:.2f} x the time of from_pretrained, which only maps the"
        f" weights; {ratios['read']:.2f} x until every weight was read; target 1.3"
    )
    return {
        "bytes": plan["bytes"],
        "runs": found,
        "medians": table,
        "ratios": ratios,
        "target": 1.3,
    }


def main(
    gigabytes: Annotated[float, typer.Option(help="size of the pulled model")] = 2.0,
    runs: Annotated[int, typer.Option(help="of each way")] = 3,
    folder: Annotated[Path | None, typer.Option(help="where to work; its disk counts")] = None,
    pulls: Annotated[bool, typer.Option(help="measure pulls")] = True,
    loads: Annotated[bool, typer.Option(help="measure loads")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON result")] = None,
    serve_from: Annotated[Path | None, typer.Option("--serve", hidden=True)] = None,
    way: Annotated[str | None, typer.Option("--work", hidden=True)] = None,
    target: Annotated[Path, typer.Option(hidden=True)] = Path("unused"),
) -> None:
    """Measure, print medians and ratios, and write them down."""
    if serve_from:
        return serve(serve_from)
    if way:
        return print(json.dumps(work(way, json.load(sys.stdin), target)))
    today = datetime.now(UTC).date().isoformat()
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=folder) as name:
        here = Path(name)
        result: Plan = {"date": today, "machine": machine(here), "threads": THREADS}
        if pulls:
            with tempfile.TemporaryDirectory(prefix="bench-store-", dir="/dev/shm") as memory:
                places = {"disk": here / "target", "memory": Path(memory) / "target"}
                result["pulls"] = bench_pulls(here, places, gigabytes, runs)
        if loads:
            result["loads"] = bench_loads(here / "loads", runs)
        subprocess.run(["chmod", "-R", "u+w", here], check=True)
    output = output or RESULTS / f"store-{today}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")
    return None


if __name__ == "__main__":
    typer.run(main)
