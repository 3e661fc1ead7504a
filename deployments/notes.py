"""Notes: what the service could not keep of a request, or chose for it, for programs and people.

The code that loses or chooses makes the note. It travels with the picture (`Picture.notes`) or the
row (`RowInput.notes`) into the result, where clients find it in `X-Imagen-Note`, in the picture's
metadata and in the job.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

_MOST_CHARACTERS = 300


class Code(StrEnum):
    """What happened, for programs. docs/notes.md says the same for people."""

    FRAMES_DROPPED = "frames_dropped"
    AUXILIARY_DROPPED = "auxiliary_dropped"
    GAIN_MAP_DROPPED = "gain_map_dropped"
    CHUNK_DROPPED = "chunk_dropped"
    END_MISSING = "end_missing"
    TRAILING_BYTES = "trailing_bytes"
    DEPTH_REDUCED = "depth_reduced"
    PROFILE_CONVERTED = "profile_converted"
    PROFILE_IGNORED = "profile_ignored"
    PROFILE_MISSING = "profile_missing"
    HDR_TONE_MAPPED = "hdr_tone_mapped"
    GREY_KEPT = "grey_kept"
    ALPHA_DROPPED = "alpha_dropped"
    NO_FOREGROUND = "no_foreground"
    SCALE_REDUCED = "scale_reduced"
    WORKING_SIZE = "working_size"
    MASKED = "masked"
    TILED = "tiled"
    DETAIL_REDUCED = "detail_reduced"
    PROMPT_CUT = "prompt_cut"
    NEGATIVE_PROMPT_UNUSED = "negative_prompt_unused"
    PARAMETER_UNUSED = "parameter_unused"
    SEED_DRAWN = "seed_drawn"
    SEED_SHORTENED = "seed_shortened"


class Note(NamedTuple):
    """One loss or choice.

    Attributes:
        code: of the class `Code`.
        text: one sentence in printable ASCII, of at most 300 characters.
    """

    code: str
    text: str


def note(code: Code, text: str) -> Note:
    """A note whose sentence is safe in an HTTP header, whatever a file or a client put into it."""
    ascii_text = text.encode("ascii", "backslashreplace").decode()
    line = "".join(letter if letter.isprintable() else " " for letter in ascii_text)
    if len(line) > _MOST_CHARACTERS:
        line = line[: _MOST_CHARACTERS - 4] + "...."
    return Note(str(code), line)


def trailing_bytes(count: int) -> Note:
    """The note of bytes behind the end of a picture."""
    return note(Code.TRAILING_BYTES, f"{count} bytes behind the end of the picture were left out.")


def gain_map_dropped() -> Note:
    """The note of a picture whose gain map is not applied."""
    told = "The gain map for HDR screens was left out: the result is made of the SDR picture."
    return note(Code.GAIN_MAP_DROPPED, told)


def no_steps(parameter: str, model: str) -> Note:
    """The note of a parameter that asks for pictures of the steps, of a model that has none."""
    told = f"{parameter} was ignored: {model} has no steps to show."
    return note(Code.PARAMETER_UNUSED, told)


def documents(notes: tuple[Note, ...]) -> list[dict[str, str]]:
    """Notes ready for JSON."""
    return [{"code": one.code, "text": one.text} for one in notes]


def from_documents(found: list[dict[str, str]]) -> tuple[Note, ...]:
    """The notes that `documents` made ready."""
    return tuple(Note(one["code"], one["text"]) for one in found)
