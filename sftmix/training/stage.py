"""What a training stage is given: model, rows, order, objective and options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from sftmix.components.base import Callback, Objective, Optimizer, Perturbation
from sftmix.components.optimizers import AdamW
from sftmix.data.batching import TokenisedRows
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.training.log import PeakMemory
from sftmix.training.online import OnlineLosses
from sftmix.training.order import TrainingOrder
from sftmix.training.values import Values
from sftmix.types import RowScores, Split

Scorer = Callable[[nn.Module, TokenisedRows], RowScores]


@dataclass(kw_only=True)
class Stage:
    """One training stage: what to train, on what, in which order, towards what."""

    name: str
    model: PreTrainedModel
    data: TokenisedRows
    order: TrainingOrder
    objective: Objective
    options: TrainingOptions
    checkpoint: CheckpointOptions
    directory: Path
    seed: int
    identity: str = ""
    """Hash of what the stage is made from; a checkpoint of another identity is refused."""
    values: Values | None = None
    """Those of a model on the meta device, where ranks share the weights."""
    memory: PeakMemory | None = None
    """What measures the stage since it began; None: the loop measures itself."""
    pad_id: int = 0
    split_of: Callable[[int], Split | None] = field(default=lambda epoch: None)
    """The groups in each epoch."""
    optimizer: Optimizer = field(default_factory=AdamW)
    perturbation: Perturbation | None = None
    online: OnlineLosses | None = None
    """Keeps the losses of the epoch that is being trained on."""
    eval_data: TokenisedRows | None = None
    packed: bool = False
    """Some rows hold several documents, which must not attend to each other."""
    scorer: Scorer | None = None
    callbacks: Sequence[Callback] = ()
    on_progress: Callable[[int, int], None] = field(default=lambda step, total: None)
