"""Print, as Markdown, what nobody had planned to look at in what regularises, beside the figures of picture.py.

The pilot's NTP and SFTMix were first trained under bf16 autocast (pilot-bf16 of the results, of revision 5ac6abe3), and
then again in float32 (runs), on the same rows at the same seeds; so were the references whose scores they read.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, special, stats

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.findings import LAST as END  # noqa: E402
from benchmarks.evidence.packed import whole  # noqa: E402
from benchmarks.evidence.regularises.analyse import (  # noqa: E402
    BEST,
    LAST,
    PRIMARY,
    TEMPERED,
    Contrast,
    Runs,
    difference,
    power,
    share,
)
from benchmarks.evidence.regularises.rows import PILOT_SEEDS  # noqa: E402
from benchmarks.evidence.regularises.run import ARMS  # noqa: E402
from benchmarks.evidence.tiers import RESULTS, read_tier  # noqa: E402
from sftmix.disk.files import read_json  # noqa: E402
from sftmix.tools.runs.output import markdown_table  # noqa: E402
from sftmix.types import Float64  # noqa: E402

FOLDER = RESULTS / "regularises"
ENDS = [end.split(".") for end in (LAST, TEMPERED, BEST)]
PILOT = {
    "NTP, bf16 − float32": ("pilot-bf16/NTP", "runs/pilot-NTP"),
    "SFTMix, bf16 − float32": ("pilot-bf16/SFTMix", "runs/pilot-SFTMix"),
    "SFTMix − NTP, float32": ("runs/pilot-SFTMix", "runs/pilot-NTP"),
    "SFTMix − NTP, bf16": ("pilot-bf16/SFTMix", "pilot-bf16/NTP"),
    "label smoothing of 0.02 − SFTMix, float32": ("runs/pilot-LabelSmoothing-0.02", "runs/pilot-SFTMix"),
    "label smoothing of 0.02 − NTP, float32": ("runs/pilot-LabelSmoothing-0.02", "runs/pilot-NTP"),
}
"""Difference -> files of two arms of the pilot, without seed."""
EFFECTS = {arm: difference(arm, "NTP-random" if arm == "SFTMix-random" else "NTP") for arm in ARMS if "NTP" not in arm}
MU_EFFECTIVE = 0.827
"""Of SFTMix, the mean over its seeds."""


def of_pilot() -> Iterator[list[str]]:
    """Yield the pilot's differences at both of its seeds."""
    yield ["pilot, seeds 901 and 902", "last", "tempered", "best"]
    for name, arms in PILOT.items():
        both = [[read_json(whole(FOLDER) / f"{arm}-seed-{seed}.json") for arm in arms] for seed in PILOT_SEEDS]
        cells = [[f"{ours[w][f] - theirs[w][f]:+.4f}" for ours, theirs in both] for w, f in ENDS]
        yield [name, *map(", ".join, cells)]


def ratio(part: Float64, whole: Float64) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*share(part, whole))


def of_effects(runs: Runs) -> Iterator[list[str]]:
    """Yield each arm's difference to NTP as a multiple of SFTMix's, and the share that a temperature takes away."""
    of = {arm: [runs.values(Contrast("", each, end)) for end in (LAST, TEMPERED)] for arm, each in EFFECTS.items()}
    yield ["arm, difference to NTP", "of SFTMix's, last", "of SFTMix's, tempered", "taken away by a temperature"]
    for arm, (last, tempered) in of.items():
        of_sftmix = [ratio(mine, its) for mine, its in zip((last, tempered), of["SFTMix"], strict=True)]
        yield [arm, *of_sftmix, ratio(last - tempered, last)]


def of_added() -> Iterator[list[str]]:
    """Yield how much of SFTMix's effect is there with the losses of its pairs added up instead of mixed."""
    yield ["overfitted table", "DecomposedMixup − NTP", "share of SFTMix − NTP"]
    for name in ("overfit", "real-overfit", "real-gemma-overfit"):
        both = [read_tier(name).differences((arm, "NTP"), END) for arm in ("DecomposedMixup", "SFTMix")]
        added, mixed = (np.array([*each.values()]) for each in both)
        yield [name, f"{added.mean():+.4f}", ratio(added, mixed)]


def fit(run: dict[str, Any]) -> float:
    """Return the mean NLL of a run's training rows at its end."""
    halves = run["sample_nll_by_half"].values()
    return sum(half["tokens"] * half["nll"] for half in halves) / sum(half["tokens"] for half in halves)


def of_fit(runs: Runs) -> Iterator[list[str]]:
    """Yield how well each arm fits its training rows, and its spread over seeds, each with rows of its own."""
    yield ["arm", "fit", "last", "sd, last", "sd, tempered", "sd, best"]
    for arm in ARMS:
        ends = [runs.values(Contrast("", {arm: 1.0}, end)) for end in (LAST, TEMPERED, BEST)]
        fits = np.mean([fit(runs.runs[arm, seed]) for seed in runs.seeds])
        yield [arm, f"{fits:.4f}", f"{ends[0].mean():.4f}", *(f"{each.std(ddof=1):.4f}" for each in ends)]


def of_watch(runs: Runs) -> Iterator[list[str]]:
    """Yield NTP after each epoch on the watch rows, and at how many seeds it is lower there than every arm's end."""
    each = {arm: np.array([runs.runs[arm, seed]["evaluations"] for seed in runs.seeds]) for arm in ARMS}
    lowest = np.min([values[:, -1] for values in each.values()], axis=0)
    yield ["epochs of NTP", "watch rows", "seeds at which it is below every arm's end"]
    for epoch, values in enumerate(each["NTP"].T, start=1):
        yield [str(epoch), f"{values.mean():.4f}", str((values < lowest).sum())]


def memorised(mu: float, *, mixed: bool) -> float:
    """Return the probability of the own token where the expected loss of two memorised rows is least.

    Each position is free to have any logits; by symmetry d, that of the own token less that of the other's, decides.

    mu     mu_effective: the weight of a pair, with that of an NTP token as 1
    mixed  if True, the loss is SFTMix's; if False that of SoftLabels
    """
    lam = special.betaincinv(
        0.5, 0.5, (np.arange(100_000) + 0.5) / 100_000
    )  # evenly spaced quantiles of Beta(0.5, 0.5)

    def loss(d: float) -> float:
        own, other = np.logaddexp(0, -d), np.logaddexp(0, d)
        if mixed:
            at = (2 * lam - 1) * d
            pair = (lam * np.logaddexp(0, -at) + (1 - lam) * np.logaddexp(0, at)).mean()
        else:
            pair = 2 * ((lam**2).mean() * own + (lam * (1 - lam)).mean() * other)
        return float(2 * own + mu * pair)

    return float(special.expit(optimize.minimize_scalar(loss, bounds=(0, 30), method="bounded").x))


def main() -> None:
    runs = Runs(whole(FOLDER))
    fits = [*of_fit(runs)]
    for rows in (of_pilot(), of_effects(runs), of_added(), of_watch(runs), fits):
        print(markdown_table([*rows]), end="\n\n")
    fitted, ends = np.array([line[1:3] for line in fits[1:]], dtype=np.float64).T
    print(f"rank correlation of fit and last over {len(ARMS)} arms: {stats.spearmanr(fitted, ends).statistic:.2f}")
    before = np.array([*read_tier("real-overfit").differences(("SFTMix", "RandomSplit"), END).values()])
    now = runs.values(Contrast("", difference("SFTMix", "SFTMix-random"), LAST))
    spread = [float(each.std(ddof=1)) for each in (before, now)]
    p = 2 * stats.f.sf((spread[1] / spread[0]) ** 2, len(now) - 1, len(before) - 1)
    print(f"sd of SFTMix − random halves: {spread[0]:.4f} before, {spread[1]:.4f} here, F test p {p:.2f}")
    of_e1 = float(runs.values(PRIMARY[0]).std(ddof=1)), float(runs.margins(PRIMARY[0]).mean())
    chance = [f"{n}: {power(*of_e1, n, 0.05):.2f}, {power(*of_e1, n, 0.05 / 3):.2f}" for n in (8, 16, 32, 48)]
    print("E1 is found equal, by seeds, at 0.05 and at Holm's strictest: " + "; ".join(chance))
    strengths = (MU_EFFECTIVE, True), (MU_EFFECTIVE, False), (MU_EFFECTIVE * 0.03 / 0.2, False)
    resting = [f"{memorised(mu, mixed=mixed):.3f}" for mu, mixed in strengths]
    print("own token of a memorised row: SFTMix {}, SoftLabels {}, SoftLabels at mu 0.03 {}".format(*resting))


if __name__ == "__main__":
    main()
