"""The memory of a stage on fake tensors, against a step on real ones, torch's tracker of FSDP, and numbers reckoned."""

import contextlib
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPModMemStats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sftmix.batches.order import Slot
from sftmix.components import ASFT, AdamW, AdamW8bit
from sftmix.components.objectives import NTP, SFTMix
from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.run import parts_of
from sftmix.tools.estimate.work import Work
from sftmix.training.footprint import Footprint, Workload, kept_of, without_values
from sftmix.training.parallel import shards_of, training_module
from sftmix.training.step import PreparedStep, plans_of, train_step
from sftmix.training.teacher import Teacher
from sftmix.training.update import build_optimizer
from sftmix.types import Batch
from tests.fast import some_fast
from tests.tools.estimate.configs import LAYER, LAYERS, VOCABULARY, WIDTH, fake_ranks, machine, micro_batch, small_llama
from tests.toy import Answers, FakeRank, FixedOrder, toy_rows, toy_setup

WIDEST = 60
SLOTS = 8 * WIDEST
ENDS = 2 * VOCABULARY * WIDTH + WIDTH
NUMBERS = LAYERS * LAYER + ENDS
LEFT_OUT = 0.07
"""Labels, pairs and, recomputed, the order in which layers are freed are so much of a model this small."""
NO_LORA, LORA = LoraOptions(), LoraOptions(r=4)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """Of which what a model does not reckon, such as labels and pairs, is a small part."""
    sizes = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
    return small_llama(tmp_path_factory.mktemp("wide"), **sizes)


def estimated(path: str, slots: int | None, *, gpu: str = "H100", count: int = 4, **changes: Any) -> dict[str, int]:
    """Bytes of each part, for micro-batches of so many token slots of pairs of rows of WIDEST (or `widest`) tokens.

    slots    None: nothing is trained
    changes  options of the training, or lora, objective, optimizer, micro_batches, widest
    """
    lora, optimizer = changes.pop("lora", NO_LORA), changes.pop("optimizer", AdamW())
    objective, several = changes.pop("objective", NTP()), changes.pop("micro_batches", 1)
    widest = changes.pop("widest", WIDEST)
    options, gpus = TrainingOptions(**{"precision": "bf16"} | changes), machine(gpu, count)
    shards, memory = shards_of(options, gpus.world), None
    model = FakeModel(path, None, lora, precision=options.precision, shards=shards)
    if slots is not None:
        module, fake = without_values(model.model, halved=options.precision == "bf16" and shards > 1)
        data, order = toy_rows([(1, widest - 1)]), FixedOrder([[(Slot(0), Slot(0))]])
        given = Workload(module, data, order, objective, optimizer, options, options.precision, gpus.world)  # type: ignore[arg-type]
        memory = Footprint(given, kept_of(given, fake))
    work = Work("train", model, options, np.zeros(3), memory=memory, slots=slots or 0, micro_batches=several)
    return parts_of(work)


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


class Known(WeakIdKeyDictionary):
    """The figures of modules in the tracker, which knows them by their forwards; the head has none."""

    def __getitem__(self, module):
        if module not in self:
            self[module] = _FSDPModMemStats("")
        return super().__getitem__(module)


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


@pytest.mark.parametrize(
    ("objective", "lora"),
    some_fast([(NTP(), NO_LORA), (SFTMix(), NO_LORA), (SFTMix(), LORA), (NTP(), LORA)], every=2),
    ids=["NTP-full", "SFTMix-full", "SFTMix-LoRA", "NTP-LoRA"],
)
@pytest.mark.parametrize("precision", some_fast(["fp32", "bf16"], every=2))
@pytest.mark.parametrize(
    "recompute",
    [pytest.param(False, id="kept"), pytest.param(True, id="recomputed", marks=(pytest.mark.slow, pytest.mark.long))],
)
def test_a_step_on_a_cpu_holds_as_much_as_its_estimate(wide, objective, precision, lora, recompute):
    about = {"activation_checkpointing": recompute, "precision": precision}
    options, counter = TrainingOptions(**about, padding_free=False), Held()
    model, given = load_model(wide), micro_batch(8, WIDEST)
    if lora.r:
        add_adapters(model, lora, seed=0)
    module = training_module(model, options, precision=precision, world=World(), trains=True)
    for parameter in module.parameters():
        counter.add(parameter.untyped_storage())
    two_steps(module, options, given, counter, optimizer=build_optimizer(module, options, AdamW()), objective=objective)
    expected = peak(wide, SLOTS, gpu="cpu", count=1, lora=lora, objective=objective, **about)
    assert expected == pytest.approx(counter.peak, rel=LEFT_OUT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [NTP(), pytest.param(SFTMix(), marks=(pytest.mark.slow, pytest.mark.long))], ids=["NTP", "SFTMix"]
)
@pytest.mark.parametrize("lora", some_fast([NO_LORA, LORA], every=2), ids=["full", "LoRA"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=(pytest.mark.slow, pytest.mark.long))])
def test_a_step_under_fsdp_holds_as_much_as_torch_s_tracker_of_fsdp_finds(wide, objective, lora, ranks):
    options = TrainingOptions(precision="bf16", parallel="fsdp", padding_free=False)
    world, given, model = FakeRank(size=ranks), micro_batch(8, WIDEST), FakeModel(wide, None, lora).model
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_ranks(world):
        module = training_module(model, options, precision="bf16", world=world, trains=True)
        with fake:
            optimizer = build_optimizer(module.to_empty(device="cpu"), options, AdamW())
        tracker = FSDPMemTracker(module, optimizer)
        tracker.memory_tracking = Known()
        modes = fake, Answers(), tracker
        two_steps(module, options, given, *modes, world=world, optimizer=optimizer, objective=objective)
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    expected = peak(wide, SLOTS, gpu="cpu", count=ranks, lora=lora, objective=objective, parallel="fsdp")
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.long
@pytest.mark.slow
def test_a_step_on_a_gpu_took_what_is_estimated(tmp_path):
    """38.3 GiB on an H200 (torch 2.11): 1.2B, bf16 autocast, several micro-batches of 4 rows of 2,048 tokens a step."""
    sizes = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    big = small_llama(tmp_path, **sizes, tie_word_embeddings=True, empty=True)
    assert peak(big, 8192, count=1, micro_batches=4, widest=2048) / 2**30 == pytest.approx(38.3, rel=0.02)


# ------------------------------------------------------------------------------------------------- parts


@pytest.mark.slow
def test_gradients_of_micro_batches_before_are_whole_under_fsdp_and_in_ddp_s_buckets(path):
    one, several = (estimated(path, SLOTS, micro_batches=n) for n in (1, 2))
    assert (one["gradients"], several["gradients"]) == (0, 4 * NUMBERS)
    assert sum(several.values()) - sum(one.values()) == 4 * NUMBERS
    ddp, alone = (estimated(path, SLOTS, parallel=kind, count=n) for kind, n in (("ddp", 4), ("auto", 1)))
    assert (ddp["gradients"], alone["gradients"]) == (4 * NUMBERS, 0)


def test_gradients_that_are_reduced_in_every_micro_batch_are_shards(path):
    """No rank holds the whole gradient between micro-batches; one micro-batch has none before it in any case."""
    reduced = {"parallel": "fsdp", "reduce_each_micro_batch": True}
    assert [estimated(path, SLOTS, micro_batches=n, **reduced)["gradients"] for n in (1, 2)] == [0, NUMBERS]


def test_weights_that_are_kept_after_the_forward_are_those_of_all_layers(path):
    """In bf16; the layer of the backward, and the next one, are there in either case."""
    freed, kept = (estimated(path, SLOTS, parallel="fsdp", reshard_after_forward=freed) for freed in (True, False))
    differences = {name: kept[name] - freed[name] for name in kept if kept[name] != freed[name]}
    assert differences == {"working": 2 * LAYERS * LAYER}


@pytest.mark.parametrize("count", [1, 4])
def test_a_tied_head_is_one_weight(tmp_path, count):
    tied = small_llama(tmp_path, tie_word_embeddings=True)
    gradients = estimated(tied, SLOTS, count=count, micro_batches=2)["gradients"]
    assert gradients == 4 * (NUMBERS - VOCABULARY * WIDTH)


def test_what_ranks_share_is_divided(path):
    part = estimated(path, SLOTS)
    assert (part["weights"], part["optimizer"]) == (NUMBERS, 2 * NUMBERS)
    scores = estimated(path, None)
    gathered = 2 * (2 * LAYER + ENDS)
    assert {name: size for name, size in scores.items() if size} == {"weights": NUMBERS, "working": gathered}


@pytest.mark.slow
def test_the_optimizer_says_what_its_state_needs_and_adapters_have_a_state_alone(path):
    for optimizer, size in ((AdamW(), 8), (AdamW8bit(), 2)):
        assert estimated(path, SLOTS, parallel="ddp", optimizer=optimizer)["optimizer"] == size * NUMBERS
    trained, part = FakeModel(path, None, LORA).numbers.whole.trained, estimated(path, SLOTS, count=1, lora=LORA)
    assert trained > 0
    assert (part["weights"], part["optimizer"]) == (4 * (NUMBERS + trained), 8 * trained)
    few, quantized = (estimated(path, 18, count=1, lora=one) for one in (LORA, replace(LORA, quantize="4bit")))
    assert quantized["weights"] < part["weights"] / 2
    assert quantized["activations"] < few["activations"]  # autocast copies no weights


class Average(ASFT):
    """ASFT with a moving average as its teacher, of which adapters need a second copy as well."""

    teacher_decay = 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("objective", "lora"), [(ASFT(), NO_LORA), (ASFT(), LORA), (Average(), LORA)], ids=["full", "LoRA", "average"]
)
def test_a_teacher_is_as_large_as_its_estimate(path, objective, lora, precision):
    """Its weights, and a copy of the head while a step uses it."""
    model, options = load_model(path), TrainingOptions(precision=precision)
    if lora.r:
        add_adapters(model, lora, seed=0)
    teacher = Teacher(training_module(model, options, precision=precision, world=World(), trains=True), objective)
    (taught,) = teacher.taught([micro_batch(2, WIDEST)], World(), precision)
    held = sum(weight.nbytes for weight in (*teacher.weights.values(), taught.weight))
    about = {"gpu": "cpu", "count": 1, "lora": lora, "precision": precision}
    taught_by, alone = (estimated(path, SLOTS, objective=one, **about)["optimizer"] for one in (objective, NTP()))
    assert taught_by - alone == held


def test_an_update_that_is_not_fused_copies_the_second_moments_on_a_gpu(path):
    """With so few slots that the update is the peak."""
    found = [estimated(path, 2, count=1, optimizer=AdamW(fused=fused))["working"] for fused in (False, True)]
    assert found[0] == 4 * NUMBERS
    assert found[1] < NUMBERS
