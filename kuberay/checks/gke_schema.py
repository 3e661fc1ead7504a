"""Google's kinds, whose schemas no package brings along: the fields we use, and how they agree.

With a CustomResourceDefinition of a kind at hand, that says which fields there are.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from kuberay.checks.crd import deviations, strict_validator
from kuberay.checks.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kuberay.checks.manifests import Document, Manifests

CHECK = "gke"
_DNS_NAME = re.compile(r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]*[a-z0-9])?")
_LONGEST_NAME = 253
_CERTIFICATES = "networking.gke.io/certmap"
_TYPES = {str: "string", int: "integer", bool: "boolean", float: "number"}
_DURATION = re.compile("^([0-9]+(ms|[smhdwy]))+$")
# A list stands for any number of its one item, a set for a choice, {} for whatever there is.
_TARGET = {"group": str, "kind": {"Service", "ServiceImport"}, "name": str, "namespace": str}
_SELECTOR: Document = {"matchLabels": {}, "matchExpressions": [{}]}
_HTTP = {
    "portSpecification": {"USE_FIXED_PORT", "USE_NAMED_PORT", "USE_SERVING_PORT"},
    "port": int,
    "portName": str,
    "host": str,
    "requestPath": str,
    "response": str,
    "proxyHeader": str,
}
_KINDS: dict[str, tuple[str, Document]] = {
    "Gateway": (
        "gateway.networking.k8s.io/v1",
        {
            "gatewayClassName": str,
            "addresses": [{"type": str, "value": str}],
            "infrastructure": {},
            "listeners": [
                {
                    "name": str,
                    "protocol": {"HTTP", "HTTPS"},
                    "port": int,
                    "hostname": str,
                    "allowedRoutes": {
                        "namespaces": {"from": {"All", "Same", "Selector"}, "selector": _SELECTOR},
                        "kinds": [{"group": str, "kind": str}],
                    },
                    "tls": {"mode": {"Terminate"}, "certificateRefs": [{}], "options": {}},
                }
            ],
        },
    ),
    "HTTPRoute": (
        "gateway.networking.k8s.io/v1",
        {
            "parentRefs": [
                {
                    "group": str,
                    "kind": str,
                    "namespace": str,
                    "name": str,
                    "sectionName": str,
                    "port": int,
                }
            ],
            "hostnames": [str],
            "rules": [
                {
                    "name": str,
                    "matches": [{}],
                    "filters": [{}],
                    "timeouts": {"request": str, "backendRequest": str},
                    "backendRefs": [_TARGET | {"port": int, "weight": int, "filters": [{}]}],
                }
            ],
        },
    ),
    "HealthCheckPolicy": (
        "networking.gke.io/v1",
        {
            "targetRef": _TARGET,
            "default": {
                "checkIntervalSec": int,
                "timeoutSec": int,
                "healthyThreshold": int,
                "unhealthyThreshold": int,
                "logConfig": {"enabled": bool},
                "config": {"type": {"HTTP"}, "httpHealthCheck": _HTTP},
            },
        },
    ),
    "GCPBackendPolicy": (
        "networking.gke.io/v1",
        {
            "targetRef": _TARGET,
            "default": {
                "timeoutSec": int,
                "connectionDraining": {"drainingTimeoutSec": int},
                "securityPolicy": str,
                "iap": {"enabled": bool, "clientID": str, "oauth2ClientSecret": {"name": str}},
                "logging": {"enabled": bool, "sampleRate": int},
                "sessionAffinity": {"type": str, "cookieTtlSec": int},
                "maxRatePerEndpoint": int,
            },
        },
    ),
    "ComputeClass": (
        "cloud.google.com/v1",
        {
            "description": str,
            "nodePoolAutoCreation": {"enabled": bool},
            "nodePoolConfig": {
                "imageStreaming": {"enabled": bool},
                "imageType": str,
                "serviceAccount": str,
                "nodeLabels": {},
                "taints": [{"key": str, "value": str, "effect": str}],
                "autoRepair": bool,
                "autoUpgrade": bool,
                "confidentialNodeType": str,
            },
            "whenUnsatisfiable": {"DoNotScaleUp", "ScaleUpAnyway"},
            "autoscalingPolicy": {
                "consolidationDelayMinutes": int,
                "consolidationThreshold": int,
                "gpuConsolidationThreshold": int,
            },
            "activeMigration": {"optimizeRulePriority": bool},
            "priorityDefaults": {},
            "priorities": [
                {
                    "nodepools": [str],
                    "machineType": str,
                    "machineFamily": str,
                    "minCores": int,
                    "minMemoryGb": int,
                    "maxRunDurationSeconds": int,
                    "spot": bool,
                    "location": {"zones": [str]},
                    "reservations": {},
                    "gpu": {"type": str, "count": int, "driverVersion": str},
                    "storage": {
                        "localSSDCount": int,
                        "bootDiskType": str,
                        "bootDiskSize": int,
                        "bootDiskKMSKey": str,
                        "secondaryBootDisks": [{"diskImageName": str, "project": str, "mode": str}],
                    },
                }
            ],
        },
    ),
    "PodMonitoring": (
        "monitoring.googleapis.com/v1",
        {
            "selector": _SELECTOR,
            "endpoints": [
                {
                    "port": str,
                    "interval": _DURATION,
                    "timeout": _DURATION,
                    "path": str,
                    "scheme": {"http", "https"},
                    "params": {},
                    "metricRelabeling": [{}],
                }
            ],
            "targetLabels": {"fromPod": [{"from": str, "to": str}], "metadata": [str]},
            "limits": {},
            "filterRunning": bool,
        },
    ),
    "Rules": (
        "monitoring.googleapis.com/v1",
        {
            "groups": [
                {
                    "name": str,
                    "interval": _DURATION,
                    "rules": [
                        {
                            "alert": str,
                            "record": str,
                            "expr": str,
                            "for": _DURATION,
                            "labels": {},
                            "annotations": {},
                        }
                    ],
                }
            ]
        },
    ),
}
Told = tuple[str, str, str]
"""Rule, place and message."""


def knows(document: Document) -> bool:
    """Whether the kind is one of those here."""
    return document.get("kind") in _KINDS


def fields(documents: list[Document]) -> list[Finding]:
    """Fields that these documents have and their kinds, as far as they are known here, have not."""
    return [one for document in documents if knows(document) for one in _fields(document)]


def _fields(document: Document) -> list[Finding]:
    kind = document["kind"]
    version = _KINDS[kind][0]
    if document["apiVersion"] != version:
        told = f"its fields are checked as of {version}, not {document['apiVersion']}"
        return [Finding(CHECK, "api-version", where(document), told)]
    return deviations(CHECK, _validator(kind), document)


@cache
def _validator(kind: str) -> Any:
    schema = _schema({"spec": _KINDS[kind][1]})
    return strict_validator(schema | {"required": ["spec"]})


def _schema(shape: Any) -> Document:
    match shape:
        case dict() if shape:
            properties = {key: _schema(value) for key, value in shape.items()}
            return {"type": "object", "properties": properties}
        case dict():
            return {"type": "object"}
        case list():
            return {"type": "array", "items": _schema(shape[0])}
        case set():
            return {"type": "string", "enum": sorted(shape)}
        case re.Pattern():
            return {"type": "string", "pattern": shape.pattern}
        case _:
            return {"type": _TYPES[shape]}


def check(manifests: Manifests) -> list[Finding]:
    """The way in: one host, HTTPS alone, and nobody past Identity-Aware Proxy."""
    told = [one for entry in manifests.of("Gateway") for one in _gateway(entry, manifests)]
    told += [one for route in manifests.of("HTTPRoute") for one in _route(route, manifests)]
    told += _proxy(manifests)
    return [Finding(CHECK, rule, place, message) for rule, place, message in told]


def _proxy(manifests: Manifests) -> Iterator[Told]:
    for policy in manifests.of("GCPBackendPolicy"):
        iap = (policy["spec"].get("default") or {}).get("iap") or {}
        if iap.get("enabled") is not True or not iap.get("clientID"):
            told = "iap is not enabled, or has no clientID: the service is open to everybody"
            yield "iap", where(policy), told


def _gateway(entry: Document, manifests: Manifests) -> Iterator[Told]:
    place = where(entry)
    for kind, without in (
        ("GCPBackendPolicy", "it is open to everybody"),
        ("HealthCheckPolicy", "Google asks `/`, which is a 404"),
        ("HTTPRoute", "it leads nowhere"),
    ):
        if not manifests.of(kind):
            yield "way-in", place, f"there is no {kind}: {without}"
    annotations = entry["metadata"].get("annotations") or {}
    for one in entry["spec"].get("listeners") or []:
        name = f"{place} {one.get('name')}"
        if one.get("protocol") != "HTTPS":
            told = f"{one.get('protocol')} on {one.get('port')}: pictures and tokens in the clear"
            yield "https", name, told
        elif not (annotations.get(_CERTIFICATES) or (one.get("tls") or {}).get("certificateRefs")):
            yield "https", name, f"no certificate: neither {_CERTIFICATES} nor tls"
        host = str(one.get("hostname", ""))
        if len(host) > _LONGEST_NAME or not _DNS_NAME.fullmatch(host):
            yield "host", name, f"{host!r} is no DNS name, such as images.example.com"


def _route(route: Document, manifests: Manifests) -> Iterator[Told]:
    place, spec = where(route), route["spec"]
    entries = {one["metadata"]["name"]: one["spec"] for one in manifests.of("Gateway")}
    listeners: list[Document] = []
    for parent in spec.get("parentRefs") or []:
        own = entries.get(parent.get("name"), {}).get("listeners") or []
        section = parent.get("sectionName")
        listeners += (meant := [one for one in own if section in (None, one.get("name"))])
        if not meant:
            named = "/".join(str(part) for part in (parent.get("name"), section) if part)
            yield "parent", place, f"no Gateway has the listener {named}: nothing gets here"
    if not spec.get("parentRefs"):
        yield "parent", place, "it has no parentRefs: nothing gets here"
    served = {str(one.get("hostname")) for one in listeners}
    for host in spec.get("hostnames") or []:
        if listeners and not served & {host, "*." + host.partition(".")[2]}:
            yield "host", place, f"{host} is none of the Gateway's: {', '.join(sorted(served))}"
