"""Steps in which nothing counts: they move no weight and begin no optimizer, nor does a checkpoint among them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sftmix.batches.order import Slot, Unit
from sftmix.common.errors import Stopped
from sftmix.common.world import World
from sftmix.components import MixupOnly, Objective, SFTMix
from sftmix.components.objectives import ntp_plan
from sftmix.options import CheckpointOptions
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import train
from sftmix.types import Split
from tests.forked import on_ranks
from tests.toy import Interrupt, logged, toy_model, toy_rows, toy_stage
from tests.trained import assert_exact

DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4), (2, 3), (5, 5)])
SPLIT = Split(group=np.array([0, 1, 0, 1, -1, -1], dtype=np.int8), names=("confident", "unconfident"))
LATE: list[list[Unit]] = [[(Slot(4),)], [(Slot(5),)], [(Slot(0), Slot(1))], [(Slot(2), Slot(3))]]
"""Two steps of unpaired rows, then two of pairs."""


def weights_of(place: Path, objective: Objective, *, every: int = 0, stop: int = -1) -> dict[str, torch.Tensor]:
    stage = toy_stage(
        place,
        LATE,
        data=DATA,
        model=toy_model(dtype=torch.float32),
        objective=objective,
        options={"learning_rate": 0.01},
        checkpoint=CheckpointOptions(every=every),
        split_of=lambda epoch: SPLIT,
        callbacks=[Interrupt(step=stop)],
    )
    return full_weights(train(stage, World()).module)


@pytest.mark.parametrize("objective", [MixupOnly(), SFTMix(ntp_on="confident")])
def test_checkpoints_among_them_change_no_weight(tmp_path, objective):
    whole = weights_of(tmp_path / "whole", objective)
    assert_exact(whole, weights_of(tmp_path / "saved", objective, every=1))
    for stop in (1, 3):
        with pytest.raises(Stopped):
            weights_of(tmp_path / f"{stop}", objective, stop=stop)
        assert_exact(whole, weights_of(tmp_path / f"{stop}", objective))


class PairsApart(SFTMix):
    """SFTMix whose plan of a micro-batch without pairs is that of NTP, which knows no mu."""

    def plan(self, batch, **given):
        return super().plan(batch, **given) if len(batch.pairs) else ntp_plan(batch, batch.ntp_weight)


def check_apart(world: World, directory: str) -> None:
    """The log is that of SFTMix, whichever rank and micro-batch has the pair; a repeated pair alone moves weights."""
    repeated: list[Unit] = [(Slot(4, 0.0),), (Slot(5, 0.0),), (Slot(0, 0.0), Slot(1, 0.0))]
    batches: list[list[Unit]] = [[(Slot(4),), (Slot(5),), (Slot(0), Slot(1))], repeated]
    for mean, moving in (("own", 2), ("ntp", 1)):
        found, moved = [], []
        for kind in (SFTMix, PairsApart):
            place = Path(directory, f"{mean}-{kind.__name__}")
            more = {"data": DATA, "split_of": lambda epoch: SPLIT, "objective": kind(mu=0.75, mixup_mean=mean)}
            done = train(toy_stage(place, batches, options={"micro_batch_size": 2}, **more), world)
            moved.append(done.figures.get("updates"))
            found.append([done.figures["mu_effective"]])
            names = ("loss", "ntp", "mixup", "mu_effective")
            found[-1] += [[line[name] for name in names] for line in logged(place)] if world.is_main else []
        assert found[0] == found[1]
        assert found[0][0] > 0
        assert moved == [moving, moving]


def test_mu_is_that_of_the_plans_that_mix(tmp_path):
    check_apart(World(), str(tmp_path))


@pytest.mark.slow
def test_mu_is_that_of_the_plans_that_mix_on_another_rank(tmp_path):
    on_ranks(check_apart, str(tmp_path))
