"""The bounds on the pages are those of the code. What happens beyond each of them: the tests that SECURITY.md names."""

import pytest

from sftmix.components.others import endpoint
from sftmix.config import load
from sftmix.data import row_files
from sftmix.disk import places, texts
from sftmix.model import varlen
from sftmix.text import templates
from tests.tiny import ROOT

SECURITY, LIMITS, DATA = "SECURITY.md", "docs/limits.md", "docs/data.md"
LARGEST = f"{row_files.MAX_ROW:,} characters"
TIME = f"{templates.SECONDS:g} s of processor time, {1000 * templates.EACH_TURN:g} ms more for each turn"
LETTERS = f"{templates.LETTERS:,} characters"
NUMBERS = {10: "ten"}
YAML = f"YAML {load._LONGEST:,} characters, {load._DEEPEST} levels and {load._MOST:,} values"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        *((page, LARGEST) for page in (SECURITY, LIMITS, DATA)),
        (SECURITY, f"a text file {row_files.MAX_TEXT_BYTES >> 20} MiB"),
        (LIMITS, f"a text file of {row_files.MAX_TEXT_BYTES >> 20} MiB"),
        (DATA, f"a `.txt` file {row_files.MAX_TEXT_BYTES >> 20} MiB"),
        (SECURITY, f"A template has at most {LETTERS}"),
        (SECURITY, f"{TIME} and {1e6 * templates.EACH_LETTER:g} s for each million characters"),
        (SECURITY, f"{templates.MEGABYTES:,} MB of memory"),
        (SECURITY, f"{LETTERS} and {NUMBERS[templates.TIMES]} more for each of the row"),
        (SECURITY, f"SIGPROF ends the process after {templates.STUCK} s of its threads"),
        (SECURITY, f"JSON has at most {texts._LARGEST >> 20} MiB, {YAML}"),
        (SECURITY, f"answers have at most {endpoint.MOST >> 20} MiB"),
        (SECURITY, f"with a part above {places._LONGEST} bytes"),
        (LIMITS, f"head widths a multiple of 8 up to {varlen.WIDEST}"),
    ],
)
def test_a_bound_on_a_page_is_that_of_the_code(page, said):
    assert said in " ".join((ROOT / page).read_text(encoding="utf-8").split())
