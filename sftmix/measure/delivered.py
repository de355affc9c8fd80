"""What the callbacks of a stage find of the weights that it delivers, and checks of what they return at the end."""

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from sftmix.components.base import Callback, Delivered, StageState
from sftmix.components.contracts import MEASURED, OWN_OF_STAGE, broken
from sftmix.disk.files import write_json
from sftmix.training.asked import evaluate
from sftmix.training.scoring import split_by_slot, sum_by_slot
from sftmix.training.step import Stage
from sftmix.types import Batch

OWN_FILES = {"figures.json", "inputs.json", "adopted.json", "MANIFEST.json"}
"""Files of a stage that the pipeline writes itself, of those that end in .json."""
OWN = OWN_FILES | OWN_OF_STAGE | MEASURED - {"calibration"}
"""Names that no callback may give at the end of a stage; `calibration` is the one of whichever callback calibrates."""


def deliver(stage: Stage, module: nn.Module, *, figures: Mapping[str, Any], last: Mapping[str, Any]) -> Delivered:
    """Call `on_delivered` of every callback, together with all ranks; return all figures and files, and the scores.

    The files are written into the directory of the stage. Scores of a callback replace those of the ones before it.

    module   with the delivered weights
    figures  of the training, whose names are taken
    last     the last line of metrics.jsonl
    """
    scorer, data = stage.scorer, stage.eval_data
    step = int(figures["steps"])

    def measure(function: Callable[..., Any]) -> list[list[Any]]:
        assert data is not None

        def columns(module: Any, batch: Batch) -> list[Any]:
            kept, summed = function(module.hidden_states(batch), module.head, batch)
            return [*(split_by_slot(x, batch) for x in kept), *(sum_by_slot(x, batch) for x in summed)]

        return scorer.columns(module, data, columns)

    state = StageState(
        stage=stage.name,
        step=step,
        total_steps=stage.order.total_steps,
        epoch=stage.order.epoch_of(step),
        metrics=last,
        evaluate=None if data is None else partial(evaluate, stage, module),
        objective=stage.objective,
        directory=stage.directory,
        is_main=scorer.world.is_main,
        measure=None if data is None else measure,
        held_out=() if data is None else data.ids,
    )
    found = Delivered()
    for callback in stage.callbacks:
        taken = {**figures, **found.figures}.keys() | found.files.keys()
        if result := check_delivered(callback, callback.on_delivered(state), taken, len(state.held_out)):
            scores = result.scores or found.scores
            found = Delivered({**found.figures, **result.figures}, {**found.files, **result.files}, scores)

    def write() -> None:
        for name, value in found.files.items():
            write_json(stage.directory / name, value)

    scorer.world.on_main(write)
    return found


def check_delivered(callback: Callback, result: Any, taken: Set[str], rows: int) -> Delivered | None:
    """Return the result of `on_delivered` if it is None or a Delivered that fits its stage; else raise ContractError.

    taken  names of figures and files that the stage has already
    rows   number of the held-out rows
    """
    if result is None:
        return None
    if not isinstance(result, Delivered):
        raise broken(callback, type(result).__name__, "sftmix.components.Delivered")
    if both := sorted((taken | OWN) & (result.figures.keys() | result.files.keys())):
        allowed = f"names that nothing else has; rename it, as my_{both[0]}"
        raise broken(callback, f"{both[0]} from on_delivered()", allowed)
    for name in result.files:
        if not re.fullmatch(r"\w[\w.-]*\.json", name):
            raise broken(callback, f"the file {name!r} from on_delivered()", "letters and digits, and .json at the end")
    figures, files = (
        {name: _plain(callback, name, value) for name, value in given.items()}
        for given in (result.figures, result.files)
    )
    if (scores := result.scores) is not None:
        shapes = [np.shape(column) for column in (scores.nll_sum, scores.n_tokens, scores.n_correct)]
        if {*shapes} != {(rows,)}:
            raise broken(callback, f"scores of the shapes {shapes}", f"one of each for {rows} held-out rows")
    return replace(result, figures=figures, files=files)


def _plain(callback: Callback, name: str, value: Any) -> Any:
    """Return a value as JSON holds it, with the numbers of arrays and tensors; raise ContractError for another one."""
    try:
        return json.loads(json.dumps(value, default=lambda array: array.tolist()))
    except (TypeError, ValueError, AttributeError):
        raise broken(callback, f"{name} {value!r} from on_delivered()", "values of JSON") from None


def check_sentences(callback: Callback, result: Any) -> Sequence[str] | None:
    """Return the sentences of `on_summary`, or None; raise ContractError for anything else."""
    if result is not None and not (isinstance(result, list) and all(type(one) is str for one in result)):
        raise broken(callback, f"{result!r} from on_summary()", "a list of sentences, or None")
    return result
