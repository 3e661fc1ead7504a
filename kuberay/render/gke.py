"""Objects for GKE only: the way in from outside, and the GPU nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from kuberay.quantity import GIB, as_bytes, parse_quantity
from kuberay.render.rayservice import SERVE_PORT, metadata
from kuberay.render.sizing import Sizing

if TYPE_CHECKING:
    from kuberay.render.environment import Environment, GpuNodes, Values

_ACCELERATORS = {
    "t4": "nvidia-tesla-t4",
    "l4": "nvidia-l4",
    "a100-40": "nvidia-tesla-a100",
    "h100": "nvidia-h100-80gb",
}
# vCPUs and GiB of machines with one GPU. T4s are attached to any N1.
_MACHINES: dict[str, dict[str, tuple[int, float]]] = {
    "t4": {"n1-standard-4": (4, 15), "n1-standard-8": (8, 30), "n1-highmem-8": (8, 52)},
    "l4": {"g2-standard-4": (4, 16), "g2-standard-8": (8, 32), "g2-standard-12": (12, 48)},
    "a100-40": {"a2-highgpu-1g": (12, 85)},
    "h100": {"a3-highgpu-1g": (26, 234)},
}
# What Google reserves of a node: shares of its first cores and GiB, of the next ones, and so on.
_CPU_KEPT = ((1, 0.06), (1, 0.01), (2, 0.005), (float("inf"), 0.0025))
_RAM_KEPT = ((4, 0.25), (4, 0.20), (8, 0.10), (112, 0.06), (float("inf"), 0.02))
_DAEMONS = (0.4, 1.0)
"""Cores and GiB of Google's own pods on a node (logging, metrics, the driver). An estimate."""
_SSDS = 1
_SSD_BYTES = 375 * GIB
_SSD_KEPT = 50 * GIB + _SSD_BYTES // 10
"""Of one local SSD: Google's part, and what must stay free, or the kubelet evicts pods."""
_BOOT_KEPT_BYTES = 20 * 10**9
"""Of a boot disk: the system and the images. An estimate."""
COMPUTE_CLASS = "imagen-gpu"


def gateway(environment: Environment) -> list[Values]:
    """HTTPS from the internet to the ingress pods, behind Identity-Aware Proxy."""
    service = f"{environment.name}-serve-svc"
    target = {"targetRef": {"group": "", "kind": "Service", "name": service}}
    listener = {
        "name": "https",
        "protocol": "HTTPS",
        "port": 443,
        "hostname": environment.site.host,
        "allowedRoutes": {"namespaces": {"from": "Same"}},
    }
    route = {
        "parentRefs": [{"name": environment.name}],
        "hostnames": [environment.site.host],
        "rules": [{"backendRefs": [{"name": service, "port": SERVE_PORT}]}],
    }
    certificate = {"networking.gke.io/certmap": environment.site.certificate_map}
    api, google = "gateway.networking.k8s.io/v1", "networking.gke.io/v1"
    entry = _object(api, "Gateway", environment)
    entry["metadata"]["annotations"] = certificate
    return [
        entry
        | {
            "spec": {
                "gatewayClassName": "gke-l7-global-external-managed",
                "listeners": [listener],
            }
        },
        _object(api, "HTTPRoute", environment) | {"spec": route},
        _object(google, "HealthCheckPolicy", environment)
        | {"spec": {"default": _health()} | target},
        _object(google, "GCPBackendPolicy", environment)
        | {"spec": {"default": _backend(environment)} | target},
    ]


def _health() -> Values:
    """Serve's own route. By default Google probes `/`, gets 404, and answers every client 503."""
    check = {"port": SERVE_PORT, "requestPath": "/-/healthz"}
    return {
        "checkIntervalSec": 10,
        "timeoutSec": 5,
        "config": {"type": "HTTP", "httpHealthCheck": check},
    }


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


def _nodes(gpu: GpuNodes, *, spot: bool) -> Values:
    accelerator = {"type": _ACCELERATORS[gpu.type], "count": 1, "driverVersion": "latest"}
    return {
        "machineType": gpu.machine,
        "spot": spot,
        "gpu": accelerator,
        "storage": {
            "localSSDCount": _SSDS,
            "bootDiskType": gpu.boot_disk_type,
            "bootDiskSize": gpu.boot_disk_gb,
        },
    }


def _check_machine(environment: Environment, gpu: GpuNodes) -> None:
    known = _MACHINES.get(gpu.type, {})
    if gpu.machine not in known:
        others = sorted({name for machines in _MACHINES.values() for name in machines})
        raise ConfigError(
            f"The machine is not in the table of machines with one {gpu.type} GPU.",
            value=gpu.machine,
            remedy=f"Use {', '.join(known or others)}, or add it in kuberay/render/gke.py.",
        )
    _check_size(environment, gpu, *known[gpu.machine])
    _check_disk(environment, gpu)


def _check_size(environment: Environment, gpu: GpuNodes, cpus: int, ram: float) -> None:
    left_cpus = cpus - _kept(cpus, _CPU_KEPT) - _DAEMONS[0]
    left_ram = ram - _kept(ram, _RAM_KEPT) - _DAEMONS[1]
    size = environment.models.size
    if parse_quantity(size["cpu"]) > left_cpus or as_bytes(size["memory"]) > left_ram * GIB:
        raise ConfigError(
            f"A model pod does not fit a {gpu.machine}, which leaves {left_cpus:.1f} CPUs and"
            f" {left_ram:.1f} GiB to pods: it would be pending for ever.",
            value=f"{size['cpu']} CPUs, {size['memory']}",
            remedy="Lower models.size, or take a larger gpu.machine.",
        )


def _check_disk(environment: Environment, gpu: GpuNodes) -> None:
    """An emptyDir and logs are on the local SSD, a folder of the node is on its boot disk."""
    sizing, cache = Sizing(environment), environment.cache
    left = _SSDS * (_SSD_BYTES - _SSD_KEPT)
    if as_bytes(sizing.disk_size) > left:
        raise ConfigError(
            f"A model pod needs more disk than the {left / GIB:.0f} GiB that a node's local SSD"
            " leaves to pods: it would be pending for ever.",
            value=f"{sizing.disk_size}, cache.copies {cache.copies:g}, scratch {cache.scratch}",
            remedy="Lower cache.copies or cache.scratch.",
        )
    if cache.kind != "hostPath" or cache.read_only:  # read-only is a disk of its own
        return
    usable = sizing.settings.store.gc_start_percent / 100
    left = int(gpu.boot_disk_gb * 10**9 * usable) - _BOOT_KEPT_BYTES
    if as_bytes(sizing.cache_size) > left:
        raise ConfigError(
            f"The folder of models needs more than {left / 10**9:.0f} GB, what a boot disk leaves.",
            value=f"{sizing.cache_size}, gpu.boot_disk_gb {gpu.boot_disk_gb}",
            remedy="Raise gpu.boot_disk_gb, or lower cache.copies.",
        )


def _kept(amount: float, steps: tuple[tuple[float, float], ...]) -> float:
    """The sum of the shares of consecutive parts of an amount."""
    kept = 0.0
    for width, share in steps:
        kept += min(amount, width) * share
        amount = max(amount - width, 0)
    return kept


def _object(api_version: str, kind: str, environment: Environment) -> Values:
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata(environment)}
