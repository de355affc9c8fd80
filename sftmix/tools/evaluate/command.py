"""`evaluate`: benchmarks on the models of a run by lm-eval, in one table."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from sftmix.cli.results import say
from sftmix.common.errors import ConfigError
from sftmix.common.places import unwritable
from sftmix.tools.evaluate.convert import BENCHMARKS, convert_benchmark
from sftmix.tools.evaluate.harness import find_tasks, measure_tasks
from sftmix.tools.evaluate.table import MODELS, write_tables
from sftmix.tools.runs.models import DTYPES, finished_models
from sftmix.tools.runs.read import is_run

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


OF_MEASURING = {
    "tasks": None,
    "models": None,
    "limit": None,
    "num_fewshot": None,
    "batch_size": 8,
    "seed": 1234,
    "dtype": "auto",
    "apply_chat_template": False,
    "data_dir": Path(),
    "include_path": None,
}
"""The options of measuring, which --convert does not read -> their defaults."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="RUN", help="run directory or model; with --convert a raw file")
    parser.add_argument("--tasks", metavar="A,B", help="names of tasks, with commas between them")
    parser.add_argument("--models", metavar="A,B", help="models of the run [base, baseline if there is one, target]")
    parser.add_argument(
        "--to",
        metavar="DIR",
        help="directory of the results [RUN/evaluation]; needed for a model; with --convert that of the rows",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="solved questions in the prompt [the task's own]")
    parser.set_defaults(**OF_MEASURING)
    parser.add_argument("--batch_size", type=int, metavar="N", help="prompts at a time [%(default)s]")
    parser.add_argument("--seed", type=int, metavar="N", help="of the few-shot examples [%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; auto: as they are stored")
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="ask in the chat template of the training, few-shot examples as turns",
    )
    parser.add_argument("--data_dir", type=Path, metavar="DIR", help="rows of this package's tasks [.]")
    parser.add_argument(
        "--include_path", type=Path, metavar="DIR", help="task files of your own, as lm-eval reads them"
    )
    parser.add_argument("--convert", choices=BENCHMARKS, help="make the rows of a task of this package from a raw file")
    solved = parser.add_mutually_exclusive_group()
    solved.add_argument(
        "--shots", type=Path, metavar="FILE", help="with --convert: raw file of solved questions for the prompts"
    )
    solved.add_argument(
        "--test", type=Path, metavar="FILE", help="with --convert: JSON file with the ids that are measured"
    )


def main(args: argparse.Namespace) -> None:
    """Convert rows; or measure models on what they were not measured on, and print the table of all results there."""
    run = Path(args.place).expanduser()
    of_run = not args.convert and is_run(run)
    if not (args.to or of_run):
        raise ConfigError("--to is missing; name the directory of the results, or with --convert that of the rows")
    _check(args)
    if args.convert:
        print(convert_benchmark(args.convert, run, Path(args.to), shots=args.shots, test=args.test))
        return
    usual = ["target"]
    if of_run:
        usual = [name for name in MODELS if name != "baseline" or (run / "baseline" / "figures.json").exists()]
    models = finished_models(args.place, args.models.split(",") if args.models else usual)
    place = Path(args.to or run / "evaluation")
    if problem := unwritable(place, folder=True):
        raise ConfigError(f"--to {place} {problem}")
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate needs lm-eval, which is not installed: pip install 'sftmix[eval]'")
    tasks, manager = find_tasks([name.strip() for name in args.tasks.split(",")], args.data_dir, args.include_path)
    measured = dict.fromkeys(MODELS, "") if of_run and place != run / "evaluation" else {}
    measured |= {model.name: measure_tasks(model, tasks, manager, place, args) for model in models}
    print(write_tables(place, measured))
    if args.to is None:
        from sftmix.tools.sharing.command import write_run_cards

        write_run_cards(run)
    say(f"all results: {place}, table.md and table.json among them")


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for a number out of range, and for an option that --convert, or its absence, leaves unread."""
    for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(f"--{name} is {value}; allowed: {least} and above")
    if not (args.convert or args.tasks):
        raise ConfigError("--tasks is missing; give names, as --tasks arc_easy,medqa_4options")
    for name in OF_MEASURING if args.convert else ("shots", "test"):
        if (value := getattr(args, name)) != OF_MEASURING.get(name):
            one = "only in the command that measures, without" if args.convert else "only beside"
            raise ConfigError(f"--{name} ({value}) counts {one} --convert")
