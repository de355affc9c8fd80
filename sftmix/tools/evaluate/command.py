"""`evaluate`: benchmarks on the models of a run, each task measured once, in one table.

A result is one file for each task, model and settings. The table has a line for each task with its settings.
"""

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.cli.results import say
from sftmix.common.errors import ConfigError, DataError
from sftmix.common.figures import markdown_table
from sftmix.common.files import read_json, sha256_file, sha256_json, write_json, write_text
from sftmix.model.paths import named
from sftmix.pipeline.directory import DTYPES, FinishedModel, finished_models, is_run
from sftmix.tools.evaluate.convert import BENCHMARKS, convert

MODELS = ["base", "baseline", "target"]
NOTE = "Standard errors are over questions; one training run says nothing of how much another seed would change."

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
    parser.add_argument("--models", metavar="A,B", help="models of the run [base, baseline if there is one, target]")
    parser.add_argument(
        "--to",
        metavar="DIR",
        help="directory of the results [RUN/evaluation]; needed for a model; with --convert that of the rows",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="solved questions in the prompt [the task's own]")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts at a time [%(default)s]")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the few-shot examples [%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as they are stored")
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="ask in the chat template of the training, few-shot examples as turns",
    )
    parser.add_argument("--data_dir", type=Path, metavar="DIR", help="rows of this package's tasks")
    parser.add_argument(
        "--include_path", type=Path, metavar="DIR", help="task files of your own, as lm-eval reads them"
    )
    parser.add_argument(
        "--convert", choices=BENCHMARKS, metavar="TASK", help="make the rows of a task of this package from a raw file"
    )
    solved = parser.add_mutually_exclusive_group()
    solved.add_argument(
        "--shots", type=Path, metavar="FILE", help="with --convert: raw file of solved questions for the prompts"
    )
    solved.add_argument(
        "--test", type=Path, metavar="FILE", help="with --convert: JSON file with the ids that are measured"
    )


def main(args: argparse.Namespace) -> None:
    """Convert rows; or measure models on what they were not measured on, and print the table of all results there."""
    if args.convert is not None:
        if args.to is None:
            raise ConfigError("--to is missing; name the directory of the rows, which --data_dir takes then")
        print(convert(args.convert, Path(args.place), Path(args.to), shots=args.shots, test=args.test))
        return
    if args.tasks is None:
        raise ConfigError("--tasks is missing; give names, as --tasks arc_easy,medqa_4options")
    run, usual = Path(args.place).expanduser(), ["target"]
    if is_run(run):
        usual = [name for name in MODELS if name != "baseline" or (run / "baseline" / "figures.json").exists()]
    elif args.to is None:
        raise ConfigError(f"{args.place} is a model; name the directory of the results with --to DIR")
    models = finished_models(args.place, args.models.split(",") if args.models else usual)
    place = Path(args.to or run / "evaluation")
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate needs lm-eval, which is not installed: pip install 'sftmix[eval]'")
    from sftmix.tools.evaluate.harness import find_tasks

    tasks, manager = find_tasks(args.tasks.split(","), args.data_dir, args.include_path)
    print(write_tables(place, {model.name: _measure(model, tasks, manager, place, args) for model in models}))
    if args.to is None:
        from sftmix.tools.sharing.command import write_run_cards

        write_run_cards(run)
    say(f"all results: {place}, table.md and table.json among them")


def _measure(model: FinishedModel, tasks: Sequence[Any], manager: Any, place: Path, args: argparse.Namespace) -> str:
    """Measure the tasks that this model was not measured on with these settings; load it only if there are some.

    A result is a file, whose name has the task, the model, and a hash of all that the numbers depend on. It holds these
    and `scores`, as `harness.scores_of` gives them; `all`, every metric that lm-eval gave; and `finished`, Unix time in
    seconds.

    tasks, manager  as `harness.find_tasks` gives them
    Returns the identity of the model. Raises DataError for rows that cannot be fetched.
    """
    from lm_eval import simple_evaluate

    from sftmix.model.load import fingerprint
    from sftmix.pipeline.loaded import encoder_of, load_finished
    from sftmix.tools.evaluate.harness import harness_of, scores_of

    with named(f"model {model.name}"):
        identity = sha256_json([fingerprint(model.path), encoder_of(model).fingerprint])
    missing = []
    for task, spec, files in tasks:
        settings = {
            "num_fewshot": args.num_fewshot,
            "limit": args.limit,
            "seed": args.seed,
            "chat_template": args.apply_chat_template,
            "dtype": args.dtype,
            "files": [sha256_file(file) for file in files],
            "lm_eval": version("lm_eval"),
        }
        if args.num_fewshot is None and isinstance(spec, dict):
            settings["num_fewshot"] = spec["num_fewshot"]
        names = [re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in (task, model.name)]
        file = place / f"{'.'.join(names)}.{sha256_json([model.name, identity, settings])[:12]}.json"
        if file.exists():
            say(f"{task}, {model.name}: there already")
        else:
            entry = {"task": task, "model": model.name, "path": model.path, "identity": identity, "settings": settings}
            missing.append((file, spec, entry))
    if not missing:
        return identity
    try:  # rows that are not there are told before a model is loaded
        manager.load([spec for _, spec, _ in missing])
    except OSError as error:  # as all are that tell of the network, the hub or a missing file
        raise DataError(
            f"--tasks: lm-eval cannot load {', '.join(entry['task'] for _, _, entry in missing)} or its rows "
            f"({' '.join(str(error).split())}); without a network it finds rows that it fetched before, and those that "
            "--include_path or --data_dir names"
        ) from error
    harness = harness_of(load_finished(model, args.dtype), args.batch_size, chat=args.apply_chat_template)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), args.seed)
    for file, spec, entry in missing:
        results = simple_evaluate(
            model=harness,
            tasks=[spec],
            task_manager=manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            **seeds,
        )
        entry["scores"] = scores_of(entry["task"], results)
        entry["finished"] = time.time()
        entry["all"] = json.loads(json.dumps(results["results"], default=str))
        write_json(file, entry)
    return identity


# ------------------------------------------------------------------------------------------------ the table


def write_tables(place: Path, measured: Mapping[str, str]) -> str:
    """Write table.json and table.md of all results of a directory; return the latter.

    A line is a task with its settings. Of results that differ in the model's files alone, the newest counts. Under the
    table stand the differences of the target to the base and to the baseline.

    measured  model -> its identity now; results of other weights under these names are left out
    """
    lines: dict[Any, dict[str, Any]] = {}
    names, entries = set(), [read_json(file) for file in place.glob("*.*.????????????.json")]
    for entry in sorted(entries, key=lambda entry: entry["finished"]):
        name, settings = entry["model"], entry["settings"]
        if measured.get(name) not in (None, entry["identity"]):
            continue
        names.add(name)
        words = "its own shots" if settings["num_fewshot"] is None else f"{settings['num_fewshot']}-shot"
        words += "" if settings["limit"] is None else f", first {settings['limit']}"
        words += f", seed {settings['seed']}" + (", chat template" if settings["chat_template"] else "")
        for task, score in entry["scores"].items():
            lines.setdefault((task, words, sha256_json(settings)), {})[name] = score
    models = [*(name for name in MODELS if name in names), *sorted(names.difference(MODELS))]
    table, differences, sentences = [["task", "settings", "metric", "questions", *models]], [], []
    for (task, words, _), scores in sorted(lines.items()):
        first = next(iter(scores.values()))
        cells = [_figure(scores[model], ".4f") if model in scores else "" for model in models]
        table.append([task, words, first["metric"], f"{first['n']:,}", *cells])
        for other in ("base", "baseline"):
            if "target" in scores and other in scores and (figures := difference(scores["target"], scores[other])):
                differences.append({"task": task, "left": "target", "right": other, **figures})
                paired = f"{_figure(figures, '+.4f')} (paired, {figures['n']:,} questions)"
                sentences.append(f"{task}: target - {other} = {paired}")
    sentences.append(NOTE)
    text = "\n".join([markdown_table(table), "", *(f"- {sentence}" for sentence in sentences)])
    write_json(place / "table.json", {"table": table, "sentences": sentences, "differences": differences})
    write_text(place / "table.md", text + "\n")
    return text


def difference(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return left - right of two scores: value, its stderr, and n.

    The error is paired: sd of the differences of single questions / sqrt(n); None for one question. There is no
    difference if the two did not answer the same questions, or if the metric is not their mean (a perplexity).
    """
    if not left["questions"] or any(left[key] != right[key] for key in ("questions", "metric")):
        return None
    values = np.array([left["values"], right["values"]])
    if not np.allclose(values.mean(axis=1), [left["value"], right["value"]], rtol=1e-9, atol=0):
        return None
    each = values[0] - values[1]
    stderr = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else None
    return {"value": float(each.mean()), "stderr": stderr, "n": len(each)}


def _figure(figure: Mapping[str, Any], form: str) -> str:
    return f"{figure['value']:{form}}" + ("" if figure["stderr"] is None else f" ± {figure['stderr']:.4f}")
