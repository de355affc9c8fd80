"""The tests of preregistration-softlabels.md, from what run.py has kept; Markdown to the standard output.

    python benchmarks/evidence/softlabels/analyse.py               once all runs are there, or after the plan's stop
    python benchmarks/evidence/softlabels/analyse.py --ends_here   before both: a deviation
    python benchmarks/evidence/softlabels/analyse.py --power       the plan's table of power, simulated

The files of a run are looked for in RESULTS/softlabels, then in RESULTS/regularises. Each contrast has its own seeds:
whole blocks of four at which all its arms are there, without the seeds at which one of them diverged. Holm corrects
over the five primary contrasts, for differences and for equalities apart, even if some are not there.

`fit` is the NLL per response token of the training rows after the last step, in the precision of the run: both halves
of `sample_nll_by_half` by their tokens. That sample has all of the 80 rows.

The first call that analyses writes RESULTS/softlabels/analysed.json: day and time, revision, seeds of each contrast.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.packed import whole  # noqa: E402
from benchmarks.evidence.regularises import analyse as before  # noqa: E402
from benchmarks.evidence.regularises.analyse import (  # noqa: E402
    TEMPERED,
    Contrast,
    by_seed,
    line,
    p_different,
    p_equal,
    whole_blocks,
)
from benchmarks.evidence.regularises.rows import SEEDS  # noqa: E402
from benchmarks.evidence.regularises.run import Plain  # noqa: E402
from benchmarks.evidence.softlabels import contrasts as plan  # noqa: E402
from benchmarks.evidence.softlabels.run import BF16, FIRST, ORDER, WORK, Study  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.components.confidence import variability  # noqa: E402
from sftmix.config import RunConfig  # noqa: E402
from sftmix.disk.files import read_json, write_json  # noqa: E402
from sftmix.disk.tables import read_dynamics  # noqa: E402
from sftmix.measure.summary import made_by  # noqa: E402
from sftmix.tools.compare.statistics import ALPHA, holm, interval  # noqa: E402
from sftmix.tools.runs.output import markdown_table  # noqa: E402
from sftmix.types import Scores  # noqa: E402

HEAD = ["contrast", "seeds", *before.HEAD[1:]]


class Kept(before.Runs):
    """What is kept of both studies at some seeds; here each contrast has the seeds of its own arms."""

    def __init__(self, results: Path, seeds: Sequence[int] = SEEDS) -> None:
        self.folder, self.seeds = results / "softlabels", list(seeds)
        self.folders = [whole(self.folder), whole(results / "regularises")]
        runs = [(arm, seed) for arm in plan.ARMS for seed in seeds]
        self.runs = {run: with_fit(read_json(file)) for run in runs if (file := self._file(*run)).exists()}
        self.diverged = [run for run, figures in self.runs.items() if diverged(figures)]
        rows = [file for folder in self.folders if (file := folder / "losses" / "rows.parquet").exists()]
        if any(pq.read_table(file) != pq.read_table(rows[0]) for file in rows):
            sys.exit(f"error: {rows[0]} and {rows[1]} are different held-out rows; both studies have the same ones")

    def path(self, *parts: str) -> Path:
        places = [folder.joinpath(*parts) for folder in self.folders]
        return next((place for place in places if place.exists()), places[0])

    def seeds_of(self, contrast: Contrast) -> list[int]:
        done = [seed for seed in self.seeds if all((arm, seed) in self.runs for arm in contrast.weights)]
        diverged = {seed for arm, seed in self.diverged if arm in contrast.weights}
        return [seed for seed in whole_blocks(done) if seed not in diverged]

    def has(self, contrast: Contrast) -> bool:
        """Return True if a contrast has the two seeds that an interval needs."""
        return len(self.seeds_of(contrast)) > 1

    def hotter(self, contrast: Contrast) -> float:
        """Return the difference of the mean temperatures of a contrast's arms."""
        return float(self.values(contrast._replace(endpoint=plan.ENDPOINTS["temperature"])).mean())


def diverged(figures: Plain) -> bool:
    """Return True for a run that ended by an error, or one of whose losses is no number."""
    return "exit_code" in figures or not all(math.isfinite(figures[at]["nll"]) for at in ("last", "best"))


def with_fit(figures: Plain) -> Plain:
    """Return the figures of a run with its `fit`; those of a run that diverged as they are."""
    if diverged(figures):
        return figures
    halves = figures["sample_nll_by_half"].values()
    nll_sum = sum(half["nll"] * half["tokens"] for half in halves)
    return figures | {"fit": {"nll": nll_sum / sum(half["tokens"] for half in halves)}}


def cells(runs: Kept, contrast: Contrast) -> list[str]:
    """Return the cells of a contrast below HEAD."""
    if not runs.has(contrast):
        return [contrast.name, "0", "not there", "-", "-"]
    name, *rest = line(runs, contrast)
    return [name, str(len(runs.seeds_of(contrast))), *rest]


# -------------------------------------------------------------------------------------------- primary


def primary(runs: Kept) -> Iterator[str]:
    """Yield the table of the primary contrasts with both p after Holm, and that of their values at each seed."""
    different = holm([p_different(runs.values(each)) if runs.has(each) else None for each in plan.PRIMARY])
    equal = holm([p_equal(runs.values(each), runs.margins(each)) if runs.has(each) else None for each in plan.PRIMARY])
    rows = [[*HEAD, "margin", "p different", "p equal", "temperature", "by the plan"]]
    for each, p, q in zip(plan.PRIMARY, different, equal, strict=True):
        shown = ["-", "-", "-", "not there"]
        if runs.has(each):
            shown = [f"{p:.2g}", f"{q:.2g}", f"{runs.hotter(each):+.4f}", verdict(runs, each, p, q)]
        rows.append([*cells(runs, each), f"{each.margin}", *shown])
    yield markdown_table(rows)
    seeds = [by_seed(runs, each, SEEDS) for each in plan.PRIMARY if runs.has(each)]
    yield markdown_table([["", *map(str, SEEDS)], *seeds])


def verdict(runs: Kept, contrast: Contrast, p_different: float, p_equal: float) -> str:
    """Return the plan's word for a contrast, given both p after Holm."""
    if contrast.endpoint == TEMPERED and abs(runs.hotter(contrast)) > plan.MATCHED:
        return "not matched"
    side = "below" if runs.values(contrast).mean() < 0 else "above"
    words = [f"{side} 0"] if p_different <= ALPHA else []
    words += ["equal"] if p_equal <= ALPHA else []
    return " and ".join(words) or "undecided"


# ------------------------------------------------------------------------------------------ precision


def precision(runs: Kept) -> Iterator[str]:
    """Yield the contrasts of precision, and what the plan reads off them; without Holm."""
    yield markdown_table([HEAD, *(cells(runs, each) for each in plan.PRECISION)])
    if runs.has(plan.REGULARISES):
        bounds = interval(runs.values(plan.REGULARISES))
        assert bounds is not None, "of two seeds or more"
        yield f"Precision regularises: {answer(bounds[1] < 0)}, by the interval over seeds."
    if runs.has(plan.AS_MUCH):
        p = p_equal(runs.values(plan.AS_MUCH), runs.margins(plan.AS_MUCH))
        yield f"As much as SFTMix: {answer(p <= ALPHA)}, p of equality within {plan.AS_MUCH.margin}: {p:.2g}."
    if all(map(runs.has, plan.SIGNS)):
        low, high = sorted(runs.values(each).mean() for each in plan.SIGNS)
        sign = "another" if low < 0 < high else "the same"
        yield f"SFTMix − NTP at best has {sign} sign under bf16; both intervals are above."


def answer(holds: bool | np.bool_) -> str:
    return "yes" if holds else "not shown"


# ------------------------------------------------------------------------------------------------ arms


def arms(runs: Kept) -> str:
    """Return the means of each arm over the whole blocks that it has."""
    rows = [["arm", "seeds", *plan.ENDPOINTS]]
    for arm in plan.ARMS:
        alone = [Contrast(arm, {arm: 1.0}, endpoint) for endpoint in plan.ENDPOINTS.values()]
        if runs.has(alone[0]):
            rows.append([arm, str(len(runs.seeds_of(alone[0]))), *(f"{runs.values(x).mean():.4f}" for x in alone)])
    return markdown_table(rows)


def pairs(runs: Kept) -> str:
    """Return what the pairs of SFTMix and SFTMix-permuted are, over the seeds that both have."""
    seeds, configs = runs.seeds_of(plan.PRIMARY[4]), Study(WORK, runs.folder).variants
    rows = [["arm", "seeds", "pairs that cross the halves", "mixed tokens", "mu_effective"]]
    for arm in plan.PRIMARY[4].weights if seeds else ():
        found = [runs.runs[arm, seed] for seed in seeds]
        columns = (
            [crossing(runs, configs[arm], seed) for seed in seeds],
            [figures["confounds"]["mixed_token_share"] for figures in found],
            [figures["mu_effective"] for figures in found],
        )
        rows.append([arm, str(len(seeds)), *(f"{np.mean(column):.4f}" for column in columns)])
    return markdown_table(rows)


def crossing(runs: Kept, config: RunConfig, seed: int) -> float:
    """Return the share of the pairs of all epochs that cross the halves, drawn again as a run of the seed drew them."""
    dynamics, pairing = read_dynamics(runs.path("scores", f"seed-{seed}.parquet")), config.resolved_pairing()
    assert pairing is not None, "of arms with pairs"
    confidence, rows = config.confidence.estimate(dynamics), np.arange(len(dynamics.ids))
    scores = Scores(dynamics.ids, rows, confidence, variability(dynamics), dynamics.n_tokens)
    split = config.splitter.split(scores, seed=seed)
    epochs = [pairing.pairs(split, scores, epoch=epoch, seed=seed) for epoch in range(int(config.training.epochs))]
    first, second = split.group[np.concatenate(epochs)].T
    return float((first != second).mean())


# ----------------------------------------------------------------------------------------------- calls


def report(results: Path) -> str:
    """Return all of the analysis."""
    runs = Kept(results)
    new = [runs.runs[run] for run in [*ORDER, *BF16] if run in runs.runs]
    revisions = {str(figures["git_revision"]) for figures in new if "git_revision" in figures}
    about = {"Diverged, left out": runs.diverged, "Not there": [run for run in plan.PLANNED if run not in runs.runs]}
    lines = [f"{what}: {', '.join(f'{arm} {seed}' for arm, seed in some) or 'none'}." for what, some in about.items()]
    lines += [f"Revisions of the new runs: {', '.join(sorted(revisions))}.", "## Primary. Both p after Holm"]
    lines += [*primary(runs), "## Precision, seeds 1 to 4", *precision(Kept(results, plan.OF_PRECISION))]
    lines += ["## Secondary, not tested", markdown_table([HEAD, *(cells(runs, each) for each in plan.SECONDARY)])]
    lines += ["## Arms at seeds 1 to 8", arms(Kept(results, FIRST)), "## Pairs", pairs(runs)]
    return "\n\n".join(lines)


def first_call(results: Path, now: datetime) -> Mapping[str, object]:
    """Return what is kept of the first call, which is this one if nothing is."""
    runs = Kept(results)
    if (kept := runs.folders[0] / "analysed.json").exists():
        return read_json(kept)
    seeds = {each.name: runs.seeds_of(each) for each in plan.PRIMARY}
    seeds |= {each.name: Kept(results, plan.OF_PRECISION).seeds_of(each) for each in plan.PRECISION}
    first = {"time": f"{now:%Y-%m-%d %H:%M} UTC", "git_revision": made_by(1)["git_revision"], "seeds": seeds}
    write_json(runs.folder / "analysed.json", first)
    return first


def main(now: datetime | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of both studies' folders")
    parser.add_argument("--power", action="store_true", help="the plan's table of power alone, without any result")
    parser.add_argument("--ends_here", action="store_true", help="before the stop, with what is there")
    options = parser.parse_args()
    if options.power:
        print(plan.powers())
        return
    now = now or datetime.now(UTC)
    there = Kept(options.results).runs
    missing = [run for run in plan.PLANNED if run not in there]
    if missing and now < plan.STOP and not options.ends_here:
        sys.exit(
            f"error: {len(missing)} of {len(plan.PLANNED)} runs are not there, and no contrast is computed before the "
            f"plan's stop, {plan.STOP:%Y-%m-%d %H:%M} UTC; if the work has to end, --ends_here takes what is there"
        )
    text = report(options.results)  # first: a call that fails has shown nothing
    first = first_call(options.results, now)
    print(f"First analysed on {first['time']}, at revision {first['git_revision']}.\n")
    print(text)


if __name__ == "__main__":
    main()
