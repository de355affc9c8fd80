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
from sftmix.components import NTP, SFTMix
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import training_module
from sftmix.training.scoring import Scorer
from sftmix.training.step import normalise
from tests.forked import on_ranks
from tests.model.test_packing import model_of
from tests.tiny import sftmix
from tests.toy import toy_model, toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])
UNITS: list[list[Unit]] = [[(Slot(0), Slot(1)), (Slot(2),)], [(Slot(3), Slot(0)), (Slot(1),)]]
"""Two micro-batches of different lengths."""

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own, which it hides by itself outside of pytest


def gradients_of_both(world: World, **options: Any) -> dict[str, torch.Tensor]:
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
    expected = gradients_of_both(world, **options)
    assert not counters["stats"]
    found = gradients_of_both(world, compile=True, **options)
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


ALPACA = toy_rows([(3, 5), (30, 20), (1, 11), (4, 4), (2, 3)])
STEPS: list[list[Unit]] = [
    [(Slot(0),)],
    [(Slot(1), Slot(2)), (Slot(3),)],
    [(Slot(2), Slot(3))],
    [(Slot(0),), (Slot(3), Slot(2))],
    [(Slot(4),)],
]
"""A first batch of a single row, the longest, two others, and a last short one."""


@pytest.mark.long
@TRACED_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("family", "graphs"), [("llama", (1, 3)), ("gemma3, sliding", (2, 4))])
def test_rows_without_padding_have_four_graphs_at_most(family, graphs, recomputed, monkeypatch):
    """Of a training and then of scoring; Gemma 3 has two kinds of layers. The attention breaks no graph."""
    monkeypatch.setattr("sftmix.model.packing.DEVICES", ("cpu",))
    torch._dynamo.reset()
    counters.clear()
    options = TrainingOptions(compile=True, activation_checkpointing=recomputed)
    module = training_module(model_of(family, None), options, precision="fp32", world=World(), trains=True).train()
    plain = TrainingModule(model_of(family, "eager"))
    assert module.padding_free
    assert not counters["stats"]  # of the probe
    for units in STEPS:
        batches = [collate(units, ALPACA, padding_free=True), collate(units, ALPACA, n_segments=4)]
        plan = NTP().plan(batches[0], step=0, total_steps=1, seed=0)
        scaled = normalise(plan, ntp_count=9, mixup_count=9, world_size=1)
        found, expected = module(batches[0], scaled), plain(batches[1], scaled)
        torch.testing.assert_close(found.nll, expected.nll, rtol=1e-5, atol=3e-6)
        found.loss.backward()
        expected.loss.backward()
    assert counters["stats"]["unique_graphs"] <= graphs[0]
    for (name, ours), theirs in zip(module.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")
    Scorer(world=World())(module, ALPACA)
    assert counters["stats"]["unique_graphs"] <= graphs[1]
    assert not counters["graph_break"], dict(counters["graph_break"])


@TRACED_ONLY
@pytest.mark.slow
def test_compiled_layers_are_recomputed():
    same(World(), activation_checkpointing=True)


@pytest.mark.slow
def test_compiled_layers_are_sharded():
    on_ranks(same_sharded)


@TRACED_ONLY
def same_sharded(world: World) -> None:
    same(world, parallel="fsdp")


@pytest.mark.slow
def test_without_a_compiler_it_is_said_before_anything_is_read(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    done = sftmix("run", *finished.tiny.options, "--training.compile", "true", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "error: training.compile true needs a C++ compiler on a CPU" in done.stderr
    assert not [p for p in (tmp_path / "run").iterdir() if p.is_dir()]
