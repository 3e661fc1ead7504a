"""Values of configs/gke.yaml for the shell scripts in this folder, one NAME=value a line.

python kuberay/gke/values.py configs/gke.yaml prod service bucket gpu
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError
from kuberay.render.environment import Environment, GpuNodes, load_environments
from kuberay.render.gke import COMPUTE_CLASS, compute_class

_BUCKET = r"gs://(?P<BUCKET>[^/]+).*"
_JOBS = r"gs://(?P<JOBS_BUCKET>[^/]+)/(?P<JOBS_FOLDER>.*[^/])/?"
_ACCOUNT = (
    r"(?P<JOBS_ACCOUNT>(?P<JOBS_ACCOUNT_ID>[a-z][a-z0-9-]{4,28}[a-z0-9])"
    r"@(?P<JOBS_PROJECT>[a-z0-9-]+)\.iam\.gserviceaccount\.com)"
)
_REPOSITORY = (
    r"(?P<REGISTRY_LOCATION>[a-z0-9-]+)-docker\.pkg\.dev"
    r"/(?P<REGISTRY_PROJECT>.+)/(?P<REGISTRY_NAME>[^/]+)/[^/]+"
)


def variables(group: str, environment: Environment) -> dict[str, str]:
    """The shell variables of a group: service, bucket, jobs, registry, site or gpu.

    Raises:
        ConfigError: a value is a placeholder, or has another form; or there are no GPU nodes.
    """
    site = environment.site
    match group:
        case "service":
            return {"SERVICE": environment.name, "NAMESPACE": environment.namespace}
        case "bucket":
            return _parts("site.mirror", site.mirror or "", _BUCKET)
        case "jobs":
            jobs: Any = environment.serve.args.get("jobs") or {}
            return {
                **_parts("serve.args.jobs.storage", jobs.get("storage") or "", _JOBS),
                **_parts("site.jobs_account", site.jobs_account or "", _ACCOUNT),
            }
        case "registry":
            repository = environment.images["imagen-cpu"].repository
            return _parts("images.imagen-cpu", repository, _REPOSITORY)
        case "site":
            return {
                **_parts("site.host", site.host, "(?P<HOST>.+)"),
                **_parts("site.certificate_map", site.certificate_map, "(?P<CERTIFICATE_MAP>.+)"),
                **_parts("site.security_policy", site.security_policy, "(?P<SECURITY_POLICY>.+)"),
            }
        case _:
            if environment.gpu is None:
                raise ConfigError("This overlay has no GPU nodes.")
            return _gpu(environment, environment.gpu)


def _gpu(environment: Environment, gpu: GpuNodes) -> dict[str, str]:
    """GPU nodes like those of kuberay/gke/compute-class.yaml."""
    kinds = compute_class(environment, gpu)["spec"]["priorities"]
    card, disk = kinds[0]["gpu"], kinds[0]["storage"]
    return {
        "COMPUTE_CLASS": COMPUTE_CLASS,
        "GPU_KINDS": " ".join("spot" if kind["spot"] else "on-demand" for kind in kinds),
        "GPU_MACHINE": gpu.machine,
        "GPU_ACCELERATOR": f"type={card['type']},count={card['count']}"
        f",gpu-driver-version={card['driverVersion']}",
        "GPU_NODES_MAX": str(gpu.max_nodes * environment.clusters),
        "GPU_SSD_COUNT": disk["localSSDCount"],
        "GPU_DISK_TYPE": gpu.boot_disk_type,
        "GPU_DISK_GB": str(gpu.boot_disk_gb),
    }


def _parts(key: str, value: str, pattern: str) -> dict[str, str]:
    match = re.fullmatch(pattern, value)
    if match is None or "unresolved" in value:
        raise ConfigError(
            "A value of Google's is a placeholder, or has another form.",
            value=f"{key}: {value}",
            remedy="Fill it in; kuberay/README.md says where it comes from.",
        )
    return match.groupdict()


def main(source: str, overlay: str, *groups: str) -> int:
    """Print the groups; 2 if one is not configured."""
    try:
        environments = load_environments(Path(source))
        if overlay not in environments:
            raise ConfigError("No such overlay.", value=overlay)
        for group in groups:
            for name, value in variables(group, environments[overlay]).items():
                sys.stdout.write(f"{name}={value}\n")
    except ConfigError as error:
        sys.stderr.write(f"{source}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
