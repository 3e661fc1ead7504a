"""Each file of the torture set decodes to what plain arithmetic says, and says what it lost."""

from __future__ import annotations

import pytest

from benchmarks.torture.cases import CASES, Case
from benchmarks.torture.judge import fault_of
from deployments import images
from deployments.errors import DamagedImage
from deployments.settings import LimitSettings

# As `images` sets on import; pytest puts its own filters before it.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

LIMITS = LimitSettings()
FILES = [case for case in CASES if not case.fields and case.form == "plain"]
BY_THE_MODEL = {"grey_kept", "working_size", "no_foreground"}
"""Notes that come later than the decoder."""
ALSO = {
    "grey JPEG with a colour profile": "profile_converted",
    "HEIC of 10 bits": "depth_reduced",
}
"""Notes of cases that ask for none, or for another one."""


def test_the_set_has_at_least_sixty_cases_of_different_names() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_a_file_decodes_as_it_should(case: Case) -> None:
    if case.refused:
        with pytest.raises(DamagedImage):
            images.decode(case.file, LIMITS)
        return
    picture = images.decode(case.file, LIMITS)
    assert fault_of(case, picture.rgb.astype(int), within=4) == ""
    assert picture.is_grey or not case.is_grey
    wanted = {case.note, ALSO.get(case.name, "")} - BY_THE_MODEL - {""}
    assert {one.code for one in picture.notes} == wanted
