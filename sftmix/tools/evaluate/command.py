"""`evaluate`: benchmarks on the models of a run, each task measured once, in one table."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.cli.results import say
from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import sha256_file, sha256_json, write_json
from sftmix.model.paths import named
from sftmix.pipeline.finished import DTYPES, FinishedModel, finished_models, is_run
from sftmix.tools.evaluate.convert import BENCHMARKS, convert
from sftmix.tools.evaluate.table import FOLDER, entry_file, write_tables

if TYPE_CHECKING:
    from sftmix.tools.evaluate.harness import Task

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
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as they are stored")
    chat = "ask in the chat template of the training, few-shot examples as turns"
    parser.add_argument("--apply_chat_template", action="store_true", help=chat)
    parser.add_argument("--data_dir", metavar="DIR", help="rows of this package's tasks")
    include = "task files of your own, as lm-eval reads them"
    parser.add_argument("--include_path", type=Path, metavar="DIR", help=include)
    make = "make the rows of a task of this package from a raw file"
    parser.add_argument("--convert", choices=BENCHMARKS, metavar="TASK", help=make)
    solved = parser.add_mutually_exclusive_group()
    shots = "with --convert: raw file of solved questions for the prompts"
    solved.add_argument("--shots", metavar="FILE", help=shots)
    test = "with --convert: JSON file with the ids that are measured"
    solved.add_argument("--test", metavar="FILE", help=test)


def main(args: argparse.Namespace) -> None:
    """Convert rows, or measure and print the table."""
    if args.convert is not None:
        if args.to is None:
            raise ConfigError("--to is missing; name the directory of the rows, which --data_dir takes then")
        print(convert(args.convert, args.place, Path(args.to), shots=args.shots, test=args.test))
    elif args.tasks is None:
        raise ConfigError("--tasks is missing; give names, as --tasks arc_easy,medqa_4options")
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Measure the models of a place on what they were not measured on, and print the table of all results there."""
    source, usual = Path(args.place).expanduser(), "target"
    if is_run(source):
        usual = "base,baseline,target" if (source / "baseline" / "figures.json").exists() else "base,target"
    elif args.to is None:
        raise ConfigError(f"{args.place} is a model; name the directory of the results with --to DIR")
    models = finished_models(args.place, (args.models or usual).split(","))
    place = Path(args.to or source / FOLDER)
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate needs lm-eval, which is not installed: pip install 'sftmix[eval]'")
    from sftmix.tools.evaluate.harness import chosen_tasks, manager

    tasks = chosen_tasks(args.tasks.split(","), args.data_dir, args.include_path)
    say(f"evaluate: {args.tasks} on {', '.join(model.name for model in models)}")
    known = manager(tasks, args.include_path)
    identities = {model.name: _measure(model, tasks, known, place, args) for model in models}
    print(write_tables(place, identities))
    if args.to is None:
        from sftmix.tools.sharing.command import write_run_cards

        write_run_cards(source)
    say(f"all results: {place}, table.md and table.json among them")


def _measure(model: FinishedModel, tasks: Sequence[Task], known: Any, place: Path, args: argparse.Namespace) -> str:
    """Measure the tasks that this model was not measured on with these settings; load it only if there are some.

    known  lm-eval's TaskManager
    Returns the identity of the model. Raises DataError for rows that cannot be fetched.
    """
    from sftmix.model.load import fingerprint
    from sftmix.pipeline.loaded import encoder_of, load_finished

    with named(f"model {model.name}"):
        identity = sha256_json([fingerprint(model.path), encoder_of(model).fingerprint])
    missing = []
    for task in tasks:
        usual = None if isinstance(task.spec, str) else task.spec["num_fewshot"]
        settings = {
            "num_fewshot": usual if args.num_fewshot is None else args.num_fewshot,
            "limit": args.limit,
            "seed": args.seed,
            "chat_template": args.apply_chat_template,
            "dtype": args.dtype,
            "files": [sha256_file(file) for file in task.files],
            "lm_eval": version("lm_eval"),
        }
        file = entry_file(place, task.name, model.name, identity, settings)
        if file.exists():
            say(f"{task.name}, {model.name}: there already")
        else:
            missing.append((task, file, settings))
    if not missing:
        return identity
    try:  # rows that are not there are told before a model is loaded
        known.load([task.spec for task, _, _ in missing])
    except OSError as error:  # as all are that tell of the network, the hub or a missing file
        raise DataError(
            f"--tasks: lm-eval cannot load {', '.join(task.name for task, _, _ in missing)} or its rows "
            f"({' '.join(str(error).split())}); without a network it finds rows that it fetched before, and those that "
            "--include_path or --data_dir names"
        ) from error
    from lm_eval import simple_evaluate

    from sftmix.tools.evaluate.harness import harness_of, scores_of

    harness = harness_of(load_finished(model, args.dtype), args.batch_size, chat=args.apply_chat_template)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), args.seed)
    for task, file, settings in missing:
        results = simple_evaluate(
            model=harness,
            tasks=[task.spec],
            task_manager=known,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            **seeds,
        )
        entry = {
            "task": task.name,
            "model": model.name,
            "path": model.path,
            "identity": identity,
            "settings": settings,
            "scores": scores_of(task.name, results),
            "finished": time.time(),
            "all": json.loads(json.dumps(results["results"], default=str)),
        }
        write_json(file, entry)
        say(f"{task.name}, {model.name}: done")
    return identity
