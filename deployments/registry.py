"""What a registry file says of a model: `configs/models/*.yaml`, one visible entry per model."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from deployments.contract import complete
from deployments.errors import ConfigError, InvalidParameter
from deployments.origins import UNRESOLVED, SafePath, check_pinned, parse_hub, safe_path
from deployments.settings import Strict
from deployments.tasks import Task

PromptField: TypeAlias = Literal["prompt", "negative_prompt", "long_prompt", "prompt_weights"]
NoisePrecision: TypeAlias = Literal["float32", "model"]


def _pinned(source: str) -> str:
    scheme, _, rest = source.partition("://")
    if scheme not in ("file", "hf", "gs", "s3", "https", "http") or not rest:
        raise ValueError(f"{source!r} is not a file://, hf://, gs://, s3:// or https:// source")
    if scheme == "hf":
        try:
            if parse_hub(source)[1] != UNRESOLVED:
                check_pinned(source)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return source


def _no_task(name: str) -> str:
    if name in list(Task):
        raise ValueError(f"{name} is the name of a task, so a model needs another one")
    return name


# YAML reads a bare `off` as False.
CompileMode = Annotated[
    Literal["off", "blocks", "full"],
    BeforeValidator(lambda value: "off" if value is False else value),
]


_WITH_BUCKETS = ("img2img", "text2img")
_OF_FEW_SIZES = (*_WITH_BUCKETS, "matting")


class Origin(Strict):
    """A place some files of a model come from.

    Attributes:
        source: hf://org/repo@<commit>, https://…, gs://bucket/prefix, s3://bucket/prefix or
            file://folder. A commit that is not looked up yet is written `unresolved`.
        files: exactly these, relative to the source. The lock file has their sizes and hashes.
        into: folder of the model that they go to.
    """

    source: Annotated[str, AfterValidator(_pinned)]
    files: tuple[SafePath, ...] = Field(min_length=1)
    into: Annotated[str, AfterValidator(lambda path: path and safe_path(path))] = ""

    def target(self, path: str) -> str:
        """Where a file of this origin lies in the model's folder."""
        return f"{self.into}/{path}" if self.into else path


class Conversion(Strict):
    """How `imagen models convert` makes a model from its origin's files.

    Attributes:
        to: fp16 casts a diffusers folder's weights; safetensors reads a .pth (weights only).
        key: entry of the .pth that holds the state dict.
        config: written to config.json next to the weights.
    """

    to: Literal["fp16", "safetensors"]
    key: str | None = None
    config: dict[str, Any] = Field(default={})


class ArtefactSpec(Strict):
    """Files the store keeps, verified, for this application or for another service.

    Attributes:
        name: unique in the registry, and no task's: commands take either.
        summary: one line for people.
        licence: as an SPDX id or a name.
        commercial: whether the licence allows commercial use.
        origins: where its files come from.
        convert: what is done to them before they are served; None for nothing.
    """

    pickles: ClassVar[frozenset[str]] = frozenset({".pth", ".pt", ".ckpt", ".pkl", ".pickle"})
    """Suffixes of files that may run code when they are read."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$"), AfterValidator(_no_task)]
    summary: str
    licence: str
    commercial: bool
    origins: tuple[Origin, ...] = Field(min_length=1)
    convert: Conversion | None = None

    @property
    def family_name(self) -> str | None:
        """The pipeline family; None for an artefact of another service."""
        return None

    @property
    def file_variant(self) -> str | None:
        """The file variant, such as fp16."""
        return None

    @model_validator(mode="after")
    def _files_once(self) -> Self:
        paths = [origin.target(path).casefold() for origin in self.origins for path in origin.files]
        if len(set(paths)) != len(paths):
            raise ValueError("two origins give the same file")
        folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
        if both := sorted(folders & set(paths)):
            raise ValueError(f"{both[0]} is both a file and a folder")
        return self

    @model_validator(mode="after")
    def _no_pickles(self) -> Self:
        if self.convert and self.convert.to == "safetensors":
            return self
        for path in (path for origin in self.origins for path in origin.files):
            if PurePosixPath(path).suffix.lower() in self.pickles:
                raise ValueError(
                    f"{path} is a pickle, which may run code when it is read: name a .safetensors"
                    " file, or write `convert: {to: safetensors}`"
                )
        return self


class ModelSpec(ArtefactSpec):
    """One model, as served; its name is shown to clients, in headers and metadata.

    Attributes:
        task: the route it serves.
        family: the pipeline that runs it, a module of `deployments/pipelines`.
        dtype: of the weights on the device.
        variant: file variant to load, such as fp16.
        attention: sdpa, or xformers if that is installed.
        noise: dtype that noise is drawn in. With float32 a seed gives the same picture, up to
            rounding, whatever the dtype; model draws in the model's dtype, as stock diffusers does.
        defaults: parameter values for fields that a request leaves out.
        ignores: fields about the prompt, which change nothing with a model that draws one style.
            They are not offered, and a request that has one gets a note. The model is given their
            defaults.
        buckets: working sizes (width, height) in px, multiples of 64; of families img2img and
            text2img only. The first is that of a request which names no size.
        max_tiles: of one picture with detail=full; of family img2img only.
        times: how many times as wide and high a GAN upscaler makes a picture; None: 4.
        tile_px: edge of the tiles an upscaler works in.
        max_picture_px: width x height of a picture, at most, where the network works on all of it
            at once; None where memory does not depend on it.
        max_batch_size: most rows in one forward pass.
        num_gpus: share of a GPU each replica takes; 0 runs on the CPU.
        compile: what torch compiles before the model is ready: full, its networks; blocks, the
            blocks that a UNet repeats; off, nothing. See docs/gpu.md.
        compiled_buckets: how many of the buckets, from the first on, `compile: full` compiles. Each
            takes a minute or two, and less with a compiled artefact; the others run uncompiled.
        graphs: whether passes are recorded as CUDA graphs, which hold as much memory as the largest
            of them; without a GPU there are none.
    """

    # torch's pytorch_model.bin is a pickle. CTranslate2's model.bin, in an artefact, is not.
    pickles = ArtefactSpec.pickles | {".bin"}

    task: Task
    family: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    variant: Literal["fp16"] | None = None
    attention: Literal["sdpa", "xformers"] = "sdpa"
    noise: NoisePrecision = "float32"
    defaults: dict[str, Any] = Field(default={})
    ignores: frozenset[PromptField] = frozenset()
    buckets: tuple[tuple[int, int], ...] = ()
    max_tiles: int = Field(default=128, ge=1)
    times: int | None = Field(default=None, ge=2, le=8)
    tile_px: int = Field(default=256, ge=32, le=4096, multiple_of=8)
    max_picture_px: int | None = Field(default=None, ge=1)
    max_batch_size: int = Field(default=4, ge=1, le=256)
    num_gpus: float = Field(default=0.0, ge=0, le=8)
    compile: CompileMode = "off"
    compiled_buckets: int = Field(default=1, ge=1)
    graphs: bool = True

    @property
    def parameters(self) -> frozenset[str]:
        """The request fields this model reads."""
        return self.task.parameters(self.family) - self.ignores

    @property
    def family_name(self) -> str | None:
        return self.family

    @property
    def records_graphs(self) -> bool:
        """Whether a GPU records passes: of a family whose passes have a few usual sizes."""
        return self.graphs and self.family in _OF_FEW_SIZES

    @property
    def file_variant(self) -> str | None:
        return self.variant

    @property
    def scale(self) -> int:
        """Output size over input size."""
        return self.times or self.task.scale

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.family not in self.task.families:
            known = ", ".join(self.task.families)
            raise ValueError(
                f"family {self.family} cannot serve the task {self.task}; known: {known}"
            )
        if (self.family in _WITH_BUCKETS) != bool(self.buckets):
            known = " and ".join(_WITH_BUCKETS)
            raise ValueError(f"buckets belong to families {known}, which need at least one")
        if any(side % 64 or side <= 0 for bucket in self.buckets for side in bucket):
            raise ValueError("every bucket side must be a positive multiple of 64")
        has_prompt = "prompt" in self.task.parameters(self.family) and self.task.needs_picture
        if self.ignores and not has_prompt:
            raise ValueError(f"family {self.family} has no prompt to ignore")
        if self.attention != "sdpa" and "steps" not in self.parameters:
            raise ValueError(f"family {self.family} has no attention to choose")
        if self.compile == "blocks" and "steps" not in self.parameters:
            raise ValueError(f"family {self.family} repeats no blocks: use compile: full or off")
        if self.compile != "off" and self.family == "upscale_gan":
            raise ValueError("family upscale_gan is not compiled: leave `compile` out")
        if self.times and self.family != "upscale_gan":
            raise ValueError(f"family {self.family} has no `times` to choose")
        if self.noise != "float32" and "seed" not in self.parameters:
            raise ValueError(f"family {self.family} draws no noise")
        check_defaults(self, self.defaults)
        return self


def check_defaults(spec: ModelSpec, defaults: dict[str, Any]) -> None:
    """Check a model's default parameters like a client's.

    Raises:
        ValueError: an unknown field, a value out of range, or a contradiction.
    """
    # The output format is chosen before the model is asked.
    foreign = set(defaults) - (spec.task.parameters(spec.family) - {"output_format"})
    # The size of a result is known, and limited, before the model is asked too.
    # So are the pictures that come with it.
    if own := {"scale", "width", "height", "mask"} & set(defaults):
        raise ValueError(f"defaults name {sorted(own)}, which every client chooses for itself")
    if foreign:
        raise ValueError(f"defaults name {sorted(foreign)}, which {spec.family} does not read")
    try:
        complete(spec.task.request(), defaults, spec.parameters)
    except InvalidParameter as error:
        raise ValueError(f"defaults are wrong: {error}") from error
