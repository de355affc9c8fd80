"""What the page says of rows whose truth is known: by the rules of the plan, and no more than its tests show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.evidence.contrasts import Contrast
from benchmarks.evidence.known_outcomes import Parts, of_auc, of_exact, of_gap
from benchmarks.evidence.known_predictions import prediction_rows
from benchmarks.evidence.known_tests import contrasts
from benchmarks.evidence.results import known_lines
from sftmix.common.files import write_json
from sftmix.tools.quickstart.tasks import DETERMINISTIC

HIGHER, LOWER = Contrast(0.2, (0.1, 0.3), 0.01, 0.05), Contrast(-0.2, (-0.3, -0.1), 0.01, 0.05)
EQUAL, OPEN = Contrast(0.0, (-0.01, 0.01), 1.0, 0.05), Contrast(0.1, (-0.1, 0.3), 0.5, 0.05)
SMALL = Contrast(0.01, (0.005, 0.015), 0.01, 0.05)
NEITHER, WRONG_UP, WRONG_DOWN = Parts(0, 0), Parts(1, 0), Parts(-1, 0)
RIGHT_UP, RIGHT_DOWN = Parts(0, 1), Parts(0, -1)
UNDECIDED_PARTS = "which rows do it is undecided: the interval of neither part shows it"
RESISTS, KEEPS = "SFTMix resists wrong responses", "at μ = 0.2 it does not keep wrong responses from being learnt"


@pytest.mark.parametrize(
    ("ntp", "random", "to_ntp", "to_random", "meaning"),
    [
        (HIGHER, HIGHER, WRONG_UP, WRONG_UP, f"{RESISTS}, and confidence is why"),
        (
            HIGHER,
            HIGHER,
            Parts(1, 1),
            WRONG_UP,
            f"{RESISTS}, and confidence is why; it learns right ones less well, too",
        ),
        (
            HIGHER,
            HIGHER,
            WRONG_UP,
            RIGHT_DOWN,
            f"{RESISTS}; that confidence is why is not shown, as RandomSplit may resist them as well",
        ),
        (HIGHER, EQUAL, WRONG_UP, NEITHER, "any Mixup of this size does it; confidence has no part above 0.05 nat"),
        (
            HIGHER,
            SMALL,
            Parts(1, -1),
            NEITHER,
            "any Mixup of this size does it; confidence has no part above 0.05 nat (a difference to RandomSplit is "
            "real, too small to matter); it learns right ones better, too",
        ),
        (HIGHER, LOWER, WRONG_UP, WRONG_DOWN, f"{RESISTS}, and RandomSplit more, which the plan did not foresee"),
        (HIGHER, OPEN, WRONG_UP, WRONG_UP, f"{RESISTS}; whether confidence is why is undecided"),
        (HIGHER, None, WRONG_UP, NEITHER, f"{RESISTS}; whether confidence is why is undecided"),
        (
            HIGHER,
            HIGHER,
            RIGHT_DOWN,
            WRONG_UP,
            "it learns the right responses better; that it resists wrong ones is not shown",
        ),
        (HIGHER, HIGHER, NEITHER, WRONG_UP, UNDECIDED_PARTS),
        (EQUAL, HIGHER, NEITHER, WRONG_UP, KEEPS),
        (EQUAL, EQUAL, Parts(1, 1), NEITHER, f"{KEEPS} more than right ones"),
        (LOWER, HIGHER, WRONG_DOWN, WRONG_UP, "it learns wrong responses better"),
        (LOWER, LOWER, RIGHT_UP, NEITHER, "it learns the right responses less well; nothing is said of wrong ones"),
        (
            LOWER,
            OPEN,
            Parts(-1, 1),
            NEITHER,
            "it learns wrong responses better, and it learns the right responses less well",
        ),
        (LOWER, OPEN, NEITHER, NEITHER, UNDECIDED_PARTS),
        (SMALL, HIGHER, WRONG_UP, WRONG_UP, "real, too small to matter"),
        (OPEN, HIGHER, WRONG_UP, WRONG_UP, "neither different from NTP's nor equal to it"),
        (None, None, NEITHER, NEITHER, "no seed has a figure of both arms"),
    ],
)
def test_the_meaning_of_a_gap_claims_no_more_than_its_tests(ntp, random, to_ntp, to_random, meaning):
    assert of_gap(ntp, random, to_ntp, to_random)[1] == meaning


@pytest.mark.parametrize(
    ("interval", "outcome", "meaning"),
    [
        ((0.81, 0.9), "found well", "a low confidence marks wrong responses; a user may look there first"),
        ((0.8, 0.9), "found, not well", "a wrong response has the lower confidence more often than not; no more"),
        ((0.3, 0.49), "not found", "confidence tells difficulty here, not truth"),
        ((0.48, 0.7), "not found", "the plan reads it as"),
        (None, "undecided", "one seed has no interval"),
    ],
)
def test_the_meaning_of_an_auc(interval, outcome, meaning):
    told = of_auc({"deterministic": {"mean": 0.5, "interval": interval}})
    assert (told[0], told[1].startswith(meaning)) == (outcome, True)
    assert ("does not show that" in told[1]) is (interval == (0.48, 0.7))


@pytest.mark.parametrize(
    ("found", "share", "outcome", "meaning"),
    [
        (HIGHER, 0, "higher than NTP's", "it helps held-out answers"),
        (HIGHER, 10, "higher than NTP's", "it helps held-out answers where rows are wrong"),
        (LOWER, 10, "lower than NTP's", "mixing costs answers"),
        (EQUAL, 10, "equal to NTP's", "it neither helps nor costs answers by 0.02 or more"),
        (SMALL, 10, "higher than NTP's, and equal within 0.02", "real, too small to matter"),
        (OPEN, 10, "undecided", "neither different from NTP's nor equal to it"),
        (None, 10, "not to be told", "no seed has a figure of both arms"),
    ],
)
def test_the_meaning_of_exact_match(found, share, outcome, meaning):
    assert of_exact(found and replace(found, margin=0.02), share) == (outcome, meaning)


def test_a_prediction_stands_beside_what_came_and_one_of_an_unfinished_table_stays_open():
    def auc(known: float, among_all: float) -> dict:
        return {"deterministic": {"mean": known}, "all": {"mean": among_all}}

    def contrast(mean: float, reach: float, p_holm: float) -> dict:
        return {"mean": mean, "interval": (mean - reach, mean + reach), "p_holm": p_holm}

    gap = {"10": contrast(0.02, 0.1, 0.3), "20": contrast(0.12, 0.01, 0.01), "40": contrast(0.05, 0.01, 0.01)}
    random = {"10": contrast(0.01, 0.01, 0.3), "20": contrast(0.1, 0.02, 0.01), "40": contrast(0.0, 0.1, 1.0)}
    tests = {
        "auc": {"10": auc(0.85, 0.6), "20": auc(0.8, 0.9), "40": auc(0.7, 0.6)},
        "gap": {"SFTMix - NTP": gap, "SFTMix - RandomSplit": random},
        "exact": {"SFTMix - NTP": {"0": contrast(0.0, 0.01, 1.0)}},
    }
    yes, no, open_ = "as predicted", "not as predicted", "not yet"
    told = list(prediction_rows(tests, [0, 10, 20, 40]))
    expected = {1: [yes, no, yes], 2: [yes, no, yes], 3: [yes, no, yes, no], 4: [yes, no, "undecided"]}
    expected[5] = [yes, "not to be told: no seed has a figure"]
    assert [row[3] for row in told] == [word for words in expected.values() for word in words]
    assert told[2][2:] == ("0.7000, 0.8500", yes)
    assert told[9] == ("3", "gap, SFTMix − NTP: rises from 10 over 20 to 40%", "+0.0200, +0.1200, +0.0500", no)
    assert told[10][2] == "[+0.0000, +0.0200]"
    assert {row[2:] for row in list(prediction_rows({**tests, "auc": {}}, [10, 20, 40]))[:6]} == {("-", expected[5][1])}
    without = list(prediction_rows(tests, [0, 10, 20]))
    assert [row[3] for row in without].count(open_) == 5
    assert without[2] == ("1", "AUC lower at 40% than at 10%", "-", open_)


def test_known_truth_is_told_by_the_rules_of_its_plan(tmp_path):
    seeds = [str(seed) for seed in range(1, 11)]
    off = {"NTP": 0.0, "SFTMix": 0.2, "RandomSplit": 0.2}
    nll = {"clean": 0.4, "corrupted": 1.7, "open": 2.0}
    runs = {
        arm: {
            s: {
                "train_nll": {**nll, "corrupted": 1.7 + each},
                "gap": 1 + each,
                "exact": {"deterministic": 0.5 - each / 10},
            }
            | {"eval_nll_after": 1.6, "eval_nll_best": 1.5, "exact_by_family": dict.fromkeys(DETERMINISTIC, each)}
            for s in seeds
        }
        for arm, each in off.items()
    }
    del runs["SFTMix"]["4"]
    auc = {s: {"deterministic": 0.6 + int(s) / 100, "within_families": 0.9, "all": 0.4} for s in seeds}
    table = {"share": 20, "complete": True, "auc": auc, "diverged": {"SFTMix": [4]}, "runs": runs}
    assert list(known_lines(tmp_path)) == ["No table of it is finished (0 of 4 have begun)."]
    write_json(tmp_path / "corrupted-20.json", table)
    write_json(tmp_path / "corrupted-40.json", {**table, "complete": False})
    write_json(tmp_path / "contrasts.json", contrasts({20: table}))
    told = "\n".join(known_lines(tmp_path))
    assert "| 20% | 0.6550 [0.6333, 0.6767] | 0.9000 [0.9000, 0.9000] | 0.4000 [0.4000, 0.4000] | found |" in told
    assert "| 20% | SFTMix − NTP | 9 | +0.2000 [+0.2000, +0.2000] | 0.0039 | 0.0117 | different: higher |" in told
    assert (
        "| 20% | SFTMix − RandomSplit | 9 | +0.0000 [+0.0000, +0.0000] | 1.0000 | 1.0000 | equal within 0.05 |" in told
    )
    assert "| 20% | SFTMix − NTP | 9 | -0.0200 [-0.0200, -0.0200] | 0.0039 | 0.0156 | different: lower |" in told
    assert "| 20% | NTP | 0.4000 | 1.7000 | 2.0000 | 1.6000 | 1.5000 | 0.5000 |" in told
    assert "| 40% |" not in told
    assert "Diverged, and so missing from the contrasts: SFTMix at 20%, seed 4." in told
    assert "| 20% | SFTMix − NTP | +0.2000 [+0.2000, +0.2000] | +0.0000 [+0.0000, +0.0000] |" in told
    assert "| 20% | AUC | found, not well |" in told
    assert "| higher (to RandomSplit: equal within 0.05) | any Mixup of this size does it; confidence has no" in told
    assert "| 20% | exact match | lower than NTP's, and equal" not in told  # its interval is one point, at the margin
    assert "| family | 20% corrupted |" in told
    assert "| capitals | 0.00 / 0.20 / 0.20 |" in told
