"""How many of the first 50 rows by each order are to be mended: from the lists and the judgements that are kept.

    python benchmarks/evidence/suspects_lists.py
    python benchmarks/evidence/suspects_lists.py --rows first1500.jsonl --run DIR/scores    writes the lists again

The rows are the first 1,500 of alpaca_8k.json, DIR/scores is what `sftmix suspects first1500.jsonl --model MODEL --out
DIR` leaves. The two orders until 2026-11-26 are of the code before f96e560f, and stay as they are in the file.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence import suspects  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.disk.tables import read_dynamics  # noqa: E402
from sftmix.tools.runs.output import markdown_table  # noqa: E402
from sftmix.tools.suspects.rows import SuspectRows  # noqa: E402
from sftmix.tools.suspects.signals import ranked  # noqa: E402
from sftmix.tools.suspects.table import default_signals, kinds_of  # noqa: E402

FILE = RESULTS / "suspects-lists.csv"
READ = {"2026-11-23-suspects-read": (0, 3), "2026-11-26-suspects-read": (1, 3), "2026-11-27-suspects-order": (0, 1)}
"""Page of judgements -> its columns of ids and of the (first) reader's judgements; the last page counts."""
UNTIL = "until 2026-11-26"
RULE = "baseline: refusals, repeated prompts and language"
SINGLE = (
    "Information",
    "EndOfTurn",
    "HardTokens",
    "Mismatch",
    "Perplexity",
    "baseline: self-confidence (cleanlab), mean of the tokens",
)
FIRST = 50


class Listed(NamedTuple):
    """A row of FILE; `signal` is of the default orders, with a + if the row stands out by it."""

    order: str
    rank: int
    id: str
    signal: str


def cells_of(page: str) -> list[list[str]]:
    text = (RESULTS.parent / f"{page}.md").read_text(encoding="utf-8")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def judged() -> dict[str, bool]:
    """Return id -> whether the row is to be mended or dropped."""
    found: dict[str, bool] = {}
    for page, (of_id, said) in READ.items():
        for cells in cells_of(page):
            if len(cells) > said and re.fullmatch("[0-9a-f]{16}", cells[of_id]):
                found[cells[of_id]] = cells[said] == "yes"
    return found


def others() -> list[str]:
    """Return the ids of the 50 others, drawn on 2026-11-23 from what was no suspect then."""
    return [cells[0] for cells in cells_of("2026-11-23-suspects-read") if cells[1:2] == ["random"]]


def read_lists() -> dict[str, list[Listed]]:
    lists: dict[str, list[Listed]] = {}
    with FILE.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            lists.setdefault(line["order"], []).append(
                Listed(line["order"], int(line["rank"]), line["id"], line["signal"])
            )
    return lists


def ratio(ours: int, of_ours: int, theirs: int, of_theirs: int) -> str:
    """Return a ratio of two shares with Katz's 95% interval, from the logarithm."""
    mean = ours / of_ours / (theirs / of_theirs)
    half = 1.96 * np.sqrt(1 / ours - 1 / of_ours + 1 / theirs - 1 / of_theirs)
    return f"{mean:.1f} [{mean * np.exp(-half):.1f}, {mean * np.exp(half):.1f}]"


def counts() -> Iterator[list[str]]:
    """Yield for each order how many of its first rows were judged, are to be mended, and are among the others."""
    mend, rest = judged(), others()
    bad = sum(mend[each] for each in rest)
    yield [
        "order",
        "judged",
        "to be mended",
        "ratio to the 50 others",
        "of the others among them",
        "ratio without these",
    ]
    for order, listed in read_lists().items():
        first = [each.id for each in listed[:FIRST]]
        wrong = sum(mend.get(each, False) for each in first)
        left = [each for each in rest if each not in first]
        seen = sum(each in mend for each in first)
        both = [ratio(wrong, seen, bad, len(rest)), ratio(wrong, seen, sum(mend[each] for each in left), len(left))]
        yield [order, f"{seen}", f"{wrong}", both[0], f"{len(rest) - len(left)}", both[1]]


def made(rows: list[dict[str, str]], run: Path) -> Iterator[Listed]:
    """Yield the lists of today's orders; of the rule all rows that it names, in the order of the file."""
    rows = [row for row in rows if row["output"].strip()]
    dynamics = read_dynamics(run / "confidence" / "dynamics.parquet")
    assert len(rows) == len(dynamics.ids), f"{len(rows)} rows with a response, {len(dynamics.ids)} scored ones"
    vectors, (prompts, responses) = suspects.sentence_vectors({"all": rows}), suspects.texts_of(rows)
    scores: Mapping[str, np.ndarray] = suspects.signals_of(rows, dynamics, vectors)
    for name, embedding in (("default", "minilm"), ("default, without the sentence embedding", "tfidf")):
        texts = SuspectRows(prompts, responses, dynamics, embedding)
        if embedding == "minilm":
            texts.vectors = [np.array([vectors[text] for text in side]) for side in (prompts, responses)]
        kinds = kinds_of(default_signals(texts))
        counted = ranked(texts, kinds, [""] * len(rows))[1]
        best, signal = counted.max(axis=1).to_numpy(), counted.idxmax(axis=1).tolist()
        for rank, at in enumerate(np.argsort(-best, kind="stable")[:FIRST], start=1):
            yield Listed(name, rank, dynamics.ids[at], signal[at] + "+" * bool(best[at] > 1))
    for name in SINGLE:
        known = np.where(np.isnan(scores[name]), -np.inf, scores[name])
        for rank, at in enumerate(np.argsort(-known, kind="stable")[:FIRST], start=1):
            yield Listed(name, rank, dynamics.ids[at], "")
    for rank, at in enumerate(np.flatnonzero(scores[RULE]).tolist(), start=1):
        yield Listed(RULE, rank, dynamics.ids[at], "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--run", type=Path)
    given = parser.parse_args()
    if given.rows and given.run:
        kept = [each for order, listed in read_lists().items() if order.startswith(UNTIL) for each in listed]
        lists = [*made(suspects.read_lines(given.rows), given.run), *kept]
        with FILE.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Listed._fields, *lists])
    print(markdown_table([*counts()]))


if __name__ == "__main__":
    main()
