"""The counts of suspects on real rows come from the kept lists and judgements, and are those of the page."""

import math

import pandas as pd
import pytest

from benchmarks.evidence import suspects_lists
from tests.test_docs import ROOT

PAGE = (ROOT / "benchmarks" / "evidence" / "suspects.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def found():
    return {cells[0]: cells[1:] for cells in suspects_lists.counts()}


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("default", "| the default |"),
        ("default, without the sentence embedding", "| the default without the sentence embedding |"),
        ("Perplexity", "| `Perplexity` alone, not among the defaults |"),
        ("until 2026-11-26", "| the order until 2026-11-26, the largest of weighted percentiles |"),
    ],
)
def test_the_page_has_the_counts(order, words, found):
    assert f"{words} {found[order][1]} | {found[order][2]} |" in PAGE


def test_a_count_by_hand(found):
    """By pandas, from the pages as they are: rows to be mended of the default's first 50, and of the 50 others."""
    results = ROOT / "benchmarks" / "results"
    said = {}
    for page in suspects_lists.READ:
        for line in (results / f"{page}.md").read_text(encoding="utf-8").splitlines():
            cells = line.strip("| ").split(" | ")
            if page.endswith("order") and len(cells) == 2:
                said[cells[0]] = cells[1]
            elif page.startswith("2026-11-26") and len(cells) == 6:
                said[cells[1]] = cells[3]
            elif page.startswith("2026-11-23") and len(cells) == 5:
                said[cells[0]] = cells[3]
    lists = pd.read_csv(suspects_lists.FILE, keep_default_na=False)
    default = lists[lists["order"] == "default"]
    wrong = (default["id"].map(said) == "yes").sum()
    assert found["default"][:2] == ["50", str(wrong)]
    others = [said[each] for each in suspects_lists.others()].count("yes")
    half = 1.96 * math.sqrt(1 / wrong + 1 / others - 2 / 50)
    low, high = (wrong / others * math.exp(sign * half) for sign in (-1, 1))
    assert found["default"][2] == f"{wrong / others:.1f} [{low:.1f}, {high:.1f}]"
    stands_out = default[default["signal"].str.endswith("+")]
    assert f"{len(stands_out)} rows stand out, {(stands_out['id'].map(said) == 'yes').sum()} of which" in PAGE
