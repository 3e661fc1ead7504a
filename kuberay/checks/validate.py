"""Every check of a set of manifests, and what could not be checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kuberay.checks import (
    autoscaler,
    capacity,
    core,
    gke_schema,
    network,
    policy,
    rules,
    serve_schema,
    timing,
    wiring,
)
from kuberay.checks.core import is_core
from kuberay.checks.manifests import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kuberay.checks.crd import Schemas
    from kuberay.checks.manifests import Document, Manifests

_CHECKS = (
    rules,
    serve_schema,
    autoscaler,
    policy,
    wiring,
    capacity,
    timing,
    network,
    gke_schema,
)
# What a check runs into where the schemas were not there to refuse a manifest first.
_SHAPE = (KeyError, TypeError, AttributeError, ValueError, IndexError)


@dataclass
class Report:
    """What the checks say of one set of manifests.

    Attributes:
        name: of the overlay or file.
        documents: how many.
        findings: mistakes, and placeholders.
        unchecked: what no check could look at.
        without_crd: kinds of KubeRay whose fields nobody looked at, for want of a CRD.
        unknown: kinds whose schema nobody gave: a cluster looks at them when they are applied.
        facts: what Ray's autoscaler would do.
        secrets: that must be in the namespace, with their keys.
    """

    name: str
    documents: int
    findings: list[Finding] = field(default_factory=list[Finding])
    unchecked: list[str] = field(default_factory=list[str])
    without_crd: list[str] = field(default_factory=list[str])
    unknown: list[str] = field(default_factory=list[str])
    facts: list[str] = field(default_factory=list[str])
    secrets: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def errors(self) -> list[Finding]:
        return [one for one in self.findings if not one.placeholder]

    @property
    def placeholders(self) -> list[Finding]:
        return [one for one in self.findings if one.placeholder]


def validate(
    manifests: Manifests,
    schemas: Schemas | None,
    kubernetes: str = core.KUBERNETES,
    nodes: Sequence[Document] = (),
) -> Report:
    """Run every check that can be run here; whether all fits `nodes`, only if there are any."""
    report = Report(manifests.name, len(manifests.documents))
    _schemas(manifests, schemas, report)
    if find_spec("kubernetes_validate"):
        _run(core.CHECK, lambda: core.check(manifests, kubernetes), report)
    else:
        report.unchecked.append("Kubernetes' own kinds: pip install 'imagen[kuberay]'")
    if report.errors:
        # The checks below rely on the shape of what they read.
        report.unchecked.append("everything else, until the fields are right")
        return report
    for check in _CHECKS:
        _run(check.CHECK, lambda: check.check(manifests), report)  # noqa: B023 - called at once
    if nodes:
        _run(capacity.CHECK, lambda: capacity.room(manifests, nodes), report)
    if not report.errors:
        report.facts = autoscaler.facts(manifests)
        report.secrets = wiring.secrets(manifests)
    return report


def _run(name: str, check: Callable[[], list[Finding]], report: Report) -> None:
    try:
        report.findings += check()
    except _SHAPE as error:
        told = f"fields have another shape than expected: {error!r}"
        report.findings.append(Finding(name, "shape", report.name, told))


def _schemas(manifests: Manifests, schemas: Schemas | None, report: Report) -> None:
    custom = [one for one in manifests.documents if not is_core(one)]
    if schemas:
        report.findings += schemas.check(manifests)
        custom = [one for one in custom if not schemas.knows(one)]
    _run(gke_schema.CHECK, lambda: gke_schema.fields(custom), report)
    custom = [one for one in custom if not gke_schema.knows(one)]
    kinds = sorted({str(one.get("kind")) for one in custom})
    report.without_crd = [kind for kind in kinds if kind.startswith("Ray")]
    report.unknown = [kind for kind in kinds if not kind.startswith("Ray")]
