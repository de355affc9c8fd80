"""Print, as Markdown, what nobody had planned to look at in what the soft labels are.

Runs with an evaluation after each step are printed by `finer.py contrasts`.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.regularises.afterwards import ratio  # noqa: E402
from benchmarks.evidence.regularises.analyse import BEST_TEMPERED, LOSSES, TEMPERED, Contrast, difference  # noqa: E402
from benchmarks.evidence.regularises.rows import SEEDS  # noqa: E402
from benchmarks.evidence.softlabels import contrasts as plan  # noqa: E402
from benchmarks.evidence.softlabels.analyse import HEAD, Kept, cells  # noqa: E402
from benchmarks.evidence.softlabels.run import FIRST, SECOND  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.tools.runs.output import markdown_table  # noqa: E402

WHEN = {**plan.ENDPOINTS, "best, after a temperature": BEST_TEMPERED}
PAIRS = [
    ("Unigram", "NTP", ["best, after a temperature"]),
    ("SoftLabels", "NTP", ["best, after a temperature"]),
    ("Uniform", "NTP", ["best, after a temperature"]),
    ("SFTMix", "NTP", ["best, after a temperature"]),
    ("NTP-bf16", "NTP", ["best, after a temperature"]),
    ("SFTMix-bf16", "NTP-bf16", ["best, after a temperature", "tempered", "last"]),
    ("SoftElsewhere", "Unigram", ["last", "tempered", "best"]),
    ("SFTMix", "Unigram", ["last", "tempered", "best"]),
]
SHARES = {"Unigram": "SoftLabels", "SoftElsewhere": "SoftLabels", "Uniform": "SoftLabels", "SoftLabels-weak": "SFTMix"}


def of_best(runs: Kept) -> Iterator[list[str]]:
    """Yield after which epoch each arm is best on the watch rows, and its mean loss there after four epochs."""
    yield ["arm", "seeds", "best after epoch", "after 1", "after 2", "after 3", "after 4"]
    for arm in plan.ARMS:
        of_arm = [runs.runs[arm, seed] for seed in SEEDS if (arm, seed) in runs.runs]
        epochs = Counter(int(np.argmin(run["evaluations"])) + 1 for run in of_arm)
        means = np.mean([run["evaluations"] for run in of_arm], axis=0)[:4]
        best = ", ".join(f"{epoch} ({count})" for epoch, count in sorted(epochs.items()))
        yield [arm, str(len(of_arm)), best, *(f"{mean:.4f}" for mean in means)]


def of_halves() -> Iterator[list[str]]:
    """Yield P1 and P4 at seeds whose runs are of two studies, and at seeds whose runs are of one."""
    yield ["contrast", *(f"seeds {some[0]} to {some[-1]}" for some in (FIRST, SECOND))]
    for each in (plan.PRIMARY[0], plan.PRIMARY[3]):
        halves = [cells(Kept(RESULTS, some), each) for some in (FIRST, SECOND)]
        yield [each.name, *(f"{mean} {bounds}" for _, _, mean, bounds, _ in halves)]


def of_contrasts(runs: Kept) -> Iterator[list[str]]:
    yield ["not planned", *HEAD[1:]]
    for ours, theirs, endpoints in PAIRS:
        for end in endpoints:
            yield cells(runs, Contrast(f"{ours} − {theirs}, {end}", difference(ours, theirs), WHEN[end]))


def of_shares(runs: Kept) -> Iterator[list[str]]:
    """Yield which share of another arm's difference to NTP some arms have, after a temperature, last step."""
    yield ["arm", "of the effect of", "seeds", "share (Fieller)"]
    for arm, other in SHARES.items():
        both = Contrast("", {arm: 1.0, other: 1.0, "NTP": 1.0}, TEMPERED)
        some = Kept(RESULTS, runs.seeds_of(both))
        part, effect = (some.values(Contrast("", difference(name, "NTP"), TEMPERED)) for name in (arm, other))
        yield [arm, other, str(len(part)), ratio(part, effect)]


def of_fit(first: Kept) -> str:
    """Say how the losses of the arms in float32 go with their fit, over their means at seeds 1 to 8."""

    def means(end: str) -> list[float]:
        return [float(first.values(Contrast("", {arm: 1.0}, WHEN[end])).mean()) for arm in plan.IN_FLOAT32]

    fit = means("fit")
    found = (f"{stats.spearmanr(fit, means(end)).statistic:.2f} with *{end}*" for end in LOSSES)
    return f"Rank correlation of *fit* over {len(plan.IN_FLOAT32)} arms: {', '.join(found)}."


def main() -> None:
    runs = Kept(RESULTS)
    for rows in (of_best(runs), of_halves(), of_contrasts(runs), of_shares(runs)):
        print(markdown_table([*rows]), end="\n\n")
    print(of_fit(Kept(RESULTS, FIRST)))


if __name__ == "__main__":
    main()
