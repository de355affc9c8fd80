"""`generate`: finished models answer a file of prompts."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.common.files import append_batch, read_batches, read_json, sha256_json, write_json, write_text
from sftmix.common.plain import as_list
from sftmix.common.progress import progress_bar
from sftmix.config.read import read_finished
from sftmix.pipeline.directory import FinishedModel, differences, finished_models
from sftmix.tools.answers.options import AnswerOptions, add_sampling, sampling

ABOUT = """Let finished models answer a file of prompts; the same command continues where it was interrupted.

  sftmix generate runs/first --to answers.jsonl                     the held-out rows of the run
  sftmix generate runs/first --prompts rows.jsonl --to answers.jsonl --models target,baseline,base
  sftmix generate my-model --prompts alpaca_eval.json --format alpaca_eval --to outputs
  sftmix generate runs/first --prompts question.jsonl --format mt_bench --to data/mt_bench

docs/evaluation.md shows how the official judges take these files."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="RUN_OR_MODEL", help="run directory, model directory or hub id")
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="file, directory or hub id of prompts, in the format of training rows or of the tool [held-out rows]",
    )
    parser.add_argument(
        "--to", required=True, metavar="PATH", help="file to write; of other formats than rows a directory"
    )
    parser.add_argument(
        "--models",
        default="target",
        metavar="NAMES",
        help="target, baseline, base, and other runs and models, with commas between them [%(default)s]",
    )
    form = (
        "rows - one line for each prompt, with the answers of all models; prompts are rows of any format; "
        "alpaca_eval - AlpacaEval: MODEL.json for each model; prompts are a file of outputs, such as the reference's; "
        "mt_bench - MT-Bench: model_answer/MODEL.jsonl as FastChat reads it; prompts are its question.jsonl "
        "[%(default)s]"
    )
    parser.add_argument("--format", choices=("rows", "alpaca_eval", "mt_bench"), default="rows", help=form)
    add_sampling(parser)
    parser.add_argument("--batch_size", type=int, default=AnswerOptions.batch_size, metavar="N", help="[%(default)s]")


def main(args: argparse.Namespace) -> None:
    """Let models answer questions, write the files of a format and print their names; say how the answers ended.

    The same call continues what was interrupted. Raises ConfigError for other inputs than those of an existing file,
    DataError for a bad row.
    """
    options, form, to = sampling(args), args.format, Path(args.to)
    finished = finished_models(args.place, args.models.split(","))
    from sftmix.data import prepare
    from sftmix.tools.answers.answering import question_of, read_questions

    runs = [model.run for model in finished if model.run]
    config = read_finished(runs[0]) if runs and form == "rows" else None
    if args.prompts:
        questions = read_questions(args.prompts, config.data.columns if config else None, mt_bench=form == "mt_bench")
    else:
        prepared = prepare(config.data, config.seed) if config else None
        if prepared is None or prepared.text or prepared.eval is None:  # plain text asks nothing
            raise ConfigError(f"--prompts is not given, and {finished[0].name} has no held-out conversations to ask")
        questions = [question_of(example) for example in prepared.eval.examples(whole=True)]
    for number, question in enumerate(questions):
        if options.temperature is not None:
            question = replace(question, temperature=options.temperature)
        if options.system is not None and question.messages[0]["role"] != "system":
            question = replace(question, messages=({"role": "system", "content": options.system}, *question.messages))
        questions[number] = question
    if form == "rows":
        answer_file(to, finished, questions, form, options)
        print(to)
        return
    for model in finished:
        # Other runs lie in the same directory, so each model has a file of its own, with the run's name before its own.
        label = Path(model.name).resolve().name
        if model.run and "/" not in model.name:
            label = f"{model.run.resolve().name}-{model.name}"
        file, outputs = to / f"answers-{label}.jsonl", []
        for question, line in zip(questions, answer_file(file, [model], questions, form, options), strict=True):
            texts = [text or "" for text in as_list(line["answers"][model.name])]
            if form == "alpaca_eval":
                outputs.append({**question.row, "output": texts[0], "generator": label})
            else:
                turns = [{"index": 0, "turns": texts}]
                outputs.append({"question_id": question.row["question_id"], "model_id": label, "choices": turns})
        if form == "alpaca_eval":
            judged = to / f"{label}.json"
            write_json(judged, outputs)
        else:
            judged = to / "model_answer" / f"{label}.jsonl"
            write_text(judged, "".join(f"{json.dumps(output, ensure_ascii=False)}\n" for output in outputs))
        print(file, judged, sep="\n")


def inputs_of(
    form: str, questions: Sequence[Any], models: Sequence[FinishedModel], options: AnswerOptions
) -> dict[str, Any]:
    """Return all that decides the answers, in types that JSON can write; ConfigError for a model that is not there."""
    from sftmix.model.load import fingerprint
    from sftmix.pipeline.loaded import encoder_of

    inputs = {"format": form, **asdict(options), "models": {}}
    del inputs["batch_size"]
    inputs["prompts"] = sha256_json([[q.plain(), q.temperature] for q in questions])
    for model in models:
        encoder = encoder_of(model).fingerprint
        inputs["models"][model.name] = {"weights": fingerprint(model.path), "encoder": encoder}
    return inputs


def answer_file(
    path: Path, models: Sequence[FinishedModel], questions: Sequence[Any], form: str, options: AnswerOptions
) -> list[dict[str, Any]]:
    """Return the lines of a file, after answering what it lacks; ConfigError if it was begun from other inputs.

    A line has the answers of all models; with follow-ups each model has a list of values, one for each turn.
    Beside it lies `FILE.inputs.json`, what it is made from, and while it is made `FILE.parts`: the answers in the order
    in which they came.
    """
    from sftmix.pipeline.loaded import load_finished
    from sftmix.tools.answers.answering import COLUMNS, answered

    file, parts = Path(f"{path}.inputs.json"), Path(f"{path}.parts")
    inputs = inputs_of(form, questions, models, options)
    if not path.exists() and not file.exists():
        write_json(file, inputs)
    old = read_json(file) if file.exists() else {}  # {}: not written by this command
    if different := differences(old, inputs):
        problem = f"{path} was made with other inputs: {'; '.join(different)}"
        raise ConfigError(f"{problem}. Use another --to, or the old settings")
    lines = []
    if path.exists():
        lines = list(map(json.loads, path.read_bytes().splitlines()))  # of a text U+2028 would end a line, too
    else:
        answers = {tuple(answer["key"]): answer for answer in read_batches(parts)}
        total = sum(1 + len(question.follow_ups) for question in questions)
        for model in models:
            done = sum(name == model.name for name, _, _ in answers)
            if done < total:
                loaded = load_finished(model, options.dtype)
                with progress_bar(f"{model.name}: answering", total=total, unit=" answers", done=done) as bar:
                    for batch in answered(loaded, questions, answers, options):
                        append_batch(parts, batch)
                        bar.update(len(batch))
                del loaded  # before the next one
        for question in questions:
            line, turns = question.plain(), range(1 + len(question.follow_ups))
            for column in COLUMNS:
                values = {m.name: [answers[m.name, question.id, turn][column] for turn in turns] for m in models}
                line[column] = values if question.follow_ups else {name: value for name, (value,) in values.items()}
            lines.append(line)
        write_text(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
        parts.unlink()
    for model in models:
        ends = Counter(end for line in lines for end in as_list(line["finish"][model.name]))
        say(f"answers of {model.name}: {', '.join(f'{n:,} {end}' for end, n in sorted(ends.items()))}")
    return lines
