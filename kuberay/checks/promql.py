"""PromQL in alerts and panels: parsed where the package promql-parser is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from deployments.errors import ConfigError
from kuberay.checks.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kuberay.checks.manifests import Manifests

CHECK = "promql"
UNCHECKED = "the alerts' expressions: pip install promql-parser"


def fault(expression: str) -> str | None:
    """What is wrong with an expression; None where nothing is, or nobody can tell."""
    if not find_spec("promql_parser"):
        return None
    import promql_parser

    try:
        promql_parser.parse(expression)
    except ValueError as error:
        return str(error)
    return None


def refuse_faults(place: str, expression: str) -> None:
    """Stop at an expression that Prometheus would refuse.

    Raises:
        ConfigError: it is no PromQL.
    """
    if reason := fault(expression):
        raise ConfigError(
            f"{place} is no PromQL: {reason}.", value=expression, remedy="Correct the expression."
        )


def check(manifests: Manifests) -> list[Finding]:
    """Every expression of rules that is no PromQL."""
    return [
        Finding(CHECK, "expression", where(one), f"{reason}: {expression}")
        for one in manifests.of("Rules")
        for expression in _expressions(one.get("spec"))
        if (reason := fault(expression))
    ]


def unchecked(manifests: Manifests) -> list[str]:
    """What `check` could not look at."""
    return [UNCHECKED] if manifests.of("Rules") and not find_spec("promql_parser") else []


def _expressions(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "expr" in node:
            yield str(node["expr"])
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from _expressions(child)
