"""Hostile requests: no 5xx, no status that the OpenAPI document does not know, and no hang.

`make fuzz` is the long version, with a new seed each time. $IMAGEN_FUZZ_SEED repeats what is drawn.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deployments.tasks import Task
from serve_app.jobs.options import JobOptions
from tests.fuzz.attacks import PLAUSIBLE
from tests.fuzz.hunt import HANG_S, Hunt
from tests.fuzz.target import target

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.fuzz.target import Target

LONG = "IMAGEN_FUZZ_S" in os.environ
SECONDS = float(os.environ.get("IMAGEN_FUZZ_S", "8"))
"""Of the fuzzer, with and without API keys together."""
EXAMPLES, LEAST_CASES = (100, 2000) if LONG else (3, 500)
"""Of Schemathesis: for each operation and phase, and in all."""
SEED = int(os.environ.get("IMAGEN_FUZZ_SEED") or (secrets.randbelow(10**6) if LONG else 1))
MOST_GROWTH_MB = 150
_FAULT = "Unsupported type: 'Binary'"
"""Of Schemathesis 4.32 itself: it cannot always mutate a form with a file, and skips its route."""
_PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[False, True], ids=["open", "keys"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Target]:
    with target(tmp_path_factory.mktemp("fuzz"), keys=request.param) as running:
        yield running


def test_schemathesis_finds_no_answer_that_the_document_does_not_know(
    served: Target, tmp_path: Path
) -> None:
    found = schemathesis(served, tmp_path)
    print(found.stdout)
    faults = set(re.findall(r"^Runtime Error\n\n(.+)$", found.stdout, re.MULTILINE))
    ended_well = found.returncode == 0 or (
        "= FAILURES =" not in found.stdout and faults == {_FAULT}
    )
    assert ended_well, found.stdout
    cases = re.search(r"([\d,]+) generated", found.stdout)
    assert cases
    assert int(cases[1].replace(",", "")) >= LEAST_CASES
    assert not served.alarms()
    served.check_service()


def schemathesis(served: Target, folder: Path) -> subprocess.CompletedProcess[str]:
    """Its own program, which tells how many cases it made, and how to repeat a failed one."""
    options = {
        "--seed": SEED,
        "--max-examples": EXAMPLES,
        "--checks": "all",
        # The document cannot say that some bytes are no picture, nor that a field wants a header;
        # and a picture from hooks.py is bytes, which Schemathesis takes for a breach.
        # A canceled job can still be read.
        "--exclude-checks": "positive_data_acceptance,negative_data_rejection,use_after_free",
        "--request-timeout": HANG_S,
        "--generation-database": "none",
        "--warnings": "off",
        "--header": [f"{name}: {value}" for name, value in served.headers.items()],
    }
    words = [
        str(word)
        for name, value in options.items()
        for one in (value if isinstance(value, list) else [value])
        for word in (name, one)
    ]
    program = Path(sys.executable).with_name("st")
    return subprocess.run(
        [program, "run", f"{served.url}/openapi.json", "--no-color", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(_PROJECT), "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_the_attacks_know_every_field() -> None:
    fields = {name for task in Task for name in task.request.model_fields}
    assert {name.encode() for name in fields | JobOptions.model_fields.keys()} <= PLAUSIBLE.keys()


def test_no_hostile_request_makes_the_service_fail(served: Target) -> None:
    hunt = Hunt(served, SEED)
    hunt.run(SECONDS / 4)
    held_mb = served.held_mb
    hunt.run(SECONDS / 4)
    print(hunt.report(), f"memory {held_mb:.0f} MB, then {served.held_mb:.0f} MB", sep="\n")
    assert not hunt.findings, hunt.report()
    assert hunt.slowest_s < HANG_S
    assert served.held_mb < held_mb + MOST_GROWTH_MB
    assert not served.alarms()
    served.check_service()
