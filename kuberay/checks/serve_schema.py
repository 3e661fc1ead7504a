"""The Serve config inside a RayService, against Serve's schema and against our application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from deployments.errors import ConfigError, LicenceRefused, SetupError
from deployments.registry import load_catalogue
from deployments.settings import Settings, Tuning, parse_settings
from deployments.store.lockfile import load_lock, locked_digest
from deployments.tasks import Task
from kuberay.checks.manifests import Finding, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.registry import ModelSpec
    from deployments.store.lockfile import Lock
    from kuberay.checks.manifests import Document, Manifests

CHECK = "serve"
_OURS = "serve_app.app:build"
_INSIDE: dict[str, type[BaseModel]] = {
    "http_options": HTTPOptionsSchema,
    "logging_config": LoggingConfig,
    "applications": ServeApplicationSchema,
    "deployments": DeploymentSchema,
    "ray_actor_options": RayActorOptionsSchema,
    "autoscaling_config": AutoscalingConfig,
}


def check(manifests: Manifests) -> list[Finding]:
    """Every mistake in the Serve configs."""
    return [
        finding
        for service in manifests.of("RayService")
        for finding in _service(service, manifests.serve_config(service))
    ]


def _service(service: Document, config: Any) -> Iterator[Finding]:
    place = where(service, "serveConfigV2")
    if not isinstance(config, dict) or not config.get("applications"):
        yield Finding(
            CHECK, "schema", place, "it is no Serve config in YAML, or has no application"
        )
        return
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        for one in error.errors():
            path = ".".join(str(step) for step in one["loc"])
            yield Finding(CHECK, "schema", f"{place} {path}", one["msg"])
        return
    # Serve ignores keys it does not know: a typo would keep a default.
    for path in _unknown(config, ServeDeploySchema, ""):
        yield Finding(CHECK, "unknown-field", f"{place} {path}", "Serve has no such option")
    for application in config["applications"]:
        if application.get("import_path") == _OURS:
            yield from _application(place, application)
        else:
            told = f"{application.get('import_path')} is not the application: {_OURS}"
            yield Finding(CHECK, "import-path", f"{place} {application.get('name')}", told)


def _unknown(values: Any, schema: type[BaseModel], path: str) -> Iterator[str]:
    for key, value in values.items():
        here = f"{path}.{key}".lstrip(".")
        if key not in schema.model_fields:
            yield here
        elif key in _INSIDE:
            for i, one in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(one, dict):
                    place = f"{here}.{one.get('name', i)}" if isinstance(value, list) else here
                    yield from _unknown(one, _INSIDE[key], place)


def _application(place: str, application: Document) -> Iterator[Finding]:
    try:
        settings = parse_settings(Settings, application.get("args") or {}, "args")
    except ConfigError as error:
        yield Finding(CHECK, "args", f"{place} args", error.message)
        return
    deployments = {one["name"]: one for one in application.get("deployments") or []}
    expected = {"Ingress", *(task.deployment for task in Task)}
    for name in sorted(deployments.keys() ^ expected):
        told = "the application has no such deployment" if name in deployments else "it is missing"
        yield Finding(CHECK, "deployments", f"{place} {name}", told)
    for name, one in deployments.items():
        try:
            parse_settings(Tuning, one.get("user_config") or {}, "user_config")
        except ConfigError as error:
            yield Finding(CHECK, "user-config", f"{place} {name}", error.message)
    yield from _registry(place, settings)


def _registry(place: str, settings: Settings) -> Iterator[Finding]:
    """What would stop the application at its start, and only people can settle."""
    where_models = f"{place} args.models"
    try:
        catalogue, lock = load_catalogue(settings.models), load_lock(settings.models)
        accepted = tuple(entry.name for entry in catalogue.entries)
        served = catalogue.model_copy(update={"accept_noncommercial": accepted}).served()
    except SetupError as error:
        yield Finding(CHECK, "registry", where_models, str(error))
        return
    for spec in served.values():
        try:
            catalogue.check_licence(spec)
        except LicenceRefused as error:
            yield Finding(CHECK, "licence", where_models, str(error), placeholder=True)
    if missing := [spec.name for spec in served.values() if not _is_locked(lock, spec)]:
        told = f"no digest of {', '.join(missing)}: run `imagen models resolve`, and `convert`"
        yield Finding(CHECK, "digest", where_models, told, placeholder=True)


def _is_locked(lock: Lock, spec: ModelSpec) -> bool:
    try:
        return bool(locked_digest(lock, spec))
    except ConfigError:
        return False
