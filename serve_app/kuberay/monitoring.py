"""Alert rules and the dashboard, from the short files in kuberay/monitoring."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from deployments.errors import ConfigError
from serve_app.kuberay.cluster import metadata

if TYPE_CHECKING:
    from pathlib import Path

    from serve_app.kuberay.source import Environment, Values

ALERTS = "monitoring/alerts.yaml"
PANELS = "monitoring/panels.yaml"
DASHBOARD = "monitoring/dashboard.json"
_COLUMNS = 2
_WIDTH, _HEIGHT = 24 // _COLUMNS, 8


def rules(environment: Environment, folder: Path) -> Values:
    """The alerts, as Google's managed Prometheus takes them.

    Args:
        folder: kuberay/.

    Raises:
        ConfigError: the file cannot be read.
    """
    return {
        "apiVersion": "monitoring.googleapis.com/v1",
        "kind": "Rules",
        "metadata": metadata(environment, environment.name),
        "spec": {"groups": _read(folder / ALERTS)["groups"]},
    }


def dashboard(folder: Path) -> str:
    """The Grafana dashboard as JSON; its data source is chosen where it is imported.

    Raises:
        ConfigError: the file cannot be read.
    """
    short = _read(folder / PANELS)
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 0}
    asked = [
        {"name": name, "type": "textbox", "query": value, "current": {"value": value}}
        for name, value in short["variables"].items()
    ]
    whole = {
        "title": short["title"],
        "uid": "imagen",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source, *asked]},
        "panels": [_panel(number, panel) for number, panel in enumerate(short["panels"])],
    }
    return json.dumps(whole, indent=1) + "\n"


def _panel(number: int, short: dict[str, Any]) -> Values:
    row, column = divmod(number, _COLUMNS)
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": short["title"],
        "datasource": source,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": short["unit"], "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": source}
            for i, (legend, expr) in enumerate(short["queries"].items())
        ],
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("A file of kuberay/monitoring cannot be read.", value=error) from error
