"""The names of pictures that no training run may read."""

from __future__ import annotations

from pathlib import Path

_LIST = Path(__file__).with_name("kept_out.txt")


def kept_out() -> frozenset[str]:
    """Names as `package:file`."""
    lines = _LIST.read_text(encoding="utf-8").splitlines()
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def refuse_kept_out(names: list[str]) -> None:
    """Raise ValueError if training would read a kept-out picture."""
    wrong = sorted(kept_out().intersection(names))
    if wrong:
        raise ValueError(f"Kept out of training, but given to it: {', '.join(wrong)}.")
