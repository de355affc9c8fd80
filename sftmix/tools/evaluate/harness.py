"""Tasks for lm-eval, a finished model as lm-eval asks it, and the scores that lm-eval gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig

from sftmix.common.errors import ConfigError
from sftmix.data.templates import on_the_same_day
from sftmix.pipeline.loaded import LoadedModel
from sftmix.tools.evaluate.convert import BENCHMARKS, files_of

MEDICAL = Path(__file__).parent / "tasks" / "medical.yaml"


Task = tuple[str, Any, list[Path]]
"""Its name; what lm-eval's TaskManager loads, the name or the whole configuration of a task of this room; and the files
that its result depends on, task files and rows."""


def find_tasks(names: Sequence[str], data_dir: Path | None, include: Path | None) -> tuple[list[Task], TaskManager]:
    """Find tasks by name, and lm-eval's TaskManager that loads them; ConfigError for unknown names and missing rows.

    data_dir  the directory with the converted rows of this room's tasks
    include   directory of a user's task files, and of rows and code that they may read
    lm-eval's own task files, thousands, are read only where one of the names may be among them.
    """
    mine = [path for path in include.rglob("*") if path.is_file() and path.suffix != ".pyc"] if include else []
    tasks: list[Task] = []
    for name in dict.fromkeys(names):
        if name not in BENCHMARKS:
            tasks.append((name, name, sorted(mine)))
            continue
        rows, shots = files_of(name, data_dir or Path())
        if data_dir is None or not (rows.exists() and shots.exists()):
            raise ConfigError(
                f"task {name} is measured on local rows, {rows.name} and {shots.name} in --data_dir DIR; "
                f"`sftmix evaluate RAW --convert {name} --to DIR` makes them"
            )
        spec = yaml.safe_load(MEDICAL.read_text(encoding="utf-8"))
        spec["task"] = name
        spec["doc_to_choice"] = list("ABCDE"[: BENCHMARKS[name]])
        spec["dataset_kwargs"] = {"data_files": {"test": str(rows), "shots": str(shots)}}
        tasks.append((name, spec, [MEDICAL, rows, shots]))
    others = set(names).difference(BENCHMARKS)
    manager = TaskManager(include_path=include, include_defaults=False)
    if not others.issubset(manager.all_tasks):
        manager = TaskManager(include_path=include)
    if unknown := sorted(others.difference(manager.all_tasks)):
        raise ConfigError(
            f"no task {', '.join(unknown)}; there are {', '.join(BENCHMARKS)} of this package, those of lm-eval "
            "(`lm_eval ls tasks` lists them) and the files of --include_path"
        )
    return tasks, manager


def harness_of(loaded: LoadedModel, batch_size: int, *, chat: bool = False) -> HFLM:
    """Return a model as lm-eval asks it, with the tokenizer, the chat template and the stop ids of its training.

    chat  prompts are rendered conversations: as in training, no token is put before them
    """
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
    loaded.model.generation_config = GenerationConfig(
        eos_token_id=list(loaded.stop_ids), pad_token_id=harness.tokenizer.pad_token_id
    )
    return harness


def scores_of(name: str, evaluated: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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
        samples = [sample for sample in evaluated["samples"].get(task, []) if sample["filter"] == kind]
        if not all(isinstance(sample.get(metric), int | float) for sample in samples):
            samples = []
        scores[task] = {
            "metric": metric if kind == "none" else f"{metric} ({kind})",
            "value": results[metrics[0]],
            "stderr": stderr if isinstance(stderr, float) else None,
            "n": results["sample_len"],
            "questions": [sample["doc_hash"] for sample in samples],
            "values": [float(sample[metric]) for sample in samples],
        }
    return {name: scores[name]} if name in scores else scores
