"""Pictures of the documents."""

from __future__ import annotations

import pytest

from deployments.settings import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = sorted(
    path.name for kind in ("jpg", "png", "svg") for path in ROOT.glob(f"docs/*.{kind}")
)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_kept_is_shown_somewhere(name: str) -> None:
    assert any(name in page.read_text(encoding="utf-8") for page in PAGES)
