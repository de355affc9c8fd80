"""`generate`: finished models answer a file of prompts."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sftmix.cli.say import say
from sftmix.config import RunConfig
from sftmix.disk.appended import append_batch, read_batches
from sftmix.disk.files import write_json
from sftmix.disk.hashes import sha256_file, sha256_json
from sftmix.disk.places import unwritable
from sftmix.options.data import DataOptions
from sftmix.pipeline.validity import differences
from sftmix.tools.answers.options import AnswerOptions, Question
from sftmix.tools.runs.models import FinishedModel, finished_models
from sftmix.tools.runs.output import write_jsonl
from sftmix.tools.runs.read import Reading, read_finished, read_json_if_there
from sftmix.words.errors import ConfigError, DataError, refuse
from sftmix.words.fields import TEXT, column_problems
from sftmix.words.given import as_list
from sftmix.words.progress import progress_bar

FASTCHAT = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
"""FastChat's temperatures by category (llm_judge/common.py); writing, roleplay and other categories get 0.7 there."""

ABOUT = """Let finished models answer a file of prompts; the same command continues where it was interrupted.

  sftmix generate runs/first --to answers.jsonl                     the held-out rows of the run
  sftmix generate runs/first --prompts rows.jsonl --to answers.jsonl --models target,baseline,base
  sftmix generate my-model --prompts alpaca_eval.json --format alpaca_eval --to outputs
  sftmix generate runs/first --prompts question.jsonl --format mt_bench --to data/mt_bench

docs/evaluation.md shows how the official judges take these files."""


@dataclass
class Options(AnswerOptions, Reading):
    place: str
    """RUN_OR_MODEL: run directory, model directory or hub id"""
    _: KW_ONLY
    prompts: list[str] = field(default_factory=list)
    """FILE: file, directory or hub id of prompts, in the format of training rows or of the tool [held-out rows]"""
    to: str
    """PATH: file to write; of other formats than rows a directory"""
    models: str = "target"
    """NAMES: target, baseline, base, and other runs and models, with commas between them [%(default)s]"""
    format: Literal["rows", "alpaca_eval", "mt_bench"] = "rows"
    """rows - one line for each prompt, with the answers of all models; prompts are rows of any format; alpaca_eval -
    AlpacaEval: MODEL.json for each model; prompts are a file of outputs, such as the reference's; mt_bench - MT-Bench:
    model_answer/MODEL.jsonl as FastChat reads it; prompts are its question.jsonl [%(default)s]"""
    data__columns: dict[str, str | None] | None = None
    """MAP: of prompts: as of `run`, over those of the run"""
    data__roles: dict[str, str] | None = None
    """MAP: of prompts: likewise"""
    temperature: float | None = None
    """X: 0 takes the likeliest token [0; mt_bench: as FastChat, by the category]"""


def main(args: Options) -> None:
    """Let models answer questions, write the files of a format and print their names; say how the answers ended.

    The same call continues what was interrupted. Raises ConfigError if an existing file was made from other inputs,
    DataError for a bad row.
    """
    form = args.format
    to = Path(args.to)
    finished = finished_models(args.place, args.models.split(","))
    # Judges' files have names of their own, which data.columns of a run say nothing of.
    run = next((model.run for model in finished if model.run), None) if form == "rows" else None
    if form != "rows" and not args.prompts:
        raise ConfigError(f"--format {form} needs --prompts, a file of its judge's questions")
    if (args.data__columns or args.data__roles) and (form == "mt_bench" or not args.prompts):
        raise ConfigError("--data.columns and --data.roles are for --prompts that are rows; leave them out")
    if args.prompts:
        questions = read_questions(args.prompts, _reading_rows(args, run), mt_bench=form == "mt_bench")
    else:
        questions = _held_out(finished[0].name, run)
    _apply(args, questions)
    if form != "rows":
        _answer_for_judge(form, to, finished, questions, args)
    elif to.is_dir():
        raise ConfigError(f"--to {to} is a directory; with --format rows it names a file, as {to}/answers.jsonl")
    else:
        answer_file(to, finished, questions, form, args)
        print(to)


def _answer_for_judge(
    form: str, to: Path, models: Sequence[FinishedModel], questions: Sequence[Question], options: AnswerOptions
) -> None:
    """Write the answers and the judge's file of each model into a directory, and print their names."""
    if problem := unwritable(to, folder=True):
        raise ConfigError(f"--to {to} {problem}; with --format {form} it names a directory")
    labels = [_label(model) for model in models]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--models: the files of two models would have one name: {', '.join(labels)}")
    for model, label in zip(models, labels, strict=True):
        file = to / f"answers-{label}.jsonl"
        lines = answer_file(file, [model], questions, form, options)
        rows = []
        for question, line in zip(questions, lines, strict=True):
            texts = [text or "" for text in as_list(line["answers"][model.name])]  # None: the prompt left no room
            rows.append(_judged(form, label, question.row, texts))
        judged = to / (f"{label}.json" if form == "alpaca_eval" else f"model_answer/{label}.jsonl")
        (write_json if form == "alpaca_eval" else write_jsonl)(judged, rows)
        print(file, judged, sep="\n")


def _label(model: FinishedModel) -> str:
    """Return the name of a model's files: other runs are in the same directory, so a run's name is before its own."""
    if model.run and "/" not in model.name:
        return f"{model.run.resolve().name}-{model.name}"  # first-target
    return Path(model.name).resolve().name  # gpt2 of openai-community/gpt2, my-model of ./my-model


def _apply(options: AnswerOptions, questions: Sequence[Question]) -> None:
    """Give the questions the temperature of the options, and their system turn to those that have none."""
    for question in questions:
        if options.temperature is not None:
            question.temperature = options.temperature
        if options.system is not None and question.messages[0]["role"] != "system":
            question.messages = ({"role": "system", "content": options.system}, *question.messages)


def _reading_rows(options: Options, run: Path | None) -> RunConfig:
    """Return the configuration by which prompts are read: as rows of the run, with the options that are given."""
    own = DataOptions(train=options.prompts, columns=options.data__columns, roles=options.data__roles)
    config = read_finished(run) if run else RunConfig()
    if own.columns or own.roles:
        form = config.row_format or config.data.format
        refuse([*own.problems(), *column_problems(form, own.columns or {})], "the options of the prompts")
    columns, roles = own.columns or config.data.columns, own.roles or config.data.roles
    return replace(config, data=replace(config.data, columns=columns, roles=roles))


def _held_out(name: str, run: Path | None) -> list[Question]:
    """Return the held-out conversations of a run; ConfigError if it has none."""
    from sftmix.tools.runs.rows import rows_of_run

    prepared = rows_of_run(run)[1].prepared if run else None
    if prepared is None or prepared.options.format == TEXT or prepared.eval is None:  # plain text asks nothing
        raise ConfigError(f"--prompts is not given, and {name} has no held-out conversations to ask")
    return [question_of(example) for example in prepared.eval.examples(whole=True)]


def _judged(form: str, label: str, row: Any, texts: list[str]) -> dict[str, Any]:
    """Return the line of a judge's file for a row of its own file of prompts, and a model's answers to it."""
    if form == "alpaca_eval":
        return {**row, "output": texts[0], "generator": label}
    return {"question_id": row["question_id"], "model_id": label, "choices": [{"index": 0, "turns": texts}]}


def read_questions(names: Sequence[str], config: RunConfig | None = None, *, mt_bench: bool = False) -> list[Question]:
    """Read the questions of files, directories and hub ids, in file order; answers may be missing.

    config    of a run, whose columns, roles and format count; a row without these fields keeps its own
    mt_bench  the rows are from FastChat's question.jsonl, and of no format of training data
    Raises DataError that names the first bad row as `file:line: reason`.
    """
    from sftmix.data.sources import expand
    from sftmix.text.formats import Columns
    from sftmix.text.values import checked_text
    from sftmix.tools.answers.asked import asked

    config = config or RunConfig()
    form, data = config.row_format or config.data.format, config.data
    reader, questions = Columns(data.columns), list[Question]()
    times, taken = Counter[str](), set[str]()
    sources, lines = expand(names, "--prompts")
    for line in lines:
        say(line)
    for source in sources:
        for place, row in source.rows():
            try:
                plain = reader.renamed(row)
                more = {"row": row}
                if mt_bench:
                    if not isinstance(plain["turns"], list) or not plain["turns"]:
                        raise ValueError("turns must be a list of texts")
                    first, *later = [checked_text(text, f"turns[{k}]") for k, text in enumerate(plain["turns"])]
                    category = checked_text(plain["category"], "category")
                    more |= {"follow_ups": tuple(later), "temperature": FASTCHAT.get(category, 0.7)}
                    # The first turn as a row; the later ones follow the model's own answers.
                    plain = {"id": plain["question_id"], "prompt": first}
                question = question_of(asked(plain, reader, form, data.roles), **more)
            except (KeyError, ValueError) as problem:  # BadRow, or a question without turns
                reason = f"it has no {problem}" if isinstance(problem, KeyError) else problem
                raise DataError(f"--prompts: {place}: {reason}") from problem
            name = question.id
            while question.id in taken:  # a, a, "a#2", a -> a, a#2, a#2#2, a#3
                times[name] += 1
                question.id = f"{name}#{times[name] + 1}"
            taken.add(question.id)
            questions.append(question)
    if not questions:
        raise DataError(f"--prompts: {', '.join(names)}: there is no row; name a file with questions")
    return questions


def question_of(example: Any, **more: Any) -> Question:
    """Make the question of a conversation, an Example: all turns before the last answer, which is the reference."""
    from sftmix.data.store import content_hash

    *before, last = example.messages
    messages = tuple(
        {"role": turn.role, "content": turn.content, **({"thought": turn.thought} if turn.thought else {}), **turn.more}
        for turn in before
    )
    name = example.id or content_hash(example.messages)
    return Question(name, messages, last.content or None, tools=example.tools, **more)


def inputs_of(
    form: str, questions: Sequence[Any], models: Sequence[FinishedModel], options: AnswerOptions
) -> dict[str, Any]:
    """Return all that decides the answers, in types that JSON can write; ConfigError for a model that is not there."""
    from sftmix.tools.runs.loaded import encoder_of, weights_of

    return {
        "format": form,
        **{name: getattr(options, name) for name in AnswerOptions.__dataclass_fields__ if name != "batch_size"},
        "prompts": sha256_json([[question.as_dict(), question.temperature] for question in questions]),
        "models": {
            model.name: {"weights": weights_of(model), "encoder": encoder_of(model).fingerprint} for model in models
        },
    }


def answer_file(
    path: Path, models: Sequence[FinishedModel], questions: Sequence[Any], form: str, options: AnswerOptions
) -> list[dict[str, Any]]:
    """Return the lines of a file, after answering what it lacks; ConfigError if it was begun from other inputs.

    A line has the answers of all models; with follow-ups each model has a list of values, one for each turn.
    Beside it is `FILE.inputs.json`, what it is made from and, once it is whole, its hash; and while it is made
    `FILE.parts`: the answers in the order in which they came.
    """
    file, parts = Path(f"{path}.inputs.json"), Path(f"{path}.parts")
    inputs = inputs_of(form, questions, models, options)
    if not path.exists() and not file.exists():
        parts.unlink(missing_ok=True)  # whatever they were made from
        write_json(file, inputs)
    old = read_json_if_there(file)  # {}: not written by this command
    written = old.pop("answers_sha256", None)
    if different := differences(old, inputs):
        problem = f"{path} was made with other inputs: {'; '.join(different)}"
        raise ConfigError(f"{problem}. Use another --to, or the old settings")
    if not written or not path.exists():
        answers = _answers(models, questions, options, parts)
        write_jsonl(path, [_line(question, models, answers) for question in questions])
        write_json(file, inputs | {"answers_sha256": sha256_file(path)})
        parts.unlink(missing_ok=True)
    elif sha256_file(path) != written:
        raise ConfigError(f"{path} is not as it was written. Move it away, and the same command makes it again")
    lines = list(map(json.loads, path.read_bytes().splitlines()))  # in a text U+2028 would also end a line
    for model in models:
        ends = Counter(end for line in lines for end in as_list(line["finish"][model.name]))
        say(f"answers of {model.name}: {', '.join(f'{n:,} {end}' for end, n in sorted(ends.items()))}")
    return lines


def _answers(
    models: Sequence[FinishedModel], questions: Sequence[Question], options: AnswerOptions, parts: Path
) -> dict[Any, dict[str, Any]]:
    """Return the answers of all models by their keys, after appending to `parts` those that it lacks."""
    from sftmix.tools.answers.answering import answered
    from sftmix.tools.runs.loaded import load_finished

    answers = {tuple(answer["key"]): answer for answer in read_batches(parts)}  # JSON has made a list of it
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
    return answers


def _line(
    question: Question, models: Sequence[FinishedModel], answers: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what the file says of a question and of the answers of all models."""
    from sftmix.tools.answers.answering import COLUMNS

    line, turns = question.as_dict(), range(1 + len(question.follow_ups))
    for column in COLUMNS:
        values = {m.name: [answers[m.name, question.id, turn][column] for turn in turns] for m in models}
        # {"target": ["Red.", "Blue."]}; without follow-ups {"target": "Red."}.
        line[column] = values if question.follow_ups else {name: value for name, (value,) in values.items()}
    return line
