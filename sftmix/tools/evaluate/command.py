"""`evaluate`: benchmarks on the models of a run by lm-eval, each task measured once, in one table.

A result is one file for each task, model and settings. The table has a line for each task with its settings.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sftmix.cli.results import say
from sftmix.common.errors import ConfigError, DataError
from sftmix.common.files import read_json, sha256_file, sha256_json, write_json, write_text
from sftmix.common.shown import markdown_table
from sftmix.pipeline.finished import DTYPES, FinishedModel, finished_models, is_run
from sftmix.tools.evaluate.convert import BENCHMARKS, convert, files_of

MODELS = ["base", "baseline", "target"]
MEDICAL = Path(__file__).parent / "tasks" / "medical.yaml"

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
    parser.add_argument("--data_dir", type=Path, default="", metavar="DIR", help="rows of this package's tasks [.]")
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
    if args.convert:
        print(convert(args.convert, run, Path(args.to), shots=args.shots, test=args.test))
        return
    if not args.tasks:
        raise ConfigError("--tasks is missing; give names, as --tasks arc_easy,medqa_4options")
    usual = ["target"]
    if of_run:
        usual = [name for name in MODELS if name != "baseline" or (run / "baseline" / "figures.json").exists()]
    models = finished_models(args.place, args.models.split(",") if args.models else usual)
    place = Path(args.to or run / "evaluation")
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluate needs lm-eval, which is not installed: pip install 'sftmix[eval]'")
    tasks, manager = find_tasks(args.tasks.split(","), args.data_dir, args.include_path)
    print(write_tables(place, {model.name: _measure(model, tasks, manager, place, args) for model in models}))
    if args.to is None:
        from sftmix.tools.sharing.command import write_run_cards

        write_run_cards(run)
    say(f"all results: {place}, table.md and table.json among them")


def find_tasks(names: Sequence[str], data_dir: Path, include: Path | None) -> tuple[list[Any], Any]:
    """Find tasks by name, and lm-eval's TaskManager that loads them; ConfigError for unknown names and missing rows.

    data_dir  the directory with the converted rows of this room's tasks
    include   directory of a user's task files, and of rows and code that they may read
    Of each task this is its name; what the TaskManager loads, the name or the whole configuration of a task of this
    room; and the files that its result depends on, task files and rows. lm-eval's own task files, thousands, are read
    only where one of the names may be among them.
    """
    mine = sorted(path for path in include.rglob("*") if path.is_file() and path.suffix != ".pyc") if include else []
    tasks: list[Any] = []
    for name in dict.fromkeys(names):
        if name not in BENCHMARKS:
            tasks.append((name, name, mine))
            continue
        rows, shots = files_of(name, data_dir)
        if not (rows.exists() and shots.exists()):
            raise ConfigError(
                f"task {name} is measured on local rows, {rows.name} and {shots.name} in --data_dir DIR; "
                f"`sftmix evaluate RAW --convert {name} --to DIR` makes them"
            )
        spec = {
            **yaml.safe_load(MEDICAL.read_text(encoding="utf-8")),
            "task": name,
            "doc_to_choice": list("ABCDE"[: BENCHMARKS[name]]),
            "dataset_kwargs": {"data_files": {"test": str(rows), "shots": str(shots)}},
        }
        tasks.append((name, spec, [MEDICAL, rows, shots]))
    from lm_eval.tasks import TaskManager

    others = set(names).difference(BENCHMARKS)
    manager = TaskManager(include_path=include, include_defaults=False)
    if not others.issubset(manager.all_tasks):
        manager = TaskManager(include_path=include)
    if unknown := others.difference(manager.all_tasks):
        raise ConfigError(
            f"no task {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)} of this package, those of "
            "lm-eval (`lm_eval ls tasks` lists them) and the files of --include_path"
        )
    return tasks, manager


def _measure(model: FinishedModel, tasks: Sequence[Any], manager: Any, place: Path, args: argparse.Namespace) -> str:
    """Measure the tasks that this model was not measured on with these settings; load it only if there are some.

    A result is a file, whose name has the task, the model, and a hash of all that the numbers depend on. It holds these
    and `scores`, as `scores_of` gives them; `all`, every metric that lm-eval gave; and `finished`, Unix seconds.

    tasks, manager  as `find_tasks` gives them
    Returns the identity of the model. Raises DataError for rows that cannot be fetched.
    """
    from lm_eval import __version__, simple_evaluate

    from sftmix.model.load import fingerprint
    from sftmix.pipeline.loaded import encoder_of, load_finished

    identity = sha256_json([fingerprint(model.path), encoder_of(model).fingerprint])
    missing, few = [], args.num_fewshot
    for task, spec, files in tasks:
        settings = {
            "num_fewshot": spec["num_fewshot"] if few is None and isinstance(spec, dict) else few,
            "limit": args.limit,
            "seed": args.seed,
            "chat_template": args.apply_chat_template,
            "dtype": args.dtype,
            "files": [sha256_file(file) for file in files],
            "lm_eval": __version__,
        }
        name = ".".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in (task, model.name))
        file = place / f"{name}.{sha256_json([model.name, identity, settings])[:12]}.json"
        if file.exists():
            say(f"{task}, {model.name}: there already")
        else:
            missing.append((task, spec, settings, file))
    if not missing:
        return identity
    try:  # rows that are not there are told before a model is loaded
        manager.load([spec for _, spec, *_ in missing])
    except OSError as error:  # as all are that tell of the network, the hub or a missing file
        raise DataError(
            f"--tasks: lm-eval cannot load {', '.join(task for task, *_ in missing)} or its rows "
            f"({' '.join(str(error).split())}); without a network it finds rows that it fetched before, and those that "
            "--include_path or --data_dir names"
        ) from error
    harness = harness_of(load_finished(model, args.dtype), args.batch_size, chat=args.apply_chat_template)
    for task, spec, settings, file in missing:
        results = simple_evaluate(
            model=harness,
            tasks=[spec],
            task_manager=manager,
            num_fewshot=few,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            random_seed=args.seed,
            numpy_random_seed=args.seed,
            torch_random_seed=args.seed,
            fewshot_random_seed=args.seed,
        )
        entry = {
            "task": task,
            "model": model.name,
            "path": model.path,
            "identity": identity,
            "settings": settings,
            "scores": scores_of(task, results),
            "finished": time.time(),
            "all": json.loads(json.dumps(results["results"], default=str)),
        }
        write_json(file, entry)
    return identity


def harness_of(loaded: Any, batch_size: int, *, chat: bool = False) -> Any:
    """Return a LoadedModel as lm-eval asks it, with the tokenizer, the chat template and the stop ids of its training.

    chat  prompts are rendered conversations: as in training, no token is put before them
    """
    from lm_eval.models.huggingface import HFLM

    from sftmix.data.templates import on_the_same_day

    tokenizer = loaded.encoder.tokenizer
    if loaded.encoder.chat_template is not None:
        tokenizer.chat_template = on_the_same_day(loaded.encoder.chat_template)
    harness = HFLM(
        pretrained=loaded.model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=loaded.context,
        add_bos_token=False if chat else None,
    )
    # Without these an answer would end at eos alone, which need not be what ends a turn.
    loaded.model.generation_config.update(
        eos_token_id=list(loaded.stop_ids), pad_token_id=harness.tokenizer.pad_token_id
    )
    return harness


def scores_of(name: str, evaluated: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of what was asked for: of a group where it has a metric of its own, else of each of its tasks.

    evaluated  the results of lm-eval's simple_evaluate
    A score is the first metric of a task, as its file lists them: metric, value, stderr (None where lm-eval gives
    none), n, and `questions` (the hash of each) with `values` (the metric of each), empty for a group.
    """
    scores = {}
    for task, results in evaluated["results"].items():
        metrics = [key for key in results if "," in key and "_stderr" not in key and isinstance(results[key], float)]
        if not metrics:
            continue
        metric, kind = metrics[0].split(",", 1)
        stderr = results.get(f"{metric}_stderr,{kind}")
        samples = [
            sample
            for sample in evaluated["samples"].get(task, [])
            if sample["filter"] == kind and isinstance(sample.get(metric), int | float)
        ]
        scores[task] = {
            "metric": metric if kind == "none" else f"{metric} ({kind})",
            "value": results[metrics[0]],
            "stderr": stderr if isinstance(stderr, float) else None,
            "n": results["sample_len"],
            "questions": [sample["doc_hash"] for sample in samples],
            "values": [float(sample[metric]) for sample in samples],
        }
    return {name: scores[name]} if name in scores else scores


# ------------------------------------------------------------------------------------------------ the table


def write_tables(place: Path, measured: dict[str, str]) -> str:
    """Write table.json and table.md of all results of a directory; return the latter.

    A line is a task with its settings. Of results that differ in the model's files alone, the newest counts. Under the
    table stand the differences of the target to the base and to the baseline.

    measured  model -> its identity now; results of other weights under these names are left out
    """
    lines: dict[Any, dict[str, Any]] = {}
    names, entries = set(), map(read_json, place.glob("*.*.????????????.json"))
    for entry in sorted(entries, key=lambda entry: entry["finished"]):
        name, settings = entry["model"], entry["settings"]
        if measured.get(name) in (None, entry["identity"]):
            names.add(name)
            few, limit = settings["num_fewshot"], settings["limit"]
            words = "its own shots" if few is None else f"{few}-shot"
            words += f", seed {settings['seed']}" if limit is None else f", first {limit}, seed {settings['seed']}"
            words += ", chat template" if settings["chat_template"] else ""
            for task, score in entry["scores"].items():
                lines.setdefault((task, words, sha256_json(settings)), {})[name] = score
    models = [*(name for name in MODELS if name in names), *sorted(names.difference(MODELS))]
    table, differences, sentences = [["task", "settings", "metric", "questions", *models]], [], []
    for (task, settings, _), scores in sorted(lines.items()):
        first = next(iter(scores.values()))
        cells = [_figure(scores[model], ".4f") if model in scores else "" for model in models]
        table.append([task, settings, first["metric"], f"{first['n']:,}", *cells])
        for other in ("base", "baseline"):
            if "target" in scores and other in scores and (figures := difference(scores["target"], scores[other])):
                differences.append({"task": task, "left": "target", "right": other, **figures})
                paired = f"{_figure(figures, '+.4f')} (paired, {figures['n']:,} questions)"
                sentences.append(f"{task}: target - {other} = {paired}")
    sentences.append(
        "Standard errors are over questions; one training run says nothing of how much another seed would change."
    )
    text = "\n".join([markdown_table(table), "", *(f"- {sentence}" for sentence in sentences)])
    write_json(place / "table.json", {"table": table, "sentences": sentences, "differences": differences})
    write_text(place / "table.md", text + "\n")
    return text


def difference(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any] | None:
    """Return left - right of two scores: value, its stderr, and n.

    The error is paired: sd of the differences of single questions / sqrt(n); None for one question. There is no
    difference if the two did not answer the same questions, or if the metric is not their mean (a perplexity).
    """
    if not left["questions"] or any(left[key] != right[key] for key in ("questions", "metric")):
        return None
    if not np.isclose(np.mean(left["values"]), left["value"], rtol=1e-9, atol=0):
        return None
    from scipy.stats import sem

    each = np.subtract(left["values"], right["values"])
    return {"value": float(each.mean()), "stderr": float(sem(each)) if len(each) > 1 else None, "n": len(each)}


def _figure(figure: dict[str, Any], form: str) -> str:
    return f"{figure['value']:{form}}" + ("" if figure["stderr"] is None else f" ± {figure['stderr']:.4f}")
