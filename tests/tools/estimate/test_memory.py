"""The memory of a stage on fake tensors, against a step on real ones, torch's tracker of FSDP, and numbers reckoned."""

import contextlib
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftmix.common.world import World
from sftmix.components.objectives import NTP, SFTMix
from sftmix.components.optimizers import AdamW, AdamW8bit
from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.tools.estimate.run import FakeModel, _ranks, memory_of
from sftmix.tools.estimate.work import Layout, Work
from sftmix.training.parallel import training_module
from sftmix.training.step import PreparedStep, build_optimizer, plans_of, train_step
from sftmix.types import Batch
from tests.tools.estimate.configs import LAYER, LAYERS, VOCABULARY, WIDTH, machine, micro_batch, small_llama
from tests.toy import Answers, FakeRank, toy_setup

ENDS = 2 * VOCABULARY * WIDTH + WIDTH
NUMBERS = LAYERS * LAYER + ENDS
NO_LORA, LORA = LoraOptions(), LoraOptions(r=4)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"))


def estimated(path: str, given: Batch | None, *, gpu: str = "H100", count: int = 4, **changes: Any) -> dict[str, int]:
    """Bytes of each part; `changes` are options of the training, or lora, objective, optimizer, micro_batches."""
    lora, optimizer = changes.pop("lora", NO_LORA), changes.pop("optimizer", AdamW())
    objective, several = changes.pop("objective", NTP()), changes.pop("micro_batches", 1)
    options, gpus = TrainingOptions(**{"precision": "bf16"} | changes), machine(gpu, count)
    work = Work("train", path, lora, options, np.zeros(3), largest=given, micro_batches=several)
    return memory_of(work, FakeModel(path, None, lora), objective, optimizer, Layout(options, gpus), gpus)


def peak(*args: Any, **changes: Any) -> int:
    return sum(estimated(*args, **changes).values())


class Held(TorchDispatchMode):
    """Bytes of the storages that somebody holds, and the most that were held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = dict[int, int]()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) in (torch.Tensor, torch.nn.Parameter):
                self.add(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.held.pop(key)


def two_steps(module: Any, options: TrainingOptions, given: Batch, *modes: Any, **parts: Any) -> None:
    """The second one has the optimizer's state from its start."""
    setup = toy_setup(module, options=options, precision=options.precision, **parts)
    plans, problem = plans_of(setup, [given], 0)
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        for step in range(2):
            assert train_step(setup, PreparedStep(step, [given], plans, problem)).updates
            if isinstance(modes[-1], FSDPMemTracker):
                modes[-1].reset_mod_stats()


@pytest.mark.parametrize("objective", [NTP(), SFTMix()], ids=["NTP", "SFTMix"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [NO_LORA, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    "recompute", [pytest.param(False, id="kept"), pytest.param(True, id="recomputed", marks=pytest.mark.slow)]
)
def test_a_step_on_a_cpu_holds_as_much_as_its_estimate(path, objective, precision, lora, recompute):
    about = {"activation_checkpointing": recompute, "precision": precision}
    options, counter = TrainingOptions(**about, padding_free=False), Held()
    model, given = load_model(path), micro_batch(8, 60)
    if lora.r:
        add_adapters(model, lora, seed=0)
    module = training_module(model, options, precision=precision, world=World(), trains=True)
    for parameter in module.parameters():
        counter.add(parameter.untyped_storage())
    two_steps(module, options, given, counter, optimizer=build_optimizer(module, options, AdamW()), objective=objective)
    expected = peak(path, given, gpu="cpu", count=1, lora=lora, objective=objective, **about)
    assert expected == pytest.approx(counter.peak, rel=0.02)


@pytest.mark.parametrize("objective", [NTP(), pytest.param(SFTMix(), marks=pytest.mark.slow)], ids=["NTP", "SFTMix"])
@pytest.mark.parametrize("lora", [NO_LORA, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_under_fsdp_holds_as_much_as_torch_s_tracker_of_fsdp_finds(path, objective, lora, ranks):
    options = TrainingOptions(precision="bf16", parallel="fsdp", padding_free=False)
    world, given, model = FakeRank(size=ranks), micro_batch(8, 60), FakeModel(path, None, lora).model
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _ranks(world):
        module = training_module(model, options, precision="bf16", world=world, trains=True)
        with fake:
            optimizer = build_optimizer(module.to_empty(device="cpu"), options, AdamW())
        tracker = FSDPMemTracker(module, optimizer)
        modes = fake, Answers(), tracker
        two_steps(module, options, given, *modes, world=world, optimizer=optimizer, objective=objective)
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    expected = peak(path, given, gpu="cpu", count=ranks, lora=lora, objective=objective, parallel="fsdp")
    assert expected == pytest.approx(found, rel=0.02)


# ------------------------------------------------------------------------------------------------- parts


LOSS = 4
"""Bytes of the last loss, which is held as well."""


def test_gradients_of_micro_batches_before_are_whole_under_fsdp_and_in_ddp_s_buckets(path):
    given = micro_batch(8, 60)
    one, several = (estimated(path, given, micro_batches=n) for n in (1, 2))
    assert (one["gradients"], several["gradients"]) == (0, 4 * NUMBERS + LOSS)
    assert sum(several.values()) - sum(one.values()) == pytest.approx(4 * NUMBERS, rel=0.02)
    ddp, alone = (estimated(path, given, parallel=kind, count=n) for kind, n in (("ddp", 4), ("auto", 1)))
    assert (ddp["gradients"], alone["gradients"]) == (4 * NUMBERS + LOSS, 0)


@pytest.mark.parametrize("count", [1, 4])
def test_a_tied_head_is_one_weight(tmp_path, count):
    tied = small_llama(tmp_path, tie_word_embeddings=True)
    gradients = estimated(tied, micro_batch(8, 60), count=count, micro_batches=2)["gradients"]
    assert gradients == 4 * (NUMBERS - VOCABULARY * WIDTH) + LOSS


def test_what_ranks_share_is_divided(path):
    part = estimated(path, micro_batch(2, 9))
    assert (part["weights"], part["optimizer"]) == (NUMBERS, 2 * NUMBERS)
    scores = estimated(path, None)
    gathered = 2 * (2 * LAYER + ENDS)
    assert {name: size for name, size in scores.items() if size} == {"weights": NUMBERS, "working": gathered}


def test_the_optimizer_says_what_its_state_needs_and_adapters_have_a_state_alone(path):
    given = micro_batch(2, 9)
    for optimizer, size in ((AdamW(), 8), (AdamW8bit(), 2)):
        assert estimated(path, given, parallel="ddp", optimizer=optimizer)["optimizer"] == size * NUMBERS
    trained, part = FakeModel(path, None, LORA).numbers.trained, estimated(path, given, count=1, lora=LORA)
    assert trained > 0
    assert (part["weights"], part["optimizer"]) == (4 * (NUMBERS + trained), 8 * trained)
    quantized = estimated(path, given, count=1, lora=replace(LORA, quantize="4bit"))
    assert quantized["weights"] < part["weights"] / 2
    assert quantized["activations"] < part["activations"]  # autocast copies no weights
