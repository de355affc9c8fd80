"""The table of suspects: every row with its rank, its signals, and a column for what somebody decides."""

import csv
import itertools
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.cli.say import say
from sftmix.config.schema import find_component
from sftmix.disk.files import MANIFEST, placing, remove_leftovers, write_manifest
from sftmix.disk.regular import refuse_link, regular
from sftmix.disk.texts import text_of
from sftmix.tools.suspects import repeats, signals, texts
from sftmix.tools.suspects.rows import SuspectRows, sentence_model
from sftmix.tools.suspects.signals import Signal, best_fits, ranked
from sftmix.types import Example
from sftmix.words.shown import as_cell, counted

SHIPPED = (
    signals.Mismatch,
    repeats.Conflict,
    signals.Echo,
    texts.BrokenEncoding,
    texts.EmptyAnswer,
    texts.Refusal,
    texts.CutShort,
    texts.OtherLanguage,
    texts.AlteredNumbers,
    signals.Information,
    signals.EndOfTurn,
    signals.HardTokens,
    signals.Perplexity,
)
NAMED = {kind.__name__: kind for kind in SHIPPED}
BY_RULES = tuple(NAMED)[1:9]
OF_TEXTS = ("Mismatch", *BY_RULES)
OF_TOKENS = (*BY_RULES, "EndOfTurn", "HardTokens")


def ranked_table(
    examples: Sequence[Example],
    rows: SuspectRows,
    hard: Sequence[str],
    kinds: Sequence[type[Signal]],
    *,
    by_label: bool,
) -> Any:
    """Return the rows as a table, the most suspicious first.

    hard      the hardest tokens of each row, or () for none
    by_label  each row is ranked among those of its label
    """
    import pandas as pd

    # False of c2@turn0, True of c2@turn1.
    later = [sum(turn.role == "assistant" for turn in one.messages) > 1 for one in examples]
    groups = [f"{turn} {one.label if by_label else None}" for turn, one in zip(later, examples, strict=True)]
    ranks, counted = ranked(rows, kinds, groups)
    names = counted.idxmax(axis=1)
    beside = np.where(names == "Conflict", repeats.nearest_prompts(rows)[0], best_fits(rows))
    columns = {
        "decision": "",
        "id": [one.id for one in examples],
        "source": [one.source for one in examples],
        "label": [one.label for one in examples],
        "score": counted.max(axis=1),  # above 1: the row stands out
        "signal": names,
        **ranks,
        "compared_with": [examples[other].id for other in beside],
        "hard_tokens": hard or "",
        "prompt": rows.prompts,
        "response": rows.responses,
    }
    table = pd.DataFrame(columns).sort_values("score", ascending=False, kind="stable")
    table.insert(0, "rank", range(1, len(table) + 1))
    return table


def fill_decisions(table: Any, earlier: Path, first: int | None, above: float | None) -> None:
    """Fill in the decisions: those of an earlier table, and drop for the first rows, or those above a score.

    What somebody decided stays, also if rows were added or deleted, or a file was renamed: a row is known by its id,
    with its file or its texts. An earlier table is kept beside it if it has decisions on rows that are not here, or
    columns that somebody added.
    """
    from sftmix.data.decisions import DROP, in_words, read_decisions  # with what reads rows, which no help waits for

    chosen = (table["rank"] <= (first or 0)) | (table["score"] > (np.inf if above is None else above))
    table["decision"] = np.where(chosen, DROP, "")
    text = text_of(regular(earlier), "--out") if earlier.exists() else ""
    left = {line["id"]: line for line in read_decisions(text, earlier)}
    added = {name for line in left.values() for name, cell in line.items() if cell} - {*table.columns, *NAMED}
    decisions, place = [], "]0123456789"  # rows.jsonl:9 -> rows.jsonl:, rows.parquet[9] -> rows.parquet[
    for row in table.itertuples():
        decision, line = row.decision, left.get(row.id)
        if line and (
            line["source"].rstrip(place) == row.source.rstrip(place)
            or in_words(line.get("prompt", ""), line.get("response", "")) == in_words(row.prompt, row.response)
        ):
            decision = left.pop(row.id)["decision"] or decision
        decisions.append(decision)
    table["decision"] = decisions
    gone = [line for line in left.values() if line["decision"]]
    lost = [f"{counted(len(gone), 'decision')} on rows that are not here"] if gone else []
    lost += [f"columns that are not ours: {', '.join(sorted(added))}"] if added else []
    if lost:
        say(f"{earlier} had {' and '.join(lost)}; {_copied(earlier)} keeps that table")


def _copied(table: Path) -> Path:
    """Copy a table beside itself, under the first name that is free, and return the copy."""
    names = (f"{table.stem}.before-{number}.csv" for number in itertools.count(1))
    before = next(path for path in map(table.with_name, names) if not path.exists())
    shutil.copyfile(table, refuse_link(before))
    return before


def write_suspects(table: Any, out: Path) -> None:
    """Write suspects.csv, whose texts no spreadsheet computes, and suspects.parquet, with the texts as they are."""
    cells = table.copy()
    for name in ("id", "source", "label", "compared_with", "hard_tokens", "prompt", "response"):
        cells[name] = [as_cell(value) if isinstance(value, str) else value for value in table[name]]
    # Quoted: Python before 3.13 writes a lone carriage return as it is, and behind it a cell would begin.
    as_csv = partial(cells.to_csv, quoting=csv.QUOTE_NONNUMERIC)
    for name in ("suspects", MANIFEST):  # of a command that was killed
        remove_leftovers(out, name)
    for ending, write in (("csv", as_csv), ("parquet", table.to_parquet)):
        with placing(out / f"suspects.{ending}") as staging:
            write(staging, index=False)
    write_manifest(out, ["suspects.parquet"])  # by its hash a report knows that the table was edited since


def default_signals(rows: SuspectRows) -> Sequence[str]:
    """Return the names of the signals that are best for what is known of the rows."""
    dynamics = rows.dynamics
    if dynamics is None or dynamics.token_nll is None:
        return OF_TEXTS
    # Words find less than Information does.
    by_texts = sentence_model(rows.embedding) or dynamics.alone_nll_sum is None
    return "Mismatch" if by_texts else "Information", *OF_TOKENS


def kinds_of(names: Sequence[str]) -> list[Any]:
    """Return the classes of signals that the names choose, each once."""
    return [NAMED.get(name) or find_component(Signal, name, "--signals", [*NAMED]) for name in dict.fromkeys(names)]
