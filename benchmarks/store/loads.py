"""Ways to load a model from the disk, and the 2 GB model they load."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deployments.registry import ModelSpec

LOADS: Final = ("load, verified", "from_pretrained")
_NO_SAFETY_CHECKER: Final[dict[str, Any]] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
_ARCHITECTURE: Final = "comic-ghibli"  # Stable Diffusion 1.5

Job = dict[str, Any]
"""The store's `root`, the model's `folder` in it, its `digest` and its `bytes`."""


def prepare(way: str, job: Job) -> Callable[[], object]:
    """Import everything; returns the load itself, which is timed."""
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline

    from deployments.loader import load
    from deployments.settings import Settings, StoreSettings
    from deployments.store.cache import Store

    # Both ways import these when they load.
    for module in ("transformers.models.clip", "deployments.pipelines.img2img"):
        import_module(module)
    torch.set_num_threads(2)
    if way == "from_pretrained":
        return lambda: StableDiffusionImg2ImgPipeline.from_pretrained(
            job["folder"],
            dtype=torch.float16,
            use_safetensors=True,
            local_files_only=True,
            **_NO_SAFETY_CHECKER,
        )
    settings = Settings(device="cpu", torch_threads=2, store=StoreSettings(root=job["root"]))
    spec, store = _spec(job["folder"]), Store(settings.store)
    return lambda: load(spec, job["digest"], store, settings)


def weights() -> list[Any]:
    """Every weight that lives in this process, whatever holds it."""
    import torch

    return [thing.data for thing in gc.get_objects() if type(thing) is torch.nn.Parameter]


def read(tensors: list[Any]) -> None:
    """Read float16 tensors once, as a copy to a device does; loading only maps them."""
    import torch

    for tensor in tensors:
        tensor.view(torch.int16).max()


def make_pipeline(folder: Path) -> None:
    """Write Stable Diffusion 1.5 with random float16 weights, 2 GB, and a small vocabulary."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from benchmarks.gpu.architectures import ARCHITECTURES, build_unet, build_vae
    from starter_models.training.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    words = len(tokenizer)
    ends = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    known: dict[str, Any] = ARCHITECTURES[_ARCHITECTURE].text or {}
    config = CLIPTextConfig.from_dict({**known, **ends, "vocab_size": words})
    encoder: Any = CLIPTextModel(config)
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": encoder.to(torch.float16),
        "unet": build_unet(_ARCHITECTURE, "cpu", torch.float16),
        "vae": build_vae(_ARCHITECTURE, "cpu", torch.float16),
        "scheduler": DDIMScheduler(),
        **_NO_SAFETY_CHECKER,
    }
    StableDiffusionImg2ImgPipeline(**parts).save_pretrained(folder)


def publish_pipeline(folder: Path, root: Path) -> Job:
    """Put a folder into a store; returns what the loads need."""
    from deployments.settings import StoreSettings
    from deployments.store.cache import Store
    from deployments.store.folder import hash_file, list_files
    from deployments.store.folder_bucket import FolderBucket
    from deployments.store.lockfile import build_manifest
    from deployments.store.manifest import FileEntry

    hashed = [(path, hash_file(folder / path)) for path in list_files(folder)]
    files = [FileEntry(path=p, size=h.size, sha256=str(h.sha256)) for p, h in hashed]
    source = FolderBucket(f"file://{folder}")
    manifest = build_manifest(_spec(str(folder)), (source.url,), files)
    held = Store(StoreSettings(root=root)).pull(manifest, {f.path: (source, f.path) for f in files})
    return {
        "folder": str(held),
        "root": str(root),
        "digest": manifest.digest,
        "bytes": manifest.total_bytes,
    }


def _spec(folder: str) -> ModelSpec:
    from deployments.registry import ModelSpec

    return ModelSpec.model_validate(
        {
            "name": "bench-model",
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
