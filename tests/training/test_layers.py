"""Compiled decoder layers train what uncompiled ones train, recomputed and sharded ones, too (T22)."""

import shutil
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot, Unit
from sftmix.common.world import World
from sftmix.components import SFTMix
from sftmix.options import TrainingOptions
from sftmix.training.parallel import training_module
from sftmix.training.step import normalise
from tests.forked import on_ranks
from tests.tiny import sftmix
from tests.toy import toy_model, toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])
UNITS: list[list[Unit]] = [[(Slot(0), Slot(1)), (Slot(2),)], [(Slot(3), Slot(0)), (Slot(1),)]]
"""Two micro-batches of different lengths."""

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own, which it hides by itself outside of pytest


def gradients(world: World, **options: Any) -> dict[str, torch.Tensor]:
    """Of every parameter after both micro-batches; two of them for layers that share what was compiled."""
    module = training_module(toy_model(), TrainingOptions(**options), precision="fp32", world=world, trains=True)
    module.train()
    for units in UNITS:
        batch = collate(units, DATA, n_segments=1)
        plan = SFTMix(mu=0.75).plan(batch, step=3, total_steps=9, seed=5)
        scaled = normalise(plan, ntp_count=plan.ntp_count, mixup_count=plan.mixup_count, world_size=1)
        module(batch, scaled).loss.backward()
    whole = {name: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for name, p in module.named_parameters()}
    return {name.removeprefix("module."): gradient for name, gradient in whole.items()}


def same(world: World, **options: Any) -> None:
    torch._dynamo.reset()
    counters.clear()
    expected = gradients(world, **options)
    assert not counters["stats"]
    found = gradients(world, compile=True, **options)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.slow
def test_compiled_layers_have_the_same_gradients():
    same(World())
    assert counters["stats"]["unique_graphs"] <= 2  # of two layers and two lengths


TRACED_ONLY = patch("torch.compile", partial(torch.compile, backend="aot_eager"))
"""Layers are traced and cut into forward and backward as ever, but not made into C++, which takes most of the time."""


@TRACED_ONLY
@pytest.mark.slow
def test_compiled_layers_are_recomputed():
    same(World(), activation_checkpointing=True)


@pytest.mark.slow
def test_compiled_layers_are_sharded():
    on_ranks(sharded)


@TRACED_ONLY
def sharded(world: World) -> None:
    same(world, parallel="fsdp")


@pytest.mark.slow
def test_without_a_compiler_it_is_said_before_anything_is_read(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    done = sftmix("run", *finished.tiny.options, "--training.compile", "true", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "error: training.compile true needs a C++ compiler on a CPU" in done.stderr
    assert not [p for p in (tmp_path / "run").iterdir() if p.is_dir()]
