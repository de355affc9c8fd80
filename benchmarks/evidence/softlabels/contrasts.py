"""The contrasts of preregistration-softlabels.md as analyse.py tests them, the runs they need, and their power."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.regularises import analyse as before  # noqa: E402
from benchmarks.evidence.regularises.analyse import (  # noqa: E402
    BEST,
    LAST,
    MIXED,
    TEMPERED,
    Contrast,
    difference,
    less,
    power,
    simulated,
)
from benchmarks.evidence.softlabels.run import BF16, FIRST, ORDER  # noqa: E402
from sftmix.tools.compare.statistics import ALPHA  # noqa: E402
from sftmix.tools.runs.output import markdown_table  # noqa: E402

STOP = datetime(2026, 12, 5, 12, tzinfo=UTC)
PLANNED = [*ORDER, *BF16, *((arm, seed) for seed in FIRST for arm in ("NTP", "SFTMix", "SoftLabels"))]
ARMS = list(dict.fromkeys(["NTP", "SFTMix", "SoftLabels", *(arm for arm, _ in PLANNED)]))
IN_FLOAT32 = [arm for arm in ARMS if arm not in {arm for arm, _ in BF16}]
OF_PRECISION = range(1, 5)
"""Seeds of the contrasts of precision."""
ENDPOINTS = {**before.ENDPOINTS, "fit": "fit.nll"}
MATCHED = 0.03
"""Largest difference of the mean temperatures of two arms that are matched."""
PRIMARY = [
    Contrast("P1: SoftLabels − Unigram, tempered", difference("SoftLabels", "Unigram"), TEMPERED, 0.015),
    Contrast("P2: SFTMix − SoftLabels-weak, tempered", difference("SFTMix", "SoftLabels-weak"), TEMPERED, 0.015),
    Contrast("P3: Unigram − Uniform, tempered", difference("Unigram", "Uniform"), TEMPERED, 0.015),
    Contrast("P4: Unigram − NTP, best", difference("Unigram", "NTP"), BEST, 0.005),
    Contrast("P5: SFTMix − SFTMix-permuted, last", difference("SFTMix", "SFTMix-permuted"), LAST, 0.011),
]
SPREADS = [(0.0126, 16), (0.0146, 8), (0.0146, 8), (0.0087, 16), (0.0151, 8)]
"""Of each primary contrast: the standard deviation and the seeds with which its power is simulated."""
MIXED_BF16 = difference("SFTMix-bf16", "NTP-bf16")
REGULARISES = Contrast("NTP-bf16 − NTP, tempered", difference("NTP-bf16", "NTP"), TEMPERED)
AS_MUCH = Contrast(
    "(NTP-bf16 − NTP) − (SFTMix − NTP), tempered", difference("NTP-bf16", "SFTMix"), TEMPERED, 0.015
)  # fmt: skip
SIGNS = [Contrast("SFTMix − NTP, best", MIXED, BEST), Contrast("SFTMix-bf16 − NTP-bf16, best", MIXED_BF16, BEST)]
CHANGE = "(SFTMix-bf16 − NTP-bf16) − (SFTMix − NTP)"
PRECISION = [
    REGULARISES,
    Contrast("NTP-bf16 − NTP, best", REGULARISES.weights, BEST),
    Contrast(f"{CHANGE}, tempered", less(MIXED_BF16, MIXED), TEMPERED),
    Contrast(f"{CHANGE}, best", less(MIXED_BF16, MIXED), BEST),
    AS_MUCH,
    *SIGNS,
]
PAIRS = {
    **{f"{arm} − NTP": difference(arm, "NTP") for arm in ARMS[1:]},
    **{each.name[4:].split(",")[0]: each.weights for each in PRIMARY},
    "SoftElsewhere − SoftLabels": difference("SoftElsewhere", "SoftLabels"),
}
SECONDARY = [
    Contrast(f"{name}, {what}", weights, endpoint)
    for name, weights in PAIRS.items()
    for what, endpoint in ENDPOINTS.items()
    if (weights, endpoint) not in [(each.weights, each.endpoint) for each in PRIMARY]
]


def least(sd: float, seeds: int, level: float) -> float:
    """Return the smallest difference that the two-sided test finds with 0.8, of 20,000 draws of normal differences."""
    means, half = simulated(sd, seeds, level / 2)
    return float(np.quantile(half - means, 0.8))


def powers() -> str:
    """Return the plan's table of power, at Holm's strictest level and, in brackets, at 0.05."""
    rows = [["", "seeds", "found with 0.8, at least", "equality is shown, if there is none"]]
    for each, (sd, seeds) in zip(PRIMARY, SPREADS, strict=True):
        assert isinstance(each.margin, float)
        margin, levels = each.margin, (ALPHA / len(PRIMARY), ALPHA)
        found = "{:.4f} ({:.4f})".format(*(least(sd, seeds, level) for level in levels))
        shown = "{:.2f} ({:.2f})".format(*(power(sd, margin, seeds, level) for level in levels))
        rows.append([each.name[:2], str(seeds), found, shown])
    return markdown_table(rows)
