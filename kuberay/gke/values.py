"""Values of configs/gke.yaml for the shell scripts in this folder, one NAME=value a line.

python kuberay/gke/values.py --overlay prod service bucket gpu
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from kuberay.render.environment import load_environments
from kuberay.render.gke import COMPUTE_CLASS, compute_class

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.render.environment import Environment

    Group = Callable[[Environment], dict[str, object]]

_REPOSITORY = re.compile(
    r"(?P<location>[a-z0-9-]+)-docker\.pkg\.dev/(?P<project>.+)/(?P<name>[^/]+)/[^/]+"
)


def service(environment: Environment) -> dict[str, object]:
    """The RayService and its namespace."""
    return {"SERVICE": environment.name, "NAMESPACE": environment.namespace}


def bucket(environment: Environment) -> dict[str, object]:
    """The bucket of published models."""
    mirror = _known("site.mirror", environment.site.mirror or "")
    if not mirror.startswith("gs://"):
        raise ConfigError("There is no bucket of models.", value=mirror, remedy="Set site.mirror.")
    return {"BUCKET": mirror.removeprefix("gs://").partition("/")[0]}


def registry(environment: Environment) -> dict[str, object]:
    """The Artifact Registry repository of the images."""
    url = _known("images.imagen-cpu", environment.images["imagen-cpu"].repository)
    match = _REPOSITORY.match(url)
    if not match:
        raise ConfigError(
            "The images are not in Artifact Registry.",
            value=url,
            remedy="Write REGION-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE, or create yours by hand.",
        )
    return {f"REGISTRY_{key.upper()}": value for key, value in match.groupdict().items()}


def site(environment: Environment) -> dict[str, object]:
    """The host, its certificate map and its Cloud Armor policy."""
    values = environment.site
    return {
        "HOST": _known("site.host", values.host),
        "CERTIFICATE_MAP": _known("site.certificate_map", values.certificate_map),
        "SECURITY_POLICY": _known("site.security_policy", values.security_policy),
    }


def gpu(environment: Environment) -> dict[str, object]:
    """GPU nodes like those of kuberay/gke/compute-class.yaml."""
    if environment.gpu is None:
        raise ConfigError("This overlay has no GPU nodes.", remedy="Choose another overlay.")
    kinds = compute_class(environment, environment.gpu)["spec"]["priorities"]
    nodes = kinds[0]
    card, disk = nodes["gpu"], nodes["storage"]
    return {
        "COMPUTE_CLASS": COMPUTE_CLASS,
        "GPU_KINDS": " ".join("spot" if kind["spot"] else "on-demand" for kind in kinds),
        "GPU_MACHINE": nodes["machineType"],
        "GPU_ACCELERATOR": f"type={card['type']},count={card['count']}"
        f",gpu-driver-version={card['driverVersion']}",
        "GPU_NODES_MAX": environment.gpu.max_nodes * environment.gpu.during_upgrade,
        "GPU_SSD_COUNT": disk["localSSDCount"],
        "GPU_DISK_TYPE": disk["bootDiskType"],
        "GPU_DISK_GB": disk["bootDiskSize"],
    }


GROUPS: dict[str, Group] = {
    group.__name__: group for group in (service, bucket, registry, site, gpu)
}


def _known(key: str, value: str) -> str:
    if "unresolved" in value:
        raise ConfigError(
            "A value is still a placeholder.", value=f"{key}: {value}", remedy="Fill it in."
        )
    return value


def main() -> int:
    """Print the groups on the command line; 2 if one is not configured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=Path("configs/gke.yaml"))
    parser.add_argument("--overlay", default="prod")
    parser.add_argument("groups", nargs="+", choices=sorted(GROUPS))
    options = parser.parse_args()
    try:
        environments = load_environments(options.source)
        if options.overlay not in environments:
            raise ConfigError("No such overlay.", value=options.overlay)
        for group in options.groups:
            for name, value in GROUPS[group](environments[options.overlay]).items():
                sys.stdout.write(f"{name}={value}\n")
    except ConfigError as error:
        sys.stderr.write(f"{options.source}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
