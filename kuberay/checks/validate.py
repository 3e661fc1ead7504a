"""Every check of a set of manifests.

The checks cover what no cluster refuses. Fields and their types are for the API server, rights of
pods for the `restricted` namespace, and KubeRay's own rules for its operator (kuberay/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kuberay.checks import (
    autoscaler,
    caches,
    capacity,
    gateway,
    jobs,
    pods,
    redis,
    serve_config,
    timeouts,
    wiring,
)
from kuberay.checks.manifests import Document, Finding, Manifests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


CHECKS = (
    serve_config,
    autoscaler,
    capacity,
    timeouts,
    wiring,
    pods,
    gateway,
    jobs,
    redis,
    caches,
)
# What a check, or Ray in it, raises on a field of another type than the schemas allow.
_SHAPE = (AssertionError, KeyError, TypeError, AttributeError, ValueError, IndexError)


@dataclass
class Report:
    """The outcome of the checks for one set of manifests.

    Attributes:
        name: of the overlay or file.
        documents: number of objects.
        findings: mistakes and placeholders.
        facts: the nodes that Ray's autoscaler would start.
        secrets: that must exist in the namespace, with their keys.
    """

    name: str
    documents: int
    findings: list[Finding] = field(default_factory=list[Finding])
    facts: list[str] = field(default_factory=list[str])
    secrets: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def errors(self) -> list[Finding]:
        return [one for one in self.findings if not one.placeholder]

    @property
    def placeholders(self) -> list[Finding]:
        return [one for one in self.findings if one.placeholder]


def validate(manifests: Manifests, nodes: Sequence[Document] = ()) -> Report:
    """Run every check.

    Args:
        manifests: to check.
        nodes: that the largest cluster must fit; none skips that check.
    """
    report = Report(manifests.name, len(manifests.documents))
    for check in CHECKS:
        report.findings += _run(check.__name__, lambda: check.check(manifests), manifests.name)  # noqa: B023 - called at once
    if nodes:
        report.findings += _run("room", lambda: capacity.room(manifests, nodes), manifests.name)
    if not report.errors:
        report.facts = autoscaler.facts(manifests)
        report.secrets = wiring.secrets(manifests)
    return report


def _run(name: str, check: Callable[[], Iterable[Finding]], place: str) -> list[Finding]:
    try:
        return list(check())
    except _SHAPE as error:
        message = f"{name.rpartition('.')[2]} stopped at {error!r}: a field has the wrong type."
        message += " `kubectl apply --server-side --dry-run=server` names it"
        return [Finding("shape", place, message)]
