"""Variables of the stacks before: each is named in the docs, and none is ignored in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployments.former import FORMER, Former, unheeded
from deployments.settings import ROOT, framework_caches


def test_the_docs_list_the_same_variables_with_the_same_successors() -> None:
    text = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    section = text.partition("## Environment variables")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| (.+) \|$", section, re.MULTILINE)
    assert rows == [(one.name, one.successor or "-") for one in FORMER]


@pytest.mark.parametrize("one", FORMER, ids=lambda one: one.name)
def test_a_variable_that_is_not_read_gets_one_line_with_the_remedy(one: Former) -> None:
    name, remedy = one.name, one.remedy
    [line] = unheeded({name: "/models", "PATH": "/bin"})
    assert line == f"{name} is set, and Imagen does not read it. {remedy}"
    assert remedy.endswith(".")


def test_what_is_unset_empty_or_still_read_is_not_mentioned() -> None:
    read = {"HF_TOKEN": "t", "HF_ENDPOINT": "https://hub", "GOOGLE_CLOUD_PROJECT": "p"}
    assert unheeded({"MODEL_SOURCE": "", **read}) == []


def test_caches_of_other_programs_are_left_alone_once_the_store_has_a_place() -> None:
    given = {"HF_HOME": "/h", "XDG_CACHE_HOME": "/x", "MODEL_CACHE_DIR": "/m"}
    assert len(unheeded(given)) == 3
    [line] = unheeded(given | {"IMAGEN_MODELS": "/models"})
    assert line.startswith("MODEL_CACHE_DIR ")


def test_the_shell_can_move_every_cache_that_other_programs_use() -> None:
    shared = {one.name for one in FORMER if one.shared}
    moved = framework_caches(Path("/models"))
    assert shared <= moved.keys()
    assert all(Path(moved[name]).is_relative_to("/models") for name in shared)
