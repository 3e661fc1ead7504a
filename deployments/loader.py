"""A model's way from its specification to ready."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from deployments.errors import ConfigError, ModelNotCached
from deployments.registry import FAMILIES
from deployments.settings import enforce_offline, resolve

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.pipelines.base import Pipeline
    from deployments.registry import ModelSpec
    from deployments.settings import Settings


@dataclass(frozen=True, slots=True)
class Loaded:
    """A ready model.

    Attributes:
        pipeline: on its device.
        digest: first 16 hex digits of the SHA-256 over the folder's paths and contents.
        device: such as cpu or cuda.
    """

    pipeline: Pipeline
    digest: str
    device: str


def load(spec: ModelSpec, settings: Settings) -> Loaded:
    """Load a model from its local folder; no network, no pickle, no remote code.

    Raises:
        ModelNotCached: the folder or a file is missing.
        ModelCorrupt: the files do not fit the network.
        AttentionUnavailable: xformers was asked for and cannot run.
        ConfigError: CUDA was asked for and there is none.
    """
    enforce_offline()
    torch.set_num_threads(settings.torch_threads)
    folder = resolve(spec.folder)
    digest = folder_digest(spec.name, folder)
    device = choose_device(settings.device)
    module, name = FAMILIES[spec.family].target.split(":")
    pipeline: Pipeline = getattr(import_module(module), name)(spec, folder, device)
    return Loaded(pipeline, digest, device)


def folder_digest(name: str, folder: Path) -> str:
    """Identity of a model folder's content.

    Raises:
        ModelNotCached: there is no such folder, or it is empty.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    if not files:
        raise ModelNotCached(
            f"Model {name} is not on this machine.",
            value=folder,
            remedy="Put its files there, or correct `folder` in the model registry.",
        )
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def choose_device(wanted: str) -> str:
    """The torch device for `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: cuda is wanted and torch sees none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(
            "device is cuda, but torch finds no CUDA device.",
            remedy="Use device: auto or cpu, or give the replica num_gpus above 0.",
        )
    return "cuda" if available and wanted != "cpu" else "cpu"
