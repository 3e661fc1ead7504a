"""Typed settings: the `args` of a Serve config file. The only reader and writer of os.environ."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.errors import ConfigError

S = TypeVar("S", bound=BaseModel)
ROOT = Path(__file__).resolve().parents[1]
"""Relative paths in configuration files are relative to the project, whatever the cwd."""


class Strict(BaseModel):
    """Unknown keys are errors: a typo must not silently keep a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitSettings(Strict):
    """What the service takes in and gives out."""

    max_body_bytes: int = Field(
        default=32 * 2**20, ge=1024, description="whole request body, bytes"
    )
    max_input_px: int = Field(default=50_000_000, ge=1, description="width x height of an upload")
    max_output_px: int = Field(
        default=16_777_216, ge=16, description="width x height of an upscaled image"
    )


class Settings(Strict):
    """Everything `serve_app.app:build` needs.

    Attributes:
        models: YAML file that names one model per task.
        device: auto takes CUDA where there is one.
        torch_threads: CPU threads of each model replica. Ray gives an actor with up to one CPU a
            single torch thread, so that this must be said here.
        pixel_threads: threads of each replica that decode and encode image files.
        model_num_cpus: CPUs that each model replica reserves; its GPU share is the model's own.
        request_timeout_s: deadline of a request; keep it below Serve's own request_timeout_s.
        max_uploads: uploads that one Ingress replica works on at a time; more get 429.
        retry_after_s: what a refused client is told to wait.
        limits: sizes.
    """

    models: Path = Path("configs/models/starter.yaml")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    torch_threads: int = Field(default=1, ge=1, le=256)
    pixel_threads: int = Field(default=2, ge=1, le=64)
    model_num_cpus: float = Field(default=1, ge=0)
    request_timeout_s: float = Field(default=60, gt=0)
    max_uploads: int = Field(default=150, ge=1)
    retry_after_s: int = Field(default=2, ge=1)
    limits: LimitSettings = LimitSettings()


class Tuning(Strict):
    """A model deployment's `user_config`: changes without a restart.

    Attributes:
        batch_window_s: how long admission waits for company; 0 admits at once.
        max_batch_size: most rows in one forward pass; None keeps the model's own.
        defaults: parameter values for fields a request leaves out, over the model's own.
    """

    batch_window_s: float = Field(default=0.0, ge=0, le=10)
    max_batch_size: int | None = Field(default=None, ge=1, le=256)
    defaults: dict[str, Any] = Field(default={})


def resolve(path: Path) -> Path:
    """An absolute path; a relative one is taken from the project's root."""
    return path if path.is_absolute() else ROOT / path


def parse_settings(kind: type[S], values: Any, where: str) -> S:
    """Typed settings from plain YAML values.

    Raises:
        ConfigError: naming each wrong key, in `where`.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()
        )
    raise ConfigError(f"{where} is wrong: {found}.", remedy="Correct the named keys.")


def enforce_offline() -> None:
    """Shut every door to a model hub. Call before the first import of a hub library.

    huggingface_hub reads HF_HUB_OFFLINE when it is imported, not when it is used.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ[name] = "1"
    # Their advice at import is meant for notebooks.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "imagen-empty-hub")
    os.environ.pop("HF_TOKEN", None)
