"""Kubernetes quantities: `26Gi`, `500m`, `4`."""

from __future__ import annotations

import re
from decimal import Decimal

_PATTERN = re.compile(r"([+-]?[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m|k|[KMGTPE]i|[MGTPE]|e[0-9]{1,2})?")
_FACTORS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    "k": Decimal(1000),
    **{f"{unit}i": Decimal(1024**n) for n, unit in enumerate("KMGTPE", 1)},
    **{unit: Decimal(1000**n) for n, unit in enumerate("MGTPE", 2)},
}
GIB = 2**30
MIB = 2**20


def parse_quantity(text: object) -> Decimal:
    """The value of a quantity.

    Raises:
        ValueError: it is not a quantity.
    """
    found = _PATTERN.fullmatch(str(text))
    if not found or isinstance(text, bool):
        raise ValueError(f"{text!r} is not a Kubernetes quantity such as 500m or 4Gi")
    number, unit = found.groups(default="")
    factor = Decimal(10) ** int(unit[1:]) if unit.startswith("e") else _FACTORS[unit]
    return Decimal(number) * factor


def as_bytes(text: object) -> int:
    """A quantity of memory or disk, in whole bytes; raises ValueError like parse_quantity."""
    return int(parse_quantity(text))


def as_gi(amount_bytes: int) -> str:
    """A quantity in Gi, rounded up."""
    return f"{-(-amount_bytes // GIB)}Gi"
