"""A second set of weights: a moving average of the trained ones, or the weights before training.

They take no second model. Before the forwards of a step they are exchanged with the trained ones, in place, and give
the states of its micro-batches; then they are exchanged back. Under FSDP they are shards as the weights are, and are
gathered once more for their pass. The base of a model with adapters is the model without them, and takes no memory,
unless they train biases of the model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sftmix.components.base import Objective
from sftmix.components.component import Need
from sftmix.components.view import Taught
from sftmix.ranks.world import World
from sftmix.training.memory import check_memory
from sftmix.training.module import TrainingModule
from sftmix.training.numbers import is_base
from sftmix.training.parallel import reshard, unwrap
from sftmix.training.scoring import eval_mode
from sftmix.training.step import StepSetup
from sftmix.types import Batch


def give_teacher(setup: StepSetup) -> dict[str, torch.Tensor]:
    """Give the setup of a stage its teacher, if the objective needs one; return what checkpoints hold of it.

    Call it before a checkpoint is loaded. Raises ConfigError if the second weights do not fit into what is free.
    """
    if Need.TEACHER not in setup.stage.objective.needs:
        return {}
    check_memory(setup)
    setup.teacher = Teacher(setup.module, setup.stage.objective)
    return setup.teacher.stored


class Teacher:
    """The second weights of a stage; make it before a checkpoint is loaded, when the weights are untrained.

    weights  name of a trained weight -> its second value, for checkpoints; empty if the base is the model's own
    """

    def __init__(self, wrapped: nn.Module, objective: Objective) -> None:
        self._wrapped, self._decay = wrapped, objective.teacher_decay
        self._base = is_base(objective, unwrap(wrapped).model)
        reshard(wrapped)
        trained = {} if self._base else {n: p for n, p in unwrap(wrapped).named_parameters() if p.requires_grad}
        self._trained = trained
        self.weights = {name: p.detach().clone() for name, p in trained.items()}

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: a moving average; the weights before training are there at each start."""
        return {} if self._decay is None else {f"teacher/{name}": weight for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the trained weights, after an update: t = d t + (1 - d) w."""
        if self._decay is not None:
            for name, second in self.weights.items():
                _local(second).lerp_(_local(self._trained[name].detach()), 1 - self._decay)

    def taught(self, batches: Sequence[Batch], world: World, precision: str) -> list[Taught]:
        """Return the teacher's states of each micro-batch, on the device; all ranks call it together."""
        with self._in_place(), eval_mode(self._wrapped, world, precision) as target:
            head = target.read(lambda module: module.head.copied(base=self._base))
            hidden = [target.read(partial(TrainingModule.hidden_states, batch=batch)).detach() for batch in batches]
        return [Taught(states, **head) for states in hidden]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Within, the model has the second weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        reshard(self._wrapped)  # what is gathered is of the other weights
        if self._base:
            parts: Iterator[Any] = unwrap(self._wrapped).modules()
            for part in parts:
                if hasattr(part, "_disable_adapters"):
                    part._disable_adapters = not part._disable_adapters
        for name, second in self.weights.items():
            first, second = _local(self._trained[name].detach()), _local(second)
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)


def _local(weight: Any) -> torch.Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight
