"""The judge of text to image: it passes pictures that show the prompt, and fails all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from starter_models import adherence
from starter_models.training import toy_drawing, toy_world
from starter_models.training.toy_world import Scene, Thing

if TYPE_CHECKING:
    from starter_models.training.data import Picture

LEFT, RIGHT = (-1, 0), (1, 0)
PROMPT = "a red star to the left of a blue ring on a green background"


def drawn(*things: Thing, background: str = "green") -> Picture:
    scene = Scene("things", PROMPT, things, background)
    return toy_drawing.draw(scene, np.random.default_rng(0)).astype(np.float32) / 255


STAR, RING = Thing("star", "red", LEFT, 3), Thing("ring", "blue", RIGHT, 3)


def test_a_picture_that_shows_its_prompt_is_right() -> None:
    assert adherence.judge(PROMPT, drawn(STAR, RING)).right


@pytest.mark.parametrize(
    ("picture", "wrong"),
    [
        (drawn(Thing("star", "pink", LEFT, 3), RING), "colours"),
        (drawn(STAR, Thing("circle", "blue", RIGHT, 3)), "shapes"),
        (drawn(STAR, RING, background="blue"), "background"),
        (drawn(STAR), "count"),
        (drawn(STAR, RING, Thing("heart", "black", (0, 0), 0)), "count"),
        (np.full((256, 256, 3), 0.5, np.float32), "count"),
    ],
)
def test_a_picture_of_something_else_is_wrong(picture: Picture, wrong: str) -> None:
    verdict = adherence.judge(PROMPT, picture)
    assert not getattr(verdict, wrong)
    assert not verdict.right


def test_things_that_have_changed_places_are_wrong() -> None:
    swapped = drawn(Thing("star", "red", RIGHT, 3), Thing("ring", "blue", LEFT, 3))
    assert not adherence.judge(PROMPT, swapped).right


def test_every_prompt_it_judges_is_kept_out_of_training_and_can_be_passed() -> None:
    rng = np.random.default_rng(0)
    scenes = toy_world.kept_out_scenes(rng, 200)
    prompts = adherence.PROMPTS.read_text(encoding="utf-8").splitlines()
    assert [scene.prompt for scene in scenes] == prompts
    assert len(set(prompts)) == 200
    for scene in scenes[::20]:
        picture = toy_drawing.draw(scene, rng).astype(np.float32) / 255
        assert adherence.judge(scene.prompt, picture).right, scene.prompt
    seen = [toy_world.training_scene(rng) for _ in range(2000)]
    assert not {scene.prompt for scene in seen} & set(prompts)


def test_a_prompt_that_it_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read"):
        adherence.judge("a cat on a mat", drawn(STAR))
