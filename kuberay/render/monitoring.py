"""Alert rules for Google, and the Grafana dashboard, from the short files in kuberay/monitoring."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import Field

from deployments.errors import ConfigError
from deployments.settings import Strict, parse_settings
from kuberay.render.rayservice import metadata

if TYPE_CHECKING:
    from pathlib import Path

    from kuberay.render.environment import Environment, Values

ALERTS = "monitoring/alerts.yaml"
PANELS = "monitoring/panels.yaml"
DASHBOARD = "monitoring/dashboard.json"
_COLUMNS = 2
_WIDTH, _HEIGHT = 24 // _COLUMNS, 8


class Alert(Strict):
    """A rule, in Prometheus' words."""

    alert: str
    expr: str
    for_: str = Field(alias="for")
    labels: dict[str, str]
    annotations: dict[str, str]


class Group(Strict):
    """Alerts that are evaluated together."""

    name: str
    interval: str
    rules: list[Alert] = Field(min_length=1)


class Alerts(Strict):
    """kuberay/monitoring/alerts.yaml."""

    groups: list[Group] = Field(min_length=1)


class Panel(Strict):
    """A chart.

    Attributes:
        unit: in Grafana's words.
        queries: expressions by their legend.
        only_on_gpu: without a GPU it stays empty.
    """

    title: str
    unit: str
    queries: dict[str, str] = Field(min_length=1, max_length=26)  # Grafana names them by letters
    only_on_gpu: bool = False


class Panels(Strict):
    """kuberay/monitoring/panels.yaml.

    Attributes:
        variables: that readers may set, with their defaults.
    """

    title: str
    panels: list[Panel] = Field(min_length=1)
    variables: dict[str, str] = Field(default={})


S = TypeVar("S", bound=Strict)


def rules(environment: Environment, folder: Path) -> Values:
    """The alerts, as Google's managed Prometheus takes them.

    Args:
        environment: whose namespace they are for.
        folder: kuberay/.

    Raises:
        ConfigError: the file cannot be read, or an expression is not PromQL.
    """
    alerts = _read(folder / ALERTS, Alerts)
    for one in (alert for group in alerts.groups for alert in group.rules):
        _check_promql(f"The alert {one.alert}", one.expr)
    return {
        "apiVersion": "monitoring.googleapis.com/v1",
        "kind": "Rules",
        "metadata": metadata(environment),
        "spec": {"groups": [group.model_dump(by_alias=True) for group in alerts.groups]},
    }


def dashboard(folder: Path) -> str:
    """The dashboard as JSON. Grafana asks for the data source when it is imported.

    Args:
        folder: kuberay/.

    Raises:
        ConfigError: the file cannot be read, or an expression is not PromQL.
    """
    short = _read(folder / PANELS, Panels)
    for panel in short.panels:
        for expression in panel.queries.values():
            # An unknown variable stays, and is not PromQL.
            filled = re.sub(r"\$(\w+)", lambda m: short.variables.get(m[1], m[0]), expression)
            _check_promql(f"A query of the panel {panel.title}", filled)
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 0}
    variables = [
        {"name": name, "type": "textbox", "query": value, "current": {"value": value}}
        for name, value in short.variables.items()
    ]
    whole = {
        "title": short.title,
        "uid": "imagen",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source, *variables]},
        "panels": [_panel(number, panel) for number, panel in enumerate(short.panels)],
    }
    return json.dumps(whole, indent=1) + "\n"


def _panel(number: int, short: Panel) -> Values:
    row, column = divmod(number, _COLUMNS)
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": short.title,
        "datasource": source,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": short.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": source}
            for i, (legend, expr) in enumerate(short.queries.items())
        ],
    }


def _check_promql(place: str, expression: str) -> None:
    """Parse an expression, if the optional package promql-parser is installed."""
    if not find_spec("promql_parser"):
        return
    import promql_parser

    try:
        promql_parser.parse(expression)
    except ValueError as error:
        raise ConfigError(
            f"{place} is not PromQL: {error}.", value=expression, remedy="Correct the expression."
        ) from error


def _read(path: Path, kind: type[S]) -> S:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "A file in kuberay/monitoring cannot be read.",
            value=f"{path}: {str(error).splitlines()[0]}",
            remedy="Restore it, or correct its YAML.",
        ) from error
    return parse_settings(kind, values, str(path))
