"""Objects for clusters that are not Google's: the way in from outside, and the alerts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuberay.render.entry import entry
from kuberay.render.environment import Environment, Values, read_yaml
from kuberay.render.rayservice import metadata

if TYPE_CHECKING:
    from pathlib import Path

_CERTIFICATE = "imagen-tls"
"""The Secret into which cert-manager writes the certificate of the host."""


def gateway(environment: Environment) -> list[Values]:
    """HTTPS to the ingress pods. API keys are the only check of who may enter."""
    site = environment.site
    return entry(
        environment,
        site.gateway_class,
        {"cert-manager.io/cluster-issuer": site.issuer},
        {"tls": {"mode": "Terminate", "certificateRefs": [{"name": _CERTIFICATE}]}},
        # Each implementation has a default of its own: Envoy's is 15 s.
        {"timeouts": {"request": f"{environment.timeouts_s.load_balancer}s"}},
    )


def rules(environment: Environment, alerts: Path) -> Values:
    """The alerts, as the Prometheus operator takes them.

    Raises:
        ConfigError: the file of alerts cannot be read.
    """
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata(environment),
        "spec": read_yaml(alerts),
    }
