"""`evaluate`: benchmarks on the models of a run, in one table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sftmix.cli.results import say
from sftmix.cli.words import read_words, refuse_others
from sftmix.common.errors import ConfigError

ABOUT = """Measure the models of a run on benchmarks, by lm-eval: one table of tasks x models with standard errors.
Results go to RUN/evaluation; what is there with the same settings is not measured again.

  sftmix evaluate runs/first --tasks medqa_4options,pubmedqa --data_dir benchmarks
  sftmix evaluate runs/first --tasks arc_easy,hellaswag --models base,target --limit 200
  sftmix evaluate my-model --tasks arc_easy --to results

Tasks are lm-eval's, by name, files of --include_path, and four of this package on local rows: medqa_4options,
medqa_5options, pubmedqa and medmcqa, as Labrak et al. 2024 ask them. Their rows are made from raw public files:

  sftmix evaluate medqa_test.jsonl --convert medqa_4options --shots medqa_train.jsonl --to benchmarks
  sftmix evaluate ori_pqal.json --convert pubmedqa --test test_ground_truth.json --to benchmarks

It needs lm-eval: pip install 'sftmix[eval]'."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="RUN", help="run directory or model; with --convert a raw file")
    parser.add_argument("--tasks", metavar="A,B", help="names of tasks, with commas between them")
    which = "models of the run [base, baseline if there is one, target]"
    parser.add_argument("--models", metavar="A,B", help=which)
    where = "directory of the results [RUN/evaluation]; needed for a model; with --convert that of the rows"
    parser.add_argument("--to", metavar="DIR", help=where)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="solved questions in the prompt [the task's own]")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts at a time [%(default)s]")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the few-shot examples [%(default)s]")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; auto: as they are stored")
    chat = "ask in the chat template of the training, few-shot examples as turns"
    parser.add_argument("--apply_chat_template", action="store_true", help=chat)
    parser.add_argument("--data_dir", metavar="DIR", help="rows of this package's tasks")
    parser.add_argument("--include_path", metavar="DIR", help="task files of your own, as lm-eval reads them")
    parser.add_argument("--convert", metavar="TASK", help="make the rows of a task of this package from a raw file")
    parser.add_argument("--shots", metavar="FILE", help="with --convert: raw file of solved questions for the prompts")
    parser.add_argument("--test", metavar="FILE", help="with --convert: JSON file with the ids that are measured")


def main(argv: Sequence[str]) -> None:
    """Convert rows, or measure and print the table."""
    given = read_words("evaluate", ABOUT, add_options, argv)
    if given.convert is not None:
        _convert(given)
        return
    for option in ("shots", "test"):
        if getattr(given, option) is not None:
            raise ConfigError(f"--{option} is {getattr(given, option)}, but it belongs to --convert TASK")
    if given.tasks is None:
        raise ConfigError("--tasks is missing; give names, as --tasks arc_easy,medqa_4options")
    for option in ("limit", "batch_size"):
        value = getattr(given, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} is {value}; allowed: 1 and above")
    if given.num_fewshot is not None and given.num_fewshot < 0:
        raise ConfigError(f"--num_fewshot is {given.num_fewshot}; allowed: 0 and above")
    measure(given)


def _convert(given: argparse.Namespace) -> None:
    from sftmix.tools.evaluate.convert import convert

    kept = ("place", "to", "convert", "shots", "test")
    refuse_others("--convert", given, add_options, kept=kept, reason="rows are only made")
    if given.to is None:
        raise ConfigError("--to is missing; name the directory of the rows, which --data_dir takes then")
    shots, test = (None if file is None else Path(file) for file in (given.shots, given.test))
    print("\n".join(convert(given.convert, Path(given.place), Path(given.to), shots=shots, test=test)))


def measure(given: argparse.Namespace) -> None:
    """Measure the models of a place and print the table of all results there."""
    from importlib.util import find_spec

    from sftmix.pipeline.finished import finished_models, is_run
    from sftmix.tools.evaluate.chosen import chosen_tasks
    from sftmix.tools.evaluate.entries import FOLDER

    run = is_run(given.place)
    names = _words(given.models) if given.models else _default_models(Path(given.place)) if run else ["target"]
    models = finished_models(given.place, names)
    if not run and given.to is None:
        raise ConfigError(f"{given.place} is a model; name the directory of the results with --to DIR")
    data_dir, include = (None if path is None else Path(path) for path in (given.data_dir, given.include_path))
    tasks = _words(given.tasks)
    chosen_tasks(tasks, data_dir, include)
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate needs lm-eval, which is not installed: pip install 'sftmix[eval]'")
    say(f"evaluate: {', '.join(tasks)} on {', '.join(model.name for model in models)}")
    from sftmix.tools.evaluate.run import EvaluateOptions, evaluate
    from sftmix.tools.evaluate.table import plain

    options = EvaluateOptions(
        num_fewshot=given.num_fewshot,
        limit=given.limit,
        batch_size=given.batch_size,
        seed=given.seed,
        chat_template=given.apply_chat_template,
        dtype=given.dtype,
        data_dir=data_dir,
        include=include,
    )
    place = Path(given.to) if given.to is not None else Path(given.place).expanduser() / FOLDER
    print(plain(evaluate(models, tasks, place, options, say)))
    if run and given.to is None:
        from sftmix.tools.sharing.command import write_run_cards

        write_run_cards(Path(given.place).expanduser())
    say(f"all results: {place}, table.md and table.json among them")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _default_models(run: Path) -> list[str]:
    return ["base", *(["baseline"] if (run.expanduser() / "baseline" / "figures.json").exists() else []), "target"]
