"""`evaluate`: tasks x models, each measured once, and the table of all results so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sftmix.common.files import write_json, write_text
from sftmix.pipeline.finished import FinishedModel
from sftmix.tools.evaluate.chosen import ChosenTask, chosen_tasks, manager
from sftmix.tools.evaluate.entries import Entry, check_run, entry_file, read_entries, run_of, write_entry
from sftmix.tools.evaluate.table import NOTE, Table, markdown, sentences_of, table_from, table_of


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation.

    num_fewshot  solved questions in the prompt; None: as the task says
    limit        the first so many questions of each task; None: all
    dtype        of the weights: float32, bfloat16, float16 or auto, as they are stored
    data_dir     the converted rows of this package's tasks
    include      directory of a user's own task files
    """

    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 1234
    chat_template: bool = False
    dtype: str = "auto"
    data_dir: Path | None = None
    include: Path | None = None


def evaluate(
    models: Sequence[FinishedModel],
    tasks: Sequence[str],
    place: Path,
    options: EvaluateOptions,
    say: Callable[[str], None],
) -> Table:
    """Measure what is not measured yet, write table.json and table.md, and return the table.

    place  directory of the results; each task on each model is a file there as soon as it is done
    Raises ConfigError for tasks, rows and models that are not there, and for a place with results of another run.
    """
    check_run(place, models)
    chosen = chosen_tasks(tasks, options.data_dir, options.include)
    known = manager(chosen, options.include)
    measured = {model.name: _measure_model(model, chosen, known, place, options, say) for model in models}
    table = table_from(read_entries(place), measured)
    write_json(place / "table.json", table_json(table))
    write_text(place / "table.md", markdown(table))
    return table


def table_json(table: Table) -> dict[str, Any]:
    """Return what others read of the results: the table as text, the sentences, and the numbers of each line."""
    numbers = [
        {
            "task": line.task,
            "settings": line.settings,
            "scores": {
                model: {key: value for key, value in asdict(score).items() if key not in ("questions", "values")}
                for model, score in line.cells.items()
            },
            "differences": [asdict(one) for one in line.differences],
        }
        for line in table.lines
    ]
    return {"table": table_of(table), "sentences": [*sentences_of(table), NOTE], "lines": numbers}


def settings_of(task: ChosenTask, options: EvaluateOptions, encoder: str | None = None) -> dict[str, Any]:
    """Return all that a result depends on, but the model.

    encoder  fingerprint of the tokenizer and the chat template, where the template is applied
    """
    shots = options.num_fewshot
    if shots is None and not isinstance(task.spec, str):
        shots = task.spec["num_fewshot"]
    return {
        "num_fewshot": shots,
        "limit": options.limit,
        "seed": options.seed,
        "chat_template": options.chat_template,
        "dtype": options.dtype,
        "source": dict(task.source),
        "lm_eval": version("lm_eval"),
        **({} if encoder is None else {"encoder": encoder}),
    }


def _measure_model(
    model: FinishedModel,
    tasks: Sequence[ChosenTask],
    known: Any,
    place: Path,
    options: EvaluateOptions,
    say: Callable[[str], None],
) -> str:
    """Measure the tasks that this model was not measured on with these settings; load it only if there are some.

    Returns the fingerprint of the model's files.
    """
    from sftmix.model.load import fingerprint
    from sftmix.model.paths import named
    from sftmix.pipeline.loaded import encoder_of, load_finished

    with named(model.option):
        identity = fingerprint(model.path)
    encoder = encoder_of(model).fingerprint if options.chat_template else None
    asked = [(task, settings_of(task, options, encoder)) for task in tasks]
    left = [(t, s) for t, s in asked if not entry_file(place, t.name, model.name, identity, s).exists()]
    for task in (task for task, _ in asked if task not in [t for t, _ in left]):
        say(f"{task.name}, {model.name}: there already")
    if not left:
        return identity
    known.load([task.spec for task, _ in left])  # rows that are not there are told before a model is loaded
    import torch

    from sftmix.tools.evaluate.harness import Harness, measure

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_finished(model, dtype=dtype, device=device)
    harness = Harness(loaded, options.batch_size, chat=options.chat_template)
    for task, settings in left:
        found = measure(
            harness,
            task,
            known,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            seed=options.seed,
            chat=options.chat_template,
        )
        run = run_of(place, model)
        write_entry(place, Entry(task.name, model.name, model.path, identity, settings, run=run, **found))
        say(f"{task.name}, {model.name}: done in {found['seconds']:.0f} s")
    return identity
