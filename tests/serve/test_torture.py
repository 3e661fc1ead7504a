"""The torture set by HTTP, as `imagen torture` sends it: every answer is right, every loss told."""

from __future__ import annotations

from benchmarks.torture.cases import CASES
from benchmarks.torture.judge import Target, judge


def test_every_case_comes_back_right_and_says_what_it_lost(address: str) -> None:
    verdicts = list(judge(Target(address, {}), CASES))
    assert len(verdicts) == len(CASES)
    assert [(one.case.name, one.fault) for one in verdicts if one.fault] == []
    assert [one.case.name for one in verdicts if one.is_told is False] == []
