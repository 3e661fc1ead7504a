"""Requests and results: one request class per task. The typed request *is* the validation."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from PIL import ImageColor
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from deployments.errors import InvalidParameter, Problem, plain
from deployments.notes import Code, Note, note
from deployments.prompts import check_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

OutputFormat = Literal["png", "webp", "jpeg"]
MOST_SEEDS = 2**63
"""Seeds are below it."""
_RANDOM_SEED = -1
"""How clients of other services ask for a random seed."""


def _printable(text: str) -> str:
    """Refuse control characters, which no tokenizer wants; pydantic refuses lone surrogates."""
    for position, character in enumerate(text):
        if ord(character) < 32 and character not in "\t\n\r":
            raise ValueError(f"character {position + 1} is a control character")
    return text


def _contradiction(fact: str, **fields: object) -> PydanticCustomError:
    """The error of fields that are in range one by one, and contradict each other."""
    found = ", ".join(f"{name}={value}" for name, value in fields.items())
    return PydanticCustomError("contradiction", "{fact}", {"fact": fact, "found": found})


def _no_random_seed(seed: int | None) -> int | None:
    return None if seed == _RANDOM_SEED else seed


def _full_name(value: object) -> object:
    return "jpeg" if value == "jpg" else value


def _six_digits(color: str) -> str:
    """A colour as #rrggbb."""
    if color.startswith("#"):
        return color if len(color) == 7 else "#" + "".join(digit * 2 for digit in color[1:])
    known = ImageColor.colormap.get(color.lower())
    if known is None:
        raise ValueError("is no CSS colour name")
    return "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(color.lower())[:3])


Prompt = Annotated[str, AfterValidator(_printable)]
_COLOR = Field(
    pattern=r"^(#[0-9a-fA-F]{3}|#[0-9a-fA-F]{6}|[A-Za-z]+)$",
    json_schema_extra={"format": "color"},
)
Color = Annotated[str, _COLOR, AfterValidator(_six_digits)]
"""Any way to write an opaque sRGB colour in CSS that fits a word; becomes #rrggbb."""


PICTURE = "picture"
"""A background, or a mask, that comes as a file of its own."""
Background = Annotated[
    str,
    _COLOR,
    AfterValidator(lambda text: text if text == PICTURE else _six_digits(text)),
]


def _none_if_empty(text: object) -> object:
    return text or None


class ImageRequest(BaseModel):
    """What every task accepts besides the picture.

    Attributes:
        task: name of the task, see `deployments.tasks.Task`.
        keeps_grey: whether the result of a grey picture is grey: the task is about no colours.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
    task: ClassVar[str]
    keeps_grey: ClassVar[bool] = False

    output_format: Annotated[OutputFormat | None, BeforeValidator(_full_name)] = Field(
        default=None,
        description="File format of the result; jpg is jpeg. Unset: by the Accept header, "
        "else PNG.",
    )
    output_compression: int | None = Field(
        default=None,
        ge=0,
        le=100,
        examples=[100],
        description="Quality of a JPEG or a WebP: 0 gives the smallest file, 100 the best picture. "
        "Unset: 92 for JPEG, 90 for WebP. A PNG loses nothing and takes 100 alone.",
        json_schema_extra={"unit": "percent"},
    )
    metadata: Literal["full", "none"] = Field(
        default="full",
        description="full: seed, parameters and model are written into the result. "
        "none: only that a model made it (IPTC's digital source type).",
    )
    strict: bool = Field(
        default=False,
        description="Whether a parameter that the model does not read is refused. "
        "Else it is ignored, and a note says so.",
    )

    @property
    def needs_alpha(self) -> bool:
        """Whether the request asks for a transparent result, which JPEG cannot hold."""
        return False

    def result_size(self, width_px: int, height_px: int, scale: int) -> tuple[int, int]:
        """Width and height of the result, before a crop.

        Args:
            width_px, height_px: of the picture; 0 without one.
            scale: side of the model's result over side of the picture.

        Raises:
            InvalidParameter: the request asks for more than the model's result has, or an upscaler
                for less than the picture has.
        """
        return width_px * scale, height_px * scale

    def canvas(self, default: tuple[int, int]) -> tuple[int, int]:
        """Width and height of what a task without a picture makes; 0 where it makes none.

        Args:
            default: of a request that names no size.
        """
        return 0, 0


class DiffusionRequest(ImageRequest):
    """What every diffusion model accepts."""

    prompt: Prompt = Field(
        default="",
        max_length=2000,
        description="What the picture should become. Models read 75 tokens, unless long_prompt "
        "says otherwise.",
        json_schema_extra={"unit": "characters"},
    )
    negative_prompt: Prompt = Field(
        default="",
        max_length=2000,
        description="What to avoid. Has an effect when guidance_scale is above 1.",
        json_schema_extra={"unit": "characters"},
    )
    long_prompt: Literal["cut", "chunk"] = Field(
        default="cut",
        description="Prompts beyond 75 tokens. cut: the rest is left out. chunk: up to 600 tokens "
        "are read in chunks of 75.",
    )
    prompt_weights: bool = Field(
        default=False,
        description="Whether brackets in prompts are weights: (word:1.3), (word) for 1.1, [word] "
        "for 1/1.1; \\( is a plain bracket.",
    )
    guidance_scale: float = Field(
        default=5.0,
        ge=1.0,
        le=20.0,
        description="How strongly the prompt steers. 1 turns guidance off and halves the work.",
        json_schema_extra={"unit": "factor"},
    )
    steps: int = Field(
        default=30,
        ge=1,
        le=150,
        description="Denoising steps. More take longer, and may look better.",
        json_schema_extra={"unit": "steps"},
    )
    seed: Annotated[int | None, AfterValidator(_no_random_seed)] = Field(
        default=None,
        ge=_RANDOM_SEED,
        le=MOST_SEEDS - 1,
        examples=[7],
        description="Same request and seed, same image; beside other requests, pixels may differ "
        "by one level of 255. Unset or -1: chosen at random and returned.",
    )

    @model_validator(mode="after")
    def _weights_in_range(self) -> Self:
        prompts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        for name, prompt in prompts.items() if self.prompt_weights else ():
            try:
                check_weights(prompt)
            except ValueError as error:
                raise _contradiction(f"{name}: {error}", prompt_weights=True) from error
        return self


class Img2ImgRequest(DiffusionRequest):
    """Diffusion that starts from a picture."""

    strength: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="How far the result may leave the picture. At 0.5, half of the steps run, "
        "rounded down.",
        json_schema_extra={"unit": "fraction of the schedule"},
    )
    detail: Literal["full", "working"] = Field(
        default="working",
        description="full: the model works on every pixel of a large picture, in overlapping "
        "tiles. working: it works on a smaller copy, which is then enlarged. A picture that fits "
        "the model is the same with both.",
    )
    output_size: Literal["input", "working"] = Field(
        default="input",
        description="input: the size that was sent. working: the size the model worked at.",
        json_schema_extra={"unit": "px"},
    )
    mask: Annotated[Literal["picture", "alpha"] | None, BeforeValidator(_none_if_empty)] = Field(
        default=None,
        description="Which part is changed; the rest stays as it is. A picture of the same size, "
        "sent as a file in this field: white is changed, black stays, grey is between. "
        "alpha: what is transparent in the picture itself is changed, and the result is opaque.",
    )
    mask_changes: Literal["white", "transparent"] = Field(
        default="white",
        description="What a mask that is a file marks for change. white: what is white in it. "
        "transparent: what is transparent in it, as for OpenAI.",
    )
    mask_feather_px: int = Field(
        default=0,
        ge=0,
        le=128,
        description="Width of a soft edge that the mask gets. It lies within the part that is "
        "changed.",
        json_schema_extra={"unit": "px"},
    )

    @model_validator(mode="after")
    def _at_least_one_step(self) -> Self:
        # Only if both are given: a model's own defaults may replace the ones above.
        both_given = {"steps", "strength"} <= self.model_fields_set
        if both_given and int(self.steps * self.strength) < 1:
            raise _contradiction(
                "int(steps * strength) must be at least 1, "
                f"but int({self.steps} * {self.strength}) is 0",
                steps=self.steps,
                strength=self.strength,
            )
        return self


class SizedRequest(ImageRequest):
    """What every upscaler accepts: the size of the result, up to that of the model's own."""

    scale: int = Field(
        default=4,
        ge=2,
        le=4,
        description="Side of the result over side of the picture, at most what the model "
        "enlarges (usually 4). Less comes from an exact area filter behind it.",
        json_schema_extra={"unit": "times"},
    )
    width: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="The result is at most so wide, in place of scale, with the picture's aspect "
        "ratio, and at least as wide as the picture. 0: by height or scale.",
        json_schema_extra={"unit": "px"},
    )
    height: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="The result is at most so high, in place of scale, with the picture's aspect "
        "ratio, and at least as high as the picture. 0: by width or scale.",
        json_schema_extra={"unit": "px"},
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.scale != 4 and (self.width or self.height):
            raise _contradiction(
                "send scale, or width and height",
                scale=self.scale,
                width=self.width,
                height=self.height,
            )
        return self

    def result_size(self, width_px: int, height_px: int, scale: int) -> tuple[int, int]:
        factors = [
            asked / side
            for asked, side in ((self.width, width_px), (self.height, height_px))
            if asked
        ]
        factor = min(factors, default=float(min(self.scale, scale)))
        if factor > scale:
            raise InvalidParameter(
                f"The model enlarges {scale} times at most.",
                value=f"width={self.width}, height={self.height} for {width_px} x {height_px} px",
                remedy=f"Ask for at most {width_px * scale} x {height_px * scale} px.",
            )
        # Shrunk, the whole enlarged picture would have to be kept until its last row has come.
        if factor < 1:
            least_px = f"width={width_px}" if self.width else f"height={height_px}"
            if self.width and self.height:
                least_px = f"width={width_px} and height={height_px}"
            raise InvalidParameter(
                "The result would be smaller than the picture.",
                value=f"width={self.width}, height={self.height} for {width_px} x {height_px} px",
                remedy=f"Ask for at least {least_px}.",
            )
        return max(round(width_px * factor), 1), max(round(height_px * factor), 1)


class UpscaleRequest(DiffusionRequest, SizedRequest):
    """Enlarge."""

    task = "upscale"
    keeps_grey = True
    noise_level: int = Field(
        default=20,
        ge=0,
        le=350,
        description="How much noise the model assumes in the picture, and smooths away.",
        json_schema_extra={"unit": "training timesteps"},
    )


class GenerateRequest(DiffusionRequest):
    """Make a picture from a text."""

    task = "generate"
    prompt: Prompt = Field(
        default="",
        max_length=2000,
        description="What the picture shows. Models read 75 tokens, unless long_prompt says "
        "otherwise.",
        examples=["a red star to the left of a blue ring"],
        json_schema_extra={"unit": "characters"},
    )
    width: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Of the result. 0: by height and the model's first size.",
        json_schema_extra={"unit": "px"},
    )
    height: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Of the result. 0: by width and the model's first size.",
        json_schema_extra={"unit": "px"},
    )

    def canvas(self, default: tuple[int, int]) -> tuple[int, int]:
        """One side alone gives the other by the default's aspect ratio."""
        width, height = default
        if self.width and self.height:
            return self.width, self.height
        if self.width:
            return self.width, max(round(self.width * height / width), 1)
        if self.height:
            return max(round(self.height * width / height), 1), self.height
        return default


class EnhanceRequest(Img2ImgRequest):
    """Clean and sharpen."""

    task = "enhance"
    keeps_grey = True
    detail: Literal["full", "working"] = Field(
        default="full",
        description="full: the model works on every pixel of a large picture, in overlapping "
        "tiles. working: it works on a smaller copy, which is then enlarged. A picture that fits "
        "the model is the same with both. Unset: full, if it can end in time, which a note tells.",
    )
    strength: float = Field(
        default=0.25,
        gt=0.0,
        le=1.0,
        description="How far the result may leave the picture. At 0.5, half of the steps run, "
        "rounded down.",
        json_schema_extra={"unit": "fraction of the schedule"},
    )


class ComicRequest(Img2ImgRequest):
    """Redraw as a comic."""

    task = "comic"


class AgedRequest(Img2ImgRequest):
    """Make old."""

    task = "aged"


class BackgroundRequest(ImageRequest):
    """Cut out the foreground."""

    task = "background"
    output: Literal["rgba", "mask", "color"] = Field(
        default="rgba",
        examples=["color"],
        description="rgba: the picture with a transparent background. mask: a grey picture, white "
        "where the foreground is. color: the foreground on a plain colour, white by default.",
    )
    color: Color = Field(
        default="#ffffff",
        examples=["#2060a0"],
        description="Background with output=color, in sRGB: #rrggbb, #rgb or a CSS colour name.",
    )
    background: Annotated[Background | None, BeforeValidator(_none_if_empty)] = Field(
        default=None,
        examples=[""],
        description="What lies below the foreground in place of transparency: a picture that is "
        "sent as a file in this field and scaled to cover the result, or a colour, as in `color`.",
    )
    edges: Literal["estimated", "original"] = Field(
        default="estimated",
        description="Colours of pixels that show foreground and background at once. estimated: "
        "those of the foreground alone. original: those of the picture, old background included.",
    )
    crop: Literal["none", "subject"] = Field(
        default="none",
        description="none: the result has the picture's size. subject: it is cut to the smallest "
        "rectangle that holds all of the foreground.",
    )
    shadow: Literal["none", "soft"] = Field(
        default="none",
        description="none: nothing but the foreground. soft: a blurred shadow falls below it.",
    )

    @property
    def needs_alpha(self) -> bool:
        return self.output == "rgba" and self.background is None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.background is not None and self.model_fields_set & {"output", "color"}:
            raise _contradiction(
                "send background, or output and color",
                background=self.background,
                output=self.output,
                color=self.color,
            )
        if "color" in self.model_fields_set and self.output != "color":
            raise _contradiction("color needs output=color", output=self.output, color=self.color)
        if self.needs_alpha and self.output_format == "jpeg":
            raise _contradiction(
                "jpeg has no transparency; use png or webp, output=color or background",
                output=self.output,
                output_format=self.output_format,
            )
        return self


R = TypeVar("R", bound=ImageRequest)
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ImageJob:
    """What travels to a model replica. It carries the file rather than pixels.

    Attributes:
        request: validated. Fields that the client did not set get the model's defaults later.
        image: the uploaded file; None where the task needs no picture.
        output_format: of the result.
        timeout_s: seconds from sending to the request's deadline.
        whole_s: that such a request has in all, its upload too; 0 for `timeout_s`.
        request_id: for the log; clients choose it.
        job_id: of a job that is kept; empty for another request. A job runs once at a time.
        width_px, height_px: of the picture in the file, upright; without one, of what is made.
        sent_unix_s: when it was sent, on the clock of `time.time`; 0 if unknown.
        n: results, of seeds that follow one another; above 1 only for models that use chance.
        preview: whether `ModelDeployment.stream` shows small pictures of the steps.
        notes: of what was chosen before the model got it.
        background: the file to lay below the result, where the request says `background=picture`.
        background_px: width x height of its picture; 0 without one.
        mask: the file that says what is changed, where the request says `mask=picture`; of the
            picture's size.
    """

    request: ImageRequest
    image: bytes | None
    output_format: OutputFormat
    timeout_s: float
    whole_s: float = 0.0
    request_id: str = ""
    job_id: str = ""
    width_px: int = 0
    height_px: int = 0
    sent_unix_s: float = 0.0
    n: int = 1
    preview: bool = False
    notes: tuple[Note, ...] = ()
    background: bytes | None = None
    background_px: int = 0
    mask: bytes | None = None

    @property
    def limit_s(self) -> float:
        """Seconds that such a request may take at most."""
        return max(self.whole_s, self.timeout_s)

    def left_s(self, now_unix_s: float) -> float:
        """Seconds until the deadline, without the time that the request waited for a replica.

        The sender gives up at the deadline. A wait that is longer comes from clocks that differ,
        and is ignored.
        """
        waited_s = now_unix_s - self.sent_unix_s
        return self.timeout_s - waited_s if 0 <= waited_s < self.timeout_s else self.timeout_s


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What travels back.

    Attributes:
        image: the encoded file.
        media_type: as in `image/png`.
        width_px, height_px: of the result.
        model: name@digest.
        seed: None if the model draws nothing at random.
        batch_size: mean number of rows in the passes that carried this one.
        gpu_seconds: share of the pass, times the share of the GPU; 0 without a GPU.
        determinism: exact if the bits depend on the request alone; bounded if rows that share its
            passes may change them, within the bounds of docs/engine.md.
        timings_s: seconds by stage: decode, queue, denoise, vae, encode.
        notes: what was lost or chosen on the way.
    """

    image: bytes
    media_type: str
    width_px: int
    height_px: int
    model: str
    seed: int | None
    batch_size: int
    gpu_seconds: float
    determinism: Literal["exact", "bounded"] = "bounded"
    timings_s: dict[str, float] = field(default_factory=dict[str, float])
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a request is, which `ModelDeployment.stream` tells before the results.

    Attributes:
        steps_done, steps: passes of all its rows; 0 until they have begun.
        left_s: estimate of the seconds until its end; None if unknown.
        preview: a small JPEG; None where there is none.
    """

    steps_done: int
    steps: int
    left_s: float | None = None
    preview: bytes | None = None


WHOLE = "request"
"""The parameter of a problem that is about several."""
_JOINT = ("steps", "strength")


def parse(kind: type[R], fields: Mapping[str, object]) -> R:
    """A request from form fields.

    Args:
        kind: the request class of the task.
        fields: by name; text as a form has it, or already typed.

    Raises:
        InvalidParameter: naming every unknown, malformed or out-of-range field.
    """
    return validated(kind, fields, kind.task)


def unused(request: ImageRequest, parameters: frozenset[str]) -> dict[str, Any]:
    """Fields that the client set and the model does not read.

    Args:
        request: as the client sent it.
        parameters: the fields that the model reads.
    """
    given = request.model_dump(exclude_unset=True)
    return {name: value for name, value in given.items() if name not in parameters}


def check_used(request: ImageRequest, parameters: frozenset[str]) -> None:
    """Refuse fields that the client set and the model does not read, if the request is strict.

    Raises:
        InvalidParameter: naming them.
    """
    fields = unused(request, parameters)
    if fields and request.strict:
        raise InvalidParameter(
            f"The model behind {request.task} does not read {', '.join(fields)}.",
            value=", ".join(f"{name}={value}" for name, value in fields.items()),
            remedy=f"Leave it out. This model reads: {', '.join(sorted(parameters))}.",
        )


def unused_notes(request: ImageRequest, parameters: frozenset[str]) -> tuple[Note, ...]:
    """A note for each field that the client set and the model does not read."""
    return tuple(
        note(Code.PARAMETER_UNUSED, f"The model behind {request.task} does not read {name}.")
        for name in unused(request, parameters)
    )


def scale_notes(request: ImageRequest, picture_px: tuple[int, int], most: int) -> tuple[Note, ...]:
    """A note if the result is smaller than the client asked for.

    Args:
        request: as the client sent it.
        picture_px: width and height of the picture.
        most: times that the model enlarges.
    """
    if "scale" in request.model_fields_set and getattr(request, "scale", most) > most:
        told = f"The model enlarges {most} times, which is the scale of the result."
        return (note(Code.SCALE_REDUCED, told),)
    asked = getattr(request, "width", 0), getattr(request, "height", 0)
    given = request.result_size(*picture_px, most)
    if not all(asked) or given == asked:
        return ()
    told = "The result has {} x {} px, not {} x {}: it keeps the picture's aspect ratio."
    return (note(Code.SCALE_REDUCED, told.format(*given, *asked)),)


def draw_seed() -> tuple[int, Note]:
    """A seed for a request without one, and the note that says so."""
    told = "No seed was sent; one was drawn at random, which the result states."
    return secrets.randbits(32), note(Code.SEED_DRAWN, told)


def complete(request: R, defaults: Mapping[str, Any], parameters: frozenset[str]) -> R:
    """The request with the model's own defaults in the fields that the client left out.

    Args:
        request: as the client sent it.
        defaults: the model's.
        parameters: the fields this model reads.

    Raises:
        InvalidParameter: a strict request has a field this model does not read, or the result is
            inconsistent, such as `int(steps * strength) == 0`.
    """
    check_used(request, parameters)
    given = request.model_dump(exclude_unset=True, include=set(parameters))
    # These are validated together, so both are given even if the client set neither.
    joint = {name: getattr(request, name) for name in _JOINT if name in parameters}
    # A default color belongs to output=color. It must not contradict another output of the client.
    dropped = {"color"} if given.get("output", "color") != "color" else set[str]()
    # And neither may contradict a background of the client.
    dropped |= {"output", "color"} if given.get("background") is not None else set()
    dropped |= {"background"} if given.keys() & {"output", "color"} else set()
    kept = {name: value for name, value in defaults.items() if name not in dropped}
    return validated(type(request), {**joint, **kept, **given}, request.task)


def validated(kind: type[M], fields: Mapping[str, object], whose: str) -> M:
    """Fields as typed values.

    Args:
        kind: the class that has them.
        fields: by name; text as a form has it, or already typed.
        whose: what has these parameters, for the error.

    Raises:
        InvalidParameter: naming every unknown, malformed or out-of-range field.
    """
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        problems = tuple(_problem(kind, detail, whose) for detail in error.errors())
    first = problems[0]
    raise InvalidParameter(
        " ".join(p["fact"] for p in problems),
        value=first["value"],
        remedy=first["remedy"],
        problems=problems,
    )


def _problem(kind: type[BaseModel], detail: ErrorDetails, whose: str) -> Problem:
    name = str(detail["loc"][0]) if detail["loc"] else WHOLE
    name = plain(name, 100)
    shown: object = detail["input"]
    if detail["type"] == "extra_forbidden":
        fact = f"{name} is not a parameter of {whose}."
        remedy = f"Parameters of {whose}: {', '.join(kind.model_fields)}."
    elif not detail["loc"]:
        fact, remedy = f"{detail['msg']}.", "Change one of them."
        shown = detail.get("ctx", {}).get("found", shown)
    else:
        fact = f"{name}: {detail['msg'].removeprefix('Value error, ')}."
        remedy = f"Send {name} as {describe(kind, name)}."
    if not isinstance(shown, str):
        shown = json.dumps(shown, default=str, ensure_ascii=False)
    return Problem(parameter=name, fact=fact, value=plain(shown, 80) or "nothing", remedy=remedy)


def describe(kind: type[BaseModel], name: str) -> str:
    """A parameter's type and range in words, such as "integer from 1 up to 150"."""
    schema = kind.model_json_schema()["properties"][name]
    options = [o for o in schema.get("anyOf", [schema]) if o.get("type") != "null"]
    option = options[0]
    if "enum" in option:
        return "one of " + ", ".join(option["enum"])
    words = [str(option["type"])]
    if "minimum" in option:
        words.append(f"from {option['minimum']}")
    if "exclusiveMinimum" in option:
        words.append(f"above {option['exclusiveMinimum']}")
    if "maximum" in option:
        words.append(f"up to {option['maximum']}")
    if "maxLength" in option:
        words.append(f"of at most {option['maxLength']} characters")
    if "pattern" in option:
        words.append(f"matching {option['pattern']}")
    return " ".join(words)
