"""Optimizers: the rule by hand, fused, resumed, on shards, and what is refused before any work."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from sftmix.components import NTP, AdamW, AdamW8bit, Optimizer, TrainedReference
from sftmix.config import RunConfig
from sftmix.data.batching import Slot, collate
from sftmix.errors import ConfigError
from sftmix.options import DataOptions, ModelOptions, ReferenceTraining, TrainingOptions
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.distributed import World, unwrap, wrap
from sftmix.training.optim import build_optimizer
from sftmix.training.step import TrainingModule
from tests.toy import on_ranks, toy_model, toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4)])
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
TRAINING = TrainingOptions(learning_rate=0.01, weight_decay=0.2, betas=(0.8, 0.95))


class Counting(Optimizer):
    """SGD that slows down by itself: its state is a number of each parameter, and one of its groups."""

    def build(self, parameters, *, training):
        return _Counting([{"params": list(parameters.values())}], {"lr": training.learning_rate, "slower": 1.0})


class _Counting(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    rate = -group["lr"] * group["slower"] / state["count"]
                    parameter.add_(parameter.grad, alpha=rate)
            group["slower"] *= 0.75


OPTIMIZERS: dict[str, Optimizer] = {"fused": AdamW(fused=True), "numbers": Counting()}


class Trained:
    """A wrapped module and its optimizer after some steps on the same batch on every rank."""

    def __init__(self, kind: str, *, steps: int, seed: int = 0, world: World | None = None, parallel: str = "none"):
        module = TrainingModule(toy_model(dtype=torch.float32, tied=True, seed=seed))
        self.wrapped = wrap(module, parallel=parallel, precision="fp32", world=world or World())
        self.optimizer = build_optimizer(module.model, TRAINING, OPTIMIZERS[kind])
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        batch = collate([(Slot(row),) for row in range(len(DATA))], DATA)
        self.wrapped(batch, NTP().plan(batch, step=0, total_steps=1, seed=0)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def everything(self) -> dict[str, torch.Tensor]:
        """All weights and the whole state, numbers as tensors (on rank 0; call it on every rank)."""
        state = get_optimizer_state_dict(unwrap(self.wrapped), self.optimizer, options=FULL)
        numbers = {k: torch.as_tensor(v) for k, v in state.items() if isinstance(v, (int, float, torch.Tensor))}
        return {k: v.clone().contiguous() for k, v in (full_weights(self.wrapped) | numbers).items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_adamw_is_the_rule_by_hand():
    """Decoupled weight decay on the matrix alone, bias-corrected moments, epsilon outside of the root."""
    for fused in (False, True):
        matrix, vector = nn.Parameter(torch.tensor([[0.5, -2.0]])), nn.Parameter(torch.tensor([1.5]))
        optimizer = AdamW(fused=fused).build({"w": matrix, "b": vector}, training=TRAINING)
        expected = {matrix: matrix.detach().double(), vector: vector.detach().double()}
        first = {p: torch.zeros_like(x) for p, x in expected.items()}
        second = {p: torch.zeros_like(x) for p, x in expected.items()}
        for step in (1, 2, 3):
            for p, decay in ((matrix, 0.2), (vector, 0.0)):
                p.grad = torch.full_like(p, 0.3 * step)
                g = p.grad.double()
                first[p], second[p] = 0.8 * first[p] + 0.2 * g, 0.95 * second[p] + 0.05 * g * g
                root = (second[p] / (1 - 0.95**step)).sqrt() + TRAINING.eps
                expected[p] = expected[p] * (1 - 0.01 * decay) - 0.01 * first[p] / (1 - 0.8**step) / root
            optimizer.step()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach().double(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_step_after_a_resume_is_the_same(tmp_path, kind):
    it, other = Trained(kind, steps=2), Trained(kind, steps=1, seed=7)
    store = CheckpointStore(tmp_path, keep=1, world=World())
    store.save(2, it.wrapped, it.optimizer, {})
    store.load(2, other.wrapped, other.optimizer)
    for each in (it, other):
        each.step()
    assert equal(it.everything(), other.everything())
    if kind == "numbers":
        numbers = json.loads((store.path(2) / "optimizer.json").read_text())
        assert {v for k, v in numbers.items() if k.endswith(".count")} == {2}
        assert {v for k, v in numbers.items() if k.endswith(".slower")} == {0.75**2}


def sharded(world: World, path: str) -> None:
    for kind in OPTIMIZERS:
        it = Trained(kind, steps=2, world=world, parallel="fsdp")
        CheckpointStore(Path(path) / kind, keep=1, world=world).save(2, it.wrapped, it.optimizer, {})
        found = it.everything()
        if world.is_main:
            save_file(found, Path(path) / f"{kind}.safetensors")


def test_two_ranks_that_share_the_weights_train_what_one_trains_and_one_goes_on(tmp_path):
    on_ranks(sharded, str(tmp_path))
    for kind in OPTIMIZERS:
        one, two = Trained(kind, steps=2).everything(), load_file(tmp_path / f"{kind}.safetensors")
        assert one.keys() == two.keys()
        assert max(float((one[k].double() - two[k].double()).abs().max()) for k in one) < 1e-6
        loaded = Trained(kind, steps=1, seed=7)
        CheckpointStore(tmp_path / kind, keep=1, world=World()).load(2, loaded.wrapped, loaded.optimizer)
        assert equal(loaded.everything(), two)


class Forgetful(Optimizer):
    def build(self, parameters, *, training):
        return torch.optim.SGD(list(parameters.values())[1:], lr=0.1)


def test_a_parameter_that_is_left_out_is_named():
    with pytest.raises(ConfigError, match=r"Forgetful must take each of \d+ parameters once; .*transformer\.wte"):
        build_optimizer(toy_model(), TRAINING, Forgetful())


def config(**options) -> RunConfig:
    return RunConfig(out="o", model=ModelOptions(path="m"), data=DataOptions(train=["t"]), **options)


def test_eight_bits_are_built_of_the_options(monkeypatch):
    """What the class of bitsandbytes is given: each parameter once, decay on the matrix alone, all the options."""

    class Recorded(torch.optim.SGD):
        def __init__(self, groups, **options):
            super().__init__(groups, lr=options["lr"])
            self.options = options

    package = ModuleType("bitsandbytes")
    package.optim = ModuleType("bitsandbytes.optim")  # type: ignore[attr-defined]
    package.optim.AdamW8bit = Recorded
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package.optim)
    model = nn.Linear(3, 2)
    training = TrainingOptions(learning_rate=0.01, weight_decay=0.2, betas=(0.8, 0.95), eps=1e-7)
    built = build_optimizer(model, training, AdamW8bit())
    assert isinstance(built, Recorded)
    assert built.options == {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7}
    assert isinstance(built.options["betas"], tuple)
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert decay == {id(model.weight): 0.2, id(model.bias): 0.0}


def test_what_eight_bits_need_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"AdamW8bit needs the package bitsandbytes: pip install bitsandbytes"):
        config(optimizer=AdamW8bit()).validate()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    config(optimizer=AdamW8bit()).validate()
    for parallel in ("fsdp", "hsdp"):
        training = TrainingOptions(parallel=parallel)
        with pytest.raises(ConfigError, match=rf"AdamW8bit and training\.parallel {parallel} exclude each other"):
            config(optimizer=AdamW8bit(), training=training).validate()
    own = TrainedReference(training=ReferenceTraining(parallel="fsdp"))
    with pytest.raises(ConfigError, match=r"AdamW8bit and reference\.training\.parallel fsdp exclude each other"):
        config(optimizer=AdamW8bit(), reference=own).validate()


def test_groups_of_shards_are_for_hsdp():
    config(training=TrainingOptions(parallel="hsdp", shard_group_size=2)).validate()
    with pytest.raises(ConfigError, match=r"training\.shard_group_size is 2, which only hsdp knows, .* parallel auto"):
        config(training=TrainingOptions(shard_group_size=2)).validate()
    with pytest.raises(ConfigError, match=r"training\.shard_group_size is 0; allowed: at least 1"):
        config(training=TrainingOptions(parallel="hsdp", shard_group_size=0)).validate()
    own = TrainedReference(training=ReferenceTraining(parallel="fsdp", shard_group_size=2))
    with pytest.raises(ConfigError, match=r"reference\.training\.shard_group_size is 2, which only hsdp knows"):
        config(training=TrainingOptions(parallel="hsdp"), reference=own).validate()
