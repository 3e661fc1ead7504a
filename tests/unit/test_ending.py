"""Every command ends the same way: a red message, one JSON object, an exit code."""

from __future__ import annotations

import json
import logging

import pytest
import typer

from cli.console import Output
from cli.ending import ending
from deployments.errors import ConfigError, ImagenError, NotFound, SourceFailed


def end_with(error: BaseException, *, as_json: bool = False) -> int:
    with pytest.raises(typer.Exit) as caught, ending(Output(as_json=as_json)):
        raise error
    return caught.value.exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("The file is wrong.", remedy="Correct it."), 2),
        (SourceFailed("The hub refused.", remedy="Correct it."), 7),
        (NotFound("No such task.", remedy="Correct it."), 2),
    ],
)
def test_an_error_is_printed_and_gives_its_code(
    error: ImagenError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_with(error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert error.message in err
    assert "Correct it." in err


def test_with_json_an_error_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    error = SourceFailed("The hub refused.", value="hf://a/b", remedy="Correct it.")
    assert end_with(error, as_json=True) == 7
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "code": "source_failed",
            "exit_code": 7,
            "message": "The hub refused.",
            "value": "hf://a/b",
            "remedy": "Correct it.",
        },
        "exit_code": 7,
    }


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_other_errors_and_exits_pass() -> None:
    assert end_with(typer.Exit(3)) == 3
    with pytest.raises(ZeroDivisionError), ending(Output(as_json=False)):
        raise ZeroDivisionError


def test_log_lines_appear_meanwhile_and_not_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("ray.serve.imagen.test")
    with ending(Output(as_json=False)):
        logger.warning("something is odd")
    assert "something is odd" in capsys.readouterr().err
    assert logger.parent is not None
    assert not logging.getLogger("ray.serve.imagen").handlers
