"""Label selectors, as Kubernetes reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kuberay.checks.manifests import Document


def matches(selector: Document, labels: Mapping[str, str]) -> bool:
    """Whether a selector selects what has these labels; an empty one selects everything."""
    exact = (selector.get("matchLabels") or {}).items() <= labels.items()
    return exact and all(
        _holds(one, labels.get(one["key"])) for one in selector.get("matchExpressions") or []
    )


def _holds(expression: Document, value: str | None) -> bool:
    values: list[Any] = expression.get("values") or []
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None
