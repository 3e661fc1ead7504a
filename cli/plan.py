"""`imagen plan`: prints each model's share of a GPU, and the Serve config's lines for it.

deployments/gpu/plan.py computes the numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cli.console import Output, make_table
from cli.ending import ending
from cli.paths import user_path
from cli.serving import Serve, say_unaccepted, serve_of
from deployments.catalogue import Registry, load_catalogue
from deployments.errors import ConfigError
from deployments.gpu.choice import choose_fitting
from deployments.gpu.plan import Plan
from deployments.gpu.plan import plan as make_plan
from deployments.gpu.profiles import as_gpu
from deployments.gpu.target import gpus_at_hand
from deployments.registry import ModelSpec
from deployments.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.catalogue import Catalogue
    from deployments.gpu.plan import Placed

_GIB = 2**30
_PRODUCTION = [Path("configs/models/production.yaml")]
_FRAGMENT_TITLE = (
    "# Merge these keys into your Serve config, under the application's `deployments`:"
)


def plan(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Models of the registry; default: those it serves, and --serve"),
    ] = None,
    models: Annotated[
        list[Path], typer.Option(help="A registry, a YAML file of models; may be repeated")
    ] = _PRODUCTION,
    serve: Serve = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="t4, l4, a100-40, h100 or h200; default: those of this machine"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=64, help="Fit this many with the largest batches")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else")
    ] = False,
) -> None:
    """Divide GPUs among models: shares, batches and pixel budgets that fit their memory.

    Without --gpu and names, models that do not fit this machine's GPUs give way to smaller ones.

    Exit codes: 0 planned; 2 usage or configuration; 9 the models do not fit.
    """
    output = Output(as_json=as_json)
    with ending(output):
        catalogue = load_catalogue(*map(user_path, models))
        chosen = _choose(catalogue, names, serve_of(serve))
        if gpu is not None:
            made = make_plan(chosen.models, as_gpu(gpu), gpus)
        else:
            others = () if names or serve else catalogue.models
            made = _plan_here(chosen.models, others, gpus, output)
            chosen = Registry((placed.demand.spec for placed in made.placed), {})
        _show(made, catalogue, output)
        entries = _deployments(made, chosen)
        output.show(_fragment(entries))
        output.emit(_as_values(made) | {"deployments": entries})


def _plan_here(
    wanted: Sequence[ModelSpec], others: Sequence[ModelSpec], gpus: int | None, output: Output
) -> Plan:
    """A plan of this machine's GPUs; says what does not fit them.

    Args:
        wanted: models to plan.
        others: that may stand in for them; if there are none, all that is wanted is planned.
        gpus: how many to use; None for all.
    """
    kind, count = gpus_at_hand()
    count = gpus or count
    if others:
        wanted, given_up = choose_fitting(wanted, others, kind, count)
        for model, instead in given_up:
            what = f"{instead.name} is planned instead" if instead else "it is left out"
            output.say(f"{model.name} does not fit beside the others: {what}.", "yellow")
    return make_plan(wanted, kind, count)


def _choose(
    catalogue: Catalogue, names: Sequence[str] | None, serve: dict[str, list[str]]
) -> Registry:
    """The named models, else those served; models that the licence check refuses are included.

    Of several models of a task the first one named is its default.
    """
    if not names:
        return catalogue.accepting().served(serve)
    if serve:
        raise ConfigError("Name models, or use --serve; not both.", value=", ".join(names))
    found = list({entry.name: entry for entry in map(catalogue.find, names)}.values())
    specs = [entry for entry in found if isinstance(entry, ModelSpec)]
    if len(specs) < len(found):
        artefacts = ", ".join(e.name for e in found if not isinstance(e, ModelSpec))
        raise ConfigError("Artefacts are not served, so they need no GPU.", value=artefacts)
    return Registry(specs, {})


# ------------------------------------------------------------------------------- the table


def _show(made: Plan, catalogue: Catalogue, output: Output) -> None:
    table = make_table(
        *("Model", "GPU", "num_gpus", "Rows", "budget_px", "Weights", "Activations"),
        *("Graphs", "Autoencoder", "Context", "Total", "Source"),
        title=f"{made.gpus} x {made.gpu.label}, {_gib(made.gpu.total_bytes)} each",
    )
    for placed in made.placed:
        table.add_row(*_row(made, placed))
    output.show(table)
    for i in range(made.gpus):
        here = [placed for placed in made.placed if placed.gpu_index == i]
        used = sum(placed.percent for placed in here)
        output.show(f"GPU {i}: {used / 100:.2f}  {', '.join(p.name for p in here) or 'empty'}")
    if not made.measured:
        output.show(
            f"~ marks estimates: run `make profile-gpu` on the GPU ({made.gpu.label}) to measure"
            " them (docs/gpu.md)."
        )
    say_unaccepted((placed.demand.spec for placed in made.placed), catalogue, output)


def _row(made: Plan, placed: Placed) -> list[str]:
    demand, rows = placed.demand, placed.rows
    about = "" if demand.measured else "~"
    context = "" if made.context_measured else "~"
    return [
        placed.name,
        str(placed.gpu_index),
        f"{about or context}{placed.num_gpus:g}",
        f"{rows}{' (reduced)' if placed.reduced else ''}",
        str(placed.budget_px),
        f"{about}{_gib(demand.profile.weights_bytes)}",
        f"{about}{_gib(demand.peak_bytes(rows))}",
        f"{about}{_gib(demand.graph_bytes(rows))}",
        f"{about}{_gib(demand.vae_peak_bytes)}",
        f"{context}{_gib(made.context_bytes)}",
        f"{about or context}{_gib(demand.need_bytes(rows))}",
        _source(placed),
    ]


def _source(placed: Placed) -> str:
    profile = placed.demand.profile
    if placed.demand.measured:
        return f"measured {profile.measured_at}"
    if profile.source == "estimate":
        return "estimate"
    where = profile.gpu if profile.gpu != placed.demand.gpu.name else "another size"
    return f"estimate, from {where}"


def _gib(amount_bytes: int) -> str:
    return f"{amount_bytes / _GIB:.2f} GiB"


def _as_values(made: Plan) -> dict[str, Any]:
    return {
        "gpu": made.gpu.name,
        "gpus": made.gpus,
        "total_bytes": made.gpu.total_bytes,
        "context_bytes": made.context_bytes,
        "context_source": "measured" if made.context_measured else "estimate",
        "measured": made.measured,
        "models": [
            {
                "name": placed.name,
                "task": str(placed.demand.spec.task),
                "gpu_index": placed.gpu_index,
                "num_gpus": placed.num_gpus,
                "max_batch_size": placed.rows,
                "budget_px": placed.budget_px,
                "weights_bytes": placed.demand.profile.weights_bytes,
                "peak_bytes": placed.demand.peak_bytes(placed.rows),
                "graph_bytes": placed.demand.graph_bytes(placed.rows),
                "vae_peak_bytes": placed.demand.vae_peak_bytes,
                "need_bytes": placed.demand.need_bytes(placed.rows),
                "reduced": placed.reduced,
                "source": _source(placed),
            }
            for placed in made.placed
        ],
    }


# ---------------------------------------------------------------- the Serve config's fragment


def _deployments(made: Plan, chosen: Registry) -> list[dict[str, Any]]:
    """Entries for `deployments` of a Serve config.

    Serve replaces the application's `ray_actor_options` as a whole, so that an entry needs the CPUs
    as well.
    """
    cpus = Settings().model_num_cpus
    return [
        {
            "name": chosen.deployment(placed.demand.spec),
            "ray_actor_options": {"num_cpus": cpus, "num_gpus": placed.num_gpus},
            "user_config": {"max_batch_size": placed.rows, "budget_px": placed.budget_px},
        }
        for placed in made.placed
    ]


def _fragment(entries: list[dict[str, Any]]) -> str:
    """The entries as YAML to paste, with one line for each section."""
    text = yaml.safe_dump({"deployments": entries}, default_flow_style=None, sort_keys=False)
    return f"{_FRAGMENT_TITLE}\n{text.rstrip()}"
