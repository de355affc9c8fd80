"""Optimizers: the rule by hand, fused, resumed, on shards, and what is refused before any work."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftmix.components import AdamW, AdamW8bit, Optimizer, TrainedReference
from sftmix.components.optimizers import decay_groups
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.options import DataOptions, ModelOptions, ReferenceTraining, TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import CheckpointStore
from sftmix.training.update import build_optimizer
from sftmix.words.errors import ConfigError
from tests.forked import on_ranks
from tests.toy import rounding, toy_model
from tests.trained import Trained, assert_exact, assert_near

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


class Rounded(Optimizer):
    """Momentum in bfloat16, and the norm of each parameter, which every rank has in whole."""

    def build(self, parameters, *, training):
        return _Rounded(list(parameters.values()), {"lr": training.learning_rate})


class _Rounded(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = 0.9 * state.get("mean", torch.zeros_like(parameter)) + parameter.grad
                state["mean"] = mean.to(torch.bfloat16)
                parameter.add_(state["mean"], alpha=-group["lr"])
                state["size"] = torch.tensor([float(parameter.numel())], dtype=torch.float64)


OPTIMIZERS: dict[str, Optimizer] = {"fused": AdamW(fused=True), "numbers": Counting(), "rounded": Rounded()}


def trained_by(kind, *, seed=0, **how):
    model = toy_model(dtype=torch.float32, tied=True, seed=seed)
    return Trained(model, optimizer=OPTIMIZERS[kind], options=TRAINING, **how)


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
            limit = rounding(p.detach(), 2 * 3)  # each step takes the decay off, then adds
            torch.testing.assert_close(p.detach().double(), value, rtol=0, atol=limit)


class Made(TorchDispatchMode):
    """The largest tensor that an operation has made, apart from what it wrote to."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.data_ptr() not in given:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_on_a_cpu_a_matrix_is_updated_by_blocks_to_the_same_bits(monkeypatch):
    """Like torch's, with matrices of several blocks, whole or not, and a resumed state; nothing large is made."""
    monkeypatch.setattr("sftmix.functional.adamw.BLOCK", 5_000)
    random = torch.Generator().manual_seed(0)
    shapes = ((1_000, 37), (333,), (1_003, 64), (3, 5, 7), (128, 9_000))
    ours = {str(shape): nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes}
    theirs = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    options = {"lr": TRAINING.learning_rate, "betas": TRAINING.betas, "eps": TRAINING.eps}
    groups = decay_groups(theirs, TRAINING.weight_decay)
    plain, blockwise = torch.optim.AdamW(groups, **options), AdamW().build(ours, training=TRAINING)
    for step in range(4):
        for name, mine in ours.items():
            mine.grad = theirs[name].grad = torch.randn(mine.shape, generator=random)
        plain.step()
        if step == 2:
            state, blockwise = blockwise.state_dict(), AdamW().build(ours, training=TRAINING)
            blockwise.load_state_dict(state)
        blockwise.step()
    assert_exact(ours, theirs)
    for number, expected in plain.state_dict()["state"].items():
        assert_exact(blockwise.state_dict()["state"][number], expected)
    with Made() as made:
        blockwise.step()
    assert 0 < made.numbers <= 64 * 9_000  # 64 rows at least


def test_auto_is_fused_on_cuda_alone():
    with FakeTensorMode():
        for device, fused in (("cpu", None), ("cuda", True)):
            weight = nn.Parameter(torch.empty(3, 3, device=device))
            assert AdamW().build({"w": weight}, training=TRAINING).defaults["fused"] is fused


def train_sharded(world, path):
    for kind in OPTIMIZERS:
        it = trained_by(kind, steps=2, world=world, parallel="fsdp")
        CheckpointStore(Path(path) / kind, keep=1, world=world).save(2, it.wrapped, it.optimizer, {})
        found = it.everything()
        if world.is_main:
            save_file(found, Path(path) / f"{kind}.safetensors")


@pytest.mark.slow
def test_two_ranks_that_share_the_weights_train_what_one_trains_and_one_goes_on(tmp_path):
    on_ranks(train_sharded, str(tmp_path))
    for kind in OPTIMIZERS:
        one, two = trained_by(kind, steps=2), load_file(tmp_path / f"{kind}.safetensors")
        assert_near(one.everything(), two, atol=2**-8 if kind == "rounded" else 1e-6)
        loaded = trained_by(kind, steps=1, seed=7)
        CheckpointStore(tmp_path / kind, keep=1, world=World()).load(2, loaded.wrapped, loaded.optimizer)
        assert_exact(loaded.everything(), two)
        assert {name: x.dtype for name, x in loaded.everything().items()} == {name: x.dtype for name, x in two.items()}


class Forgetful(Optimizer):
    def build(self, parameters, *, training):
        return torch.optim.SGD(list(parameters.values())[1:], lr=0.1)


def test_a_parameter_that_is_left_out_is_named():
    with pytest.raises(ConfigError, match=r"Forgetful must take each of \d+ parameters once; .*transformer\.wte"):
        build_optimizer(toy_model(), TRAINING, Forgetful())


class TwoRates(Optimizer):
    """Matrices, and vectors at a rate of their own: an adapter trains no vector, and then the second group is empty."""

    def build(self, parameters, *, training):
        groups = [[p for p in parameters.values() if (p.ndim > 1) is matrix] for matrix in (True, False)]
        return torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}])


def test_an_empty_group_of_parameters_is_none_and_the_training_goes_on(tmp_path):
    def made(seed):
        model = toy_model(dtype=torch.float32, seed=seed)
        for parameter in model.parameters():
            parameter.requires_grad = parameter.ndim > 1
        return Trained(model, optimizer=TwoRates(), options=TRAINING, steps=1)

    it, other = made(0), made(7)
    assert [len(group["params"]) > 0 for group in it.optimizer.param_groups] == [True]
    store = CheckpointStore(tmp_path, keep=1, world=World())
    store.save(1, it.wrapped, it.optimizer, {})
    store.load(1, other.wrapped, other.optimizer)
    assert_exact(other.everything(), it.everything())


def test_a_parameter_that_is_taken_twice_is_refused():
    class Twice(Optimizer):
        def build(self, parameters, *, training):
            both = torch.optim.SGD(parameters.values(), lr=0.1)
            both.param_groups.append(dict(both.param_groups[0]))
            return both

    with pytest.raises(
        ConfigError, match=r"Twice must take each of (\d+) parameters once; it has \d+, and left out \[\]"
    ):
        build_optimizer(toy_model(), TRAINING, Twice())


def config_with(**options):
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
        validate(config_with(optimizer=AdamW8bit()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    validate(config_with(optimizer=AdamW8bit()))
    for parallel in ("fsdp", "hsdp"):
        training = TrainingOptions(parallel=parallel)
        with pytest.raises(ConfigError, match=rf"AdamW8bit and training\.parallel {parallel} exclude each other"):
            validate(config_with(optimizer=AdamW8bit(), training=training))
    own = TrainedReference(training=ReferenceTraining(parallel="fsdp"))
    with pytest.raises(ConfigError, match=r"AdamW8bit and reference\.training\.parallel fsdp exclude each other"):
        validate(config_with(optimizer=AdamW8bit(), reference=own))
