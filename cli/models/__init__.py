"""`imagen models`: the registry and the store of this machine, for operators and Jobs.

Tables go to stdout, everything else to stderr; with --json, stdout holds one JSON object.
"""

from __future__ import annotations

import typer

from cli.models import bring, compiling, get, own, show, upkeep

models_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The models of this machine: look them up, pull, verify, publish, remove.",
)
models_app.command("list")(show.list_models)
models_app.command("info")(show.info)
models_app.command("get")(get.get_model)
models_app.command("add")(own.add_model)
models_app.command("resolve")(bring.resolve_models)
models_app.command("pull")(bring.pull)
models_app.command("verify")(upkeep.verify)
models_app.command("publish")(bring.publish_model)
models_app.command("convert")(bring.convert_model)
models_app.command("compile")(compiling.compile_model)
models_app.command("gc")(upkeep.gc)
models_app.command("clear")(upkeep.clear)
models_app.command("where")(show.where)
