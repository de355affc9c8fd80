"""`suspects`: the rows that are most likely wrong, by signals of their texts and of a reference's losses."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.common.files import placing
from sftmix.config.schema import find_component
from sftmix.pipeline.directory import check_finished, is_run
from sftmix.tools.suspects import signals

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
    parser.add_argument("--by", choices=["label"], help="rank each row among those of its label")
    parser.add_argument("--label_field", metavar="NAME", help="of files of rows: the field that is the label")
    parser.add_argument("--signals", nargs="+", metavar="NAME", help=f"signals [{' '.join(WITH_MODEL)}]")
    parser.add_argument("--embedding", choices=("auto", "tfidf", "minilm"), default="auto", help="of texts [auto]")
    parser.add_argument("--out", metavar="DIR", help="folder of suspects.csv and suspects.parquet [RUN/suspects]")


def main(args: argparse.Namespace) -> None:
    """Print the first rows, and write all of them as CSV and Parquet: a score is the largest weighted percentile."""
    import pandas as pd

    run = Path(args.rows[0]) if is_run(args.rows[0]) else None
    if run and len(args.rows) > 1:
        raise ConfigError(f"suspects takes one run, or files of rows, and not {' '.join(args.rows)}")
    if run:
        examples, dynamics, hard = _of_run(run)
    else:
        from sftmix.data import prepare
        from sftmix.options import DataOptions

        train = prepare(DataOptions(train=args.rows, label_field=args.label_field), 0).train
        examples, dynamics, hard = list(train.examples(whole=False)), None, []
    if args.by and not any(example.label for example in examples):
        raise ConfigError("--by label: the rows have no label; name its field with data.label_field or --label_field")
    if run and not hard:
        say("the run has no NLL of tokens (--reference.token_nll true), so the texts alone count")
    prompts = ["\n".join(turn.content for turn in one.messages if not turn.trained) for one in examples]
    responses = ["\n".join(turn.content for turn in one.messages if turn.trained) for one in examples]
    texts = signals.SuspectRows(prompts, responses, dynamics, args.embedding)
    ids, labels = [one.id for one in examples], [one.label for one in examples]
    shipped = {kind.__name__: kind for kind in signals.Signal.__subclasses__()}
    kinds: list[Any] = [
        shipped.get(name) or find_component(signals.Signal, name, "--signals", [*shipped])
        for name in dict.fromkeys(args.signals or (WITH_MODEL if hard else WITHOUT_MODEL))
    ]
    groups = labels if args.by else [None] * len(labels)
    ranks = pd.DataFrame({kind.__name__: signals.percentiles(kind().score(texts), groups) for kind in kinds})
    weighted = signals.weighted(ranks, [kind.weight for kind in kinds])
    nearest, score = signals.best_fits(texts), weighted.max(axis=1)
    columns = {
        "id": ids,
        "source": [one.source for one in examples],
        "label": labels,
        "score": score,
        "signal": ranks.columns[weighted.argmax(axis=1)],
        **ranks,
        "duplicate_of": [ids[first] if first >= 0 else "" for first in signals.duplicates(texts)],
        "compared_with": [ids[other] for other in nearest],
        "hard_tokens": hard or "",
        "prompt": prompts,
        "response": responses,
    }
    table = pd.DataFrame(columns).iloc[np.lexsort((-ranks.mean(axis=1), -score))]
    table.insert(0, "rank", range(1, len(table) + 1))
    for row, line in table.head(args.top).replace(r"\s+", " ", regex=True).iterrows():
        nearer = " ".join(responses[nearest[row]].split())
        why = f"nearer: {nearer:.40}" if line.signal == "Mismatch" else line.hard_tokens
        why += f"  repeats {line.duplicate_of}" if line.duplicate_of else ""
        say(SHOWN.format(why=why, **line), sys.stdout)
    if out := args.out or (run and run / "suspects"):
        for ending, write in (("csv", table.to_csv), ("parquet", table.to_parquet)):
            with placing(Path(out) / f"suspects.{ending}") as staging:
                write(staging, index=False)
        say(f"{len(table):,} rows in {out}/suspects.csv and suspects.parquet; data.exclude takes a file of ids")


def _of_run(run: Path) -> tuple[list[Any], Any, list[str]]:
    """Return the training rows of a run, their dynamics if there are some, and the hardest tokens of each."""
    from sftmix.common.tables import read_dynamics
    from sftmix.pipeline.rows import rows_of_run

    check_finished(run)
    _, rows = rows_of_run(run, progress=True)
    train, path, hard = rows.data.train, run / "confidence" / "dynamics.parquet", []
    dynamics = read_dynamics(path).of(train.ids) if path.exists() else None
    for encoded, nll in zip(train, dynamics.token_nll or () if dynamics else (), strict=False):
        ids = encoded.input_ids[1:][encoded.target[1:]]
        hardest = ids[np.argsort(-nll[-1])[:5]] if nll.shape[1] == len(ids) else ids[:0]
        hard.append(" | ".join(str(rows.encoder.tokenizer.decode([one])).strip() for one in hardest.tolist()))
    return list(train.examples()), dynamics, hard
