"""`imagen keys`: make, list and revoke API keys.

A new token goes to stdout, once; tables too; everything else goes to stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Output, Row, make_table
from cli.ending import ending
from deployments.settings import KEYS_VARIABLE, AccessSettings, KeyLimits, parse_settings

if TYPE_CHECKING:
    from serve_app.access.keys import Key

keys_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="API keys of clients: make, list, revoke. Running servers follow within seconds.",
)
File = Annotated[
    Path | None,
    typer.Option("--keys", help=f"The file; default: ${KEYS_VARIABLE}, else ~/.config/imagen"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout")]
_DEFAULT = "Default: the server's access.limits"

# Functions import serve_app.access, so that other commands start quickly.


@keys_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people")],
    requests_per_s: Annotated[float | None, typer.Option(help=_DEFAULT)] = None,
    pictures: Annotated[int | None, typer.Option(help="At a time. " + _DEFAULT)] = None,
    megapixels_per_minute: Annotated[float | None, typer.Option(help=_DEFAULT)] = None,
    queue_share: Annotated[float | None, typer.Option(help="From 0 to 1. " + _DEFAULT)] = None,
    wait_share: Annotated[float | None, typer.Option(help="From 0 to 1. " + _DEFAULT)] = None,
    keys: File = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print its token, which cannot be shown again."""
    output = Output(as_json=as_json)
    with ending(output):
        from serve_app.access.editing import create_key

        given = {
            "requests_per_s": requests_per_s,
            "pictures": pictures,
            "megapixels_per_minute": megapixels_per_minute,
            "queue_share": queue_share,
            "wait_share": wait_share,
        }
        own = {limit: value for limit, value in given.items() if value is not None}
        place = _place(keys)
        key, token = create_key(place, name, parse_settings(KeyLimits, own, "A limit"))
    output.show(token)
    output.emit(_row(key) | {"token": token, "file": str(place)})
    output.say(f"Key {key.id} of {key.name} is in {place}. Keep its token: it is not stored.")


@keys_app.command("list")
def list_keys(keys: File = None, as_json: AsJson = False) -> None:
    """Show every key, without its token."""
    output = Output(as_json=as_json)
    with ending(output):
        from serve_app.access.editing import load_keys

        found = load_keys(_place(keys))
    table = make_table("Id", "Name", "Created", "Revoked", "Own limits")
    for key in found:
        row = _row(key)
        own = ", ".join(f"{limit} {value:g}" for limit, value in row["limits"].items())
        table.add_row(key.id, key.name, row["created"], row["revoked"] or "", own)
    output.show(table if found else "There are no keys.")
    output.emit({"keys": [_row(key) for key in found]})


@keys_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `imagen keys list` shows it")],
    keys: File = None,
    as_json: AsJson = False,
) -> None:
    """Refuse a key from now on."""
    output = Output(as_json=as_json)
    with ending(output):
        from serve_app.access.editing import revoke_key

        key = revoke_key(_place(keys), key_id)
    output.emit(_row(key))
    output.say(f"Key {key.id} of {key.name} is revoked. Servers that read the file refuse it now.")


def _place(file: Path | None) -> Path:
    return file.absolute() if file else AccessSettings().keys_file


def _row(key: Key) -> Row:
    values = key.model_dump(mode="json", exclude={"sha256", "limits"})
    own = key.limits.model_dump(exclude_unset=True)
    return values | {"limits": {limit: value for limit, value in own.items() if value is not None}}
