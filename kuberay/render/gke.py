"""Objects for GKE only: the way in from outside, the GPU nodes, and the alerts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from kuberay.quantity import GIB, as_bytes, parse_quantity
from kuberay.render.entry import entry, serve_service
from kuberay.render.environment import Environment, GpuNodes, Values, read_yaml
from kuberay.render.rayservice import SERVE_PORT, metadata
from kuberay.render.sizing import Sizing

if TYPE_CHECKING:
    from pathlib import Path


_ACCELERATORS = {
    "t4": "nvidia-tesla-t4",
    "l4": "nvidia-l4",
    "a100-40": "nvidia-tesla-a100",
    "h100": "nvidia-h100-80gb",
}
# CPUs and GiB that a machine with one GPU leaves to pods: all that it has, less what GKE is
# documented to keep, and an estimated 0.4 CPUs and 1 GiB for Google's own pods.
_MACHINES = {
    "t4": {"n1-standard-4": (3.5, 11.5), "n1-standard-8": (7.5, 25.5), "n1-highmem-8": (7.5, 46.2)},
    "l4": {
        "g2-standard-4": (3.5, 12.4),
        "g2-standard-8": (7.5, 27.4),
        "g2-standard-12": (11.5, 42.4),
    },
    "a100-40": {"a2-highgpu-1g": (11.5, 77.2)},
    "h100": {"a3-highgpu-1g": (25.4, 221.5)},
}
_SSD_BYTES = 375 * GIB - 375 * GIB // 10 - 50 * GIB
"""Of one local SSD, without Google's part, and what must stay free, or the kubelet evicts pods."""
_BOOT_KEPT_BYTES = 20 * 10**9
"""Of a boot disk: the system and the images. An estimate."""
COMPUTE_CLASS = "imagen-gpu"
_GATEWAY_CLASS = "gke-l7-global-external-managed"
# Serve's own route. By default Google probes `/`, gets 404, and answers every client 503.
_HEALTH = {
    "checkIntervalSec": 10,
    "timeoutSec": 5,
    "config": {
        "type": "HTTP",
        "httpHealthCheck": {"port": SERVE_PORT, "requestPath": "/-/healthz"},
    },
}


def gateway(environment: Environment) -> list[Values]:
    """HTTPS from the internet to the ingress pods, behind Identity-Aware Proxy."""
    about = metadata(environment)
    target = {"targetRef": {"group": "", "kind": "Service", "name": serve_service(environment)}}
    certificate = {"networking.gke.io/certmap": environment.site.certificate_map}
    policies = {
        "HealthCheckPolicy": {"default": _HEALTH} | target,
        "GCPBackendPolicy": {"default": _backend(environment)} | target,
    }
    google = {"apiVersion": "networking.gke.io/v1"}
    return entry(environment, _GATEWAY_CLASS, certificate) + [
        google | {"kind": kind, "metadata": about, "spec": spec} for kind, spec in policies.items()
    ]


def _backend(environment: Environment) -> Values:
    site, longest_s = environment.site, environment.timeouts_s.load_balancer
    secret = {"name": "imagen-oauth"}
    return {
        "timeoutSec": longest_s,
        # As long as a request may take, so that a pod that leaves finishes those it has.
        "connectionDraining": {"drainingTimeoutSec": longest_s},
        "securityPolicy": site.security_policy,
        "iap": {"enabled": True, "clientID": site.oauth_client, "oauth2ClientSecret": secret},
    }


def compute_class(environment: Environment, gpu: GpuNodes) -> Values:
    """GPU nodes, in the order in which GKE tries them. A ComputeClass has no namespace.

    Raises:
        ConfigError: the machine is not in the table, or a model pod does not fit it.
    """
    _check_machine(environment, gpu)
    kinds = [True, False] if gpu.spot_first else [False]
    return {
        "apiVersion": "cloud.google.com/v1",
        "kind": "ComputeClass",
        "metadata": {"name": COMPUTE_CLASS, "labels": {"app.kubernetes.io/name": "imagen"}},
        "spec": {
            "nodePoolAutoCreation": {"enabled": True},
            # Containers start while their image is still being pulled.
            "nodePoolConfig": {"imageStreaming": {"enabled": True}},
            # Otherwise GPU pods would get nodes without a GPU.
            "whenUnsatisfiable": "DoNotScaleUp",
            # Ray has already waited for its own idle time.
            "autoscalingPolicy": {"consolidationDelayMinutes": 5},
            # Moving to cheaper nodes would stop warm pods.
            "activeMigration": {"optimizeRulePriority": False},
            "priorities": [_nodes(gpu, spot=spot) for spot in kinds],
        },
    }


def rules(environment: Environment, alerts: Path) -> Values:
    """The alerts, as Google's managed Prometheus takes them.

    Raises:
        ConfigError: the file of alerts cannot be read.
    """
    return {
        "apiVersion": "monitoring.googleapis.com/v1",
        "kind": "Rules",
        "metadata": metadata(environment),
        "spec": read_yaml(alerts),
    }


def _nodes(gpu: GpuNodes, *, spot: bool) -> Values:
    accelerator = {"type": _ACCELERATORS[gpu.type], "count": 1, "driverVersion": "latest"}
    return {
        "machineType": gpu.machine,
        "spot": spot,
        "gpu": accelerator,
        "storage": {
            "localSSDCount": 1,
            "bootDiskType": gpu.boot_disk_type,
            "bootDiskSize": gpu.boot_disk_gb,
        },
    }


def _check_machine(environment: Environment, gpu: GpuNodes) -> None:
    """A model pod that no node can hold is pending for ever, and nothing reports it."""
    known = _MACHINES.get(gpu.type, {})
    if gpu.machine not in known:
        raise ConfigError(
            f"The machine is not in the table of machines with one {gpu.type} GPU.",
            value=gpu.machine,
            remedy=f"Use one of {', '.join(known)}, or add it in kuberay/render/gke.py.",
        )
    cpus, ram_gib = known[gpu.machine]
    size, cache, sizing = environment.models.size, environment.cache, Sizing(environment)
    if parse_quantity(size["cpu"]) > cpus or as_bytes(size["memory"]) > ram_gib * GIB:
        raise ConfigError(
            f"A model pod does not fit a {gpu.machine}, which leaves {cpus} CPUs and {ram_gib} GiB"
            " to pods.",
            value=f"{size['cpu']} CPUs, {size['memory']}",
            remedy="Lower models.size, or take a larger gpu.machine.",
        )
    if as_bytes(sizing.disk_size) > _SSD_BYTES:
        raise ConfigError(
            f"A model pod needs more disk than the {_SSD_BYTES / GIB:.0f} GiB that a node's local"
            " SSD leaves to pods.",
            value=f"{sizing.disk_size}, cache.copies {cache.copies:g}, scratch {cache.scratch}",
            remedy="Lower cache.copies or cache.scratch.",
        )
    usable = sizing.settings.store.gc_start_percent / 100
    left_bytes = int(gpu.boot_disk_gb * 10**9 * usable) - _BOOT_KEPT_BYTES
    # A read-only cache is on a disk of its own.
    on_boot_disk = cache.kind == "hostPath" and not cache.read_only
    if on_boot_disk and as_bytes(sizing.cache_size) > left_bytes:
        raise ConfigError(
            f"The boot disk leaves {left_bytes / 10**9:.0f} GB to models, which need more.",
            value=f"{sizing.cache_size}, gpu.boot_disk_gb {gpu.boot_disk_gb}",
            remedy="Raise gpu.boot_disk_gb, or lower cache.copies.",
        )
