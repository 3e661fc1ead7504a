"""`imagen kuberay`: manifests for Kubernetes, rendered and checked without a cluster."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Output
from deployments.errors import ConfigError, SetupError
from deployments.settings import resolve
from kuberay.checks.core import KUBERNETES

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from kuberay.checks.crd import Schemas
    from kuberay.checks.manifests import Manifests
    from kuberay.checks.validate import Report

kuberay_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Kubernetes manifests: render them from configs/gke.yaml, check them without a cluster.",
)
FOLDER = Path("kuberay")
SOURCE = Path("configs/gke.yaml")
CRDS_VARIABLE = "KUBERAY_CRDS"
_WRONG, _UNCHECKED = 1, 3
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else")]
Folder = Annotated[Path, typer.Option(help="Where the manifests are")]
Built = Annotated[list[Path] | None, typer.Argument(help="Built manifests; unset: every overlay")]
Nodes = Annotated[
    list[str] | None, typer.Option(help="All must fit nodes like cpu=4,memory=12Gi; each once")
]
Crds = Annotated[
    Path | None,
    typer.Option(envvar=CRDS_VARIABLE, help="Folder of CustomResourceDefinitions, in YAML"),
]


@kuberay_app.command("render")
def render_manifests(
    source: Annotated[Path, typer.Option(help="What to render")] = SOURCE,
    folder: Folder = FOLDER,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a file is out of date")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write every generated file below kuberay/."""
    output = Output(as_json=as_json)
    with _ending(output):
        # Here, because the names of deployments come with Ray.
        from kuberay.render.render import out_of_date, render, write

        place = resolve(folder)
        files = render(source, place / "images.lock")
        changed = out_of_date(files, place) if check else write(files, place)
    for path in changed:
        output.say(f"{folder / path}: {'out of date' if check else 'written'}", "yellow")
    output.say(f"{len(files)} files, {len(changed)} {'out of date' if check else 'changed'}")
    output.emit({"files": sorted(files), "changed": changed})
    if check and changed:
        output.say("Run `imagen kuberay render`, and commit what it writes.", "red")
        raise typer.Exit(_WRONG)


@kuberay_app.command("lock")
def lock_images(
    names: Annotated[list[str] | None, typer.Argument(help="Images; unset: all")] = None,
    tag: Annotated[str | None, typer.Option(help="Of images whose source names none")] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="IMAGEN_REGISTRY_TOKEN",
            help="For Google's registries: gcloud auth print-access-token",
            show_envvar=True,
        ),
    ] = None,
    source: Annotated[Path, typer.Option(help="What names the images")] = SOURCE,
    folder: Folder = FOLDER,
) -> None:
    """Ask registries what images' tags are now, and write their digests; needs a network."""
    output = Output(as_json=False)
    with _ending(output):
        import httpx

        from kuberay.render.images import chosen, load_digests, look_up, pulled, write_digests
        from kuberay.render.source import load_environments

        images = chosen(pulled(load_environments(source).values()), names)
        lock = resolve(folder) / "images.lock"
        others = load_digests(lock) if names else {}
        with httpx.Client(follow_redirects=True) as client:
            digests = look_up(images, tag, token, client)
        write_digests(lock, others | digests)
    for name, digest in digests.items():
        output.say(f"{name}: {digest}", "green")
    output.say("Now run `imagen kuberay render`.")


@kuberay_app.command("validate")
def validate_manifests(
    files: Built = None,
    crds: Crds = None,
    skip_crd: Annotated[
        bool, typer.Option("--skip-crd", help="Pass although no CRD was given")
    ] = False,
    allow_placeholder: Annotated[
        bool, typer.Option("--allow-placeholder", help="Pass with `unresolved` values in it")
    ] = False,
    kubernetes: Annotated[str, typer.Option(help="Version whose kinds are meant")] = KUBERNETES,
    node: Nodes = None,
    folder: Folder = FOLDER,
    as_json: AsJson = False,
) -> None:
    """Check manifests as far as that goes without a cluster; changes nothing.

    Exit codes: 0 nothing wrong, 1 mistakes, 2 usage, 3 nothing wrong in what could be checked.
    """
    output = Output(as_json=as_json)
    with _ending(output):
        from kuberay.checks.crd import Schemas

        schemas = Schemas(crds) if crds else None
        nodes = [_resources(one) for one in node or []]
        built = _manifests(files, resolve(folder))
        reports = [_report(one, schemas, kubernetes, nodes) for one in built]
    for report in reports:
        _show(report, output, allow_placeholder)
    code = _exit_code(reports, allow_placeholder=allow_placeholder, skip_crd=skip_crd)
    if not crds and any(report.without_crd for report in reports):
        output.say(
            f"NOT CHECKED: without --crds or ${CRDS_VARIABLE}, a misspelt field of a RayService"
            " passes. kuberay/README.md says where to take the CRDs from.",
            "yellow" if skip_crd else "red",
        )
    output.emit({"manifests": [asdict(report) for report in reports], "exit_code": code})
    if code:
        raise typer.Exit(code)


def _resources(text: str) -> dict[str, str]:
    from kuberay.quantity import parse_quantity

    found = {name: amount for name, _, amount in (part.partition("=") for part in text.split(","))}
    try:
        for name in {"cpu", "memory", *found}:
            parse_quantity(found.get(name, f"no {name}"))
    except ValueError as error:
        raise ConfigError(
            f"A node is not what was expected: {error}.",
            value=text,
            remedy="Write it like cpu=4,memory=12Gi.",
        ) from error
    return found


def _report(
    manifests: Manifests,
    schemas: Schemas | None,
    kubernetes: str,
    nodes: Sequence[dict[str, str]],
) -> Report:
    from kuberay.checks import promql
    from kuberay.checks.validate import validate

    report = validate(manifests, schemas, kubernetes, nodes)
    report.findings += promql.check(manifests)
    report.unchecked += promql.unchecked(manifests)
    return report


def _exit_code(reports: Sequence[Report], *, allow_placeholder: bool, skip_crd: bool) -> int:
    if any(one.errors or (one.placeholders and not allow_placeholder) for one in reports):
        return _WRONG
    without_crd = any(one.without_crd for one in reports) and not skip_crd
    return _UNCHECKED if without_crd or any(one.unchecked for one in reports) else 0


def _manifests(files: Sequence[Path] | None, folder: Path) -> list[Manifests]:
    from kuberay.checks.manifests import build, read

    if files:
        return [read(path) for path in files]
    overlays = sorted(path.parent for path in folder.glob("overlays/*/kustomization.yaml"))
    if not overlays:
        raise ConfigError("The folder has no overlays.", value=folder, remedy="Name another one.")
    return [build(overlay) for overlay in overlays]


def _show(report: Report, output: Output, allow_placeholder: bool) -> None:
    left = [*report.unchecked, *(f"the fields of {k}: no CRD of it" for k in report.without_crd)]
    verdict = "wrong" if report.errors else "not all checked" if left else "right"
    output.show(f"{report.name}: {report.documents} objects, {verdict}")
    for finding in report.errors:
        output.show(f"  {finding}")
    for finding in report.placeholders:
        output.say(f"  {finding}", "yellow" if allow_placeholder else "red")
    for one in left:
        output.say(f"  NOT CHECKED: {one}", "red")
    if report.unknown:
        kinds = ", ".join(report.unknown)
        output.say(f"  no schema for {kinds}: names and ports were checked, fields were not")
    for fact in report.facts:
        output.show(f"  Ray's autoscaler: {fact}")
    for name, keys in report.secrets.items():
        output.show(f"  needs the Secret {name} ({', '.join(keys)})")


@contextmanager
def _ending(output: Output) -> Generator[None]:
    try:
        yield
    except SetupError as error:
        output.fail(error)
        values = {"code": error.code, "message": error.message, "value": error.value}
        values["remedy"] = error.remedy
        output.emit({"error": values, "exit_code": error.exit_code})
        raise typer.Exit(error.exit_code) from error
