"""Errors keep what they say on their way through processes, and the tree is as it is drawn."""

from __future__ import annotations

import copy
import pickle
import re
from typing import TYPE_CHECKING

import pytest

from deployments import errors
from deployments.errors import ImagenError, Problem, RequestError, ServiceError, SetupError

if TYPE_CHECKING:
    from collections.abc import Iterator


def below(kind: type[ImagenError]) -> Iterator[type[ImagenError]]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


BRANCHES = {ImagenError, RequestError, ServiceError, SetupError}
EVERY = [ImagenError, *below(ImagenError)]
LEAVES = [kind for kind in EVERY if kind not in BRANCHES]
PROBLEM = Problem(parameter="steps", fact="too many", value="151", remedy="Send fewer.")


def drawn() -> dict[str, int | None]:
    """Name and status of each leaf in the module's docstring."""
    lines = re.findall(r"^\s+x (\w+)(?: +(\d{3}))?", errors.__doc__ or "", re.MULTILINE)
    return {name: int(status) if status else None for name, status in lines}


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_survives_a_process_hop_whole(kind: type[ImagenError]) -> None:
    error = kind(
        "The fact.", value=151, remedy="The remedy.", retry_after_s=2.5, problems=(PROBLEM,)
    )
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert vars(twin) == vars(error)
        assert twin.args == ("The fact.",)
        got = "" if issubclass(kind, ServiceError) else " (got 151)"
        assert str(twin) == f"The fact{got}. The remedy."


def test_a_client_reads_nothing_rather_than_an_empty_value() -> None:
    error = RequestError("The field webhook is no URL.", value="", remedy="Leave it out.")
    assert error.details("id")["value"] == "nothing"
    assert str(error) == "The field webhook is no URL. Leave it out."


def test_every_error_is_drawn_in_the_tree_and_nothing_else() -> None:
    assert set(drawn()) == {kind.__name__ for kind in LEAVES}


@pytest.mark.parametrize("kind", LEAVES)
def test_the_tree_tells_the_status_of_whatever_a_client_can_see(kind: type[ImagenError]) -> None:
    seen = not issubclass(kind, SetupError)
    assert drawn()[kind.__name__] == (int(kind.status) if seen else None)


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in EVERY]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch("[a-z_]+", code) for code in codes)


def test_the_client_is_blamed_for_its_own_errors_only() -> None:
    assert all(400 <= kind.status < 500 for kind in below(RequestError))
    assert all(kind.status in (429, 503, 504) for kind in below(ServiceError))


def test_a_long_value_is_cut() -> None:
    assert errors.TooLarge("Long.", value="x" * 201).value == "x" * 200
    assert errors.TooLarge("Long.", value="x" * 200).value == "x" * 200


def test_what_is_not_said_leaves_no_trace_in_the_text() -> None:
    assert str(errors.NotFound("No such route.")) == "No such route."
    assert str(errors.NotFound("No such route.", value="/x")) == "No such route (got /x)."


def test_lateness_is_explained_with_a_remedy() -> None:
    error = errors.too_late()
    assert error.status == 504
    assert "fewer steps" in error.remedy
