"""The Serve config of a RayService: Serve's schema, then the application's own settings.

KubeRay passes the text on without reading it. Serve ignores a key that it does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

from deployments.catalogue import load_catalogue
from deployments.errors import ConfigError, LicenceRefused, SetupError
from deployments.settings import ClientSettings, Settings, Tuning, parse_settings
from deployments.store.lockfile import known_digest, load_lock
from kuberay.checks.manifests import Document, Finding, Manifests, where

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deployments.catalogue import Catalogue
    from deployments.registry import ModelSpec
    from deployments.store.lockfile import Lock

_OURS = "serve_app.app:build"
_INSIDE: dict[str, type[BaseModel]] = {
    "http_options": HTTPOptionsSchema,
    "logging_config": LoggingConfig,
    "applications": ServeApplicationSchema,
    "deployments": DeploymentSchema,
    "ray_actor_options": RayActorOptionsSchema,
    "autoscaling_config": AutoscalingConfig,
}


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every mistake in the Serve config."""
    place, config = where(manifests.service, "serveConfigV2"), manifests.serve_config
    if not config.get("applications"):
        yield Finding("schema", place, "it is not a Serve config in YAML, or has no application")
        return
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        for one in error.errors():
            path = ".".join(str(step) for step in one["loc"])
            yield Finding("schema", f"{place} {path}", one["msg"])
        return
    for path in _unknown(config, ServeDeploySchema, ""):
        yield Finding("unknown-field", f"{place} {path}", "Serve has no such option")
    for application in config["applications"]:
        if application.get("import_path") == _OURS:
            yield from _application(place, application, manifests.http_options)
        else:
            message = f"{application.get('import_path')} is not the application: write {_OURS}"
            yield Finding("import-path", f"{place} {application.get('name')}", message)


def _unknown(values: Document, schema: type[BaseModel], path: str) -> Iterator[str]:
    for key, value in values.items():
        here = f"{path}.{key}".lstrip(".")
        if key not in schema.model_fields:
            yield here
        elif key in _INSIDE:
            for i, one in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(one, dict):
                    inside = f"{here}.{one.get('name', i)}" if isinstance(value, list) else here
                    yield from _unknown(one, _INSIDE[key], inside)


def _application(place: str, application: Document, http: Document) -> Iterator[Finding]:
    try:
        settings = parse_settings(Settings, application.get("args") or {}, "args")
    except ConfigError as error:
        yield Finding("args", f"{place} args", error.message)
        return
    deployments = {one["name"]: one for one in application.get("deployments") or []}
    for name, one in deployments.items():
        kind = ClientSettings if name == "Ingress" else Tuning
        try:
            parse_settings(kind, one.get("user_config") or {}, "user_config")
        except ConfigError as error:
            yield Finding("user-config", f"{place} {name}", error.message)
    yield from _access(f"{place} Ingress", deployments.get("Ingress", {}), http)
    try:
        catalogue, lock = load_catalogue(*settings.models), load_lock(*settings.models)
        served = catalogue.accepting().served(settings.serve)
    except SetupError as error:
        yield Finding("registry", f"{place} args.models", str(error))
        return
    expected = {"Ingress", *map(served.deployment, served.models)}
    if settings.jobs.enabled:
        expected |= {"JobWorker"} | ({"Redis"} & deployments.keys())  # see the check of jobs
    for name in sorted(deployments.keys() ^ expected):
        known = "the application has no such deployment"
        yield Finding("deployments", f"{place} {name}", known if name in deployments else "missing")
    yield from _models(f"{place} args.models", catalogue, served.models, lock)


def _access(place: str, ingress: Document, http: Document) -> Iterator[Finding]:
    """Whether a service that others reach asks for keys."""
    try:
        clients = parse_settings(ClientSettings, ingress.get("user_config") or {}, "user_config")
    except ConfigError:
        return  # which is a finding already
    try:
        clients.access.check_host(str(http.get("host", "0.0.0.0")))  # noqa: S104 - the default
    except ConfigError as error:
        yield Finding("auth", f"{place} user_config.access", f"{error.message} {error.remedy}")


def _models(
    place: str, catalogue: Catalogue, served: Sequence[ModelSpec], lock: Lock
) -> Iterator[Finding]:
    """What people must still decide: licences and digests."""
    for spec in served:
        try:
            catalogue.check_licence(spec)
        except LicenceRefused as error:
            yield Finding("licence", place, str(error), placeholder=True)
    if missing := [spec.name for spec in served if not known_digest(lock, spec)]:
        message = f"no digest of {', '.join(missing)}: run `imagen models resolve`, and `convert`"
        yield Finding("digest", place, message, placeholder=True)
