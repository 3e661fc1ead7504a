"""`imagen storage`: lifecycle rules, and proofs with the credentials of the environment."""

from __future__ import annotations

import json
import shlex
from math import inf
from typing import TYPE_CHECKING

import pytest
from google.auth import compute_engine
from google.cloud import storage
from typer.testing import CliRunner

from benchmarks.servers.gcs_links import FakeGcsLinks
from benchmarks.servers.s3 import S3Server
from cli.main import app
from deployments.settings import JobSettings
from deployments.store import gcs
from serve_app.jobs.options import JobOptions
from tests.store import common
from tests.store.conftest import close_clients

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

CONFIG = """\
applications:
  - import_path: serve_app.app:build
    args: {jobs: {keep_s: 129600}}
"""
PROOFS = [
    "proved: a file can be written",
    "proved: a second write does not replace it",
    "proved: it reads back as it was written",
    "proved: a signed link opens it without credentials",
    "proved: an altered link is refused",
    "proved: a link is refused once it has expired",
    "proved: the file can be deleted",
]


@pytest.fixture(autouse=True)
def fresh_clients() -> Iterator[None]:
    close_clients()
    yield
    close_clients()


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcsLinks]:
    with common.google_without_key(monkeypatch) as server:
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with common.served(S3Server(), monkeypatch) as server:
        yield server


def imagen_storage(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["storage", *arguments])


@pytest.mark.usefixtures("google", "s3")
@pytest.mark.parametrize("scheme", ["file", "gs", "s3"])
def test_a_storage_that_works_is_proved(scheme: str, tmp_path: Path) -> None:
    place = {"file": str(tmp_path / "files")}.get(scheme, "models/jobs")
    done = imagen_storage("check", f"{scheme}://{place}")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == PROOFS
    assert not [path for path in tmp_path.rglob("*.png")]


def test_a_bucket_that_checks_no_signature_fails_its_proof(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_check", lambda _: None)  # moto alone
    done = imagen_storage("check", "s3://models/jobs")
    assert done.exit_code == 7
    assert done.stdout.splitlines() == PROOFS[:4]
    assert "an altered link is refused" in done.stderr
    assert "emulator" in done.stderr


def test_credentials_that_cannot_sign_are_told_why(google: FakeGcsLinks) -> None:
    google.may_sign = False
    done = imagen_storage("check", "gs://models/jobs")
    assert done.exit_code == 2
    assert done.stdout.splitlines() == PROOFS[:3]
    assert "roles/iam.serviceAccountTokenCreator" in done.stderr
    assert list(gcs.GcsBucket("gs://models/jobs").list()) == []


def test_credentials_that_are_refused_are_told_why(s3: S3Server) -> None:
    s3.faults.add("403", times=inf)
    done = imagen_storage("check", "s3://models/jobs")
    assert done.exit_code == 7
    assert done.stdout == ""
    assert "s3:PutObject" in done.stderr


@pytest.mark.parametrize("command", ["init", "check"])
def test_a_place_that_is_no_storage(command: str) -> None:
    done = imagen_storage(command, "https://example.org/jobs")
    assert done.exit_code == 2
    assert "gs://bucket/prefix" in done.stderr


def test_a_folder_is_made(tmp_path: Path) -> None:
    done = imagen_storage("init", f"file://{tmp_path / 'files'}")
    assert done.exit_code == 0
    assert (tmp_path / "files/.link-key").is_file()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert imagen_storage("init", f"file://{tmp_path / 'file'}").exit_code == 5


def test_google_deletes_what_is_old_and_keeps_its_other_rules(
    google: FakeGcsLinks, tmp_path: Path
) -> None:
    bucket = storage.Client(project="p", credentials=compute_engine.Credentials()).get_bucket(
        "models"
    )
    bucket.add_lifecycle_set_storage_class_rule("COLDLINE", age=365)
    bucket.patch()
    config = tmp_path / "serve.yaml"
    config.write_text(CONFIG)
    for options in (["--config", str(config)], []):
        done = imagen_storage("init", "gs://models/jobs", *options)
        assert done.exit_code == 0, done.output
    bucket.reload()
    conditions = [rule["condition"] for rule in bucket.lifecycle_rules]
    # A week until the deadline, a week after the end, and a day.
    ours = {"age": 15, "matchesPrefix": ["jobs/inputs/", "jobs/outputs/"]}
    assert conditions == [{"age": 365}, ours]


@pytest.mark.usefixtures("google")
def test_googles_bucket_that_is_not_there() -> None:
    done = imagen_storage("init", "gs://none/jobs")
    assert done.exit_code == 7
    assert "There is no such bucket" in done.stderr


@pytest.mark.parametrize("url", ["s3://pictures/my jobs", "s3://pictures"])
def test_the_command_for_s3_can_be_run_as_it_is(url: str, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(CONFIG)
    done = imagen_storage("init", url, "--config", str(config))
    assert done.exit_code == 0
    assert "replaces every rule" in done.stderr
    call = shlex.split(done.stdout)
    assert call[:5] == [
        "aws",
        "s3api",
        "put-bucket-lifecycle-configuration",
        "--bucket",
        "pictures",
    ]
    rules = json.loads(call[-1])["Rules"]
    start = "my jobs/" if "my" in url else ""
    assert [rule["Filter"]["Prefix"] for rule in rules] == [f"{start}inputs/", f"{start}outputs/"]
    # A week until the deadline, a day and a half after the end, and a day: as whole days.
    assert {rule["Expiration"]["Days"] for rule in rules} == {10}


def test_pictures_never_go_before_their_jobs() -> None:
    longest = JobSettings(keep_s=7 * 86_400)
    done = imagen_storage("init", "s3://pictures")
    [days] = {r["Expiration"]["Days"] for r in json.loads(shlex.split(done.stdout)[-1])["Rules"]}
    assert days * 86_400 > JobOptions(deadline_s=7 * 86_400).deadline_s + longest.keep_s


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    done = imagen_storage("init", "s3://pictures", "--config", str(tmp_path / "none.yaml"))
    assert done.exit_code == 2
