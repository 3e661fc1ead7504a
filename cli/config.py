"""What a Serve config file says of the application."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from deployments.catalogue import load_registry
from deployments.errors import ConfigError
from deployments.settings import ClientSettings, Settings, file_fault, parse_settings, resolve
from deployments.store.lockfile import load_lock, locked_digest
from deployments.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

_OURS = "serve_app.app:"
SERVICER = "serve_app.v2.door:add_to_server"
SIZE_VARIABLE = "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"


def address_of(config: Path) -> str:
    """The URL that a Serve config file makes the API listen on.

    Raises:
        ConfigError: the file cannot be read, or is no Serve config.
    """
    with _reading(config) as values:
        options = values.get("http_options") or {}
        host, port = options.get("host", "127.0.0.1"), options.get("port", 8000)
        first = next(iter(values.get("applications") or ()), {})
        prefix = str(first.get("route_prefix", "/")).rstrip("/")
        host = "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104 - compared, not bound
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if options.get("ssl_certfile") else "http"
        address = f"{scheme}://{host}:{int(port)}{prefix}"
        httpx.URL(address)
        return address


def clients_of(config: Path) -> ClientSettings | None:
    """What clients of the application of a Serve config file may do; None if it is not ours.

    Raises:
        ConfigError: the file cannot be read, or a setting is wrong.
    """
    with _reading(config) as values:
        found = [dict(one) for one in values.get("applications") or ()]
        ours = [one for one in found if str(one.get("import_path", "")).startswith(_OURS)]
        given = [
            one.get("user_config") or {}
            for application in ours
            for one in application.get("deployments") or ()
            if one["name"] == "Ingress"
        ]
    if not ours:
        return None
    _settings(ours[0])  # which refuses them in `args`
    return parse_settings(ClientSettings, next(iter(given), {}), "The user_config of Ingress")


def check_reach(config: Path, clients: ClientSettings) -> None:
    """Refuse a service without keys that others than this machine can reach.

    Raises:
        ConfigError: it is one; or the file cannot be read.
    """
    with _reading(config) as values:
        host = str((values.get("http_options") or {}).get("host", "0.0.0.0"))  # noqa: S104 - Serve's
    clients.access.check_host(host)


def grpc_environment(config: Path) -> dict[str, str]:
    """What the environment of Ray must have for a Serve config file; nothing without gRPC.

    Raises:
        ConfigError: the file cannot be read, or its options of gRPC do not fit its application.
    """
    clients = clients_of(config)
    if clients is None:
        return {}
    with _reading(config) as values:
        options = dict(values.get("grpc_options") or {})
    wanted = {"grpc_servicer_functions": [SERVICER], "enable_reflection": False}
    fits = all(options.get(name) == value for name, value in wanted.items())
    if fits if clients.grpc.enabled else not options:
        limit = {SIZE_VARIABLE: str(clients.limits.max_body_bytes)}
        return limit if clients.grpc.enabled else {}
    raise ConfigError(
        "gRPC needs grpc.enabled in the user_config of Ingress, and grpc_options in the file.",
        value=options or "no grpc_options",
        remedy="Set both as docs/protocols.md says, with enable_reflection: false; or neither.",
    )


def settings_of(config: Path) -> Settings:
    """The settings of the application of a Serve config file.

    Raises:
        ConfigError: the file cannot be read, a setting is wrong, or no application is ours.
    """
    with _reading(config) as values:
        found = [dict(one) for one in values.get("applications") or ()]
    for one in found:
        if str(one.get("import_path", "")).startswith(_OURS):
            return _settings(one)
    raise ConfigError(
        "The Serve config has no application of Imagen.",
        value=config,
        remedy=f"Name a file with import_path: {_OURS}.",
    )


def config_serving(config: Path, serve: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
    """A Serve config whose application runs these models; None if the file says the same.

    A further model of a task gets the options of the task's deployment, where the file has any.
    Those of a task that is not served are left out.

    Args:
        config: the file.
        serve: names of models by task, laid upon those of the file.

    Raises:
        ConfigError: no application is ours; a model has no digest yet; or see `Catalogue.served`.
        LicenceRefused: a model's licence is not accepted.
    """
    if serve:
        settings_of(config)  # there is an application to change
    with _reading(config) as values:
        found = [dict(one) for one in values.get("applications") or ()]
    ours = [
        _serving(one, serve) if str(one.get("import_path", "")).startswith(_OURS) else one
        for one in found
    ]
    return None if ours == found else values | {"applications": ours}


def _serving(application: dict[str, Any], serve: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    settings = _settings(application)
    chosen = settings.serve | {task: tuple(names) for task, names in serve.items()}
    registry, lock = load_registry(*settings.models, serve=chosen), load_lock(*settings.models)
    for spec in registry.models:
        locked_digest(lock, spec)
    every: list[dict[str, Any]] = list(application.get("deployments") or ())
    # Serve refuses options of a deployment that the application does not have.
    absent = {task.deployment for task in Task if task not in registry}
    given = [one for one in every if one.get("name") not in absent]
    options = {one.get("name"): one for one in given}
    further = [
        options[spec.task.deployment] | {"name": registry.deployment(spec)}
        for spec in registry.models
        if registry.deployment(spec) not in options and spec.task.deployment in options
    ]
    args: dict[str, Any] = application.get("args") or {}
    if serve:
        args = args | {"serve": {task: names and list(names) for task, names in chosen.items()}}
    changes: dict[str, Any] = {"args": args} if serve else {}
    if further or given != every:
        changes["deployments"] = [*given, *further]
    return application | changes


def _settings(application: dict[str, Any]) -> Settings:
    return parse_settings(Settings, application.get("args") or {}, "The application's args")


@contextmanager
def _reading(config: Path) -> Generator[Any]:
    try:
        values = yaml.safe_load(resolve(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no date
        raise ConfigError(
            f"The Serve config cannot be read: {file_fault(error)}.",
            value=config,
            remedy="Name a Serve YAML file.",
        ) from error
    try:
        yield values
    except Exception as error:  # a hand-written file is wrong in many ways, and all mean the same
        raise ConfigError(
            "The file is no Serve config.", value=config, remedy="Name a Serve YAML file."
        ) from error
