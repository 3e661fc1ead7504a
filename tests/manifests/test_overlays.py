"""The committed overlays: built offline, and right in every check that needs no cluster."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from deployments.gpu.plan import plan
from deployments.registry import load_catalogue
from deployments.settings import ROOT
from kuberay.checks import autoscaler, network
from kuberay.checks.manifests import build
from kuberay.checks.timing import timeouts
from kuberay.checks.validate import validate
from tests.manifests.conftest import OVERLAYS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kuberay.checks.crd import Schemas
    from kuberay.checks.manifests import Manifests

    Overlay = Callable[[str], Manifests]


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_builds_offline_and_is_right(name: str, overlay: Overlay) -> None:
    report = validate(overlay(name), None)
    assert [str(finding) for finding in report.errors] == []
    assert (report.unchecked, report.without_crd, report.unknown) == ([], ["RayService"], [])


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_no_field_that_the_crds_lack(
    name: str, overlay: Overlay, schemas: Schemas
) -> None:
    assert schemas.knows(overlay(name).of("RayService")[0])
    assert [str(finding) for finding in schemas.check(overlay(name))] == []


def test_placeholders_are_refused_unless_allowed(
    overlay: Overlay, crds: Path, tmp_path: Path
) -> None:
    (tmp_path / "prod.yaml").write_text(yaml.safe_dump_all(overlay("prod").documents))
    command = ["kuberay", "validate", "--crds", str(crds), "--json", str(tmp_path / "prod.yaml")]
    refused = CliRunner().invoke(app, command)
    allowed = CliRunner().invoke(app, [*command, "--allow-placeholder"])
    assert (refused.exit_code, allowed.exit_code) == (1, 0)
    (report,) = json.loads(allowed.stdout)["manifests"]
    assert {one["rule"] for one in report["findings"]} == {"placeholder", "licence", "digest"}
    assert "sha256:unresolved is no real value" in refused.stdout


def test_without_crds_it_says_what_it_did_not_check(
    built: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERAY_CRDS", raising=False)
    folder = tmp_path / "kuberay"
    (folder / "overlays").mkdir(parents=True)
    for name in ("base", "overlays/dev"):
        (folder / name).symlink_to(ROOT / "kuberay" / name)
    command = ["kuberay", "validate", "--folder", str(folder)]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 3
    assert "NOT CHECKED: the fields of RayService" in told.output
    assert CliRunner().invoke(app, [*command, "--skip-crd"]).exit_code == 0


def test_the_dev_overlay_holds_no_placeholder(overlay: Overlay) -> None:
    assert validate(overlay("dev"), None).placeholders == []


def test_each_caller_outlasts_whom_it_calls(overlay: Overlay) -> None:
    manifests = overlay("prod")
    waits = timeouts(manifests, manifests.of("RayService")[0])
    assert [one.who for one in waits] == ["client", "load balancer", "Serve", "engine"]
    assert all(outer.seconds > inner.seconds for outer, inner in pairwise(waits))


def test_the_readme_tells_the_timeouts_of_prod(overlay: Overlay) -> None:
    manifests = overlay("prod")
    text = (ROOT / "kuberay" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (client|load balancer|Serve|engine) \| (\d+) s \|", text, re.M))
    found = timeouts(manifests, manifests.of("RayService")[0])
    assert rows == {one.who: f"{one.seconds:g}" for one in found}


def test_idle_no_gpu_node_runs_and_one_of_each_model_takes_what_the_plan_says(
    overlay: Overlay,
) -> None:
    manifests = overlay("prod")
    service = manifests.of("RayService")[0]
    ray = autoscaler.autoscaling_config_of(service)
    asked = autoscaler.demands(manifests.serve_config(service))
    served = load_catalogue(ROOT / "configs/models/production.yaml")
    accepted = tuple(entry.name for entry in served.entries)
    models = served.model_copy(update={"accept_noncommercial": accepted}).served().values()
    assert autoscaler.nodes(ray, []) == ({"ingress": 2}, 0)
    assert autoscaler.nodes(ray, asked) == (
        {"ingress": 2, "models": plan(list(models), "l4").gpus},
        0,
    )


def test_prod_names_the_secrets_that_must_be_there(overlay: Overlay) -> None:
    assert validate(overlay("prod"), None).secrets == {
        "imagen-oauth": ["key"],
        "imagen-ray-token": ["auth_token"],
        "imagen-redis": ["password"],
    }


def test_the_operator_is_where_network_policies_are_checked_to_let_it_in() -> None:
    text = (ROOT / "kuberay" / "operator" / "kustomization.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["namespace"] == network.OPERATOR_NAMESPACE


def test_kustomize_refusals_are_told_with_their_reason(built: object, tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nowhere.yaml]\n")
    with pytest.raises(Exception, match="kustomize refuses the overlay"):
        build(tmp_path)
