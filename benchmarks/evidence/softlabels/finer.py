"""Is the best epoch too coarse? Some arms with an evaluation after each step, which nobody had planned.

    python benchmarks/evidence/softlabels/finer.py run --seeds 1 3     a second process has other seeds
    python benchmarks/evidence/softlabels/finer.py contrasts           differences at the best step and the best epoch

The plan evaluates at the ends of epochs, five steps apart, and some arms are best after the first epoch, others after
the second. These runs are those of run.py with an evaluation on the `watch` rows after each step. They end once five
evaluations in a row were no better; the learning rate is that of all 40 steps. RESULTS/finer has the same files as
there; unpack them (../packed.py) before you go on.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.packed import whole  # noqa: E402
from benchmarks.evidence.regularises.analyse import (  # noqa: E402
    BEST,
    BEST_TEMPERED,
    Contrast,
    difference,
    line,
)
from benchmarks.evidence.regularises.run import Plain  # noqa: E402
from benchmarks.evidence.softlabels.analyse import Kept  # noqa: E402
from benchmarks.evidence.softlabels.run import FIRST, WORK, Study  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.disk.files import read_json  # noqa: E402
from sftmix.tools.compare.statistics import interval  # noqa: E402
from sftmix.tools.runs.output import markdown_table  # noqa: E402
from sftmix.types import Float64  # noqa: E402

KEPT = RESULTS / "finer"
ARMS = ("NTP", "Unigram", "SFTMix", "NTP-bf16", "SFTMix-bf16")
PAIRS = [("Unigram", "NTP"), ("SFTMix", "NTP"), ("NTP-bf16", "NTP"), ("SFTMix-bf16", "NTP-bf16")]
STOP = {"class_path": "sftmix.components.callbacks.EarlyStopping", "init_args": {"patience": 5}}


class Finer(Study):
    """Runs with an evaluation after each step, until it does not get better."""

    measures = ("best",)
    asks = False

    def config(self, arm: str, seed: int, *, held_out: str = "watch") -> Plain:
        plain = super().config(arm, seed, held_out=held_out)
        for callback in plain["callbacks"]:
            if callback["class_path"].endswith(".Evaluate"):
                callback["init_args"]["every"] = 1
        return plain | {"callbacks": [*plain["callbacks"], STOP]}


def run(arms: Sequence[str], seeds: Sequence[int], work: Path) -> None:
    study = Finer(work, KEPT)
    study.read_strengths(whole(RESULTS / "softlabels"))
    for seed in seeds:
        for arm in arms:
            study.quietly(arm, seed)


# ----------------------------------------------------------------------------------------- contrasts


class Fine(Kept):
    """What is kept of the finer runs, at the seeds that have all of them."""

    def __init__(self) -> None:
        self.folder, self.folders, self.diverged = KEPT, [whole(KEPT)], []
        self.seeds = [seed for seed in FIRST if all(self._file(arm, seed).exists() for arm in ARMS)]
        self.runs = {(arm, seed): read_json(self._file(arm, seed)) for arm in ARMS for seed in self.seeds}


def of_best(fine: Fine, study: Kept) -> Iterator[list[str]]:
    """Yield each arm's best step at each seed, and its mean losses at the best step and at the best epoch."""
    yield ["arm", "best step at each seed", "watch", "at the best epoch", "held out", "at the best epoch"]
    for arm in ARMS:
        of_arm = [[runs.runs[arm, seed] for seed in fine.seeds] for runs in (fine, study)]
        steps = ", ".join(str(int(np.argmin(run["evaluations"])) + 1) for run in of_arm[0])
        watch = [np.mean([min(run["evaluations"]) for run in runs]) for runs in of_arm]
        held_out = [np.mean([run["best"]["nll"] for run in runs]) for runs in of_arm]
        yield [arm, steps, *(f"{mean:.4f}" for mean in [*watch, *held_out])]


def of_contrasts(fine: Fine, study: Kept) -> Iterator[list[str]]:
    """Yield differences on the held-out rows: over seeds, over seeds and rows; at the best epoch; and what changed."""
    yield ["contrast", "at the best step", "over seeds and rows", "at the best epoch", "change"]
    for ours, theirs in PAIRS:
        for endpoint, words in {BEST: "", BEST_TEMPERED: ", after a temperature"}.items():
            contrast = Contrast(f"{ours} − {theirs}{words}", difference(ours, theirs), endpoint)
            values = [runs.values(contrast) for runs in (fine, study)]
            *_, by_rows = line(fine, contrast)
            yield [contrast.name, spread(values[0]), by_rows, spread(values[1]), spread(values[0] - values[1])]


def spread(values: Float64) -> str:
    bounds = interval(values)
    assert bounds is not None, "of two seeds or more"
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(values.mean(), *bounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "contrasts"])
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(FIRST))
    parser.add_argument("--work", type=Path, default=WORK / "finer", help="folder of the runs, with the rows in data/")
    options = parser.parse_args()
    if options.part == "run":
        run(options.arms, options.seeds, options.work)
        return
    fine = Fine()
    for rows in (of_best, of_contrasts):
        print(markdown_table([*rows(fine, Kept(RESULTS, fine.seeds))]), end="\n\n")


if __name__ == "__main__":
    main()
