"""mistakes.yaml: `imagen kuberay validate` finds each mistake, under its own rule.

kuberay/README.md ("What refuses a mistake") says who refuses the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deployments.settings import ROOT
from kuberay.checks import validate
from tests.manifests.prod import Prod
from tests.manifests.test_network import CLOSED, OPEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.checks.manifests import Manifests

    Overlay = Callable[[str], Manifests]

CHECKS = {check.__name__.rpartition(".")[2]: check for check in validate.CHECKS}
TABLE = yaml.safe_load(Path(__file__).with_name("mistakes.yaml").read_text())
MISTAKES = {name: (check, row) for check, rows in TABLE.items() for name, row in rows.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_under_its_rule(name: str, overlay: Overlay) -> None:
    check, (rule, word, part, change, *which) = MISTAKES[name]
    prod = Prod(overlay(*which or ["prod"]))
    prod.change(part, change)
    findings = [one for one in CHECKS[check].check(prod.manifests) if one.rule == rule]
    assert [one for one in findings if word in str(one)], findings


def test_every_check_finds_a_mistake() -> None:
    assert TABLE.keys() == CHECKS.keys()


def test_the_readme_counts_the_mistakes() -> None:
    text = (ROOT / "kuberay" / "README.md").read_text(encoding="utf-8")
    assert f"the {len(MISTAKES)} mistakes of `tests/manifests/mistakes.yaml`" in text
    assert f"{len(CLOSED) + len(OPEN) + 1} mistakes in network policies" in text


_OUT = {
    "to": [{"ipBlock": {"cidr": "10.0.0.3/32"}}],
    "ports": [{"protocol": "TCP", "port": 6380}],
}
RIGHT: dict[str, list[tuple[str, Any]]] = {
    "one cluster at a time, and a quota for one": [
        ("RayService", {"spec upgradeStrategy type": "None"}),
        (
            "ResourceQuota",
            {"spec hard requests.nvidia.com/gpu": "4", "spec hard requests.cpu": "35"},
        ),
    ],
    "a quota of GPUs only": [("ResourceQuota", {"spec hard": {"requests.nvidia.com/gpu": "8"}})],
    "jobs on S3": [("serve", {"applications 0 args jobs storage": "s3://bucket/jobs"})],
    "a Redis of their own for jobs, with TLS": [
        *(
            (f"{pod} ray", {"env 1 value": "rediss://:$(IMAGEN_REDIS_PASSWORD)@10.0.0.3:6380/0"})
            for pod in ("head", "ingress")
        ),
        (
            "NetworkPolicy",
            {"spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [_OUT]}},
        ),
    ],
    "a worker that always runs": [
        ("JobWorker", {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}})
    ],
    "no jobs": [
        ("serve", {"applications 0 args jobs": {"enabled": False}}),
        ("serve", {"applications 0 deployments 6": None}),
    ],
    "models in the image of the model pods": [
        ("ConfigMap", {"data IMAGEN_MIRROR": "file:///weights/store"}),
        ("serve", {"applications 0 args store mirror": "file:///weights/store"}),
    ],
    "a host below the Gateway's": [
        ("Gateway", {"spec listeners 0 hostname": "*.unresolved.example"})
    ],
    "a certificate of the listener": [
        ("Gateway", {"metadata annotations": None}),
        ("Gateway", {"spec listeners 0 tls": {"certificateRefs": [{"name": "imagen-tls"}]}}),
    ],
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_correct_variant_passes(name: str, overlay: Overlay) -> None:
    prod = Prod(overlay("prod"))
    for part, change in RIGHT[name]:
        prod.change(part, change)
    assert [str(one) for one in validate.validate(prod.manifests).errors] == []


def test_a_field_of_the_wrong_type_is_a_finding_and_no_traceback(overlay: Overlay) -> None:
    prod = Prod(overlay("dev"))
    prod.cluster["workerGroupSpecs"][0]["labels"] = ["a"]
    findings = validate.validate(prod.manifests).errors
    assert "shape" in {one.rule for one in findings}
