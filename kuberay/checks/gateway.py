"""The way in: HTTPS only, a route that leads to the service, and on GKE Identity-Aware Proxy.

A cluster accepts a Gateway that is open to everybody; nothing but this check refuses one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuberay.checks.manifests import Document, Finding, Manifests, where

if TYPE_CHECKING:
    from collections.abc import Iterator


_CERTIFICATES = "networking.gke.io/certmap"
_ISSUERS = {"cert-manager.io/cluster-issuer", "cert-manager.io/issuer"}
_NEEDED = {"HTTPRoute": "no request gets in"}
_NEEDED_BY_GOOGLE = {
    "GCPBackendPolicy": "the service is open to everybody",
    "HealthCheckPolicy": "Google probes `/`, which answers 404",
}


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every way in that is open, unencrypted or a dead end."""
    for gateway in manifests.of("Gateway"):
        yield from _gateway(gateway)
        google = str(gateway["spec"].get("gatewayClassName")).startswith("gke-")
        for kind, without in (_NEEDED | (_NEEDED_BY_GOOGLE if google else {})).items():
            if not manifests.of(kind):
                yield Finding("way-in", where(gateway), f"there is no {kind}: {without}")
        if not google:
            yield from _issuer(gateway, manifests)
    for policy in manifests.of("GCPBackendPolicy"):
        iap = (policy["spec"].get("default") or {}).get("iap") or {}
        if iap.get("enabled") is not True or not iap.get("clientID"):
            message = "iap is not enabled, or has no clientID: the service is open to everybody"
            yield Finding("iap", where(policy), message)
    for route in manifests.of("HTTPRoute"):
        yield from _route(route, manifests)


def _gateway(gateway: Document) -> Iterator[Finding]:
    certificates = (gateway["metadata"].get("annotations") or {}).get(_CERTIFICATES)
    for one in gateway["spec"].get("listeners") or []:
        place = where(gateway, str(one.get("name")))
        if one.get("protocol") != "HTTPS":
            message = f"{one.get('protocol')} on port {one.get('port')} sends pictures and tokens"
            yield Finding("https", place, f"{message} unencrypted")
        elif not (certificates or (one.get("tls") or {}).get("certificateRefs")):
            yield Finding("https", place, f"no certificate: set {_CERTIFICATES} or tls")


def _issuer(gateway: Document, manifests: Manifests) -> Iterator[Finding]:
    """Without an annotation cert-manager makes no certificate, and proxies open no port."""
    named = _ISSUERS & (gateway["metadata"].get("annotations") or {}).keys()
    listeners = gateway["spec"].get("listeners") or []
    refers = any((one.get("tls") or {}).get("certificateRefs") for one in listeners)
    if refers and not named and not manifests.of("Certificate"):
        message = f"nothing issues its certificate: set {min(_ISSUERS)}, or add a Certificate"
        yield Finding("issuer", where(gateway), message)


def _route(route: Document, manifests: Manifests) -> Iterator[Finding]:
    place, parents = where(route), route["spec"].get("parentRefs") or []
    listeners: list[Document] = []
    for gateway in manifests.of("Gateway"):
        names = [p.get("sectionName") for p in parents if p["name"] == gateway["metadata"]["name"]]
        for one in gateway["spec"].get("listeners") or []:
            listeners += [one] if {None, one.get("name")} & set(names) else []
    if not listeners:
        named = ["/".join(filter(None, (p.get("name"), p.get("sectionName")))) for p in parents]
        message = f"its parentRefs {named} name no listener of a Gateway: no request gets in"
        yield Finding("parent", place, message)
        return
    served = {str(one.get("hostname")) for one in listeners}
    for host in route["spec"].get("hostnames") or []:
        if not served & {host, "*." + host.partition(".")[2]}:
            message = f"{host} is not a host of the Gateway: {', '.join(sorted(served))}"
            yield Finding("host", place, message)
