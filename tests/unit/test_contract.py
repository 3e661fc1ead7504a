"""Every parameter of every task is documented and bounded, and bad ones are refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.contract import (
    ImageRequest,
    UpscaleRequest,
    complete,
    describe,
    parse,
    scale_notes,
    unused_notes,
)
from deployments.errors import InvalidParameter
from deployments.tasks import Task

if TYPE_CHECKING:
    from deployments.contract import ImageRequest

STYLES = (Task.ENHANCE, Task.COMIC, Task.AGED)
DIFFUSION = (*STYLES, Task.UPSCALE)
IMG2IMG = Task.COMIC.parameters("img2img")
GAN = Task.UPSCALE.parameters("upscale_gan")
MATTING = Task.BACKGROUND.parameters("matting")
PARAMETERS = [(task, name) for task in Task for name in task.request.model_fields]


def refused(task: Task, fields: dict[str, str]) -> InvalidParameter:
    with pytest.raises(InvalidParameter) as caught:
        parse(task.request, fields)
    error = caught.value
    assert error.message
    assert error.remedy
    error.message.encode()  # neither a header nor a log may choke on it
    error.value.encode()
    return error


# Ranges


def test_a_request_without_fields_is_valid_for_every_task() -> None:
    for task in Task:
        assert parse(task.request, {}) == task.request()


@pytest.mark.parametrize("task", DIFFUSION)
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "1", 1),
        ("steps", "150", 150),
        ("guidance_scale", "1", 1.0),
        ("guidance_scale", "20", 20.0),
        ("seed", "0", 0),
        ("seed", "9223372036854775807", 2**63 - 1),
        ("seed", "-1", None),
        ("prompt", "", ""),
        ("prompt", "x" * 2000, "x" * 2000),
        ("negative_prompt", "🐈" * 2000, "🐈" * 2000),
        ("prompt", "a\tb\r\nc", "a\tb\r\nc"),
    ],
)
def test_the_edges_of_a_range_are_inside(task: Task, name: str, text: str, value: object) -> None:
    assert getattr(parse(task.request, {name: text}), name) == value


@pytest.mark.parametrize("task", DIFFUSION)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("steps", "0"),
        ("steps", "151"),
        ("steps", "-1"),
        ("steps", "1.5"),
        ("steps", ""),
        ("steps", "many"),
        ("guidance_scale", "0.999"),
        ("guidance_scale", "20.001"),
        ("guidance_scale", "-5"),
        ("seed", "-2"),
        ("seed", "9223372036854775808"),
        ("seed", "9" * 5000),
        ("seed", ""),
        ("prompt", "x" * 2001),
        ("prompt", "x" * 10_000),
        ("negative_prompt", "x" * 10_000),
    ],
)
def test_beyond_a_range_is_refused_by_name(task: Task, name: str, text: str) -> None:
    error = refused(task, {name: text})
    assert error.problems[0]["parameter"] == name
    assert error.problems[0]["value"] == (text[:80] or "nothing")
    assert error.message.startswith(f"{name}: ")
    assert describe(task.request, name) in error.remedy


@pytest.mark.parametrize("task", STYLES)
@pytest.mark.parametrize("text", ["0", "-0.1", "1.0001"])
def test_strength_beyond_its_range_is_refused(task: Task, text: str) -> None:
    assert refused(task, {"strength": text}).problems[0]["parameter"] == "strength"


@pytest.mark.parametrize("task", STYLES)
@pytest.mark.parametrize("text", ["0.0001", "1"])
def test_strength_within_its_range_is_taken(task: Task, text: str) -> None:
    assert getattr(parse(task.request, {"strength": text}), "strength") == float(text)  # noqa: B009


@pytest.mark.parametrize("text", ["-1", "351", "20.5"])
def test_a_noise_level_beyond_the_schedule_is_refused(text: str) -> None:
    error = refused(Task.UPSCALE, {"noise_level": text})
    assert error.problems[0]["parameter"] == "noise_level"
    assert "from 0 up to 350" in error.remedy


@pytest.mark.parametrize("text", ["0", "350"])
def test_the_ends_of_the_noise_schedule_are_taken(text: str) -> None:
    assert parse(Task.UPSCALE.request, {"noise_level": text}).model_dump()["noise_level"] == int(
        text
    )


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf", "Infinity", "1e999"])
@pytest.mark.parametrize("name", ["strength", "guidance_scale", "steps", "seed"])
def test_what_is_no_finite_number_is_refused(name: str, text: str) -> None:
    assert refused(Task.COMIC, {name: text}).problems[0]["parameter"] == name


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        (Task.UPSCALE, "output_format", "gif"),
        (Task.COMIC, "output_format", "PNG"),
        (Task.AGED, "metadata", "some"),
        (Task.COMIC, "output_size", "huge"),
        (Task.BACKGROUND, "output", "alpha"),
        (Task.BACKGROUND, "output_format", ""),
    ],
)
def test_a_choice_not_on_offer_is_refused_with_the_offer(task: Task, name: str, text: str) -> None:
    error = refused(task, {name: text})
    assert error.problems[0]["parameter"] == name
    assert describe(task.request, name).startswith("one of ")
    assert describe(task.request, name) in error.remedy


# Text


@pytest.mark.parametrize(
    "character", ["\ud83d\ude00 \ud83d", "\ud800", "\0", "\x07", "\x1b", "\x1f"]
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_what_is_not_text_is_refused_in_a_prompt(name: str, character: str) -> None:
    error = refused(Task.COMIC, {name: f"cat{character}dog"})
    assert error.problems[0]["parameter"] == name


def test_the_place_of_a_control_character_is_told() -> None:
    assert "character 4 is a control character" in refused(Task.AGED, {"prompt": "cat\0"}).message


@given(prompt=st.text(max_size=200))
def test_any_prompt_is_taken_as_it_is_or_refused(prompt: str) -> None:
    try:
        request = parse(Task.COMIC.request, {"prompt": prompt})
    except InvalidParameter:
        assert any(ord(c) < 32 for c in prompt)
    else:
        assert request.model_dump()["prompt"] == prompt


# Names


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("name", ["stepps", "Steps", "task", "request", "model_config"])
def test_unknown_fields_are_refused_by_name_with_the_known_ones(task: Task, name: str) -> None:
    error = refused(task, {name: "1"})
    assert error.message == f"{name} is not a parameter of {task}."
    assert all(known in error.remedy for known in task.request.model_fields)


def test_a_name_that_is_no_text_is_refused() -> None:
    refused(Task.COMIC, {"\ud800": "1"})


def test_a_parameter_of_another_task_is_unknown() -> None:
    assert "noise_level" in refused(Task.COMIC, {"noise_level": "20"}).message
    assert "strength" in refused(Task.UPSCALE, {"strength": "0.5"}).message
    assert "prompt" in refused(Task.BACKGROUND, {"prompt": "cat"}).message


def test_several_mistakes_are_all_told() -> None:
    error = refused(Task.COMIC, {"steps": "0", "strength": "2", "wat": "1"})
    assert [p["parameter"] for p in error.problems] == ["steps", "strength", "wat"]
    assert all(p["parameter"] in error.message for p in error.problems)


def test_a_name_of_any_length_gives_a_short_answer() -> None:
    assert len(refused(Task.COMIC, {"x" * 60_000: "y" * 60_000}).message) < 200


# Contradictions


@pytest.mark.parametrize(
    ("steps", "strength"),
    [
        (1, 0.999),
        (3, 0.33),
        (10, 0.09),
        (49, 1 / 49),  # 0.9999999999999999, which int() cuts to 0
    ],
)
def test_a_strength_that_leaves_no_step_is_refused(steps: int, strength: float) -> None:
    for task in STYLES:
        error = refused(task, {"steps": str(steps), "strength": repr(strength)})
        assert f"int({steps} * {strength}) is 0" in error.message


@pytest.mark.parametrize(
    ("steps", "strength"), [(1, 1.0), (2, 0.5), (10, 0.1), (10, 0.29), (100, 0.01)]
)
def test_a_strength_that_leaves_one_step_is_taken(steps: int, strength: float) -> None:
    for task in STYLES:
        parse(task.request, {"steps": str(steps), "strength": repr(strength)})


@given(steps=st.integers(1, 150), strength=st.floats(0, 1, exclude_min=True))
def test_steps_and_strength_are_judged_as_the_pipelines_count(steps: int, strength: float) -> None:
    fields = {"steps": str(steps), "strength": repr(strength)}
    if int(steps * strength) >= 1:
        parse(Task.COMIC.request, fields)
    else:
        refused(Task.COMIC, fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"color": "#000000"},
        {"color": "#000000", "output": "rgba"},
        {"color": "#000000", "output": "mask"},
        {"output_format": "jpeg"},
        {"output_format": "jpeg", "output": "rgba"},
    ],
)
def test_a_background_that_contradicts_its_output_is_refused(fields: dict[str, str]) -> None:
    assert refused(Task.BACKGROUND, fields).problems[0]["parameter"] == "request"


@pytest.mark.parametrize(
    "fields",
    [
        {"color": "#00fFa9", "output": "color"},
        {"output": "color"},
        {"output": "color", "output_format": "jpeg"},
        {"output": "mask", "output_format": "jpeg"},
        {"output": "rgba", "output_format": "webp"},
    ],
)
def test_a_background_that_fits_its_output_is_taken(fields: dict[str, str]) -> None:
    assert parse(Task.BACKGROUND.request, fields).model_dump(exclude_unset=True) == fields


@pytest.mark.parametrize(
    ("color", "digits"),
    [
        ("#fa0", "#ffaa00"),
        ("#Fa0B1c", "#Fa0B1c"),
        ("white", "#ffffff"),
        ("RebeccaPurple", "#663399"),
        ("darkslategrey", "#2f4f4f"),
    ],
)
def test_a_color_may_be_written_in_many_ways(color: str, digits: str) -> None:
    request: Any = parse(Task.BACKGROUND.request, {"output": "color", "color": color})
    assert request.color == digits


@pytest.mark.parametrize(
    "color",
    ["reddish", "#ffff", "#gggggg", "ffffff", "#ffffff\n", "#ffffffff", "rgb(1,2,3)", "", "#"],
)
def test_what_is_no_color_is_refused(color: str) -> None:
    error = refused(Task.BACKGROUND, {"output": "color", "color": color})
    assert error.problems[0]["parameter"] == "color"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (400, 300)),
        ({"scale": "2"}, (200, 150)),
        ({"scale": "3"}, (300, 225)),
        ({"width": "250"}, (250, 188)),
        ({"height": "90"}, (120, 90)),
        ({"width": "250", "height": "90"}, (120, 90)),
        ({"scale": "4", "width": "400", "height": "300"}, (400, 300)),
        ({"width": "100"}, (100, 75)),
    ],
)
def test_an_upscaled_picture_has_the_size_that_was_asked_for(
    fields: dict[str, str], expected: tuple[int, int]
) -> None:
    assert parse(Task.UPSCALE.request, fields).result_size(100, 75, 4) == expected


def test_more_than_the_model_enlarges_is_refused_with_what_would_do() -> None:
    request = parse(Task.UPSCALE.request, {"width": "401"})
    with pytest.raises(InvalidParameter, match="4 times at most") as caught:
        request.result_size(100, 75, 4)
    assert "400 x 300" in caught.value.remedy


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({"width": "99"}, "width=100"),
        ({"height": "1"}, "height=75"),
        ({"width": "400", "height": "60"}, "width=100 and height=75"),
    ],
)
def test_a_result_smaller_than_the_picture_is_refused_with_the_least_size(
    fields: dict[str, str], least: str
) -> None:
    request = parse(Task.UPSCALE.request, fields)
    with pytest.raises(InvalidParameter, match="smaller than the picture") as caught:
        request.result_size(100, 75, 4)
    assert caught.value.remedy == f"Ask for at least {least}."


def test_two_ways_to_say_a_size_contradict_each_other() -> None:
    found = refused(Task.UPSCALE, {"scale": "2", "width": "100"})
    assert found.problems[0]["parameter"] == "request"


@pytest.mark.parametrize("fields", [{"scale": "1"}, {"scale": "5"}, {"scale": "2.5"}])
def test_other_scales_are_refused(fields: dict[str, str]) -> None:
    assert refused(Task.UPSCALE, fields).problems[0]["parameter"] == "scale"


# A model's own defaults


def completed(task: Task, fields: dict[str, str], defaults: dict[str, Any]) -> dict[str, Any]:
    others = {
        Task.UPSCALE: GAN,
        Task.BACKGROUND: MATTING,
        Task.GENERATE: Task.GENERATE.parameters("text2img"),
    }
    family = others.get(task, IMG2IMG)
    return complete(parse(task.request, fields), defaults, family).model_dump()


def test_a_models_defaults_fill_what_the_client_left_out() -> None:
    request = completed(Task.COMIC, {"steps": "40"}, {"steps": 8, "prompt": "comic style"})
    assert request["steps"] == 40
    assert request["prompt"] == "comic style"
    assert request["guidance_scale"] == 5.0


def test_a_clients_empty_prompt_is_not_replaced() -> None:
    assert completed(Task.COMIC, {"prompt": ""}, {"prompt": "comic style"})["prompt"] == ""


def test_a_clients_value_that_equals_the_general_default_is_not_replaced() -> None:
    assert completed(Task.COMIC, {"steps": "30"}, {"steps": 8})["steps"] == 30


def test_steps_and_strength_are_judged_after_the_models_defaults() -> None:
    assert completed(Task.COMIC, {"strength": "0.1"}, {"steps": 10})["strength"] == 0.1
    with pytest.raises(InvalidParameter, match=r"int\(8 \* 0\.1\) is 0"):
        completed(Task.COMIC, {"strength": "0.1"}, {"steps": 8})
    with pytest.raises(InvalidParameter, match=r"int\(3 \* 0\.25\) is 0"):
        completed(Task.ENHANCE, {"steps": "3"}, {})


def test_completing_twice_changes_nothing() -> None:
    once = complete(parse(Task.COMIC.request, {"strength": "0.5"}), {"steps": 8}, IMG2IMG)
    assert complete(once, {"steps": 8}, IMG2IMG) == once


def test_jpg_is_jpeg() -> None:
    assert parse(Task.COMIC.request, {"output_format": "jpg"}).output_format == "jpeg"


@pytest.mark.parametrize(("fields", "codes"), [({"scale": "4"}, ["scale_reduced"]), ({}, [])])
def test_a_scale_beyond_the_model_is_noted_if_the_client_asked_for_it(
    fields: dict[str, str], codes: list[str]
) -> None:
    request = parse(Task.UPSCALE.request, fields)
    assert [one.code for one in scale_notes(request, (24, 16), 2)] == codes
    assert not scale_notes(request, (24, 16), 4)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"width": "96", "height": "96"}, ["96 x 64 px, not 96 x 96"]),
        ({"width": "96", "height": "64"}, []),
        ({"width": "96"}, []),
    ],
)
def test_a_size_of_another_shape_is_noted(fields: dict[str, str], told: list[str]) -> None:
    notes = scale_notes(parse(Task.UPSCALE.request, fields), (24, 16), 4)
    assert [one.text.split("has ")[1].split(":")[0] for one in notes] == told


def test_the_size_of_what_is_made_of_a_text_is_that_asked_for() -> None:
    request = parse(Task.GENERATE.request, {"prompt": "a", "width": "300", "height": "200"})
    assert not scale_notes(request, (300, 200), 1)


@pytest.mark.parametrize("name", ["prompt", "steps", "seed", "noise_level"])
def test_a_parameter_the_model_does_not_read_is_left_out_and_noted(name: str) -> None:
    request = parse(Task.UPSCALE.request, {name: "5", "output_format": "webp"})
    done = complete(request, {}, GAN)
    assert getattr(done, name) == getattr(UpscaleRequest(), name)
    assert done.output_format == "webp"
    [told] = unused_notes(request, GAN)
    assert told.code == "parameter_unused"
    assert name in told.text


@pytest.mark.parametrize("name", ["prompt", "steps", "seed", "noise_level"])
def test_a_strict_request_refuses_what_the_model_does_not_read(name: str) -> None:
    with pytest.raises(InvalidParameter, match=f"does not read {name}") as caught:
        completed(Task.UPSCALE, {name: "5", "strict": "true"}, {})
    assert caught.value.value == f"{name}=5"
    assert all(known in caught.value.remedy for known in GAN)


def test_what_every_model_reads_is_never_refused() -> None:
    for task in Task:
        request = completed(task, {"output_format": "webp", "metadata": "none"}, {})
        assert (request["output_format"], request["metadata"]) == ("webp", "none")


def test_a_models_default_color_does_not_stand_in_the_way_of_a_mask() -> None:
    defaults = {"output": "color", "color": "#112233"}
    assert completed(Task.BACKGROUND, {}, defaults)["color"] == "#112233"
    assert completed(Task.BACKGROUND, {"output": "mask"}, defaults)["output"] == "mask"
    assert completed(Task.BACKGROUND, {"output": "rgba"}, defaults)["output"] == "rgba"


def test_a_request_cannot_be_changed_once_it_is_checked() -> None:
    request: Any = parse(Task.COMIC.request, {})
    with pytest.raises(ValueError, match="frozen"):
        request.steps = 10**6


# Documentation


@pytest.mark.parametrize(("task", "name"), PARAMETERS)
def test_every_parameter_is_described_bounded_and_has_a_default(task: Task, name: str) -> None:
    schema = task.request.model_json_schema()["properties"][name]
    options = [o for o in schema.get("anyOf", [schema]) if o.get("type") != "null"]
    assert len(schema["description"]) > 10
    assert "default" in schema
    for option in options:
        low = option.keys() & {"minimum", "exclusiveMinimum"}
        bounded = low and "maximum" in option
        is_boolean = option.get("type") == "boolean"
        assert bounded or is_boolean or option.keys() & {"enum", "maxLength", "pattern"}


def test_every_parameter_with_a_dimension_names_its_unit() -> None:
    without = {"output_format", "metadata", "strict", "seed", "output", "color", "edges", "crop"}
    without |= {"long_prompt", "prompt_weights", "background", "detail", "shadow"}
    without |= {"mask", "mask_changes"}
    for task, name in PARAMETERS:
        schema = task.request.model_json_schema()["properties"][name]
        assert ("unit" in schema) != (name in without), (task, name)


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        (Task.COMIC, "steps", "integer from 1 up to 150"),
        (Task.COMIC, "strength", "number above 0.0 up to 1.0"),
        (Task.COMIC, "seed", "integer from -1 up to 9223372036854775807"),
        (Task.COMIC, "prompt", "string of at most 2000 characters"),
        (Task.COMIC, "output_format", "one of png, webp, jpeg"),
        (Task.BACKGROUND, "strict", "boolean"),
    ],
)
def test_a_parameter_is_told_in_words(task: Task, name: str, words: str) -> None:
    assert describe(task.request, name) == words


def test_every_task_has_a_request_of_its_own() -> None:
    kinds = [task.request for task in Task]
    assert len(set(kinds)) == len(Task)
    assert [kind.task for kind in kinds] == list(Task)
    assert all(issubclass(kind, ImageRequest) for kind in kinds)


# Backgrounds


@pytest.mark.parametrize(
    ("text", "value"), [("#FFF", "#FFFFFF"), ("Teal", "#008080"), ("picture", "picture")]
)
def test_a_background_is_a_colour_or_a_picture_and_opaque(text: str, value: str) -> None:
    request: Any = parse(Task.BACKGROUND.request, {"background": text, "output_format": "jpg"})
    assert request.background == value
    assert not request.needs_alpha


@pytest.mark.parametrize("fields", [{"output": "rgba"}, {"output": "mask"}, {"color": "red"}])
def test_a_background_beside_another_output_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(InvalidParameter, match="send background, or output and color"):
        parse(Task.BACKGROUND.request, {"background": "teal", **fields})


def test_a_background_goes_before_the_models_own_output_and_the_other_way_round() -> None:
    parameters = Task.BACKGROUND.parameters("matting")
    asked = parse(Task.BACKGROUND.request, {"background": "teal"})
    made: Any = complete(asked, {"output": "color", "color": "#000000"}, parameters)
    assert (made.background, made.output) == ("#008080", "rgba")
    asked = parse(Task.BACKGROUND.request, {"output": "mask"})
    made = complete(asked, {"background": "#008080"}, parameters)
    assert (made.background, made.output) == (None, "mask")
