"""The tests of preregistration-regularises.md, from what run.py has kept; Markdown to the standard output.

    python benchmarks/evidence/regularises/analyse.py           of the seeds that all seven arms have, in whole blocks
    python benchmarks/evidence/regularises/analyse.py --power   how often each test of equality succeeds, simulated

A contrast is a weighted sum of arms at each seed. Tests are Student's over the seeds: two-sided for a difference; two
one-sided ones (TOST) for equality within a margin, in which a margin that is a tenth of an effect varies with that
effect seed by seed, so its own uncertainty counts. Holm corrects over the three primary contrasts, for differences and
for equalities apart.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from scipy import stats

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.regularises.rows import SEEDS  # noqa: E402
from benchmarks.evidence.regularises.run import ARMS, LATER  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.common.files import read_json  # noqa: E402
from sftmix.tools.compare.statistics import holm, interval, per_example  # noqa: E402
from sftmix.tools.runs.shown import markdown_table  # noqa: E402
from sftmix.types import Float64  # noqa: E402

BLOCK, LEAST = 4, 8
"""Seeds of a block; the fewest seeds that are tested."""
Weights = Mapping[str, float]
LAST, TEMPERED, BEST = "last.nll", "last.nll_temperature_scaled", "best.nll"
COLUMNS = {LAST: "last_nll_sum", TEMPERED: "last_tempered_sum", BEST: "best_nll_sum"}
"""Endpoint -> its column of losses by row."""


class Contrast(NamedTuple):
    """A weighted sum of arms at an endpoint.

    margin  within which it is called equal: nats per token, or the weights of the effect of which it is a tenth
    """

    name: str
    weights: Weights
    endpoint: str = LAST
    margin: float | Weights | None = None


def difference(ours: str, theirs: str) -> Weights:
    return {ours: 1.0, theirs: -1.0}


MIXED, RANDOM = difference("SFTMix", "NTP"), difference("SFTMix-random", "NTP-random")
SPLIT = {**MIXED} | {arm: -weight for arm, weight in RANDOM.items()}
PRIMARY = [
    Contrast("E1: (SFTMix − NTP) − (random halves − NTP in their order)", SPLIT, LAST, RANDOM),
    Contrast("E2: SFTMix − label smoothing, after a temperature each", difference("SFTMix", "LabelSmoothing"),
             TEMPERED, 0.005),
    Contrast("E3: SFTMix, literal sum − NTP", difference("SFTMix-literal", "NTP"), LAST, MIXED),
]  # fmt: skip
ENDPOINTS = (("last", LAST), ("tempered", TEMPERED), ("best", BEST))
SECONDARY = [
    *(Contrast(f"SFTMix − NTP, {name}", MIXED, at) for name, at in ENDPOINTS),
    *(Contrast(f"E1, {name}", SPLIT, at) for name, at in ENDPOINTS[1:]),
    *(
        Contrast(f"SFTMix − {arm}, {name}", difference("SFTMix", arm), at)
        for arm in ("LabelSmoothing", "SoftLabels")
        for name, at in ENDPOINTS
    ),
    Contrast("E3, tempered", PRIMARY[2].weights, TEMPERED),
    Contrast("E3, best", PRIMARY[2].weights, BEST),
    Contrast("SFTMix − NTP, accuracy", MIXED, "last.accuracy"),
    Contrast("SFTMix − label smoothing, accuracy", difference("SFTMix", "LabelSmoothing"), "last.accuracy"),
    Contrast("SFTMix − NTP, words of an answer", MIXED, "answers.words"),
]  # fmt: skip
BY_LENGTH = Contrast(
    "(SFTMix − NTP) − (halves of like lengths − NTP in their order)",
    {**MIXED} | {"SFTMix-length": -1.0, "NTP-length": 1.0}, LAST, difference("SFTMix-length", "NTP-length"),
)  # fmt: skip


class Runs:
    """What is kept of the study: `seeds` have all arms, in whole blocks."""

    def __init__(self, folder: Path, arms: Sequence[str] = ARMS) -> None:
        self.folder, done = folder, {seed for seed in SEEDS if all(self._file(arm, seed).exists() for arm in arms)}
        blocks = [SEEDS[start : start + BLOCK] for start in range(0, len(SEEDS), BLOCK)]
        self.seeds = [seed for block in blocks if done.issuperset(block) for seed in block]
        self.figures = {arm: [read_json(self._file(arm, seed)) for seed in self.seeds] for arm in arms}

    def _file(self, arm: str, seed: int) -> Path:
        return self.folder / "runs" / f"{arm}-seed-{seed}.json"

    def values(self, weights: Weights, endpoint: str) -> Float64:
        """Return f64[S], the weighted sum of an endpoint at each seed."""

        def at(found: Any) -> float:
            for key in endpoint.split("."):
                found = found[key]
            return float(found)

        parts = [weight * np.array([at(run) for run in self.figures[arm]]) for arm, weight in weights.items()]
        return np.sum(parts, axis=0)

    def by_row(self, weights: Weights, endpoint: str) -> Float64:
        """Return f64[S, N], each held-out row's part of the same."""
        tokens = pq.read_table(self.folder / "losses" / "rows.parquet")["n_tokens"].to_numpy().astype(np.float64)
        whole = np.zeros((len(self.seeds), len(tokens)))
        for arm, weight in weights.items():
            files = (self.folder / "losses" / f"{arm}-seed-{seed}.parquet" for seed in self.seeds)
            sums = np.stack([pq.read_table(file)[COLUMNS[endpoint]].to_numpy().astype(np.float64) for file in files])
            whole += weight * per_example(sums, np.tile(tokens, (len(sums), 1)))
        return whole


def p_different(values: Float64) -> float:
    """Return the two-sided p of Student's test that the mean is 0."""
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def p_equal(values: Float64, margins: Float64) -> float:
    """Return the p of TOST: the larger one of mean(values) >= mean(margins) and mean(values) <= -mean(margins)."""
    below = stats.ttest_1samp(values - margins, 0.0, alternative="less").pvalue
    above = stats.ttest_1samp(values + margins, 0.0, alternative="greater").pvalue
    return float(max(below, above))


def margins_of(runs: Runs, contrast: Contrast) -> Float64:
    """Return the margin at each seed: a tenth of an effect that lowers the loss is above 0."""
    if isinstance(contrast.margin, Mapping):
        return -0.1 * runs.values(contrast.margin, contrast.endpoint)
    assert contrast.margin is not None
    return np.full(len(runs.seeds), contrast.margin)


def report(runs: Runs) -> str:
    """Return the three primary contrasts with their tests, the secondary ones, and the arms."""
    values = [runs.values(each.weights, each.endpoint) for each in PRIMARY]
    margins = [margins_of(runs, each) for each in PRIMARY]
    different = holm([p_different(each) for each in values])
    equal = holm([p_equal(*pair) for pair in zip(values, margins, strict=True)])
    rows = [["contrast", "mean", "95% over seeds", "over seeds and rows", "margin", "p different", "p equal"]]
    for each, found, margin, p, q in zip(PRIMARY, values, margins, different, equal, strict=True):
        rows.append([*_line(runs, each, found), f"{margin.mean():.4f}", f"{p:.4f}", f"{q:.4f}"])
    lines = [f"Seeds {', '.join(map(str, runs.seeds))}. Both p after Holm.", markdown_table(rows)]
    others = [_line(runs, each, runs.values(each.weights, each.endpoint)) for each in SECONDARY]
    lines.append(markdown_table([rows[0][:4], *others]))
    seeds = [["", *map(str, runs.seeds)]]
    lines.append(
        markdown_table(seeds + [[one.name, *(f"{x:+.4f}" for x in v)] for one, v in zip(PRIMARY, values, strict=True)])
    )
    heads = {"last": LAST, "tempered": TEMPERED, "best": BEST, "temperature": "last.temperature",
             "accuracy": "last.accuracy", "words": "answers.words", "ended": "answers.ended"}  # fmt: skip
    arms = [[arm, *(f"{runs.values({arm: 1.0}, at).mean():.4f}" for at in heads.values())] for arm in runs.figures]
    lines.append(markdown_table([["arm", *heads], *arms]))
    return "\n\n".join(lines)


def _line(runs: Runs, contrast: Contrast, values: Float64) -> list[str]:
    bounds = [interval(values)]
    bounds.append(interval(runs.by_row(contrast.weights, contrast.endpoint)) if contrast.endpoint in COLUMNS else None)
    return [
        contrast.name,
        f"{values.mean():+.4f}",
        *("-" if b is None else f"[{b[0]:+.4f}, {b[1]:+.4f}]" for b in bounds),
    ]


def power(sd: float, margin: float, seeds: int, level: float) -> float:
    """Return how often TOST finds a mean of 0 equal within the margin, of 20,000 draws of normal differences."""
    draws = np.random.default_rng(0).normal(0.0, sd, (20_000, seeds))
    half = stats.t.ppf(1 - level, seeds - 1) * draws.std(axis=1, ddof=1) / np.sqrt(seeds)
    return float((np.abs(draws.mean(axis=1)) + half < margin).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "regularises")
    parser.add_argument("--power", action="store_true")
    options = parser.parse_args()
    if options.power:
        for name, sd, margin in (("E1", 0.0103, 0.0097), ("E2", 0.0055, 0.005), ("E3", 0.0067, 0.0103)):
            found = [[power(sd, margin, n, level) for level in (0.05, 0.05 / 3)] for n in (8, 12, 16)]
            print(name, " ".join(f"{a:.2f}/{b:.2f}" for a, b in found))
        return
    runs = Runs(options.results)
    if len(runs.seeds) < LEAST:
        sys.exit(f"error: {len(runs.seeds)} seeds in whole blocks; {LEAST} are the fewest that are tested")
    print(report(runs))
    by_length = Runs(options.results, [*ARMS, *LATER])
    if len(by_length.seeds) >= LEAST:
        values = by_length.values(BY_LENGTH.weights, LAST)
        q = p_equal(values, margins_of(by_length, BY_LENGTH))
        print("\n" + markdown_table([[*_line(by_length, BY_LENGTH, values), f"p equal {q:.4f}"]]))


if __name__ == "__main__":
    main()
