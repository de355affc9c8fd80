"""What the soft labels are: the pages have what the commands print, and the contrasts by formulas of their own."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence.packed import whole
from benchmarks.evidence.regularises.analyse import BEST, Contrast, difference
from benchmarks.evidence.softlabels import afterwards, analyse, finer
from benchmarks.evidence.softlabels.run import FIRST
from benchmarks.evidence.tiers import RESULTS
from tests.test_docs import ROOT

PAGE = (RESULTS / "softlabels.md").read_text(encoding="utf-8")
WORDS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
CONTRASTS = {
    "P1": ("SoftLabels", "Unigram", "last", "nll_temperature_scaled", 0.015, 16),
    "P2": ("SFTMix", "SoftLabels-weak", "last", "nll_temperature_scaled", 0.015, 8),
    "P3": ("Unigram", "Uniform", "last", "nll_temperature_scaled", 0.015, 8),
    "P4": ("Unigram", "NTP", "best", "nll", 0.005, 16),
    "P5": ("SFTMix", "SFTMix-permuted", "last", "nll", 0.011, 8),
}


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def of(arm, when, figure, seeds):
    """Return f64[S], a figure of an arm from the files of either study."""
    found = []
    for seed in seeds:
        places = [
            whole(RESULTS / study) / "runs" / f"{arm}-seed-{seed}.json" for study in ("softlabels", "regularises")
        ]
        file = next(place for place in places if place.exists())
        found.append(json.loads(file.read_text())[when][figure])
    return np.array(found)


@pytest.fixture(scope="module")
def differences():
    """Return, by contrast, f64[S] of its seeds."""
    return {
        name: of(ours, when, figure, range(1, n + 1)) - of(theirs, when, figure, range(1, n + 1))
        for name, (ours, theirs, when, figure, _, n) in CONTRASTS.items()
    }


def test_the_page_has_what_the_analysis_prints():
    there = cells_of(PAGE)
    report = analyse.report(RESULTS)
    assert [row for row in cells_of(report) if row not in there and set(row[1]) != {"-"}] == []
    assert "Not there: none." in report
    assert "Diverged, left out: none." in report
    first = json.loads((whole(RESULTS / "softlabels") / "analysed.json").read_text())["time"]
    assert f"Analysed once, on {first.replace(' ', ' at ', 1)}" in PAGE


def test_the_page_has_what_was_seen_afterwards():
    runs, there, fine = analyse.Kept(RESULTS), cells_of(PAGE), finer.Fine()
    study = analyse.Kept(RESULTS, fine.seeds)
    rows = [*afterwards.of_best(runs), *afterwards.of_halves(), *afterwards.of_contrasts(runs)]
    rows += [*afterwards.of_shares(runs), *finer.of_best(fine, study), *finer.of_contrasts(fine, study)]
    assert [row for row in rows if row not in there] == []
    assert afterwards.of_fit(analyse.Kept(RESULTS, FIRST)) in " ".join(PAGE.split())


@pytest.mark.parametrize("name", CONTRASTS)
def test_a_contrast_by_hand(name, differences):
    """Means, Student's intervals and both p after Holm, on the page and among the results."""
    values, margin = differences[name], CONTRASTS[name][4]
    different = {key: stats.ttest_1samp(each, 0).pvalue for key, each in differences.items()}
    equal = {
        key: max(
            stats.ttest_1samp(each, -CONTRASTS[key][4], alternative="greater").pvalue,
            stats.ttest_1samp(each, CONTRASTS[key][4], alternative="less").pvalue,
        )
        for key, each in differences.items()
    }
    (row,) = [row for row in cells_of(PAGE) if row[0].startswith(f"{name}:") and len(row) == 10]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert row[1:4] == [str(len(values)), f"{values.mean():+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
    assert row[5:8] == [str(margin), f"{holm(different, name):.2g}", f"{holm(equal, name):.2g}"]
    assert f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]" in WORDS
    by_seed = [f"{value:+.4f}" for value in values] + ["-"] * (16 - len(values))
    assert [row[0], *by_seed] in cells_of(PAGE)


def holm(p, name):
    """Return the p of a contrast after Holm's correction over all."""
    smaller = sorted(value for value in p.values() if value <= p[name])
    return min(1.0, max((len(p) - rank) * value for rank, value in enumerate(smaller)))


def test_the_finer_runs_are_the_studys_where_both_are_evaluated():
    """Each has the study's losses at the ends of epochs, and none of these is lower than its best step."""
    fine = finer.Fine()
    study = analyse.Kept(RESULTS, fine.seeds)
    for key, run in fine.runs.items():
        ends, of_study = run["evaluations"][4::5], study.runs[key]["evaluations"]
        np.testing.assert_allclose(ends, of_study[: len(ends)], rtol=1e-6)
        assert min(run["evaluations"]) <= min(of_study) + 1e-6
        assert len(run["evaluations"]) == int(np.argmin(run["evaluations"])) + 6


def test_readme_says_what_is_not_told_apart_at_the_best_step():
    fine = finer.Fine()
    values = fine.values(Contrast("", difference("SFTMix", "NTP"), BEST))
    assert stats.ttest_1samp(values, 0).pvalue > 0.05
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "at the best step of each, the two are not told apart (four seeds)" in words
    assert len(values) == 4
