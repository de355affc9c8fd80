"""The plan of a table: variants, seeds, the run of each cell, and the checks before the first run."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sftmix.components.component import Need
from sftmix.config import RunConfig
from sftmix.config.checks import problems_of
from sftmix.config.values import EXAMPLES
from sftmix.config.wants import Wants
from sftmix.disk.files import MANIFEST
from sftmix.tools.compare.statistics import MAX_SEEDS
from sftmix.words.differing import differing
from sftmix.words.errors import refuse
from sftmix.words.given import OptionFields

OF_THE_TABLE = {"out", "seed", "with_baseline"}
"""Options of a run that the table sets, so that a variant cannot."""
DIVERGED = "diverged.json"
"""In the directory of a cell whose target diverged: the error. Without it, the same command tries the cell again."""

# A variant is a folder beside the table's files: NTP, mu-0.4 and "table" may be one, table.md and .hidden not.
_NAME = re.compile(r"(?!table\.|compare\.|STATUS\.)[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclass(kw_only=True)
class TableOptions(OptionFields):
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6])
    """Seeds of the runs. `--list` says how many a test of the contrasts needs: 6, and more for several contrasts."""
    baseline: str | None = None
    """The variant that the others are compared with; null: the first."""
    metric: str = "eval_nll_after"
    """Figure of summary.json that the contrasts are tested on, with dots (calibration.ece); or fit, the NLL per
    response token of the training rows at the end."""
    metrics: list[str] | None = None
    """A list of further figures; the name of a group (calibration) stands for all of it. null: a choice of them."""
    contrasts: list[list[str]] | None = None
    """Planned comparisons: [A, B] of variants for A - B, or [A, B, C, D] for (A - B) - (C - D); null: every variant
    with the baseline."""
    fresh_reference: bool = False
    """Each seed has its own reference and held-out rows. false: those of --seed for all, made once."""


class Cell(NamedTuple):
    """One run of the table: a variant at a seed, its name and run directory, and its configuration in plain form."""

    variant: str
    seed: int
    name: str
    path: Path
    plain: Mapping[str, object]


@dataclass(kw_only=True)
class Comparison:
    """Variants x seeds. The variants' own seed, the same in all, decides the reference and the held-out rows.

    out  directory of the table; a run is in OUT/<variant>/seed-<seed>
    """

    out: str = ""
    variants: Mapping[str, RunConfig]
    options: TableOptions = field(default_factory=TableOptions)

    @property
    def baseline(self) -> str:
        return self.options.baseline or next(iter(self.variants))

    @property
    def contrasts(self) -> list[tuple[str, ...]]:
        """(A, B): A - B is tested; (A, B, C, D): (A - B) - (C - D)."""
        if self.options.contrasts is None:
            return [(name, self.baseline) for name in self.variants if name != self.baseline]
        return list(map(tuple, self.options.contrasts))

    @cached_property
    def cells(self) -> list[Cell]:
        """All runs, seed by seed, so that an unfinished table already compares the variants."""
        variants = {name: config.as_dict() for name, config in self.variants.items()}
        if not self.options.fresh_reference:  # what all seeds share does not depend on a run's seed
            seed = self.variants[self.baseline].seed
            for plain in variants.values():
                if plain["data"]["seed"] is None and plain["data"]["eval_fraction"] is not None:
                    plain["data"]["seed"] = seed
                values = plain["reference"]["init_args"]
                if "training" in values:  # a reference that trains
                    training = values["training"] = {"seed": None, **(values["training"] or {})}
                    if training["seed"] is None:
                        training["seed"] = seed
        cells = []
        for seed in self.options.seeds:
            for name, plain in variants.items():
                place = f"{name}/seed-{seed}"
                path = Path(self.out) / place  # runs/role/NTP/seed-1
                cells.append(Cell(name, seed, place, path, {**plain, "seed": seed, "out": str(path)}))
        return cells

    def options_of(self, variant: str) -> dict[str, object]:
        """Return a variant's options that are not the same in all, as plain values; a new component as a whole."""
        options = dict[str, object]()
        for other in self.variants:
            options |= self.changed(other, variant)
        # SFTMix(mu=0.4) differs from NTP in `objective`, and from another SFTMix in `objective.mu`, a part of that.
        return {k: v for k, v in options.items() if k.rpartition(".")[0] not in options}

    def changed(self, base: str, variant: str) -> dict[str, object]:
        """Return the options of a variant that are not those of another, as plain values."""
        one, other = (self.variants[name].as_dict() for name in (base, variant))
        return {option: value for option, _, value in differing(one, other) if option not in OF_THE_TABLE}

    def as_dict(self) -> dict[str, object]:
        """Return the table in the form that `compare --config` reads: each variant with all its options."""
        return {
            "seed": self.variants[self.baseline].seed,
            **asdict(self.options),
            "variants": self.plain_variants(),
        }

    def plain_variants(self) -> dict[str, dict[str, object]]:
        """Return each variant with all its options: over any base it is the same."""
        return {
            name: {k: v for k, v in config.as_dict().items() if k not in OF_THE_TABLE}
            for name, config in self.variants.items()
        }

    def validate(self) -> None:
        """Check the table and every run of it, without reading data or a model; ConfigError lists every problem."""
        refuse(list(self._problems()), "the table")

    def _problems(self) -> Iterator[str]:
        options, names = self.options, list(self.variants)
        listed = ", ".join(names)
        if not names:
            yield (
                "variants is missing: `compare` runs named variants of a configuration, for example "
                f"--variants '{EXAMPLES['variants']}', or `variants` in a file of --config; `run` makes a single run"
            )
        elif self.baseline not in names:
            yield f"baseline is {self.baseline!r}; there are the variants {listed}"
        if not 1 <= len(options.seeds) <= MAX_SEEDS or len(set(options.seeds)) < len(options.seeds):
            # An exact test goes through 2^n signs: 20 seeds are a million.
            yield f"seeds is {options.seeds}; allowed: 1 to {MAX_SEEDS} different whole numbers"
        # A - B is also -(B - A), and (A - B) - (C - D) also (A - C) - (B - D)
        asked = Counter(frozenset((frozenset(arms[::3]), frozenset(arms[1:3]))) for arms in self.contrasts)
        if max(asked.values(), default=1) > 1:
            yield f"contrasts: {options.contrasts} asks for one difference more than once, which would count as several"
        for arms in options.contrasts or ():
            for arm in dict.fromkeys(arms):
                if arm not in names or arms.count(arm) > 1:
                    problem = "more than once" if arm in names else f"which is no variant; there are {listed}"
                    yield f"contrasts: {arms} names {arm}, {problem}"
            if len(arms) not in (2, 4):
                yield f"contrasts: {arms} is neither [A, B], for A - B, nor [A, B, C, D], for (A - B) - (C - D)"
        yield from of_variants({name: self._problems_of(name, config) for name, config in self.variants.items()})

    def _problems_of(self, name: str, config: RunConfig) -> Iterator[str]:
        """Yield the problems of one variant."""
        options = self.options
        if not _NAME.fullmatch(name):
            yield (
                f"{name!r} cannot be a directory's name; allowed: letters, digits and . _ + = -, and no name of a file "
                "of the table"
            )
        if config.with_baseline:
            yield "with_baseline has no place in a table; add a variant `objective: NTP` instead"
        if config.data.eval is None and config.data.eval_fraction is None and options.metric.startswith("eval_"):
            yield f"{options.metric} needs held-out rows; set data.eval or data.eval_fraction"
        own = config.reference
        # A class of one's own that trains, without the option `training`, by which its seed would be kept.
        wants = Wants(config)
        trains = wants.by_confidence and wants.by_dynamics and Need.TRAINING in own.needs
        alone = trains and "training" not in own.spec()["init_args"]
        if alone and len(options.seeds) > 1 and not options.fresh_reference:
            yield (
                f"reference {type(own).__name__} would be trained at each seed, as it has no option that keeps its "
                "seed: give its constructor `training: ReferenceTraining | None = None` (of sftmix.options) and set "
                "self.training to it, or set fresh_reference true"
            )
        yield from problems_of(config, needs_out=False)


def of_variants(problems: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Yield each problem once, behind the names of the variants that have it."""
    having = dict[str, list[str]]()
    for variant, found in problems.items():
        for problem in found:
            having.setdefault(problem, []).append(variant)
    for problem, variants in having.items():
        # An option of the base is in every variant.
        who = "all variants" if 1 < len(variants) == len(problems) else f"variant {', '.join(variants)}"
        yield f"{who}: {problem}"


def is_over(run: Path) -> bool:
    """Return True if the target of a run is trained, or has diverged: nothing is left to do."""
    return (run / "train" / MANIFEST).exists() or has_diverged(run)


def has_diverged(run: Path) -> bool:
    """Return True if a table has noted that the training of a run's target diverged, and no one trained it since."""
    return (run / DIVERGED).exists() and not (run / "train" / MANIFEST).exists()


def shown_options(options: Mapping[str, object]) -> str:
    """Write options as `key: value; ...`."""
    return "; ".join(f"{key}: {_value(value)}" for key, value in options.items()) or "(none)"


def _value(value: object) -> str:
    """Write a plain value; a component as its class and options, a group as its options that are set."""
    if isinstance(value, Mapping):
        options = value.get("init_args", value)  # SFTMix(mu=0.4, alpha=0.5); of a group (path=gpt2)
        listed = ", ".join(f"{k}={_value(v)}" for k, v in options.items() if v is not None)
        return f"{value.get('class_path', '').rpartition('.')[2]}({listed})"
    return value if isinstance(value, str) else json.dumps(value)
