"""Make the runs of preregistration-softlabels.md in their order; the same command goes on where it was.

    python benchmarks/evidence/softlabels/run.py precision               NTP and SFTMix in bf16, on a CPU that has it
    python benchmarks/evidence/softlabels/run.py pilot                   the strengths of the three matched arms
    python benchmarks/evidence/softlabels/run.py arms --seeds 1 3 5 7    all else; a second process has other seeds

It needs runs/softlabels/data (../regularises/rows.py) and runs/real/smollm2-135m (benchmarks/real_models.py, or a link
to what it made). What is kept of a run is as in the study before (../regularises/run.py), in RESULTS/softlabels, where
strengths.json has what the pilot found. Scores of references and runs of the study before are read from
RESULTS/regularises. No loss is printed: what a run prints goes to WORK/logs.

Once what is kept is packed in files.parquet (../packed.py), unpack it before you go on.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.packed import whole  # noqa: E402
from benchmarks.evidence.regularises import run as before  # noqa: E402
from benchmarks.evidence.regularises.rows import PILOT_SEEDS  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.disk.files import read_json, write_json  # noqa: E402

FOLDER, WORK, OLD = Path(__file__).resolve().parent, Path("runs/softlabels"), RESULTS / "regularises"


class Match(NamedTuple):
    """An arm whose strength gives it the temperature of another arm on the rows of the pilot.

    option  of the objective, the strength
    like    the other arm
    first   the strength that is tried first
    known   strength -> the pilot's runs of the study before that have it
    """

    option: str
    like: str
    first: float
    known: Mapping[float, str] = {}


MATCHED = {
    "SoftLabels-weak": Match("mu", "SFTMix", 0.03),
    "Unigram": Match("epsilon", "SoftLabels", 0.04),
    "Uniform": Match("epsilon", "SoftLabels", 0.04, {0.02: "pilot-LabelSmoothing-0.02"}),
}
TRIES = 5
"""Most strengths that the pilot tries of an arm."""
FIRST, SECOND = range(1, 9), range(9, 17)
"""Seeds with the runs of the study before, and seeds without."""
BF16 = [(arm, seed) for seed in (1, 2, 3, 4) for arm in ("NTP-bf16", "SFTMix-bf16")]
ORDER = (
    [("Unigram", seed) for seed in FIRST]
    + [(arm, seed) for seed in SECOND for arm in ("SoftLabels", "Unigram", "NTP")]
    + [(arm, seed) for seed in FIRST for arm in ("SoftLabels-weak", "Uniform", "SoftElsewhere", "SFTMix-permuted")]
)


class Study(before.Study):
    """The runs of this study: `work` has their directories, `out` what is kept of them.

    strengths  of the matched arms, by name
    """

    arms = FOLDER / "arms.yaml"

    def __init__(self, work: Path, out: Path, options: Sequence[str] = ()) -> None:
        super().__init__(work, out, options)
        self.strengths: dict[str, float] = {}

    def read_strengths(self, folder: Path) -> None:
        """Take the strengths that the pilot has written to a folder, if it is over."""
        if (file := folder / "strengths.json").exists():
            self.strengths = {arm: found["strength"] for arm, found in read_json(file).items()}

    def config(self, arm: str, seed: int, *, held_out: str = "watch") -> before.Plain:
        plain = super().config(arm, seed, held_out=held_out)
        args = plain["objective"].get("init_args", {})
        if "tokens" in args:
            args["tokens"] = str(self.tokens(seed))
        if arm in MATCHED:
            args[MATCHED[arm].option] = self.strengths[arm]
        return plain

    def scores(self, seed: int) -> Path:
        old = OLD / "scores" / f"seed-{seed}.parquet"  # which are packed nowhere
        return old if old.exists() else super().scores(seed)

    def tokens(self, seed: int) -> Path:
        """Return the file of all response tokens of a seed's training rows, which is written unless it is there."""
        from sftmix.config.read import from_dict
        from sftmix.pipeline.rows import read_rows
        from sftmix.ranks.world import World, accelerator

        if not (file := self.work / f"tokens-{seed}.npy").exists():
            plain = self.config("NTP", seed) | {"out": str(self.work / "rows")}
            _, rows = read_rows(from_dict(plain), World(device=accelerator()))
            train = rows.data.train
            tokens = [train[row].input_ids[train[row].target] for row in range(len(train.ids))]
            with (part := file.with_suffix(".part")).open("wb") as to:  # half a file would be taken for the whole
                np.save(to, np.concatenate(tokens).astype(np.int64))
            part.replace(file)
        return file

    # ----------------------------------------------------------------------------------------------- pilot

    def pilot(self) -> None:
        """Find the strength of each matched arm, and write it."""
        file = self.out / "strengths.json"
        found: dict[str, Any] = read_json(file) if file.exists() else {}
        wanted = {"SFTMix": self._old("pilot-SFTMix"), "SoftLabels": self._temperature("SoftLabels")}
        for arm, match in MATCHED.items():
            if arm not in found:
                tried = {0.0: self._old("pilot-NTP")} | {x: self._old(name) for x, name in match.known.items()}
                while (strength := next_strength(tried, wanted[match.like], match.first)) is not None:
                    tried[strength] = self._temperature(arm, strength)
                chosen = strength_at(tried, wanted[match.like])
                by_strength = {f"{x:g}": tried[x] for x in sorted(tried)}
                found[arm] = {"strength": chosen, "wanted": wanted[match.like], "temperatures": by_strength}
                write_json(file, found)

    def _temperature(self, arm: str, strength: float | None = None) -> float:
        """Return the mean temperature of the pilot's runs of an arm, which are made unless they are there."""
        if strength is not None:
            self.strengths[arm] = strength
        name = f"pilot-{arm}" + ("" if strength is None else f"-{strength:g}")
        runs = [self.quietly(arm, seed, name=name, held_out="pilot") for seed in PILOT_SEEDS]
        return statistics.mean(run["last"]["temperature"] for run in runs)

    def _old(self, name: str) -> float:
        runs = [read_json(whole(OLD) / "runs" / f"{name}-seed-{seed}.json") for seed in PILOT_SEEDS]
        return statistics.mean(run["last"]["temperature"] for run in runs)

    def quietly(self, arm: str, seed: int, **options: Any) -> before.Plain:
        """Return what is kept of an arm at a seed; what its run prints goes to a file."""
        log = self.work / "logs" / f"{options.get('name') or arm}-seed-{seed}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as to, contextlib.redirect_stdout(to), contextlib.redirect_stderr(to):
            return self.arm(arm, seed, **options)


def _bracketed(tried: Mapping[float, float], wanted: float) -> bool:
    """Return True if the wanted temperature is between those of two strengths above 0."""
    found = [temperature for strength, temperature in tried.items() if strength]
    return bool(found) and min(found) <= wanted <= max(found)


def next_strength(tried: Mapping[float, float], wanted: float, first: float) -> float | None:
    """Return the strength to try next, given strength -> temperature; None if no other one is needed.

    The first one is `first`; then the largest one is doubled if all temperatures are above the wanted one, or the
    smallest one is halved if all are below.
    """
    above = {strength: temperature for strength, temperature in tried.items() if strength}
    if first not in above:
        return first
    if len(above) >= TRIES or _bracketed(tried, wanted):
        return None
    return 2 * max(above) if min(above.values()) > wanted else min(above) / 2


def strength_at(tried: Mapping[float, float], wanted: float) -> float:
    """Return the strength of the wanted temperature, of four decimals, on the line through both neighbours of it.

    If no strength was hot or cold enough, it is the outermost one.
    """
    pairs = sorted(tried.items())
    for (low, above), (high, below) in pairwise(pairs):
        if below <= wanted <= above:
            share = (above - wanted) / (above - below) if above != below else 1.0
            return round(low + share * (high - low), 4)
    return round(pairs[-1][0], 4)


def steps(study: Study, part: str, seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield arm and seed of the runs of a part in their order: of these seeds, and of arms whose strength is known."""
    for arm, seed in BF16 if part == "precision" else ORDER:
        if seed in seeds and (arm not in MATCHED or arm in study.strengths):
            yield arm, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["precision", "pilot", "arms"])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(1, 17)))
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the rows and the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "softlabels", help="folder of what is kept")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with a small random model")
    options, more = parser.parse_known_args()
    study = Study(options.work, options.out, [*more, *(before.TINY if options.tiny else [])])
    options.work.mkdir(parents=True, exist_ok=True)
    if options.part == "pilot":
        study.pilot()
        return
    study.read_strengths(options.out)
    if options.part == "arms" and (unknown := sorted(MATCHED.keys() - study.strengths)):
        print(f"left out until the pilot has found their strengths: {', '.join(unknown)}")
    for arm, seed in steps(study, options.part, options.seeds):
        study.quietly(arm, seed)


if __name__ == "__main__":
    main()
