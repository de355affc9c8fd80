"""What callbacks may ask of the model between two steps: scores of rows, an evaluation, figures of the last step."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

from sftmix.batches.order import ResponsesAlone, RowSubset
from sftmix.training.callback_state import unmoved
from sftmix.training.scoring import eval_mode, held_out_metrics
from sftmix.training.step import Stage, StepResult, StepSetup
from sftmix.types import RowLosses, Rows


def score_training_rows(stage: Stage, module: nn.Module, rows: Rows | None = None, *, alone: bool = False) -> RowLosses:
    """Return the scores of training rows, by numbers or a mask; None: of all. alone: without their instructions."""
    chosen = np.arange(len(stage.data))[slice(None) if rows is None else list(rows)]
    kind = ResponsesAlone if alone else RowSubset
    return stage.scorer(module, kind(stage.data, chosen))


def evaluate(stage: Stage, module: nn.Module) -> Mapping[str, float]:
    """Return the metrics of the held-out rows, of which there are some."""
    assert stage.eval_data is not None
    return held_out_metrics(stage.scorer(module, stage.eval_data))


def read_step(setup: StepSetup, done: StepResult, function: Callable[..., Any]) -> list[Any]:
    """Return function(hidden, head, batch, plan) of a step's micro-batches, in eval mode, of all ranks.

    The function may call the loss, whose objective keeps its state.
    """
    with unmoved(setup.stage.objective), eval_mode(setup.module, setup.world, setup.precision) as target:

        def read(batch: Any, plan: Any) -> Any:
            return target.read(lambda it: function(it.hidden_states(batch), it.head, batch, plan))

        results = list(map(read, done.batches, done.plans))
    return [result for of_rank in setup.world.gather(results) for result in of_rank]
