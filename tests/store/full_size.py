"""Servers that hold the production registry in full size, with zeros for weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.origins import UNRESOLVED, parse_hub
from deployments.store.lockfile import LockedFile, LockedModel, LockedOrigin, load_lock

if TYPE_CHECKING:
    from collections import Counter

    from benchmarks.servers.files import FileServer
    from benchmarks.servers.hub import HubServer
    from deployments.catalogue import Catalogue
    from deployments.registry import ArtefactSpec, Origin
    from deployments.store.lockfile import Lock

PRODUCTION = Path("configs/models/production.yaml")
HEADER = 2**16
"""Roughly the size of a safetensors header."""
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
    "generate-sdxl-base": {
        "unet/diffusion_pytorch_model.fp16.safetensors": 2 * 2_567_463_684 + HEADER,
        "text_encoder/model.fp16.safetensors": 2 * 123_060_480 + HEADER,
        "text_encoder_2/model.fp16.safetensors": 2 * 694_659_840 + HEADER,
    },
    "generate-lcm-dreamshaper7": {
        "unet/diffusion_pytorch_model.safetensors": 4 * 859_602_884 + HEADER,
        "text_encoder/model.safetensors": 4 * 123_060_480 + HEADER,
        "vae/diffusion_pytorch_model.safetensors": 4 * 83_653_863 + HEADER,
    },
    "background-rmbg14": {"model.safetensors": 4 * 44_046_790 + HEADER},
    "upscale-realesrgan-x4plus-anime": {"RealESRGAN_x4plus_anime_6B.pth": 18_000_000},
    "mms-lid-126": {"model.safetensors": 3_860_000_000},
}
"""Bytes by model and file, from parameter counts, where the lock file has none yet."""
SMALL = {"vocab.json": 1_059_962, "merges.txt": 524_619}


def size_of(name: str, file: LockedFile) -> int:
    """Bytes of a file: from the lock file, else from parameter counts, else those of a config."""
    if isinstance(file.size, int):
        return file.size
    return WEIGHTS.get(name, {}).get(file.path) or SMALL.get(Path(file.path).name, 1000)


def stand_in(catalogue: Catalogue, hub: HubServer, web: FileServer) -> tuple[Catalogue, Lock]:
    """Fill the servers with zeros for every file of a registry.

    Returns:
        The registry with its https sources on the local server, and its lock file without the
        real files' hashes.
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
        repo, revision = parse_hub(origin.source)
        hub.add_repo(repo, sizes, None if revision == UNRESOLVED else revision)
        return tuple(LockedFile(path=path) for path in sizes)
    for path, size in sizes.items():
        target = web.root / Path(origin.source).name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        os.truncate(target, size)
    # The hash of an https file must be known beforehand.
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
