"""The page of the soft labels where one would stop has the figures of the kept runs."""

import itertools
import math
import statistics

import pytest

from benchmarks.evidence.softlabels import second
from benchmarks.evidence.study import read_study
from tests.test_docs import ROOT

PAGE = (ROOT / "benchmarks" / "results" / "evidence" / "second.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs():
    return read_study(second.KEPT).runs


def test_the_page_has_the_contrasts():
    for line in second.contrasts():
        assert line in PAGE


def test_the_first_contrast_by_hand(runs):
    """Student's interval of eight differences, and all 256 signs; the least of four p values has Holm's factor 4."""
    found = [runs["SFTMix", seed]["eval_nll_best"] - runs["NTP", seed]["eval_nll_best"] for seed in range(21, 29)]
    mean, half = statistics.mean(found), 2.3646 * statistics.stdev(found) / math.sqrt(8)
    sums = [
        abs(sum(s * x for s, x in zip(signs, found, strict=True))) for signs in itertools.product((1, -1), repeat=8)
    ]
    p = statistics.mean(total >= abs(sum(found)) - 1e-12 for total in sums)
    assert p == 2 / 256
    cells = f"{mean:+.4f} | [{mean - half:+.4f}, {mean + half:+.4f}] | {4 * p:.2g} | different, equal |"
    assert f"| D1: SFTMix − NTP, best | {cells}" in PAGE


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("best", lambda run: run["eval_nll_best"]),
        ("last", lambda run: run["eval_nll_after"]),
        ("tempered", lambda run: run["calibration"]["nll_temperature_scaled"]),
        ("temperature", lambda run: run["calibration"]["temperature"]),
        ("calibration error (ECE)", lambda run: run["calibration"]["ece"]),
        ("Brier score", lambda run: run["calibration"]["brier"]),
        ("accuracy", lambda run: run["eval_accuracy"]),
    ],
)
def test_the_page_has_the_means(words, value, runs):
    cells = []
    for arm in ("NTP", "SFTMix", "SoftLabels", "Unigram"):
        found = [value(runs[arm, seed]) for seed in range(21, 29)]
        cells.append(f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}")
    assert f"| {words} | {' | '.join(cells)} |" in PAGE


def test_the_matching_is_that_of_the_page(runs):
    soft, unigram = (
        statistics.mean(runs[arm, seed]["calibration"]["temperature"] for seed in range(21, 29))
        for arm in ("SoftLabels", "Unigram")
    )
    assert f"differ by {abs(soft - unigram):.4f}" in PAGE
