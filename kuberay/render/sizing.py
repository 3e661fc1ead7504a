"""What an environment needs: GPU shares, RAM of replicas, disk for models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from deployments.catalogue import Catalogue, load_catalogue
from deployments.errors import ConfigError, GpuTooSmall
from deployments.gpu.plan import Placed, plan
from deployments.gpu.profiles import as_gpu
from deployments.settings import Settings, parse_settings
from deployments.store.lockfile import load_lock
from kuberay.quantity import MIB, as_bytes, as_gi

if TYPE_CHECKING:
    from deployments.catalogue import Registry
    from deployments.registry import ModelSpec
    from deployments.store.lockfile import Lock
    from kuberay.render.environment import Environment, Values

_STEP_BYTES = 64 * MIB
_DISK_SLACK = 1.1
"""Room for staging folders, compiled kernels and file system blocks."""


@dataclass(frozen=True)
class Sizing:
    """Sizes derived from an environment, its model registries and the GPU plan."""

    environment: Environment

    @cached_property
    def settings(self) -> Settings:
        """The application's args, as the application parses them.

        Raises:
            ConfigError: a key or value is wrong.
        """
        return parse_settings(Settings, application_args(self.environment), "serve.args")

    @cached_property
    def catalogue(self) -> Catalogue:
        return load_catalogue(*self.settings.models)

    @cached_property
    def registry(self) -> Registry:
        """The models that are served, whether or not their licences are accepted yet."""
        return self.catalogue.accepting().served(self.settings.serve)

    @cached_property
    def placed(self) -> dict[str, Placed]:
        """The GPU plan by model; empty without GPUs, or with one share for all models.

        Raises:
            ConfigError: an unknown GPU, or a model no profile knows.
            GpuTooSmall: a model does not fit, or there are too few GPUs for one replica of each.
        """
        gpu = self.environment.gpu
        if gpu is None or gpu.share is not None:
            return {}
        made = plan(self.registry.models, as_gpu(gpu.type))
        if made.gpus > gpu.max_nodes:
            raise GpuTooSmall(
                f"One replica of each model needs {made.gpus} x {made.gpu.label}.",
                value=f"gpu.max_nodes {gpu.max_nodes}",
                remedy="Raise gpu.max_nodes, take a larger gpu.type, or serve smaller models.",
            )
        return {placed.name: placed for placed in made.placed}

    def num_gpus(self, spec: ModelSpec) -> float:
        """GPUs that Ray reserves for one replica; 0 without GPUs."""
        gpu, placed = self.environment.gpu, self.placed.get(spec.name)
        return placed.num_gpus if placed else (gpu.share if gpu and gpu.share else 0)

    @cached_property
    def _lock(self) -> Lock:
        return load_lock(*self.settings.models)

    def weights_bytes(self, spec: ModelSpec) -> int:
        """Size of a model's weights on disk, in bytes; 0 if nothing is known."""
        locked = self._lock.models.get(spec.name)
        files = [file for origin in locked.origins for file in origin.files] if locked else []
        known = sum(file.size for file in files if isinstance(file.size, int))
        placed = self.placed.get(spec.name)
        # A model that is converted is smaller than what it is made from.
        return placed.demand.profile.weights_bytes if placed else known

    def replica_memory_bytes(self, spec: ModelSpec) -> int:
        """RAM that Ray reserves for one replica: its process, and the files it maps."""
        needed = as_bytes(self.environment.memory.process) + self.weights_bytes(spec)
        return -(-needed // _STEP_BYTES) * _STEP_BYTES

    @cached_property
    def pod_memory_bytes(self) -> int:
        """RAM of a model pod that Ray may reserve for replicas.

        Raises:
            ConfigError: nothing is left for them.
        """
        whole = as_bytes(self.environment.models.size["memory"])
        left = whole - as_bytes(self.environment.memory.reserved)
        if left <= 0:
            raise ConfigError(
                "memory.reserved leaves no memory of a model pod to replicas.",
                value=self.environment.memory.reserved,
                remedy="Raise models.size.memory.",
            )
        return left

    @cached_property
    def cache_size(self) -> str:
        """Disk for models, as a quantity."""
        models = sum(self.weights_bytes(spec) for spec in self.registry.models)
        return as_gi(int(models * self.environment.cache.copies * _DISK_SLACK))

    @cached_property
    def disk_size(self) -> str:
        """Disk that lives and dies with a model pod, as a quantity."""
        cache = self.environment.cache
        models = as_bytes(self.cache_size) if cache.kind == "emptyDir" else 0
        return as_gi(models + as_bytes(cache.scratch))


def application_args(environment: Environment) -> Values:
    """The `args` of the application, including derived ones."""
    args, mirror = dict(environment.serve.args), environment.site.mirror
    store: Any = args.pop("store", {})
    if mirror and isinstance(store, dict):
        store = store | {"mirror": mirror}
    return args | ({} if store == {} else {"store": store})
