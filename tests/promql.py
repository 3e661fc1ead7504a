"""The expressions of kuberay/monitoring, and the metrics in them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import promql_parser
import yaml

from deployments.settings import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOLDER = ROOT / "kuberay/monitoring"
_PRICE = "$price_per_gpu_hour"


def alerts() -> list[dict[str, Any]]:
    file = yaml.safe_load((_FOLDER / "alerts.yaml").read_text(encoding="utf-8"))
    return [rule for group in file["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return json.loads((_FOLDER / "dashboard.json").read_text(encoding="utf-8"))["panels"]


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """Each `name{label="value"}` of an expression."""
    return list(_selectors(promql_parser.parse(expression)))


def _selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (child := getattr(node, name, None)) is not None:
            yield from _selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from _selectors(child)


def names(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    return {selector.name for selector in selectors(expression)}


def shown(panel: dict[str, Any]) -> list[str]:
    """The expressions of a panel, with a price filled in."""
    return [target["expr"].replace(_PRICE, "1") for target in panel["targets"]]


EXPRESSIONS = [alert["expr"] for alert in alerts()] + [e for p in panels() for e in shown(p)]
