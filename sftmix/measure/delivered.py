"""What the callbacks of a stage find of the weights that it delivers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from sftmix.components.base import Delivered, StageState
from sftmix.components.contracts import check_delivered
from sftmix.disk.files import write_json
from sftmix.training.asked import evaluate
from sftmix.training.scoring import split_by_slot, sum_by_slot
from sftmix.training.step import Stage
from sftmix.types import Batch


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
