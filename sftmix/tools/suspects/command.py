"""`suspects`: the rows that are most likely wrong, by signals of their texts and of a reference's losses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np

from sftmix.cli.results import say
from sftmix.cli.words import read_words
from sftmix.common.errors import ConfigError
from sftmix.common.files import placing
from sftmix.common.shown import one_line
from sftmix.components.base import Need
from sftmix.config.classes import find_component
from sftmix.tools.suspects.signals import Embedding, Signal, SuspectRows, duplicates, percentiles
from sftmix.types import Example, TrainingDynamics

ABOUT = """List the rows to read first: those whose texts, or whose losses under the reference, are least usual.
A row's score is the largest of its percentiles by the signals. With a run that has
confidence/dynamics.parquet with the NLL of each token (--reference.token_nll true) all signals count; with
files of rows those of the texts alone, and no model is needed.

  sftmix suspects runs/first
  sftmix suspects rows.jsonl --out suspects --top 20"""

WITHOUT_MODEL = ("Mismatch", "Echo", "Ending")
WITH_MODEL = ("Mismatch", "Echo", "EndOfTurn", "HardTokens")
EXCERPT = 70
"""Characters of a prompt and of a response on the terminal."""


@dataclass(frozen=True)
class Found:
    """Rows with what signals say of them, and of a run the hardest tokens of each."""

    examples: Sequence[Example]
    texts: SuspectRows
    tokens: Sequence[str] | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="+", metavar="RUN|FILE", help="a run directory, or files of rows")
    parser.add_argument("--top", type=int, default=50, metavar="N", help="rows to print [50]; the files hold all")
    parser.add_argument("--by", metavar="label", choices=["label"], help="rank each row among those of its label")
    parser.add_argument("--label_field", metavar="NAME", help="of files of rows: the field that is the label")
    parser.add_argument("--signals", nargs="+", metavar="NAME", help=f"signals [{' '.join(WITH_MODEL)}]")
    parser.add_argument("--embedding", choices=get_args(Embedding), default="auto", help="of texts [auto]")
    parser.add_argument("--out", metavar="DIR", help="folder of suspects.csv and suspects.parquet [RUN/suspects]")


def main(argv: Sequence[str]) -> None:
    """Print the first rows, and write all of them as CSV and Parquet."""
    list_suspects(read_words("suspects", ABOUT, add_options, argv))


def list_suspects(given: argparse.Namespace) -> None:
    """Do what the words of the command say."""
    run = Path(given.rows[0]) if (Path(given.rows[0]) / "config.yaml").exists() else None
    if run is not None and len(given.rows) > 1:
        raise ConfigError(f"suspects takes one run, or files of rows, and not {' '.join(given.rows)}")
    found = _of_run(run, given.embedding) if run else _of_files(given)
    if given.by and not any(example.label for example in found.examples):
        raise ConfigError("--by label: the rows have no label; name its field with data.label_field or --label_field")
    shipped = {cls.__name__: cls for cls in Signal.__subclasses__()}
    names = given.signals or _default(found.texts.dynamics)
    signals = [cast(Signal, (shipped.get(name) or find_component(Signal, name, "--signals"))()) for name in names]
    table = rank(found, signals, by_label=given.by is not None)
    out = Path(given.out) if given.out else run and run / "suspects"
    for line in table[: given.top]:
        say(_shown(line), sys.stdout)
    if out:
        write(table, out)
        say(f"{len(table):,} rows in {out / 'suspects.csv'} and suspects.parquet; data.exclude takes a file of ids")


def _default(dynamics: TrainingDynamics | None) -> Sequence[str]:
    if dynamics is not None and dynamics.token_nll is not None:
        return WITH_MODEL
    if dynamics is not None:
        say("the run has no NLL of tokens (--reference.token_nll true), so the texts alone count")
    return WITHOUT_MODEL


def _of_files(given: argparse.Namespace) -> Found:
    from sftmix.data import prepare
    from sftmix.options import DataOptions

    train = prepare(DataOptions(train=given.rows, label_field=given.label_field), 0).train
    examples = [example for _, _, example in train.examples(train.records, whole=False)]
    return Found(examples, _texts(examples, None, given.embedding))


def _of_run(run: Path, embedding: Embedding) -> Found:
    from sftmix.common.tables import read_dynamics
    from sftmix.pipeline.rows import rows_of_run

    _, rows = rows_of_run(run, progress=True)
    train, path = rows.data.train, run / "confidence" / "dynamics.parquet"
    dynamics, tokens = read_dynamics(path).of(train.ids) if path.exists() else None, None
    if dynamics is not None and dynamics.token_nll is not None:
        tokens = []
        for encoded, nll in zip(train, dynamics.token_nll, strict=True):
            ids = encoded.input_ids[1:][encoded.target[1:]]
            hard = ids[np.argsort(-nll[-1])[:5]] if nll.shape[1] == len(ids) else ids[:0]
            tokens.append(" | ".join(str(rows.encoder.tokenizer.decode([one])).strip() for one in hard.tolist()))
    return Found(list(train.examples()), _texts(list(train.examples()), dynamics, embedding), tokens)


def _texts(examples: Sequence[Example], dynamics: TrainingDynamics | None, embedding: Embedding) -> SuspectRows:
    prompts = ["\n".join(turn.content for turn in one.messages if not turn.trained) for one in examples]
    responses = ["\n".join(turn.content for turn in one.messages if turn.trained) for one in examples]
    return SuspectRows(prompts, responses, dynamics, embedding)


def rank(found: Found, signals: Sequence[Signal], *, by_label: bool = False) -> list[dict[str, object]]:
    """Return a line for each row, the most suspicious first: its score, the signal behind it, and all percentiles."""
    texts, groups = found.texts, [one.label if by_label else None for one in found.examples]
    for signal in signals:
        if Need.TOKEN_NLL in signal.needs and (texts.dynamics is None or texts.dynamics.token_nll is None):
            name = type(signal).__name__
            raise ConfigError(f"--signals {name} needs a run with the NLL of each token (--reference.token_nll true)")
    ranks = {type(signal).__name__: percentiles(signal.score(texts), groups) for signal in signals}
    names, values = list(ranks), np.array(list(ranks.values()))
    score, copies = values.max(0), duplicates(texts)
    lines = []
    for place, row in enumerate(np.lexsort((-values.mean(0), -score)).tolist(), start=1):
        example = found.examples[row]
        lines.append(
            {"rank": place, "id": example.id, "source": example.source, "label": example.label}
            | {"score": float(score[row]), "signal": names[int(values[:, row].argmax())]}
            | {name: float(ranks[name][row]) for name in names}
            | {"duplicate_of": found.examples[copies[row]].id if copies[row] >= 0 else None}
            | {"hard_tokens": found.tokens[row] if found.tokens else None}
            | {"prompt": texts.prompts[row], "response": texts.responses[row]}
        )
    return lines


def _shown(line: dict[str, object]) -> str:
    prompt, response = (one_line(" ".join(str(line[key]).split()))[:EXCERPT] for key in ("prompt", "response"))
    why = f"{line['signal']} {line['score']:.4f}"
    if line["signal"] == "HardTokens":
        why += f" ({line['hard_tokens']})"
    copy = f", nearly the same as {line['duplicate_of']}" if line["duplicate_of"] else ""
    return f"{line['rank']:>4}  {line['source']}  {line['id']}  {why}{copy}\n      {prompt}\n      -> {response}"


def write(lines: list[dict[str, object]], out: Path) -> None:
    """Write suspects.csv and suspects.parquet."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    table = pa.Table.from_pylist(lines)
    for name, to in (("suspects.csv", csv.write_csv), ("suspects.parquet", parquet.write_table)):
        with placing(out / name) as staging:
            to(table, staging)
