"""The state of an optimizer of one's own in a checkpoint: whatever it holds, a resumed run is the uninterrupted one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sftmix.batches.order import Slot
from sftmix.common.errors import CheckpointError, Stopped
from sftmix.common.world import World
from sftmix.components import Optimizer
from sftmix.testing import check_optimizer
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.loop import train
from tests.forked import on_ranks
from tests.toy import Interrupt, toy_model, toy_rows, toy_stage
from tests.trained import Trained, assert_exact

DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4)])
BATCHES = [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * 3


class Descent(torch.optim.Optimizer):
    """Gradient descent whose state is of one kind; `late` begins a mean of gradients in its third step."""

    kind = ""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-float(group["lr"] * self.factor(p, self.state[p])))

    def factor(self, p: torch.nn.Parameter, state: dict) -> float:
        if self.kind == "float64":
            state["scale"] = state.get("scale", np.float64(1.0)) * np.float64(0.7)
            assert type(state["scale"]) is np.float64
            return state["scale"]
        if self.kind == "bool":
            state["flip"] = not state.get("flip", False)
            assert type(state["flip"]) is bool
            return 1.0 if state["flip"] else 0.1
        if self.kind == "widens":
            state["scale"] = 0.75 * state["scale"] if "scale" in state else 1
            return state["scale"]
        state["steps"] = state.get("steps", 0) + 1
        if state["steps"] >= 3:
            state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + p.grad
            state["size"] = 0.5 * state.get("size", 8.0)
            p.add_(state["mean"], alpha=-0.001 * state["size"])
        return 1.0


class Own(Optimizer):
    def __init__(self, *, kind: str):
        self.kind = kind

    def build(self, parameters, *, training):
        made = Descent([{"params": list(parameters.values())}], {"lr": training.learning_rate})
        made.kind = self.kind
        return made


def weights_of(place: Path, kind: str, *, stop: int = -1) -> dict[str, torch.Tensor]:
    stage = toy_stage(
        place,
        BATCHES,
        data=DATA,
        model=toy_model(dtype=torch.float32, tied=True),
        options={"learning_rate": 0.01},
        optimizer=Own(kind=kind),
        callbacks=[Interrupt(step=stop)],
    )
    return full_weights(train(stage, World()).module)


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("kind", ["float64", "bool", "widens", "late"])
def test_a_resumed_run_goes_on_with_all_of_it(tmp_path, kind, stop):
    check_optimizer(Own(kind=kind))
    whole = weights_of(tmp_path / "whole", kind)
    with pytest.raises(Stopped):
        weights_of(tmp_path / "parts", kind, stop=stop)
    assert_exact(whole, weights_of(tmp_path / "parts", kind))


def two_ranks(world: World, path: str) -> None:
    """State that began late is sharded as its weights are."""
    one, other = (
        Trained(toy_model(seed=seed), steps=steps, world=world, parallel="fsdp", optimizer=Own(kind="late"))
        for seed, steps in ((0, 4), (7, 1))
    )
    store = CheckpointStore(Path(path), keep=1, world=world)
    store.save(4, one.wrapped, one.optimizer, {})
    store.load(4, other.wrapped, other.optimizer)
    for each in (one, other):
        each.step()
    assert_exact(one.everything(), other.everything())


@pytest.mark.slow
def test_state_that_began_late_on_two_ranks(tmp_path):
    on_ranks(two_ranks, str(tmp_path))


def test_stored_state_of_no_weight_is_refused(tmp_path):
    it = Trained(toy_model(), steps=4, optimizer=Own(kind="late"))
    store = CheckpointStore(tmp_path, keep=1, world=World())
    first = it.optimizer.param_groups[0]["params"][0]
    it.optimizer.state[first]["nested"] = {"mean": torch.zeros(3)}
    store.save(4, it.wrapped, it.optimizer, {})
    other = Trained(toy_model(), steps=1, optimizer=Own(kind="late"))
    with pytest.raises(CheckpointError, match=r"step-00000004 .*nested\.mean"):
        store.load(4, other.wrapped, other.optimizer)
