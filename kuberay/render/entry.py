"""The way in from outside, by the Gateway API: HTTPS for one host, and the route to the service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuberay.render.rayservice import SERVE_PORT, metadata

if TYPE_CHECKING:
    from kuberay.render.environment import Environment, Values

_API = "gateway.networking.k8s.io/v1"


def serve_service(environment: Environment) -> str:
    """The name of the Service that KubeRay creates for the pods that answer requests."""
    return f"{environment.name}-serve-svc"


def entry(
    environment: Environment,
    gateway_class: str,
    annotations: dict[str, str],
    listener: Values | None = None,
    rule: Values | None = None,
) -> list[Values]:
    """A Gateway and its HTTPRoute.

    Args:
        gateway_class: who implements the Gateway.
        annotations: of the Gateway.
        listener: further fields of its one listener.
        rule: further fields of the route's one rule.
    """
    host, about = environment.site.host, metadata(environment)
    https = {
        "name": "https",
        "protocol": "HTTPS",
        "port": 443,
        "hostname": host,
        "allowedRoutes": {"namespaces": {"from": "Same"}},
    }
    backend = {"name": serve_service(environment), "port": SERVE_PORT}
    specs: dict[str, Values] = {
        "Gateway": {"gatewayClassName": gateway_class, "listeners": [https | (listener or {})]},
        "HTTPRoute": {
            "parentRefs": [{"name": environment.name}],
            "hostnames": [host],
            "rules": [{"backendRefs": [backend]} | (rule or {})],
        },
    }
    abouts = {"Gateway": about | {"annotations": annotations}, "HTTPRoute": about}
    return [
        {"apiVersion": _API, "kind": kind, "metadata": abouts[kind], "spec": spec}
        for kind, spec in specs.items()
    ]
