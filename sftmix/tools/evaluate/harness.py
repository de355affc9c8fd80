"""Tasks for lm-eval, a finished model as lm-eval asks it, and the scores that lm-eval gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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

OWN = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Task:
    """A task to measure.

    spec   what lm-eval's TaskManager loads: the name, or the whole configuration of a task of this room
    files  what else the result depends on: task files, and rows
    """

    name: str
    spec: str | dict[str, Any]
    files: Sequence[Path]


def chosen_tasks(names: Iterable[str], data_dir: str | Path | None, include: Path | None) -> list[Task]:
    """Find tasks by name; raise ConfigError for rows that are not there.

    data_dir  the directory with the converted rows of this room's tasks
    include   directory of a user's task files, and of rows and code that they may read
    Names that are neither are those of lm-eval, which `manager` checks.
    """
    mine = [] if include is None else [p for p in include.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    tasks = []
    for name in dict.fromkeys(names):
        if name not in BENCHMARKS:
            tasks.append(Task(name, name, sorted(mine)))
            continue
        rows, shots = files_of(name, Path(data_dir or ""))
        if data_dir is None or not (rows.exists() and shots.exists()):
            raise ConfigError(
                f"task {name} is measured on local rows, {rows.name} and {shots.name} in --data_dir DIR; "
                f"`sftmix evaluate RAW --convert {name} --to DIR` makes them"
            )
        files = [OWN / "_medical.yaml", OWN / f"{name}.yaml"]
        spec: dict[str, Any] = {}
        for file in files:
            spec |= yaml.safe_load(file.read_text(encoding="utf-8"))
        del spec["include"]
        spec["dataset_kwargs"] = {"data_files": {"test": str(rows), "shots": str(shots)}}
        tasks.append(Task(name, spec, [*files, rows, shots]))
    return tasks


def manager(tasks: Sequence[Task], include: Path | None) -> TaskManager:
    """Return lm-eval's TaskManager for these tasks; raise ConfigError for names that it does not know.

    Its own task files, thousands, are read only where one of the names may be among them.
    """
    names, place = {task.name for task in tasks if isinstance(task.spec, str)}, include and str(include)
    known = TaskManager(include_path=place, include_defaults=False)
    if names - set(known.all_tasks):
        known = TaskManager(include_path=place)
    if unknown := sorted(names - set(known.all_tasks)):
        raise ConfigError(
            f"no task {', '.join(unknown)}; there are {', '.join(BENCHMARKS)} of this package, those of lm-eval "
            "(`lm_eval ls tasks` lists them) and the files of --include_path"
        )
    return known


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
        first = metrics[0]
        metric, kind = first.split(",", 1)
        stderr = results.get(f"{metric}_stderr,{kind}")
        samples = [one for one in evaluated.get("samples", {}).get(task, []) if one.get("filter", kind) == kind]
        samples.sort(key=lambda sample: int(sample["doc_id"]))
        known = all(isinstance(sample.get(metric), int | float) for sample in samples)
        scores[task] = {
            "metric": metric if kind == "none" else f"{metric} ({kind})",
            "value": results[first],
            "stderr": stderr if isinstance(stderr, float) else None,
            "n": int(results.get("sample_len", 0)) or len(samples),
            "questions": [sample["doc_hash"] for sample in samples] if known else [],
            "values": [float(sample[metric]) for sample in samples] if known else [],
        }
    return {name: scores[name]} if name in scores else scores
