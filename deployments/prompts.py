"""Weights inside a prompt, in the syntax of Stable Diffusion web UI (AUTOMATIC1111)."""

from __future__ import annotations

import re
from itertools import groupby
from typing import NamedTuple

MOST_WEIGHT = 10.0
"""Of any word, brackets around brackets multiplied."""
_STEP = 1.1
"""What a pair of brackets without a number multiplies or divides by."""
_MARKS = re.compile(
    r"(?P<literal>\\[()\[\]\\])"
    r"|:\s*(?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
)


class Piece(NamedTuple):
    """A part of a prompt.

    Attributes:
        text: without the marks.
        weight: 1 where nothing else was asked for.
    """

    text: str
    weight: float


def weighted_pieces(prompt: str) -> list[Piece]:
    r"""The parts of a prompt with their weights.

    `(word:1.3)` weighs 1.3, `(word)` weighs 1.1 and `[word]` 1 / 1.1. Brackets inside brackets
    multiply. Brackets that nobody closes reach to the end. A backslash before `( ) [ ] \` makes it
    a plain character, and so is a closing bracket that closes nothing.
    """
    found = _Found([], [], {"(": [], "[": []})
    end = 0
    for mark in _MARKS.finditer(prompt):
        found.add(prompt[end : mark.start()])
        found.read(mark)
        end = mark.end()
    found.add(prompt[end:])
    for bracket, starts in found.open_at.items():
        for start in starts:
            found.multiply(start, _factor(bracket))
    return found.pieces()


def check_weights(prompt: str) -> None:
    """Whether every weight of a prompt is in range.

    Raises:
        ValueError: naming the first that is not.
    """
    for text, weight in weighted_pieces(prompt):
        if not 0 <= weight <= MOST_WEIGHT:
            shown = text.strip()[:20]
            raise ValueError(
                f"weights go from 0 to {MOST_WEIGHT:g}, and '{shown}' weighs {weight:g}"
            )


class _Found(NamedTuple):
    """What was read of a prompt.

    Attributes:
        texts, weights: of its pieces.
        open_at: the pieces at which brackets were opened, the latest last.
    """

    texts: list[str]
    weights: list[float]
    open_at: dict[str, list[int]]

    def add(self, text: str) -> None:
        if text:
            self.texts.append(text)
            self.weights.append(1.0)

    def read(self, mark: re.Match[str]) -> None:
        text, number, bracket = mark[0], mark["number"], mark["bracket"]
        opening = "[" if bracket == "]" else "("
        if mark["literal"]:
            self.add(text[1:])
        elif bracket in self.open_at:
            self.open_at[bracket].append(len(self.texts))
        elif self.open_at[opening]:
            factor = float(number) if number else _factor(opening)
            self.multiply(self.open_at[opening].pop(), factor)
        else:
            self.add(text)

    def multiply(self, start: int, factor: float) -> None:
        for i in range(start, len(self.weights)):
            self.weights[i] *= factor

    def pieces(self) -> list[Piece]:
        """Neighbours of one weight as one, because a tokenizer sees more in a whole text."""
        alike = groupby(zip(self.texts, self.weights, strict=True), key=lambda one: one[1])
        return [Piece("".join(text for text, _ in group), weight) for weight, group in alike]


def _factor(opening: str) -> float:
    return _STEP if opening == "(" else 1 / _STEP
