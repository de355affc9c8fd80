"""Numbers of numpy in schedules and plans: the log is that of Python's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sftmix.batches.order import Slot
from sftmix.common.world import World
from sftmix.components import Schedule, SFTMix
from sftmix.testing import check_objective, check_schedule
from sftmix.training.loop import train
from tests.toy import logged, toy_rows, toy_stage

DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4)])
BATCHES = [[(Slot(0), Slot(1))], [(Slot(2), Slot(3))]]


class Halving(Schedule):
    def __init__(self, *, kind: str):
        self.make = getattr(np, kind) if kind != "float" else float

    def value(self, step, total_steps):
        return self.make(0.5 / (step + 1))


class Rewritten(SFTMix):
    """SFTMix whose plans have numbers of numpy."""

    def plan(self, batch, **given):
        made = super().plan(batch, **given)
        numbers = {"ntp_count": np.int64(made.ntp_count), "mixup_count": np.float32(made.mixup_count)}
        return replace(made, mu=np.float32(made.mu), **numbers)


@pytest.mark.parametrize("objective", [SFTMix(mu=Halving(kind="float32")), Rewritten(mu=Halving(kind="float"))])
def test_they_are_logged_as_those_of_python(tmp_path, objective):
    check_objective(objective)
    found = []
    for name, one in (("these", objective), ("plain", SFTMix(mu=Halving(kind="float")))):
        done = train(toy_stage(tmp_path / name, BATCHES, data=DATA, objective=one), World())
        found.append([done.figures["mu_effective"]])
        found[-1] += [[line[key] for key in ("loss", "mixup", "mu_effective")] for line in logged(tmp_path / name)]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["float", "float32", "float64"])
def test_a_schedule_may_return_them(kind):
    check_schedule(Halving(kind=kind))
