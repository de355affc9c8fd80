"""The tables of the study as they were planned, with the runs of each that have been collected so far."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.study import TableLosses, read_study  # noqa: E402
from sftmix.config.read import read_layers  # noqa: E402

FOLDER = Path(__file__).resolve().parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
TITLES = {
    "primary": "Tier 1: the recipe and its controls",
    "overfit": "Tier 2: the regime that overfits",
    "parts": "Tier 3: parts of the recipe",
    "rows": "Tier 4: other rows",
    "others": "Tier 5: other methods",
}
TESTED = ("primary", "overfit")
"""The tiers with enough seeds for a test."""
DIRECTION = ("real-gemma-main", "real-gemma-overfit")
"""Tables whose three seeds show a direction and no claim."""
PILOTS = ("pilot-rate", "pilot-strength")
REAL = {
    "real-main": "SmolLM2, 320 rows, 2 epochs",
    "real-overfit": "SmolLM2, 80 rows, 8 epochs",
    "real-gemma-main": "Gemma, 320 rows, 2 epochs",
    "real-gemma-overfit": "Gemma, 80 rows, 8 epochs",
}
"""The tables of preregistration-real.md, whose configurations are in the folder `real`."""

Summary = Mapping[str, Any]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Tier:
    """A planned table and its collected runs.

    seeds      the planned ones
    contrasts  planned pairs (A, B), for A - B
    runs       arm -> seed -> summary of the finished run, with the figures of real/answers.py if it was asked
    diverged   arm -> seeds of its runs that diverged, and so have no figures
    losses     of single examples, as far as they were kept
    """

    name: str
    arms: Sequence[str]
    seeds: Sequence[int]
    baseline: str
    contrasts: Sequence[Pair]
    runs: Mapping[str, Mapping[int, Summary]]
    diverged: Mapping[str, Sequence[int]] = field(default_factory=dict)
    losses: TableLosses | None = None

    @property
    def title(self) -> str:
        return (TITLES | REAL).get(self.name, self.name)

    @property
    def tested(self) -> bool:
        return self.name in TESTED

    @property
    def runs_done(self) -> int:
        return sum(len(self.runs[arm]) + len(self.diverged.get(arm, ())) for arm in self.arms)

    @property
    def runs_planned(self) -> int:
        return len(self.arms) * len(self.seeds)

    @property
    def complete(self) -> bool:
        return self.runs_done == self.runs_planned

    @cached_property
    def common(self) -> list[int]:
        """The seeds at which all arms are over, with figures or diverged."""
        over = {arm: {*self.runs[arm], *self.diverged.get(arm, ())} for arm in self.arms}
        return [seed for seed in self.seeds if all(seed in over[arm] for arm in self.arms)]

    def values(self, arm: str, key: str) -> dict[int, float]:
        """Seed -> figure of an arm: of all its seeds in a finished tier, of those that all arms have in another."""
        seeds = self.seeds if self.complete else self.common
        return {seed: self.runs[arm][seed][key] for seed in seeds if seed in self.runs[arm]}

    def differences(self, pair: Pair, key: str) -> dict[int, float]:
        """Seed -> figure of the first arm minus that of the second, for the seeds that both have."""
        ours, theirs = (self.values(arm, key) for arm in pair)
        return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}


def read_tier(name: str, results: Path = RESULTS, plans: Path = FOLDER) -> Tier:
    """Return a planned table with what was collected of it, which may be nothing."""
    # Read as plain values: the components of a table take half a second, and nothing here asks for them.
    plan_file = plans / f"{name.replace('real-', 'real/')}.yaml"
    plan = {key: value for _, layer in read_layers(plan_file) for key, value in layer.items()}
    arms = list(plan["variants"])
    kept = read_study(results / f"{name}.parquet")
    runs: dict[str, dict[int, Summary]] = {arm: {} for arm in arms}
    diverged: dict[str, list[int]] = {arm: [] for arm in arms}
    for (arm, seed), summary in kept.runs.items():
        if arm in runs and seed in plan["seeds"]:
            if "eval_nll_after" in summary:
                runs[arm][seed] = summary
            else:
                diverged[arm].append(seed)
    return Tier(
        name,
        arms,
        plan["seeds"],
        plan.get("baseline") or arms[0],
        [(a, b) for a, b in plan.get("contrasts", ())],
        {arm: dict(sorted(found.items())) for arm, found in runs.items()},
        {arm: seeds for arm, seeds in diverged.items() if seeds},
        kept.losses,
    )
