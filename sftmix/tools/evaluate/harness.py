"""Tasks of lm-eval on one model: each is measured once, and its result is a file."""

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from sftmix.cli.say import say
from sftmix.disk.files import hashed, write_json
from sftmix.disk.hashes import sha256_file, sha256_json
from sftmix.tools.evaluate.table import Score
from sftmix.tools.runs.models import Dtype, FinishedModel
from sftmix.tools.runs.read import Reading, read_json_if_there
from sftmix.words.errors import ConfigError, DataError


@dataclass
class Options(Reading):
    place: str
    """RUN: run directory or model"""
    _: KW_ONLY
    tasks: str
    """A,B: names of tasks, with commas between them"""
    models: str | None = None
    """A,B: models of the run [base, baseline if there is one, target]"""
    to: str | None = None
    """DIR: directory of the results [RUN/evaluation]; needed for a model"""
    limit: int | None = None
    """N: only the first N questions of each task"""
    num_fewshot: int | None = None
    """N: solved questions in the prompt [the task's own]"""
    batch_size: int = 8
    """N: prompts at a time [%(default)s]"""
    seed: int = 1234
    """N: of the few-shot examples [%(default)s]"""
    dtype: Dtype = "auto"
    """of the weights; auto: as they are stored"""
    apply_chat_template: bool = False
    """ask in the chat template of the training, few-shot examples as turns"""
    include_path: str | None = None
    """DIR: task files of your own, as lm-eval reads them"""


def find_tasks(names: Sequence[str], include: str | None) -> tuple[Any, list[Path]]:
    """Return lm-eval's TaskManager that loads the tasks of these names; ConfigError for unknown names.

    include   directory of a user's task files, and of rows and code that they may read
    Beside it is the list of the files in it, on which results depend. lm-eval's own task files, thousands, are read
    only if one of the names may be among them.
    """
    found = Path(include).rglob("*") if include else ()
    # Python writes a .pyc beside the code of a task.
    files = sorted(path for path in found if path.is_file() and path.suffix != ".pyc")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include, include_defaults=False)
    if not {*names}.issubset(manager.all_tasks):
        manager = TaskManager(include_path=include)
    if unknown := sorted({*names}.difference(manager.all_tasks)):
        raise ConfigError(
            f"no task {', '.join(unknown)}; there are those of lm-eval (`lm_eval ls tasks` lists them) and the files "
            "of --include_path"
        )
    return manager, files


def measure_tasks(
    model: FinishedModel,
    names: Sequence[str],
    manager: Any,
    files: Sequence[Path],
    place: Path,
    args: Options,
) -> str:
    """Measure the tasks that this model was not measured on with these settings; load it only if there are some.

    A result is a file, whose name has the task, the model, and a hash of all that the numbers depend on. It holds these
    and `scores`, as `scores_of` gives them; `all`, every metric that lm-eval gave; and `finished`, Unix seconds.

    manager, files  as `find_tasks` gives them
    Returns the identity of the model. Raises DataError for rows that cannot be fetched, DifferenceError for a result
    that is not as it was written.
    """
    from sftmix.tools.runs.loaded import encoder_of, load_finished, weights_of

    weights = weights_of(model)
    identity = sha256_json([weights, encoder_of(model).fingerprint])
    settings = _settings(files, args)
    missing = {}
    for task in dict.fromkeys(names):
        # arc_easy of owner/my-model is measured in arc_easy.owner-my-model.HASH.json.
        name = ".".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in (task, model.name))
        file = place / f"{name}.{sha256_json([model.name, identity, settings])[:12]}.json"
        if read_json_if_there(file):
            say(f"{task}, {model.name}: there already")
        else:
            missing[task] = file
    if not missing:
        return identity
    _load(manager, missing)  # before a model is loaded
    harness = harness_of(load_finished(model, args.dtype), args.batch_size, chat=args.apply_chat_template)
    for task, file in missing.items():
        results = _asked(harness, task, manager, args)
        entry = {
            "task": task,
            "model": model.name,
            "path": model.path,
            "identity": identity,
            "weights": weights,
            "settings": settings,
            "scores": scores_of(task, results),
            "finished": time.time(),
            "all": json.loads(json.dumps(results["results"], default=str)),  # numpy's numbers and functions as text
        }
        write_json(file, hashed(entry))
    return identity


def _load(manager: Any, names: Iterable[str]) -> None:
    """Load tasks and their rows, each alone, as it is measured: a task may be in a group beside it.

    Raises DataError for rows that are out of reach, ConfigError for a missing package.
    """
    for name in names:
        try:
            manager.load([name])
        except ImportError as error:
            raise ConfigError(
                f"--tasks {name}: {error}; lm-eval has extras for such packages, as lm-eval[ifeval]"
            ) from error
        except OSError as error:  # the network, the hub, a missing file
            raise DataError(
                f"--tasks: lm-eval cannot load {name} or its rows ({' '.join(str(error).split())}); without a network "
                "it finds rows that it fetched before, and those that files of --include_path name"
            ) from error


def _settings(files: Sequence[Path], args: Options) -> dict[str, Any]:
    """Return all that the numbers of a task depend on, beside the model."""
    from lm_eval import __version__

    return {
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "seed": args.seed,
        "chat_template": args.apply_chat_template,
        "dtype": args.dtype,
        "files": [sha256_file(file) for file in files],  # an edited task is measured again
        "lm_eval": __version__,
    }


def _asked(harness: Any, task: str, manager: Any, args: Options) -> dict[str, Any]:
    from lm_eval import evaluator

    # It records the commit of the working directory; git writes "fatal: not a git repository" outside a checkout.
    evaluator.get_git_commit_hash = str
    return evaluator.simple_evaluate(
        model=harness,
        tasks=[task],
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        random_seed=args.seed,
        numpy_random_seed=args.seed,
        torch_random_seed=args.seed,
        fewshot_random_seed=args.seed,
    )


def harness_of(loaded: Any, batch_size: int, *, chat: bool = False) -> Any:
    """Return a LoadedModel as lm-eval asks it, with the tokenizer, the chat template and the stop ids of its training.

    chat  prompts are rendered conversations: as in training, no token is put before them
    """
    from lm_eval.models.huggingface import HFLM

    from sftmix.text.templates import on_the_same_day

    tokenizer = loaded.encoder.tokenizer
    if loaded.encoder.chat_template is not None:
        tokenizer.chat_template = on_the_same_day(loaded.encoder.chat_template)
    harness = HFLM(
        pretrained=loaded.model,
        tokenizer=tokenizer,
        batch_size=batch_size if loaded.together >= (loaded.context or sys.maxsize) else 1,
        max_length=loaded.context,
        add_bos_token=False if chat else None,  # the template writes it
    )
    # Without these an answer would end at eos alone, which need not be what ends a turn.
    loaded.model.generation_config.update(
        eos_token_id=list(loaded.stop_ids), pad_token_id=harness.tokenizer.pad_token_id
    )
    return harness


def scores_of(name: str, evaluated: dict[str, Any]) -> dict[str, Score]:
    """Return the scores of what was asked for: of a group if it has a metric of its own, else of each of its tasks.

    evaluated  the results of lm-eval's simple_evaluate
    A score is the first metric of a task, as its file lists them: metric, value, stderr (None if lm-eval gives
    none), n, shots (None for a group whose tasks had unlike numbers of them), and `questions` (the hash of each) with
    `values` (the metric of each), empty for a group.
    """
    scores = {}
    for task, results in evaluated["results"].items():
        # "acc,none" or "exact_match,strict-match", and not "acc_stderr,none", "alias" or "sample_len".
        metrics = [key for key in results if "," in key and "_stderr" not in key and isinstance(results[key], float)]
        if not metrics:  # a group without a metric of its own: its tasks are here as well
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
            "shots": evaluated["n-shot"].get(task),
            "questions": [sample["doc_hash"] for sample in samples],
            "values": [float(sample[metric]) for sample in samples],
        }
    return {name: scores[name]} if name in scores else scores  # mmlu, or each task of a group without a score
