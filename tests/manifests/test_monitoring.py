"""Alert rules and the dashboard: valid, documented, and of metrics that the code has."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import promql_parser
import pytest
import yaml

from deployments.settings import ROOT
from tests.promql import EXPRESSIONS, alerts, names, selectors

if TYPE_CHECKING:
    from collections.abc import Iterable

SOURCES = "\n".join(
    (ROOT / "deployments" / name).read_text() for name in ("telemetry.py", "model.py")
)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_is_promql(expression: str) -> None:
    promql_parser.parse(expression)


@pytest.mark.parametrize("name", sorted({n for e in EXPRESSIONS for n in names(e)}))
def test_a_metric_of_ours_is_one_that_the_code_makes(name: str) -> None:
    if not name.startswith("ray_imagen"):
        pytest.skip("Ray's own; tests/serve/test_metrics.py asks the running application")
    bare = re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix("ray_"))
    assert f'"{bare}"' in SOURCES


def test_every_metric_of_ours_is_shown_or_watched() -> None:
    made = set(re.findall(r'"(imagen_[a-z_]+)"', SOURCES))
    used = {re.sub(r"_(total|bucket|sum|count)$", "", n) for e in EXPRESSIONS for n in names(e)}
    unseen = {"imagen_store_" + n for n in ("hits", "misses", "retries", "verify_failures")}
    unseen |= {"imagen_store_fetched_bytes", "imagen_store_adopted_bytes"}
    unseen |= {"imagen_store_single_flight_wait_seconds", "imagen_model_swaps"}
    unseen |= {"imagen_compiled_artefacts"}
    assert {f"ray_{name}" for name in made - unseen} <= used


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_wrong_and_the_runbook_what_to_do(alert: dict[str, Any]) -> None:
    assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
    assert alert["labels"]["severity"] in ("page", "warn")
    assert alert["annotations"]["summary"]
    runbook = (ROOT / "kuberay/README.md").read_text(encoding="utf-8")
    assert f"| `{alert['alert']}` |" in runbook


def test_labels_of_refusals_are_those_that_replicas_give() -> None:
    codes = set(re.findall(r'code = "([a-z_]+)"', (ROOT / "deployments/errors.py").read_text()))
    for expression in EXPRESSIONS:
        for selector in selectors(expression):
            for matcher in selector.matchers.matchers:
                if matcher.name == "outcome":
                    assert set(matcher.value.split("|")) <= codes | {"ok", "gone"}


@pytest.mark.parametrize("file", ["gke/rules.yaml", "portable/prometheus-rule.yaml"])
def test_every_platform_gets_the_same_rules(file: str) -> None:
    rules = yaml.safe_load((ROOT / "kuberay" / file).read_text(encoding="utf-8"))
    given = yaml.safe_load((ROOT / "kuberay/monitoring/alerts.yaml").read_text(encoding="utf-8"))
    assert rules["spec"]["groups"] == given["groups"]


def test_the_dashboard_is_one_that_grafana_can_import() -> None:
    dashboard = json.loads((ROOT / "kuberay/monitoring/dashboard.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    corners = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(corners)) == len(corners), "panels must not lie on each other"
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert _variables(target["expr"] for p in dashboard["panels"] for target in p["targets"]) <= (
        variables
    )


def _variables(expressions: Iterable[str]) -> set[str]:
    return {name for expression in expressions for name in re.findall(r"\$(\w+)", expression)}
