"""`suspects`: the rows that are most likely wrong, by signals of their texts and of a reference's losses."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.common.files import placing
from sftmix.config.schema import find_component
from sftmix.pipeline.finished import is_run
from sftmix.tools.suspects import signals
from sftmix.types import Example, TrainingDynamics

ABOUT = """List the rows to read first: those whose texts, or whose losses under the reference, are least usual.
A row's score is the largest of its percentiles by the signals, most of them weighted. With a run that has
confidence/dynamics.parquet with the NLL of each token (--reference.token_nll true) all signals count; with
files of rows those of the texts alone, and no model is needed.

  sftmix suspects runs/first
  sftmix suspects rows.jsonl --out suspects --top 20"""

WITHOUT_MODEL = ("Mismatch", "Echo", "Ending")
WITH_MODEL = ("Mismatch", "Echo", "EndOfTurn", "HardTokens")
SHOWN = """\
{rank:>4}  {source}  {id}  {signal} {score:.4f} {why}
      {prompt:.70}
      -> {response:.70}"""
"""A row on the terminal."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="+", metavar="RUN|FILE", help="a run directory, or files of rows")
    parser.add_argument("--top", type=int, default=50, metavar="N", help="rows to print [50]; the files hold all")
    parser.add_argument("--by", metavar="label", choices=["label"], help="rank each row among those of its label")
    parser.add_argument("--label_field", metavar="NAME", help="of files of rows: the field that is the label")
    parser.add_argument("--signals", nargs="+", metavar="NAME", help=f"signals [{' '.join(WITH_MODEL)}]")
    parser.add_argument("--embedding", choices=signals.EMBEDDINGS, default="auto", help="of texts [auto]")
    parser.add_argument("--out", metavar="DIR", help="folder of suspects.csv and suspects.parquet [RUN/suspects]")


def main(args: argparse.Namespace) -> None:
    """Print the first rows, and write all of them as CSV and Parquet."""
    list_suspects(args)


def list_suspects(args: argparse.Namespace) -> None:
    """Do what the words of the command say: a row's score is the largest of its weighted percentiles."""
    import pandas as pd

    run = Path(args.rows[0]) if is_run(args.rows[0]) else None
    if run and len(args.rows) > 1:
        raise ConfigError(f"suspects takes one run, or files of rows, and not {' '.join(args.rows)}")
    examples, dynamics, hard = _of_run(run) if run else (_of_files(args), None, None)
    if args.by and not any(example.label for example in examples):
        raise ConfigError("--by label: the rows have no label; name its field with data.label_field or --label_field")
    if run and not hard:
        say("the run has no NLL of tokens (--reference.token_nll true), so the texts alone count")
    prompts = ["\n".join(turn.content for turn in one.messages if not turn.trained) for one in examples]
    responses = ["\n".join(turn.content for turn in one.messages if turn.trained) for one in examples]
    texts = signals.SuspectRows(prompts, responses, dynamics, args.embedding)
    groups = [one.label if args.by else None for one in examples]
    ranks, weighted = pd.DataFrame(), pd.DataFrame()
    shipped = {kind.__name__: kind for kind in signals.Signal.__subclasses__()}
    for name in args.signals or (WITH_MODEL if hard else WITHOUT_MODEL):
        kind: Any = shipped.get(name) or find_component(signals.Signal, name, "--signals")
        ranks[kind.__name__] = signals.percentiles(kind().score(texts), groups)
        weighted[kind.__name__] = signals.weighted(ranks[kind.__name__], kind.weight)
    columns = {
        "id": [one.id for one in examples],
        "source": [one.source for one in examples],
        "label": [one.label for one in examples],
        "score": weighted.max(axis=1),
        "signal": weighted.idxmax(axis=1),
        **ranks,
        "duplicate_of": [examples[first].id if first >= 0 else "" for first in signals.duplicates(texts)],
        "compared_with": [examples[other].id for other in signals.best_fits(texts)],
        "hard_tokens": hard or "",
        "prompt": prompts,
        "response": responses,
    }
    table = pd.DataFrame(columns).iloc[np.lexsort((-ranks.mean(axis=1), -weighted.max(axis=1)))]
    table.insert(0, "rank", range(1, len(table) + 1))
    response_of = dict(zip(table["id"], table["response"], strict=True))
    for line in table.head(args.top).to_dict("records"):
        short = {key: " ".join(line[key].split()) for key in ("prompt", "response")}
        nearer = " ".join(response_of[line["compared_with"]].split())
        why = f"nearer: {nearer:.40}" if line["signal"] == "Mismatch" else line["hard_tokens"]
        why += f"  repeats {line['duplicate_of']}" if line["duplicate_of"] else ""
        say(SHOWN.format_map(line | short | {"why": why}), sys.stdout)
    if out := args.out or (run and run / "suspects"):
        file = Path(out) / "suspects.csv"
        for to, write in ((file, table.to_csv), (file.with_suffix(".parquet"), table.to_parquet)):
            with placing(to) as staging:
                write(staging, index=False)
        say(f"{len(table):,} rows in {file} and suspects.parquet; data.exclude takes a file of ids")


def _of_files(args: argparse.Namespace) -> list[Example]:
    from sftmix.data import prepare
    from sftmix.options import DataOptions

    train = prepare(DataOptions(train=args.rows, label_field=args.label_field), 0).train
    return list(train.examples(whole=False))


def _of_run(run: Path) -> tuple[list[Example], TrainingDynamics | None, list[str] | None]:
    """Return the training rows of a run, their dynamics if there are some, and the hardest tokens of each."""
    from sftmix.common.tables import read_dynamics
    from sftmix.pipeline.rows import rows_of_run

    _, rows = rows_of_run(run, progress=True)
    train, path = rows.data.train, run / "confidence" / "dynamics.parquet"
    dynamics, hard = read_dynamics(path).of(train.ids) if path.exists() else None, None
    if dynamics is not None and dynamics.token_nll is not None:
        hard = []
        for encoded, nll in zip(train, dynamics.token_nll, strict=True):
            ids = encoded.input_ids[1:][encoded.target[1:]]
            hardest = ids[np.argsort(-nll[-1])[:5]] if nll.shape[1] == len(ids) else ids[:0]
            hard.append(" | ".join(str(rows.encoder.tokenizer.decode([one])).strip() for one in hardest.tolist()))
    return list(train.examples()), dynamics, hard
