"""`suspects`: the rows that are most likely wrong, by signals of their texts and of a model's losses."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sftmix.cli.say import as_word, say
from sftmix.disk.places import unwritable
from sftmix.options.data import DataOptions
from sftmix.text.examples import question_and_response
from sftmix.tools.runs.read import Reading, check_finished, is_run
from sftmix.tools.suspects.rows import SuspectRows, sentence_model
from sftmix.tools.suspects.table import (
    default_signals,
    fill_decisions,
    kinds_of,
    ranked_table,
    write_suspects,
)
from sftmix.types import TrainingDynamics
from sftmix.words.errors import ConfigError

ABOUT = """List the rows to read first: those whose texts, or whose losses under a model, are least usual.
The first signal orders the rows, first turns and later ones apart; before them come those that stand out by any signal.
Files of rows need no model; one that is named scores each response with its prompt and without, and is not trained. A
run counts with what its reference kept (--reference.token_nll true --reference.response_alone true).

  sftmix suspects rows.jsonl --out suspects --top 20
  sftmix suspects rows.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --out suspects
  sftmix suspects runs/first"""

OF_FILES = ("label_field", "columns", "roles", "skip_bad")
"""Options of `data` that messages about rows name as remedies."""
SHOWN = """\
{rank:>4}  {source}  {id}  {signal} {score:.4f} {why}
      {prompt:.{room}}
      -> {response:.{room}}"""
"""A row on the terminal."""
BESIDE = """\
      beside {source}  {id}
      {prompt:.{room}}
      -> {response:.{room}}"""
"""The other row of the same question."""


@dataclass
class Options(Reading):
    rows: list[str]
    """RUN|FILE: a run directory, or files of rows"""
    _: KW_ONLY
    model: str | None = None
    """MODEL: directory or hub id of a model that scores files of rows"""
    top: int = 50
    """N: rows to print [50]; the files hold all"""
    by: Literal["label"] | None = None
    """rank each row among those of its label"""
    data__label_field: str | None = None
    """NAME: of files of rows: the field that is the label"""
    data__columns: dict[str, str | None] | None = None
    """MAP: of files: as of `run`"""
    data__roles: dict[str, str] | None = None
    """MAP: of files: as of `run`"""
    data__skip_bad: bool | None = None
    """VALUE: of files: as of `run`"""
    signals: list[str] = field(default_factory=list)
    """NAME: signals, of which the first orders [by what is known]"""
    embedding: Literal["auto", "tfidf", "minilm"] = "auto"
    """of texts [auto]"""
    drop: int | None = None
    """N: the decision on the first N rows is drop"""
    drop_all_above: float | None = None
    """SCORE: the decision on all rows above is drop; 1: on those that stand out"""
    out: str | None = None
    """DIR: folder of suspects.csv and suspects.parquet [RUN/suspects]"""


def main(args: Options) -> None:
    """Print the first rows, and write all of them as CSV and Parquet: those that stand out come first."""
    run = Path(args.rows[0]) if is_run(args.rows[0]) else None
    _check(args, run)
    from sftmix.data import prepare
    from sftmix.data.decisions import DROP, left_out_with

    with tempfile.TemporaryDirectory() as scratch:
        if args.model:
            # Without --out the scores are in the scratch directory, and are made again by the next command.
            rows = _of_run(_scored(args, args.model, Path(args.out or scratch) / "scores"))
        else:
            # Files give one row for each answer: c2@turn0, c2@turn1.
            rows = _of_run(run) if run else (list(prepare(_options(args), 0).train.examples(whole=False)), None, ())
    # That files name a field is known before; whether rows have a label in it, and those of a run, only now.
    if args.by and not any(example.label for example in rows[0]):
        raise ConfigError(
            "--by label: the rows have no label; name its field: --data.label_field of the run, or of this command"
        )
    examples, dynamics, hard = rows
    prompts, responses = zip(*map(question_and_response, examples), strict=True)
    texts = SuspectRows(prompts, responses, dynamics, args.embedding)
    kinds = kinds_of(args.signals or default_signals(texts))
    table = ranked_table(examples, texts, hard, kinds, by_label=bool(args.by))
    if out := args.out or (run and run / "suspects"):
        fill_decisions(table, Path(out) / "suspects.csv", args.drop, args.drop_all_above)
        write_suspects(table, Path(out))
    _print(table, args.top)
    if out:
        file = Path(out) / "suspects.csv"
        others = left_out_with(zip(table["id"], table["decision"], strict=True))
        say(
            f"{len(table):,} rows in {file} and suspects.parquet, {sum(table['decision'] == DROP):,} to "
            f"drop{others}. Fill in its column decision (keep, drop, mended): --data.exclude {as_word(file)} "
            "leaves out what is to drop"
        )


def _print(table: Any, top: int) -> None:
    """Print the first rows of a table, each with what its first signal says of it, as wide as the terminal."""
    in_a_line = {key: {r"\s+": " "} for key in ("hard_tokens", "prompt", "response")}  # ids stay as they are
    shown = table.replace(in_a_line, regex=True)
    others = dict(zip(shown["id"], shown.to_dict("records"), strict=True))
    room = max(40, shutil.get_terminal_size().columns - 9)
    for line in shown.head(top).to_dict("records"):
        other = others[line["compared_with"]]
        why = {"Mismatch": f"nearer: {other['response']:.40}", "CutShort": f"its end: {line['response'][-40:]}"}
        say(SHOWN.format(why=why.get(line["signal"], line["hard_tokens"]), room=room, **line), sys.stdout)
        if line["signal"] == "Conflict":
            say(BESIDE.format(room=room, **other), sys.stdout)


def _check(args: Options, run: Path | None) -> None:
    """Raise ConfigError for what is certain of the options, before rows are read and scored."""
    if run and (args.rows[1:] or args.model or _of_files(args)):
        raise ConfigError(
            f"{run} is a run, with rows as it read them: other rows, --model, --data.label_field, --data.columns, "
            "--data.roles and --data.skip_bad are for files of rows; leave them out"
        )
    if args.top < 1:
        raise ConfigError(f"--top is {args.top}; allowed: 1 and above")
    if args.drop is not None and args.drop < 1:
        raise ConfigError(f"--drop is {args.drop}; allowed: 1 and above")
    decides = args.drop is not None or args.drop_all_above is not None
    if decides and not (run or args.out):
        raise ConfigError("--drop and --drop_all_above fill in a table, which --out DIR names")
    kinds_of(args.signals)
    if args.by and not (run or args.data__label_field):
        raise ConfigError("--by label: files of rows have no label until --data.label_field names its field")
    sentence_model(args.embedding)
    if find_spec("sklearn") is None:
        raise ConfigError(
            "suspects needs scikit-learn, which is not installed: pip install -e '.[suspects]' in the checkout"
        )
    if run and not args.out and (problem := unwritable(run / "suspects", folder=True)):
        raise ConfigError(f"{run} {problem}: --out DIR")


def _scored(args: Options, model: str, scores: Path) -> Path:
    """Let the model score the rows with their prompts and without, and return the run directory, which is in `scores`.

    Each state of rows and model has its own: what was scored before is read back, whatever was mended in between.
    """
    from sftmix.components.reference import FromCheckpoints
    from sftmix.config import RunConfig
    from sftmix.disk.hashes import sha256_json
    from sftmix.options.model import ModelOptions
    from sftmix.pipeline import recipe
    from sftmix.pipeline.inputs import Known
    from sftmix.pipeline.rows import read_rows
    from sftmix.pipeline.stages.reference import REFERENCE
    from sftmix.ranks.world import start_world

    config = RunConfig(
        model=ModelOptions(path=model),
        data=_options(args),
        reference=FromCheckpoints(paths=[model], token_nll=True, response_alone=True),
    )
    with start_world() as world:
        read, rows = read_rows(config, world)
        inputs = REFERENCE.identity(Known(read, world, rows))
        run = scores / sha256_json(inputs)[:12]
        recipe.run(replace(config, out=str(run)), until="confidence", world=world)
    return run


def _of_files(args: Options) -> dict[str, Any]:
    """Return those of OF_FILES that are given."""
    return {name: value for name in OF_FILES if (value := getattr(args, f"data__{name}")) is not None}


def _options(args: Options) -> DataOptions:
    """Return the options under which files of rows are read."""
    return DataOptions(train=args.rows, **_of_files(args))


def _of_run(run: Path) -> tuple[list[Any], TrainingDynamics | None, Sequence[str]]:
    """Return the training rows of a run, its dynamics of them if it has got that far, and their hardest tokens."""
    from sftmix.disk.tables import read_dynamics
    from sftmix.tools.runs.rows import rows_of_run

    check_finished(run)
    _, rows = rows_of_run(run)
    train, path = rows.data.train, run / "confidence" / "dynamics.parquet"
    dynamics = read_dynamics(path).of(train.ids) if path.exists() else None
    return list(train.examples()), dynamics, _hard_tokens(rows, dynamics)


def _hard_tokens(rows: Any, dynamics: TrainingDynamics | None) -> Sequence[str]:
    """Return the hardest tokens of each training row; nothing if the reference did not read it as these tokens."""
    if dynamics is None or dynamics.token_nll is None:
        say("the run has no NLL of tokens (--reference.token_nll true), so the texts alone count")
        return ()
    hard = []
    for encoded, nll in zip(rows.data.train, dynamics.token_nll, strict=True):
        ids = encoded.input_ids[1:][encoded.target[1:]]  # [n_tokens]: nothing predicts the first one
        if nll.shape[1] not in (0, len(ids)):  # 0: this row was not scored
            counts = f"{nll.shape[1]} tokens, the target as {len(ids)}"
            say(f"no tokens are named hard: the reference reads {encoded.id} as {counts}")
            return ()
        hardest = ids[np.argsort(-nll[-1])[:5]]  # at the last checkpoint, hardest first: "Paris | 1889 | the"
        hard.append(" | ".join(str(rows.encoder.tokenizer.decode([one])).strip() for one in hardest.tolist()))
    return hard
