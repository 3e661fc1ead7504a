"""kuberay/prefetch, written by hand, with the folders of an environment in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deployments.errors import ConfigError
from kuberay.checks.manifests import read

if TYPE_CHECKING:
    from pathlib import Path

    from kuberay.render.source import Cache, Values

PREFETCH = "prefetch/prefetch.yaml"


def prefetch(folder: Path, cache: Cache) -> tuple[Values, Values]:
    """The job as it is written, and as it fills the folder that model pods of `cache` read.

    Args:
        folder: kuberay/.

    Raises:
        ConfigError: it cannot be read, or has no folder of the node.
    """
    path = folder / PREFETCH
    manifests = read(path)
    try:
        (pod,), (job,) = manifests.pods, manifests.documents
        (volume,), (mount,) = pod.spec["volumes"], pod.main["volumeMounts"]
        folders = {volume["hostPath"]["path"]: cache.path, mount["mountPath"]: cache.mount}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "The prefetch job is not one job with one folder of the node.",
            value=path,
            remedy="Restore it: its volume has a hostPath, and its container mounts that alone.",
        ) from error
    return job, _replaced(job, folders)


def _replaced(node: Any, folders: dict[str, str]) -> Any:
    """The paths stand in volume, mounts, environment and command, each as a text of its own."""
    if isinstance(node, dict):
        return {key: _replaced(value, folders) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(item, folders) for item in node]
    return folders.get(node, node) if isinstance(node, str) else node
