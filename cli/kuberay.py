"""`imagen kuberay`: render the Kubernetes manifests and check them, without a cluster."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Output
from cli.ending import ending
from deployments.errors import ConfigError
from deployments.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kuberay.checks.manifests import Manifests
    from kuberay.checks.validate import Report

kuberay_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Kubernetes manifests: render them from configs/gke.yaml, check them without a cluster.",
)
FOLDER = Path("kuberay")
SOURCE = Path("configs/gke.yaml")
_WRONG = 1
Folder = Annotated[Path, typer.Option(help="Folder of the manifests")]
Source = Annotated[Path, typer.Option(help="File to render from")]


@kuberay_app.command("render")
def render_manifests(
    source: Source = SOURCE,
    folder: Folder = FOLDER,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a file is out of date")
    ] = False,
) -> None:
    """Write every generated file below kuberay/."""
    output = Output(as_json=False)
    with ending(output):
        from kuberay.render.files import out_of_date, render, write

        place = resolve(folder)
        files = render(source, place / "images.lock")
        changed = out_of_date(files, place) if check else write(files, place)
    for path in changed:
        output.say(f"{folder / path}: {'out of date' if check else 'written'}", "yellow")
    output.say(f"{len(files)} files, {len(changed)} {'out of date' if check else 'changed'}")
    if check and changed:
        output.say("Run `imagen kuberay render`, and commit the files.", "red")
        raise typer.Exit(_WRONG)


@kuberay_app.command("lock")
def lock_images(
    names: Annotated[list[str] | None, typer.Argument(help="Images; by default all")] = None,
    tag: Annotated[str | None, typer.Option(help="For images whose source names no tag")] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="IMAGEN_REGISTRY_TOKEN",
            help="For Google's registries: gcloud auth print-access-token",
            show_envvar=True,
        ),
    ] = None,
    source: Source = SOURCE,
    folder: Folder = FOLDER,
) -> None:
    """Ask registries for the digests of the images' tags, and write them to images.lock."""
    output = Output(as_json=False)
    with ending(output):
        import httpx

        from kuberay.render.environment import load_environments
        from kuberay.render.images import load_digests, look_up, pulled, write_digests

        images = pulled(load_environments(source).values(), names or ())
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
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Overlays, or built manifests; by default every overlay"),
    ] = None,
    allow_placeholder: Annotated[
        bool, typer.Option("--allow-placeholder", help="Accept `unresolved` values")
    ] = False,
    node: Annotated[
        list[str] | None,
        typer.Option(help="Check that all pods fit nodes like cpu=4,memory=12Gi; repeat for each"),
    ] = None,
    folder: Folder = FOLDER,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout")
    ] = False,
) -> None:
    """Find mistakes that no cluster refuses. kuberay/README.md has the list.

    Exit codes: 0 no mistake, 1 mistakes or placeholders, 2 usage.
    """
    output = Output(as_json=as_json)
    with ending(output):
        from kuberay.checks.validate import validate

        nodes = [_resources(one) for one in node or []]
        reports = [validate(one, nodes) for one in _manifests(files, resolve(folder))]
    for report in reports:
        _show(report, output, allow_placeholder)
    wrong = any(one.errors or (one.placeholders and not allow_placeholder) for one in reports)
    code = _WRONG if wrong else 0
    output.emit({"manifests": [asdict(report) for report in reports], "exit_code": code})
    if code:
        raise typer.Exit(code)


def _resources(text: str) -> dict[str, str]:
    from kuberay.quantity import parse_quantity

    node = {name: amount for name, _, amount in (part.partition("=") for part in text.split(","))}
    try:
        for name in {"cpu", "memory", *node}:
            if parse_quantity(node.get(name, f"no {name}")) < 0:
                raise ValueError(f"{name} is below zero")
    except ValueError as error:
        raise ConfigError(
            f"--node is wrong: {error}.", value=text, remedy="Write it like cpu=4,memory=12Gi."
        ) from error
    return node


def _manifests(files: Sequence[Path] | None, folder: Path) -> list[Manifests]:
    from kuberay.checks.manifests import build, read

    if files:
        return [build(path) if path.is_dir() else read(path) for path in files]
    overlays = sorted(path.parent for path in folder.glob("overlays/*/kustomization.yaml"))
    if not overlays:
        raise ConfigError("The folder has no overlays.", value=folder, remedy="Name another one.")
    return [build(overlay) for overlay in overlays]


def _show(report: Report, output: Output, allow_placeholder: bool) -> None:
    mistakes = f"{len(report.errors)} mistakes" if report.errors else "no mistakes"
    unset = f", {len(report.placeholders)} placeholders" if report.placeholders else ""
    output.show(f"{report.name}: {report.documents} objects, {mistakes}{unset}")
    for finding in report.errors:
        output.say(f"  {finding}", "red")
    for finding in report.placeholders:
        output.say(f"  {finding}", "yellow" if allow_placeholder else "red")
    for fact in report.facts:
        output.show(f"  Ray's autoscaler: {fact}")
    for name, keys in report.secrets.items():
        output.show(f"  needs the Secret {name} ({', '.join(keys)})")
