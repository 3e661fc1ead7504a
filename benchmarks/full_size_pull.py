"""Pull the production models in their true sizes, from a local hub that holds zeros for weights.

Every byte goes over loopback, is hashed, checked and synced to disk, as it would be from the real
hub; the server counts what it sends. Needs about 13 GB of disk for the time it runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from deployments.registry import load_catalogue
from deployments.settings import StoreSettings
from deployments.store.bucket import UNRESOLVED
from deployments.store.hub import parse
from deployments.store.lockfile import (
    Lock,
    LockedFile,
    LockedModel,
    LockedOrigin,
    load_lock,
    save_lock,
)
from deployments.store.provider import Provider
from deployments.store.resolve import resolve
from tests.servers.files import FileServer
from tests.servers.hub import HubServer

if TYPE_CHECKING:
    from collections import Counter

    from deployments.registry import ArtefactSpec, Catalogue, Origin

PRODUCTION = Path("configs/models/production.yaml")
HEADER = 2**16
"""About what a safetensors header takes."""
WEIGHTS = {
    "upscale-sd-x4": {
        "unet/diffusion_pytorch_model.fp16.safetensors": 2 * 473_398_020 + HEADER,
        "text_encoder/model.fp16.safetensors": 2 * 340_387_840 + HEADER,
        "vae/diffusion_pytorch_model.fp16.safetensors": 2 * 55_325_927 + HEADER,
    },
    "enhance-sdxl-refiner": {
        "unet/diffusion_pytorch_model.fp16.safetensors": 2 * 2_259_526_660 + HEADER,
        "text_encoder_2/model.fp16.safetensors": 2 * 694_659_840 + HEADER,
    },
    "comic-ghibli": {
        "unet/diffusion_pytorch_model.safetensors": 4 * 859_520_964 + HEADER,
        "text_encoder/model.safetensors": 4 * 123_060_480 + HEADER,
        "vae/diffusion_pytorch_model.safetensors": 4 * 83_653_863 + HEADER,
    },
    "background-rmbg14": {"model.safetensors": 4 * 44_046_790 + HEADER},
    "mms-lid-126": {"model.safetensors": 3_860_000_000},
}
"""Bytes by model and file, from parameter counts, where the lock file does not know them yet."""
SMALL = {"vocab.json": 1_059_962, "merges.txt": 524_619}


def size_of(name: str, file: LockedFile) -> int:
    """Bytes of a file: the lock file's, else from the parameter count, else those of a config."""
    if isinstance(file.size, int):
        return file.size
    return WEIGHTS.get(name, {}).get(file.path) or SMALL.get(Path(file.path).name, 1000)


def stand_in(catalogue: Catalogue, hub: HubServer, web: FileServer) -> tuple[Catalogue, Lock]:
    """Fill the servers with zeros for every file of a registry.

    Returns:
        The registry with its https sources on the local server, and its lock file without the
        hashes of the true files.
    """
    lock = load_lock(PRODUCTION)
    entries: dict[str, ArtefactSpec] = {}
    for spec in catalogue.entries:
        origins = tuple(_moved(origin, web) for origin in spec.origins)
        entries[spec.name] = spec.model_copy(update={"origins": origins})
        held = lock.models[spec.name].origins
        known = tuple(
            LockedOrigin(source=origin.source, files=_place(spec.name, origin, before, hub, web))
            for origin, before in zip(origins, held, strict=True)
        )
        lock = lock.with_model(spec.name, LockedModel(origins=known))
    models = tuple(entries[spec.name] for spec in catalogue.models)
    artefacts = tuple(entries[spec.name] for spec in catalogue.artefacts)
    return catalogue.model_copy(update={"models": models, "artefacts": artefacts}), lock


def _moved(origin: Origin, web: FileServer) -> Origin:
    if not origin.source.startswith("https://"):
        return origin
    return origin.model_copy(update={"source": f"{web.url}/{Path(origin.source).name}"})


def _place(
    name: str, origin: Origin, held: LockedOrigin, hub: HubServer, web: FileServer
) -> tuple[LockedFile, ...]:
    sizes = {file.path: size_of(name, file) for file in held.files}
    if origin.source.startswith("hf://"):
        repo, revision = parse(origin.source)
        hub.add_repo(repo, sizes, None if revision == UNRESOLVED else revision)
        return tuple(LockedFile(path=path) for path in sizes)
    for path, size in sizes.items():
        target = web.root / Path(origin.source).name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        os.truncate(target, size)
    # Of https files the hash must be known beforehand.
    return tuple(
        LockedFile(path=path, sha256=hashlib.sha256(bytes(size)).hexdigest())
        for path, size in sizes.items()
    )


def files_sent(sent: Counter[str]) -> dict[str, int]:
    """Bytes of files, by path on the hub; without its listings and the redirects to its CDN."""
    return {
        path: count
        for path, count in sorted(sent.items())
        if count
        and not path.startswith("/api/")
        and f"/cdn{path.replace('/resolve/', '/', 1)}" not in sent
    }


def pull(console: Console, root: Path) -> None:
    """Resolve and pull; see the module.

    Raises:
        AssertionError: a byte was fetched twice, or one is missing.
    """
    settings = StoreSettings(root=root / "store")
    (root / "web").mkdir()
    with HubServer(root / "hub") as hub, FileServer(root / "web") as web:
        os.environ["HF_ENDPOINT"] = hub.url
        catalogue, lock = stand_in(load_catalogue(PRODUCTION), hub, web)
        entries = [spec for spec in catalogue.entries if not spec.convert]
        start_s = time.perf_counter()
        for spec in entries:
            lock = lock.with_model(spec.name, resolve(spec, settings, lock.models[spec.name]))
        console.print(f"resolved {len(entries)} entries in {time.perf_counter() - start_s:.1f} s")
        save_lock(root / "production.yaml", lock)
        provider = Provider(root / "production.yaml", settings)
        table = Table("model", "planned bytes", "bytes at the server", "s", "MB/s")
        sent_in_all = 0
        for spec in entries:
            hub.faults.reset_counters()
            start_s = time.perf_counter()
            manifest, _ = provider.plan(spec)
            provider.ensure(spec)
            seconds = time.perf_counter() - start_s
            sent = files_sent(hub.faults.bytes_sent)
            _check_once(sent, lock.models[spec.name])
            for path, count in sent.items():
                console.print(f"{count:>13} {path}", soft_wrap=True)
            total = sum(sent.values())
            sent_in_all += total
            rate = f"{total / seconds / 1e6:.0f}"
            table.add_row(spec.name, f"{manifest.total_bytes}", f"{total}", f"{seconds:.1f}", rate)
    console.print(table)
    console.print(f"{sent_in_all} bytes in all; each was sent once")


def _check_once(sent: dict[str, int], model: LockedModel) -> None:
    wanted = {
        f"{parse(origin.source)[1]}/{file.path}": file.size
        for origin in model.origins
        for file in origin.files
    }
    found = {path: size for path in sent for end, size in wanted.items() if path.endswith(end)}
    assert sent == found, (sent, found)
    assert len(found) == len(wanted), (found, wanted)


def main(
    root: Annotated[Path | None, typer.Option(help="an empty folder on the disk to use")] = None,
) -> None:
    """Resolve and pull every production entry that needs no conversion; nothing is kept."""
    folder = Path(tempfile.mkdtemp(prefix="full-size-", dir=root))
    try:
        pull(Console(), folder)
    finally:
        for parent, _, _ in os.walk(folder):
            os.chmod(parent, 0o755)
        shutil.rmtree(folder)


if __name__ == "__main__":
    typer.run(main)
