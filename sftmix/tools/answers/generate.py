"""`generate`: finished models answer a file of prompts."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sftmix.cli.results import say
from sftmix.cli.words import read_words
from sftmix.common.errors import ConfigError
from sftmix.common.files import sha256_json
from sftmix.common.plain import as_list
from sftmix.common.progress import progress_bar
from sftmix.config.read import read_finished
from sftmix.model.paths import named
from sftmix.pipeline.finished import FinishedModel, finished_models
from sftmix.tools.answers.options import AnswerOptions, add_sampling, sampling

ABOUT = """Let finished models answer a file of prompts; the same command continues where it was interrupted.

  sftmix generate runs/first --to answers.jsonl                     the held-out rows of the run
  sftmix generate runs/first --prompts rows.jsonl --to answers.jsonl --models target,baseline,base
  sftmix generate my-model --prompts alpaca_eval.json --format alpaca_eval --to outputs
  sftmix generate runs/first --prompts question.jsonl --format mt_bench --to data/mt_bench

docs/evaluation.md shows how the official judges take these files."""

FORMATS = {
    "rows": "one line for each prompt, with the answers of all models; prompts are rows of any format",
    "alpaca_eval": "AlpacaEval: MODEL.json for each model; prompts are a file of outputs, such as the reference's",
    "mt_bench": "MT-Bench: model_answer/MODEL.jsonl as FastChat writes it; prompts are its question.jsonl",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="RUN_OR_MODEL", help="run directory, model directory or hub id")
    rows = "file, directory or hub id of prompts, in the format of training rows or of the tool [held-out rows]"
    parser.add_argument("--prompts", nargs="+", default=[], metavar="FILE", help=rows)
    to = "file to write; of other formats than rows a directory"
    parser.add_argument("--to", required=True, metavar="PATH", help=to)
    names = "target, baseline, base, and other runs and models, with commas between them [%(default)s]"
    parser.add_argument("--models", default="target", metavar="NAMES", help=names)
    formats = "; ".join(f"{name} - {about}" for name, about in FORMATS.items())
    parser.add_argument("--format", choices=FORMATS, default="rows", help=f"{formats} [%(default)s]")
    add_sampling(parser)
    parser.add_argument("--batch_size", type=int, default=AnswerOptions.batch_size, metavar="N", help="[%(default)s]")


def main(argv: Sequence[str]) -> None:
    """Answer, and say what happened."""
    given = read_words("generate", ABOUT, add_options, argv)
    names = [name.strip() for name in given.models.split(",") if name.strip()]
    say(f"generate: {', '.join(names)} of {given.place}")
    files = generate(
        given.place, Path(given.to), models=names, prompts=given.prompts, form=given.format, options=sampling(given)
    )
    print("\n".join(map(str, files)))


def generate(
    place: str,
    to: Path,
    *,
    models: Sequence[str],
    prompts: Sequence[str] = (),
    form: str = "rows",
    options: AnswerOptions | None = None,
) -> list[Path]:
    """Let models answer questions, write the files of a format and return them; say how the answers of each ended.

    place    a run directory, model directory or hub id; `models` are names as `finished_models` takes them
    to       the file (rows), or the directory of the files
    prompts  files, directories or hub ids of rows; empty: the held-out rows of the run
    The same call continues what was interrupted. Raises ConfigError for other inputs than those of an existing file,
    DataError for a bad row.
    """
    from sftmix.data import prepare
    from sftmix.tools.answers.formats import TOOLS, write_answers
    from sftmix.tools.answers.questions import of_rows, question_of, read_questions

    options, tool = options or AnswerOptions(), TOOLS.get(form)
    finished = finished_models(place, models)
    config = next((read_finished(model.run) for model in finished if model.run is not None), None)
    if prompts:
        questions = read_questions(prompts, tool.question if tool else of_rows(config.data.columns if config else None))
    else:
        prepared = prepare(config.data, config.seed) if config and not tool else None
        if prepared is None or prepared.text or prepared.eval is None:  # plain text asks nothing
            raise ConfigError(f"--prompts is not given, and {finished[0].name} has no held-out conversations to ask")
        rows = prepared.eval
        questions = [question_of(example) for _, _, example in rows.examples(rows.records, whole=True)]
    if options.system is not None:
        first = {"role": "system", "content": options.system}
        for place_in_file, question in enumerate(questions):
            if question.messages[0]["role"] != "system":
                questions[place_in_file] = replace(question, messages=(first, *question.messages))
    files = list[Path]()
    for group in [[model] for model in finished] if tool else [finished]:
        label = _label(group[0])  # other runs lie in the same directory, so each model has a file of its own
        files.append(to / f"answers-{label}.jsonl" if tool else to)
        lines = _lines(files[-1], group, questions, form, options)
        if tool:
            files.append(to / tool.file.format(label))
            texts = [[text or "" for text in as_list(line["answers"][group[0].name])] for line in lines]
            write_answers(files[-1], tool, questions, texts)
        for model in group:
            ends = Counter(end for line in lines for end in as_list(line["finish"][model.name]))
            say(f"answers of {model.name}: {', '.join(f'{n:,} {end}' for end, n in sorted(ends.items()))}")
    return files


def _label(model: FinishedModel) -> str:
    """Return the name of a model for other tools, of a run with the run's name before it; without slashes."""
    if model.run is None or "/" in model.name:
        return Path(os.path.abspath(model.name)).name
    return f"{model.run.resolve().name}-{model.name}"


def inputs_of(
    form: str, questions: Sequence[Any], models: Sequence[FinishedModel], options: AnswerOptions
) -> dict[str, Any]:
    """Return all that decides the answers, in types that JSON can write; ConfigError for a model that is not there."""
    from sftmix.model.load import fingerprint
    from sftmix.pipeline.loaded import encoder_of

    inputs = {"format": form, **asdict(options), "models": {}}
    del inputs["batch_size"]
    inputs["prompts"] = sha256_json([[q.plain(), options.at(q.temperature)] for q in questions])
    for model in models:
        with named(model.option):
            encoder = encoder_of(model).fingerprint
            inputs["models"][model.name] = {"weights": fingerprint(model.path), "encoder": encoder}
    return inputs


def _lines(
    path: Path, models: Sequence[FinishedModel], questions: Sequence[Any], form: str, options: AnswerOptions
) -> list[dict[str, Any]]:
    """Answer what is not answered in a file yet, and return its lines."""
    from sftmix.pipeline.loaded import load_for_use
    from sftmix.tools.answers.answering import answered
    from sftmix.tools.answers.store import AnswerFile

    file = AnswerFile(path)
    file.begin(inputs_of(form, questions, models, options))
    if not path.exists():
        answers, total = file.read(), sum(1 + len(question.follow_ups) for question in questions)
        for model in models:
            done = sum(name == model.name for name, _, _ in answers)
            if done == total:
                continue
            loaded = load_for_use(model, options.dtype)
            with progress_bar(f"{model.name}: answering", total=total, unit=" answers", done=done) as bar:
                for batch in answered(loaded, questions, answers, options):
                    file.append(batch)
                    bar.update(len(batch))
            del loaded  # before the next one
        file.finish(questions, [model.name for model in models])
    return file.lines()
