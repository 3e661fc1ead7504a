"""`imagen storage`: the place of jobs' pictures, made and proved."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cli.config import settings_of
from cli.console import Output
from cli.ending import ending
from cli.proofs import prove
from deployments.settings import JobSettings, StoreSettings
from deployments.store.folder_bucket import local_folder
from deployments.store.provider import make_bucket, open_bucket
from deployments.store.transfer import retrying
from serve_app.jobs.files import FOLDERS
from serve_app.jobs.links import folder_key
from serve_app.jobs.options import life_s

storage_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The storage of jobs' pictures: file://, gs:// or s3:// (`jobs.storage`).",
)
Url = Annotated[
    str, typer.Argument(help="gs://bucket/prefix, s3://bucket/prefix or file:///folder")
]
_TRIES = StoreSettings(attempts=4)
_DAY_S = 86_400


@storage_app.command()
def init(
    url: Url,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="The application's Serve config file, whose jobs.keep_s counts"
        ),
    ] = None,
) -> None:
    """Let pictures of jobs expire: write the bucket's lifecycle rule, or make the folder.

    A picture goes once its job can neither run nor be looked at any more: after the longest
    deadline and jobs.keep_s, and one day. That is 15 days unless --config names a shorter time.

    For s3:// it prints the command that writes the rules, because the library it uses cannot.

    Exit codes: 0 done; 2 usage or configuration; 5 the folder cannot be written; 7 the bucket
    failed or refused.
    """
    output = Output(as_json=False)
    with ending(output):
        jobs = JobSettings() if config is None else settings_of(config).jobs
        days = math.ceil(life_s(jobs.keep_s) / _DAY_S)
        bucket = make_bucket(url)
        if url.startswith("file://"):
            folder_key(local_folder(url))
            output.say("The folder is ready. The application deletes what is old (jobs.keep_s).")
        elif url.startswith("s3://"):
            output.say(
                "Run this command. It replaces every rule that the bucket has; `aws s3api"
                " get-bucket-lifecycle-configuration` shows them.",
                "yellow",
            )
            output.show(_s3_command(url, days))
        else:
            from deployments.store.gcs import GcsBucket  # slow to import

            assert isinstance(bucket, GcsBucket)  # noqa: S101 - narrows the type
            retrying(lambda: bucket.expire_after(days, FOLDERS), _TRIES)
            output.say(f"Google deletes pictures after {days} days.")


@storage_app.command()
def check(url: Url) -> None:
    """Prove with these credentials that jobs can use the storage: put, read, links, expiry, delete.

    Prints one line for each proof; takes a few seconds, and leaves nothing behind.

    Exit codes: 0 proved; 2 usage, configuration, or credentials that cannot sign; 5 the folder
    cannot be written; 7 a proof failed, or the bucket failed or refused.
    """
    output = Output(as_json=False)
    with ending(output):
        for proof in prove(open_bucket(url, _TRIES), _TRIES):
            output.show(f"proved: {proof}")


def _s3_command(url: str, days: int) -> str:
    """The call of Amazon's command line that writes the lifecycle."""
    name, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
    rules = [
        {
            "ID": f"imagen-{folder}",
            "Status": "Enabled",
            "Filter": {"Prefix": f"{prefix}/{folder}/" if prefix else f"{folder}/"},
            "Expiration": {"Days": days},
        }
        for folder in FOLDERS
    ]
    call = ["aws", "s3api", "put-bucket-lifecycle-configuration", "--bucket", name]
    return shlex.join([*call, "--lifecycle-configuration", json.dumps({"Rules": rules})])
