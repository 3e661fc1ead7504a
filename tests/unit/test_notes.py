"""A note is safe wherever it is shown, and every code is explained."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from deployments.notes import Code, Note, documents, from_documents, note
from deployments.settings import ROOT


def test_every_code_is_explained_and_no_other_one() -> None:
    text = (ROOT / "docs/notes.md").read_text()
    assert re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE) == list(Code)


@given(st.text(max_size=500))
def test_whatever_a_file_says_a_note_is_one_line_of_ascii(text: str) -> None:
    made = note(Code.PROFILE_CONVERTED, f"From {text}.")
    assert made.text.isascii()
    assert made.text.isprintable()
    assert len(made.text) <= 300
    assert made.text.endswith(".")


def test_notes_come_back_from_their_documents() -> None:
    notes = (note(Code.SEED_DRAWN, "Drawn."), Note("of_a_later_version", "New."))
    assert from_documents(documents(notes)) == notes
