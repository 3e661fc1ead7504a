"""Model name to specification: `configs/models/*.yaml`, one visible entry per model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from deployments.contract import REQUESTS, Task, complete
from deployments.errors import ConfigError, InvalidParameter
from deployments.settings import Strict, parse_settings, resolve

FamilyName = Literal["img2img", "upscale_diffusion", "upscale_gan", "matting"]
_ALWAYS = frozenset({"output_format", "metadata"})
_DIFFUSION = _ALWAYS | {"prompt", "negative_prompt", "guidance_scale", "steps", "seed"}


@dataclass(frozen=True, slots=True)
class Family:
    """A pipeline family.

    Attributes:
        target: `module:class`, imported when a model is loaded, so that naming a model never
            imports torch.
        parameters: the request fields it reads.
        tasks: what it can serve.
        scale: output size over input size.
    """

    target: str
    parameters: frozenset[str]
    tasks: frozenset[Task]
    scale: int = 1


FAMILIES: dict[FamilyName, Family] = {
    "img2img": Family(
        "deployments.pipelines.img2img:Img2Img",
        _DIFFUSION | {"strength", "output_size"},
        frozenset({Task.ENHANCE, Task.COMIC, Task.AGED}),
    ),
    "upscale_diffusion": Family(
        "deployments.pipelines.upscale_diffusion:UpscaleDiffusion",
        _DIFFUSION | {"noise_level"},
        frozenset({Task.UPSCALE}),
        scale=4,
    ),
    "upscale_gan": Family(
        "deployments.pipelines.upscale_gan:UpscaleGan",
        _ALWAYS,
        frozenset({Task.UPSCALE}),
        scale=4,
    ),
    "matting": Family(
        "deployments.pipelines.matting:Matting",
        _ALWAYS | {"output", "color"},
        frozenset({Task.BACKGROUND}),
    ),
}


class ModelSpec(Strict):
    """One model.

    Attributes:
        name: shown to clients, in headers and metadata.
        task: the route it serves.
        family: the pipeline that runs it.
        folder: its files, absolute or from the project's root.
        summary: one line for people.
        licence: as an SPDX id or a name.
        commercial: whether the licence allows commercial use.
        dtype: of the weights on the device.
        variant: file variant to load, such as fp16.
        attention: sdpa, or xformers where that is installed.
        defaults: parameter values for fields a request leaves out.
        buckets: working sizes (width, height) in px, multiples of 64; diffusion img2img only.
        tile_px: edge of the tiles an upscaler works in.
        max_batch_size: most rows in one forward pass.
        num_gpus: share of a GPU each replica takes; 0 runs on the CPU.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")
    task: Task
    family: FamilyName
    folder: Path
    summary: str
    licence: str
    commercial: bool
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    variant: Literal["fp16"] | None = None
    attention: Literal["sdpa", "xformers"] = "sdpa"
    defaults: dict[str, Any] = Field(default={})
    buckets: tuple[tuple[int, int], ...] = ()
    tile_px: int = Field(default=256, ge=32, le=4096, multiple_of=8)
    max_batch_size: int = Field(default=4, ge=1, le=256)
    num_gpus: float = Field(default=0.0, ge=0, le=8)

    @property
    def parameters(self) -> frozenset[str]:
        """The request fields this model reads."""
        return FAMILIES[self.family].parameters

    @property
    def scale(self) -> int:
        """Output size over input size."""
        return FAMILIES[self.family].scale

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.task not in FAMILIES[self.family].tasks:
            raise ValueError(f"family {self.family} cannot serve the task {self.task}")
        if (self.family == "img2img") != bool(self.buckets):
            raise ValueError("buckets belong to family img2img, which needs at least one")
        if any(side % 64 or side <= 0 for bucket in self.buckets for side in bucket):
            raise ValueError("every bucket side must be a positive multiple of 64")
        if self.attention != "sdpa" and self.family not in ("img2img", "upscale_diffusion"):
            raise ValueError(f"family {self.family} has no attention to choose")
        check_defaults(self, self.defaults)
        return self


class _RegistryFile(Strict):
    models: list[ModelSpec]


Registry = dict[Task, ModelSpec]


def load_registry(path: Path) -> Registry:
    """The models of a YAML file, one per task.

    Raises:
        ConfigError: unreadable, an unknown key or value, a task twice or not at all.
    """
    try:
        values = yaml.safe_load(resolve(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no date
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The model registry cannot be read: {reason}.", value=path) from error
    specs = parse_settings(_RegistryFile, values, f"The model registry {path}").models
    tasks = [spec.task for spec in specs]
    if sorted(tasks) != sorted(Task):
        raise ConfigError(
            f"The model registry {path} must name each task once.",
            value=", ".join(tasks),
            remedy=f"Tasks: {', '.join(Task)}.",
        )
    return {spec.task: spec for spec in specs}


def check_defaults(spec: ModelSpec, defaults: dict[str, Any]) -> None:
    """Hold a model's default parameters to the same contract as a client's.

    Raises:
        ValueError: an unknown field, a value out of range, or a contradiction.
    """
    # The output format is settled before a model is asked.
    foreign = set(defaults) - (spec.parameters - {"output_format"})
    if foreign:
        raise ValueError(f"defaults name {sorted(foreign)}, which {spec.family} does not read")
    try:
        complete(REQUESTS[spec.task](), defaults, spec.parameters)
    except InvalidParameter as error:
        raise ValueError(f"defaults are wrong: {error}") from error
