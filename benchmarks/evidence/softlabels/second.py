"""Rows and pilot of preregistration-second.md, whose table `sftmix compare` makes from second.yaml.

    python benchmarks/evidence/softlabels/second.py rows --rows ../shared/data/alpaca/alpaca_8k.json
    python benchmarks/evidence/softlabels/second.py pilot
    python benchmarks/evidence/softlabels/second.py contrasts

`rows` takes those of the study of 7M parameters (../prepare.py) that no run of it was trained on. `pilot` finds the
epsilon of Unigram that has the temperature of SoftLabels, and prints each strength that it tried. `contrasts` prints
the planned differences of the runs that are kept (../../results/evidence/second.parquet).
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "docs/examples")]

from matched import matched  # noqa: E402

from benchmarks.evidence.prepare import cut, digest, parts_of  # noqa: E402
from benchmarks.evidence.study import read_study  # noqa: E402
from sftmix import RunConfig  # noqa: E402
from sftmix.cli.parsing import read_arguments  # noqa: E402
from sftmix.components import UnigramSmoothing  # noqa: E402
from sftmix.tools.compare import TableOptions  # noqa: E402
from sftmix.tools.compare.command import comparison_of  # noqa: E402
from sftmix.tools.compare.statistics import ALPHA, holm, interval, mean_sd, sign_flip  # noqa: E402

WORK = Path("runs/second")
TRAINED = 960
"""First rows of train.json, on which the study before trained."""
SIZES = {"train": 1_000, "pilot": 400, "held_out": 1_225}
PILOT_SEEDS = [911, 912]
STRONGEST = 0.16
"""First epsilon of the bisection, four times that which is expected."""

KEPT = ROOT / "benchmarks/results/evidence/second.parquet"
ENDPOINTS = {
    "best": lambda run: run["eval_nll_best"],
    "tempered": lambda run: run["calibration"]["nll_temperature_scaled"],
}
MARGIN = 0.005
"""Nats per response token."""


def write_rows(alpaca: Path) -> None:
    """Write the three files, of which an instruction is in one, and print their hashes."""
    rest = cut(parts_of(json.loads(alpaca.read_text(encoding="utf-8")))["train"], TRAINED)[1]
    (WORK / "data").mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        part, rest = cut(rest, size)
        text = json.dumps(part, ensure_ascii=False, indent=0) + "\n"
        (WORK / "data" / f"{name}.json").write_text(text, encoding="utf-8")
        print(name, len(part), digest(text))


def pilot() -> None:
    """Print the temperature of SoftLabels, and of Unigram at the strengths that bisection tries."""
    table = Path(__file__).with_name("second.yaml")
    soft = comparison_of(read_arguments(["--config", str(table)], TableOptions)).variants["SoftLabels"]
    soft = replace(soft, data=replace(soft.data, eval=[str(WORK / "data/pilot.json")]))

    def unigram(epsilon: float) -> RunConfig:
        return replace(soft, objective=UnigramSmoothing(epsilon=epsilon))

    wanted, tried = matched(str(WORK / "pilot"), soft, unigram, STRONGEST, PILOT_SEEDS)
    print(
        f"SoftLabels {wanted:.4f}", *(f"epsilon {epsilon:g} {found:.4f}" for epsilon, found in tried.items()), sep="\n"
    )


def contrasts() -> list[str]:
    """Return lines of a table: the contrasts at both endpoints, of which the plan names one each."""
    study, lines = read_study(KEPT), list[str]()
    runs, planned, seeds = study.runs, study.about["options"]["contrasts"], study.about["options"]["seeds"]
    for endpoint, value in ENDPOINTS.items():
        found = [[value(runs[a, seed]) - value(runs[b, seed]) for seed in seeds] for a, b in planned]
        adjusted = holm([sign_flip(differences) for differences in found])
        for number, ((a, b), differences, p) in enumerate(zip(planned, found, adjusted, strict=True), start=1):
            (mean, _), (low, high) = mean_sd(differences), interval(differences) or (math.nan, math.nan)
            words = ["different"] * (p <= ALPHA) + ["equal"] * (low > -MARGIN and high < MARGIN)
            by_seed = " ".join(f"{difference:+.4f}" for difference in differences)
            lines.append(
                f"| D{number}: {a} − {b}, {endpoint} | {mean:+.4f} | [{low:+.4f}, {high:+.4f}] | {p:.2g} "
                f"| {', '.join(words) or 'undecided'} | {by_seed} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "pilot", "contrasts"])
    parser.add_argument("--rows", type=Path, help="alpaca_8k.json")
    options = parser.parse_args()
    if options.what == "pilot":
        pilot()
    elif options.what == "contrasts":
        print(*contrasts(), sep="\n")
    else:
        write_rows(options.rows)


if __name__ == "__main__":
    main()
