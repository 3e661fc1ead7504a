"""The `imagen` command: every subcommand, and nothing else."""

from __future__ import annotations

import typer

from cli.bench import bench
from cli.cost import cost
from cli.jobs import jobs_app
from cli.keys import keys_app
from cli.kuberay import kuberay_app
from cli.metadata import metadata
from cli.models import models_app
from cli.plan import plan
from cli.run import run
from cli.storage import storage_app
from cli.torture import torture

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(run)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(jobs_app, name="jobs")
app.command()(plan)
app.command()(cost)
app.command()(bench)
app.command()(torture)
app.add_typer(kuberay_app, name="kuberay")
app.add_typer(storage_app, name="storage")
app.command()(metadata)


@app.callback()
def main() -> None:
    """Imagen: image models behind one HTTP API on Ray Serve."""


if __name__ == "__main__":
    app()
