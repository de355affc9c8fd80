"""Who is confident: perplexities of the training rows under several models, before and after the reference's training.

    python benchmarks/evidence/real/confidences.py \\
        --before SmolLM2=runs/real/before/smollm2-135m Gemma=runs/real/before/gemma3-270m \\
        --after SmolLM2=runs/real/main/NTP/seed-1 Gemma=benchmarks/results/evidence/real-gemma-main-scores.parquet \\
        --words runs/real/main/NTP/seed-1

A run --before has the model as it comes for a reference; a run --after has the trained one of a table, or is the file
of its scores:

    sftmix confidence --config benchmarks/evidence/real/common.yaml \\
        --reference FromCheckpoints --reference.paths '[runs/real/smollm2-135m]' --out runs/real/before/smollm2-135m
    sftmix confidence --config benchmarks/evidence/real/gemma-main.yaml \\
        --reference FromCheckpoints --reference.paths '[runs/real/gemma3-270m]' --out runs/real/before/gemma3-270m

RESULTS/real-confidence.csv gets a line for each row: its perplexity under each model before the training ("before"), at
the last scoring ("after"), and averaged over the scorings ("mean", minus the confidence); how many words its response
has, and what share of them its prompt has, too: from the run --words, of which `sftmix report RUN --map 0` was made.
What is not named stays as it is in the file, and so do its rows. The command prints how far the models agree, each with
itself before its training, and what these words say about the confidence.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.components.confidence import perplexity  # noqa: E402
from sftmix.disk.tables import read_dynamics  # noqa: E402

FILE = RESULTS / "real-confidence.csv"
WORDS = ("words", "in the prompt")


def read(run: Path) -> pd.DataFrame:
    """Return the perplexities of a run's reference: a line for each row, a column for each scoring.

    run  its directory, or a file of its dynamics
    """
    dynamics = read_dynamics(run if run.is_file() else run / "confidence" / "dynamics.parquet")
    index = pd.Index(dynamics.ids, name="id")
    return pd.DataFrame(perplexity(dynamics), index=index, columns=dynamics.steps)


def agreement(one: pd.Series, other: pd.Series) -> tuple[float, pd.Series]:
    """Return the rank correlation of two columns, and which rows are in the same half of both; rows of both alone."""
    both = pd.concat([one, other], axis=1).dropna()
    halves = both > both.median()
    return both.corr("spearman").iloc[0, 1], halves.iloc[:, 0] == halves.iloc[:, 1]


def words(run: Path) -> pd.DataFrame:
    """Return the number of words of each training row's response, and the share of them that its prompt has, too."""
    rows = pd.read_parquet(run / "report" / "examples.parquet").set_index("id")
    rows = rows[~rows.held_out]
    prompt, response = (rows[name].str.lower().str.findall(r"\w+") for name in ("instruction", "response"))
    shared = [sum(word in set(one) for word in other) for one, other in zip(prompt, response, strict=True)]
    return pd.DataFrame(dict(zip(WORDS, (response.str.len(), shared / response.str.len()), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--before", "--after"):
        parser.add_argument(name, nargs="+", default=[], help="NAME=RUN of each model")
    parser.add_argument("--words", type=Path, help="a run with a report of the rows")
    options = parser.parse_args()
    before, after = (dict(word.split("=", 1) for word in words) for words in (options.before, options.after))
    columns = {}
    for name, run in before.items():
        columns[f"{name} before"] = read(Path(run)).iloc[:, -1]
    for name, run in after.items():
        scorings = read(Path(run))
        columns |= {f"{name} after": scorings.iloc[:, -1], f"{name} mean": scorings.mean(axis=1)}
    if options.words:
        columns |= dict(words(options.words).items())
    table = pd.DataFrame(columns).sort_index()
    if FILE.exists():
        kept = pd.read_csv(FILE, index_col="id")
        if columns and not kept.index.isin(table.index).all():
            parser.error(f"{FILE} has rows that the runs lack")
        table = kept.assign(**table.reindex(kept.index))
    table.round(4).to_csv(FILE)
    print("| perplexities | rank correlation | in the same half |\n|---|---:|---:|")
    trained = [name.removesuffix(" mean") for name in table if name.endswith(" mean")]
    pairs = [pair for when in ("before", "mean") for pair in combinations([c for c in table if c.endswith(when)], 2)]
    for pair in [*pairs, *((f"{name} before", f"{name} mean") for name in trained)]:
        correlation, same = agreement(*(table[name] for name in pair))
        print(f"| {' and '.join(pair)} | {correlation:.2f} | {same.mean():.0%} of {len(same)} |")
    for name in trained:
        quarter = pd.qcut(table[f"{name} mean"], 4, labels=False).rename("quarter, 0 the most confident")
        print(name, table.groupby(quarter)[list(WORDS)].median().round(2), sep="\n")
    print("rank correlation", table.corr("spearman")[list(WORDS)].round(2), sep="\n")
    print(table.describe(percentiles=[0.05, 0.25, 0.5, 0.75, 0.95]).round(2).to_string())


if __name__ == "__main__":
    main()
