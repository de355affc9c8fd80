"""The state of an optimizer of one's own in a checkpoint: a resumed run is the uninterrupted one, or is refused."""

from pathlib import Path

import pytest
import torch

from sftmix.batches.order import Slot
from sftmix.common.errors import CheckpointError, Stopped
from sftmix.common.world import World
from sftmix.components import Optimizer
from sftmix.testing import check_optimizer
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import train
from tests.toy import Interrupt, toy_model, toy_rows, toy_stage
from tests.trained import assert_exact

DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4)])
BATCHES = [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * 3


class Descent(torch.optim.Optimizer):
    """Gradient descent with a factor and a mean of gradients in its state, or with one that begins late."""

    begins = 1

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["flip"] = not state.get("flip", False)
                state["scale"] = 0.75 * state["scale"] if "scale" in state else 1  # an int, then a float
                state["steps"] = state.get("steps", 0) + 1
                p.add_(p.grad, alpha=-float(group["lr"] * state["scale"] * (1.0 if state["flip"] else 0.1)))
                if state["steps"] >= self.begins:
                    state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + p.grad
                    p.add_(state["mean"], alpha=-0.1 * group["lr"])


class Own(Optimizer):
    def __init__(self, *, begins: int):
        self.begins = begins

    def build(self, parameters, *, training):
        made = Descent([{"params": list(parameters.values())}], {"lr": training.learning_rate})
        made.begins = self.begins
        return made


def weights_of(place: Path, begins: int, *, stop: int = -1) -> dict[str, torch.Tensor]:
    stage = toy_stage(
        place,
        BATCHES,
        data=DATA,
        model=toy_model(dtype=torch.float32, tied=True),
        options={"learning_rate": 0.01},
        optimizer=Own(begins=begins),
        callbacks=[Interrupt(step=stop)],
    )
    return full_weights(train(stage, World()).module)


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_goes_on_with_all_of_it(tmp_path, stop):
    check_optimizer(Own(begins=1))
    whole = weights_of(tmp_path / "whole", 1)
    with pytest.raises(Stopped):
        weights_of(tmp_path / "parts", 1, stop=stop)
    assert_exact(whole, weights_of(tmp_path / "parts", 1))


def test_state_that_begins_after_the_first_step_is_never_lost_in_silence(tmp_path):
    with pytest.raises(Stopped):
        weights_of(tmp_path, 3, stop=4)
    with pytest.raises(CheckpointError, match=r"step-00000004 holds optimizer/state\..*mean, for which"):
        weights_of(tmp_path, 3)
