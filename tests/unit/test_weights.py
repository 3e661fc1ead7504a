"""Weights in prompts are read as Stable Diffusion web UI reads them."""

from __future__ import annotations

import pytest

from deployments.contract import parse
from deployments.errors import InvalidParameter
from deployments.prompts import weighted_pieces
from deployments.tasks import Task


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("normal text", [("normal text", 1)]),
        ("", []),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("a ( red : .5 )", [("a ", 1), (" red ", 0.5)]),
        ("less [noise]", [("less ", 1), ("noise", 1 / 1.1)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(unclosed [and so", [("unclosed ", 1.1), ("and so", 1)]),
        (r"\(plain\) \[too\] \\", [(r"(plain) [too] \ ".rstrip(), 1)]),
        (r"a\b :) 1:2) x]", [(r"a\b :) 1:2) x]", 1)]),
        ("(a:b:2)", [("a:b", 2)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_brackets_weigh(prompt: str, pieces: list[tuple[str, float]]) -> None:
    """The last and some others are the examples in the docstring of web UI's parser."""
    found = weighted_pieces(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    "prompt", ["a (cat:11)", "(" * 30 + "cat", "(cat:-1)", "(b:" + "9" * 400 + ")"]
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_weights_out_of_range_are_refused_only_where_brackets_are_weights(
    prompt: str, name: str
) -> None:
    assert parse(Task.COMIC.request, {name: prompt})
    with pytest.raises(InvalidParameter, match=f"{name}: weights go from 0 to 10"):
        parse(Task.COMIC.request, {name: prompt, "prompt_weights": "true"})


@pytest.mark.parametrize(
    "prompt", ["(" * 1000 + ")" * 1000, "(a:1)" * 400, "[b" * 1000, "\\" * 2000]
)
def test_any_brackets_are_read(prompt: str) -> None:
    assert "".join(text for text, _ in weighted_pieces(prompt)).strip("ab\\") == ""
