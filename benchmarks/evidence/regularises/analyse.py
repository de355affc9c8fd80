"""The tests of preregistration-regularises.md, from what run.py has kept; Markdown to the standard output.

    python benchmarks/evidence/regularises/analyse.py               once sixteen seeds are there
    python benchmarks/evidence/regularises/analyse.py --ends_here   of whole blocks alone, if the work ends now
    python benchmarks/evidence/regularises/analyse.py --power       how often each test of equality succeeds, simulated

A contrast is a weighted sum of arms at each seed. Tests are Student's over the seeds: two-sided for a difference; two
one-sided ones (TOST) for equality within a margin, in which a margin that is a tenth of an effect varies with that
effect seed by seed, so its own uncertainty counts. Holm corrects over the three primary contrasts, for differences and
for equalities apart.
"""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from scipy import stats

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.packed import whole  # noqa: E402
from benchmarks.evidence.regularises.rows import SEEDS  # noqa: E402
from benchmarks.evidence.regularises.run import ARMS, LATER  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.disk.files import read_json  # noqa: E402
from sftmix.tools.compare.statistics import holm, interval, per_example  # noqa: E402
from sftmix.tools.runs.output import markdown_table  # noqa: E402
from sftmix.types import Float64  # noqa: E402

BLOCK, LEAST = 4, 8
"""Seeds of a block; the fewest seeds that are tested."""
LAST, TEMPERED, BEST = "last.nll", "last.nll_temperature_scaled", "best.nll"
ACCURACY = "last.accuracy"
BEST_TEMPERED = "best.nll_temperature_scaled"
COLUMNS = {
    LAST: "last_nll_sum",
    TEMPERED: "last_tempered_sum",
    BEST: "best_nll_sum",
    BEST_TEMPERED: "best_tempered_sum",
    ACCURACY: "last_n_correct",
}
"""Endpoint -> its column of sums by row."""
ENDPOINTS = {
    "last": LAST,
    "tempered": TEMPERED,
    "best": BEST,
    "accuracy": ACCURACY,
    "temperature": "last.temperature",
    "words of an answer": "answers.words",
    "answers that end": "answers.ended",
}
LOSSES = ("last", "tempered", "best")
HEAD = ["contrast", "mean", "95% over seeds", "over seeds and rows"]
Weights = Mapping[str, float]


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


def less(ours: Weights, theirs: Weights) -> Weights:
    """Return the difference of two contrasts that have no arm in common."""
    return {**ours, **{arm: -weight for arm, weight in theirs.items()}}


MIXED, RANDOM = difference("SFTMix", "NTP"), difference("SFTMix-random", "NTP-random")
SPLIT = less(MIXED, RANDOM)
PRIMARY = [
    Contrast("E1: (SFTMix − NTP) − (random halves − NTP in their order)", SPLIT, LAST, RANDOM),
    Contrast("E2: SFTMix − label smoothing, after a temperature each", difference("SFTMix", "LabelSmoothing"),
             TEMPERED, 0.005),
    Contrast("E3: SFTMix, literal sum − NTP", difference("SFTMix-literal", "NTP"), LAST, MIXED),
]  # fmt: skip
COMPARED = {
    "SFTMix − NTP": MIXED,
    "random halves − NTP in their order": RANDOM,
    "E1": SPLIT,
    "SFTMix − label smoothing": PRIMARY[1].weights,
    "E3": PRIMARY[2].weights,
    "SFTMix − soft labels": difference("SFTMix", "SoftLabels"),
}
SECONDARY = [
    Contrast(f"{name}, {what}", weights, endpoint)
    for name, weights in COMPARED.items()
    for what, endpoint in ENDPOINTS.items()
    if (weights, endpoint) not in [(each.weights, each.endpoint) for each in PRIMARY]
]
BY_LENGTH = [
    Contrast(
        f"(SFTMix − NTP) − (halves of like lengths − NTP in their order), {what}",
        less(MIXED, difference("SFTMix-length", "NTP-length")),
        ENDPOINTS[what],
    )
    for what in LOSSES
]


class Runs:
    """What is kept of the study: `seeds` have a file of each arm, in whole blocks.

    A run that diverged is an exit code alone: its seed is left out of the contrasts with its arm.
    """

    def __init__(self, folder: Path, arms: Sequence[str] = ARMS) -> None:
        self.folder = folder
        self.seeds = whole_blocks({seed for seed in SEEDS if all(self._file(arm, seed).exists() for arm in arms)})
        self.runs = {(arm, seed): read_json(self._file(arm, seed)) for arm in arms for seed in self.seeds}
        self.diverged = [run for run, figures in self.runs.items() if "exit_code" in figures]

    def _file(self, arm: str, seed: int) -> Path:
        return self.path("runs", f"{arm}-seed-{seed}.json")

    def path(self, *parts: str) -> Path:
        """Return where a file is, or would be."""
        return self.folder.joinpath(*parts)

    def seeds_of(self, contrast: Contrast) -> list[int]:
        """Return the seeds at which no arm of a contrast, or of the effect that is its margin, diverged."""
        arms = {*contrast.weights, *(contrast.margin if isinstance(contrast.margin, Mapping) else ())}
        return [seed for seed in self.seeds if not any((arm, seed) in self.diverged for arm in arms)]

    def values(self, contrast: Contrast) -> Float64:
        """Return f64[S], the contrast at each of its seeds."""
        return self._sum(contrast.weights, contrast.endpoint, self.seeds_of(contrast))

    def margins(self, contrast: Contrast) -> Float64:
        """Return f64[S], the margin at each of its seeds: a tenth of an effect that lowers the loss is above 0."""
        if isinstance(contrast.margin, Mapping):
            return -0.1 * self._sum(contrast.margin, contrast.endpoint, self.seeds_of(contrast))
        assert contrast.margin is not None
        return np.full(len(self.seeds_of(contrast)), contrast.margin)

    def _sum(self, weights: Weights, endpoint: str, seeds: Sequence[int]) -> Float64:
        where, name = endpoint.split(".")
        parts = [
            weight * np.array([self.runs[arm, seed][where][name] for seed in seeds], dtype=np.float64)
            for arm, weight in weights.items()
        ]
        return np.sum(parts, axis=0)

    def by_row(self, contrast: Contrast) -> Float64:
        """Return f64[S, N], each held-out row's part of the contrast at each of its seeds."""
        tokens = self._column("rows", "n_tokens")
        seeds = self.seeds_of(contrast)
        whole = np.zeros((len(seeds), len(tokens)))
        for arm, weight in contrast.weights.items():
            sums = np.stack([self._column(f"{arm}-seed-{seed}", COLUMNS[contrast.endpoint]) for seed in seeds])
            whole += weight * per_example(sums, np.tile(tokens, (len(sums), 1)))
        # Sums by row are float32. Of other rows, or of another run, they would not be these.
        np.testing.assert_allclose(whole.mean(axis=1), self.values(contrast), rtol=0, atol=1e-5)
        return whole

    def _column(self, name: str, column: str) -> Float64:
        return pq.read_table(self.path("losses", f"{name}.parquet"))[column].to_numpy().astype(np.float64)


def whole_blocks(done: Collection[int]) -> list[int]:
    """Return the seeds of the blocks whose seeds are all done."""
    blocks = [SEEDS[start : start + BLOCK] for start in range(0, len(SEEDS), BLOCK)]
    return [seed for block in blocks if set(block).issubset(done) for seed in block]


def p_different(values: Float64) -> float:
    """Return the two-sided p of Student's test that the mean is 0."""
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def p_equal(values: Float64, margins: Float64) -> float:
    """Return the p of TOST: the larger one of mean(values) >= mean(margins) and mean(values) <= -mean(margins)."""
    below = stats.ttest_1samp(values - margins, 0.0, alternative="less").pvalue
    above = stats.ttest_1samp(values + margins, 0.0, alternative="greater").pvalue
    return float(max(below, above))


def share(part: Float64, whole: Float64) -> tuple[float, float, float]:
    """Return mean(part) / mean(whole) and Fieller's 95% interval; an interval of NaN if the whole may be 0."""
    n = len(part)
    (v_part, covariance), (_, v_whole) = np.cov(part, whole) / n
    t2 = stats.t.ppf(0.975, n - 1) ** 2
    # The ratios r with (mean(part) - r mean(whole))^2 <= t2 var(part - r whole)
    a = whole.mean() ** 2 - t2 * v_whole
    b = part.mean() * whole.mean() - t2 * covariance
    c = part.mean() ** 2 - t2 * v_part
    half = np.sqrt(b * b - a * c) if a > 0 else np.nan
    return float(part.mean() / whole.mean()), float((b - half) / a), float((b + half) / a)


def report(runs: Runs) -> str:
    """Return the three primary contrasts with their tests, the secondary ones, and the arms."""
    values = [runs.values(each) for each in PRIMARY]
    margins = [runs.margins(each) for each in PRIMARY]
    different = holm([p_different(each) for each in values])
    equal = holm([p_equal(*pair) for pair in zip(values, margins, strict=True)])
    lines = [f"Seeds {', '.join(map(str, runs.seeds))}. Both p after Holm."]
    if runs.diverged:
        lines.append("Diverged, left out: " + ", ".join(f"{arm} at seed {seed}" for arm, seed in runs.diverged))
    rows = [[*HEAD, "margin", "p different", "p equal", "share of the effect (Fieller)"]]
    seeds = [["", *map(str, runs.seeds)]]
    for each, found, margin, p, q in zip(PRIMARY, values, margins, different, equal, strict=True):
        of_effect = "-"
        if isinstance(each.margin, Mapping):
            of_effect = "{:.3f} [{:.3f}, {:.3f}]".format(*share(-found, 10 * margin))
        rows.append([*line(runs, each), f"{margin.mean():.4f}", f"{p:.2g}", f"{q:.2g}", of_effect])
        seeds.append(by_seed(runs, each, runs.seeds))
    lines += [markdown_table(rows), markdown_table(seeds)]
    lines.append(markdown_table([HEAD, *(line(runs, each) for each in SECONDARY)]))
    alone = {arm: [Contrast(arm, {arm: 1.0}, endpoint) for endpoint in ENDPOINTS.values()] for arm in ARMS}
    arms = [[arm, *(f"{runs.values(each).mean():.4f}" for each in found)] for arm, found in alone.items()]
    lines.append(markdown_table([["arm", *ENDPOINTS], *arms]))
    return "\n\n".join(lines)


def line(runs: Runs, contrast: Contrast) -> list[str]:
    """Return the cells of a contrast below HEAD; the interval over rows only where losses by row are kept."""
    values = runs.values(contrast)
    bounds = [interval(values), interval(runs.by_row(contrast)) if contrast.endpoint in COLUMNS else None]
    shown = ["-" if each is None else f"[{each[0]:+.4f}, {each[1]:+.4f}]" for each in bounds]
    return [contrast.name, f"{values.mean():+.4f}", *shown]


def by_seed(runs: Runs, contrast: Contrast, seeds: Sequence[int]) -> list[str]:
    """Return the name of a contrast and a cell for each seed, `-` for seeds that it does not have."""
    at = dict(zip(runs.seeds_of(contrast), runs.values(contrast), strict=True))
    return [contrast.name, *(f"{at[seed]:+.4f}" if seed in at else "-" for seed in seeds)]


def power(sd: float, margin: float, seeds: int, level: float) -> float:
    """Return how often TOST finds a mean of 0 equal within the margin, of 20,000 draws of normal differences."""
    means, half = simulated(sd, seeds, level)
    return float((np.abs(means) + half < margin).mean())


def simulated(sd: float, seeds: int, level: float) -> tuple[Float64, Float64]:
    """Return f64[20,000] each: means of normal differences around 0, and half-widths of one-sided bounds of a level."""
    draws = np.random.default_rng(0).normal(0.0, sd, (20_000, seeds))
    half = stats.t.ppf(1 - level, seeds - 1) * draws.std(axis=1, ddof=1) / np.sqrt(seeds)
    return draws.mean(axis=1), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "regularises")
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--ends_here", action="store_true", help=f"with the whole blocks there, {LEAST} seeds or more")
    options = parser.parse_args()
    if options.power:
        for name, sd, margin in (("E1", 0.0103, 0.0097), ("E2", 0.0055, 0.005), ("E3", 0.0067, 0.0103)):
            found = [[power(sd, margin, n, level) for level in (0.05, 0.05 / 3)] for n in (8, 12, 16)]
            print(name, " ".join(f"{a:.2f}/{b:.2f}" for a, b in found))
        return
    results = whole(options.results)
    runs = Runs(results)
    if len(runs.seeds) < (least := LEAST if options.ends_here else len(SEEDS)):
        sys.exit(
            f"error: {len(runs.seeds)} of {least} seeds are there in whole blocks, and the plan analyses once; if the "
            f"work has to end, --ends_here takes {LEAST} or more"
        )
    print(report(runs))
    by_length = Runs(results, [*ARMS, *LATER])
    if len(by_length.seeds) >= LEAST:
        print(f"\nSeeds {', '.join(map(str, by_length.seeds))}.\n")
        print(markdown_table([HEAD, *(line(by_length, each) for each in BY_LENGTH)]))


if __name__ == "__main__":
    main()
