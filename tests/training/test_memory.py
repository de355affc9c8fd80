"""Too little memory is said before the first step, by what a forward really keeps."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from sftmix.batches.order import Slot
from sftmix.components.others.places import EmbeddingMixup
from sftmix.model.layers import decoder_layers
from sftmix.ranks.world import World
from sftmix.training import memory
from sftmix.training.footprint import Footprint, StepLayout, workload_of
from sftmix.training.loop import train
from sftmix.training.module import TrainingModule
from sftmix.training.plan import USABLE, by_cost, step_plans
from sftmix.training.step import StepSetup
from sftmix.words.errors import ConfigError
from tests.toy import FixedOrder, toy_model, toy_rows, toy_stage

DATA = toy_rows([(3, 5), (7, 2), (20, 12), (4, 4)])


def setup_of(stage, world: World | None = None, precision: str = "fp32") -> StepSetup:
    return StepSetup(stage, TrainingModule(stage.model), None, precision, world or World())  # type: ignore[arg-type]


def footprint(setup: StepSetup) -> Footprint:
    return Footprint(workload_of(setup))


def layout_of(several: bool, recompute: bool) -> StepLayout:
    return StepLayout(several, recompute, reshard_after_forward=True, reduce_each_micro_batch=False)


def tokens_of(setup: StepSetup, free: float) -> int:
    """The token slots of a micro-batch that `free` bytes decide on a CPU."""
    found = step_plans({"none": footprint(setup)}, workload_of(setup), {"none": free}, padded=True, gpu=None)
    tokens = by_cost(found)[0].decided(setup.stage.options).micro_batch_tokens
    assert isinstance(tokens, int)
    return tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_slot_keeps_is_measured(stage, precision):
    """A batch of k of the longest rows keeps k times as much, beside what does not depend on the rows."""
    setup = setup_of(stage, precision=precision)
    setup.module.train()
    constant, each = footprint(setup).kept
    assert setup.module.training
    for rows in (2, 5):
        sizes = {}

        def note(saved, sizes=sizes):
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        ids, model = torch.from_numpy(DATA[2].input_ids).long().repeat(rows, 1), stage.model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), saved_tensors_hooks(note, lambda x: x):
            out = model.get_decoder()(input_ids=ids, use_cache=False)
        for parameter in model.parameters():
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        assert sum(sizes.values()) == pytest.approx(constant + ids.numel() * each, rel=0.1)
        del out


def test_what_a_layer_keeps_is_let_go_before_the_next_one(stage):
    """A model whose layers must be computed again has no room for what all of them keep."""
    first, last = decoder_layers(stage.model)
    noted, gone = [], []
    first.mlp.c_fc.register_forward_hook(lambda *about: noted.append(StorageWeakRef(about[-1].untyped_storage())))
    last.register_forward_pre_hook(lambda *_: gone.append(noted[-1].expired()))
    assert footprint(setup_of(stage)).kept[1] > 0
    assert gone == [True, True]


def test_all_passes_of_an_objective_count(stage):
    """EmbeddingMixup sends both rows of each pair through the model a second time."""
    pairs = replace(stage, order=FixedOrder([PAIRS]))
    _, once = footprint(setup_of(pairs)).kept
    _, twice = footprint(setup_of(replace(pairs, objective=EmbeddingMixup()))).kept
    assert twice == pytest.approx(2 * once, rel=0.15)


@pytest.fixture
def stage(tmp_path):
    """Three steps of four rows in micro-batches of two."""
    units = [[(Slot(row),) for row in range(4)]] * 3
    return toy_stage(tmp_path, units, model=toy_model(dtype=torch.float32), data=DATA)


def free(monkeypatch, number: float) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: number)


def test_what_does_not_fit_at_all_is_refused_before_the_first_step(stage, monkeypatch):
    state = sum(3 * one.nbytes for one in stage.model.parameters())  # the gradient, and two moments of AdamW
    free(monkeypatch, state - 1)
    with pytest.raises(ConfigError, match="lora"):
        train(stage, World())
    assert not (stage.directory / "metrics.jsonl").exists()


def test_whole_gradients_between_micro_batches_are_refused_before_the_first_step(stage, monkeypatch):
    """Of two ranks that share the weights: 4 bytes of each number, or half of them, beside half of AdamW's 8."""
    monkeypatch.setattr(World, "max", lambda self, value: value)
    world, trained = World(size=2), sum(one.numel() for one in stage.model.parameters())
    free(monkeypatch, 7 * trained)
    for limits, each, refused in (
        ({"micro_batch_size": 2}, False, True),
        ({"micro_batch_size": 2}, True, False),
        ({"micro_batch_size": 16}, False, False),
        ({"micro_batch_size": None, "micro_batch_tokens": 32}, False, True),
        ({"micro_batch_size": None, "micro_batch_tokens": 999}, False, False),
    ):
        options = replace(stage.options, parallel="fsdp", reduce_each_micro_batch=each, **limits)
        setup = setup_of(replace(stage, options=options), world)
        if refused:
            with pytest.raises(ConfigError, match="reduce_each_micro_batch true"):
                memory.check_memory(setup)
        else:
            memory.check_memory(setup)


def test_the_gradients_of_ddp_are_there_before_the_first_step(stage, monkeypatch):
    setup = setup_of(stage)
    free(monkeypatch, 7.0)
    assert memory.room(setup) == 7
    monkeypatch.setattr(memory, "DDP", TrainingModule)
    assert memory.room(setup) == 7 + sum(one.nbytes for one in stage.model.parameters())


def room_for(setup: StepSetup, slots: int, *, several: bool, recompute: bool = False) -> float:
    """The bytes that so many token slots take."""
    found = footprint(setup)
    return found.optimizer + sum(found.peak(slots, layout_of(several, recompute)))


PAIRS = [(Slot(0), Slot(1)), (Slot(2), Slot(3))]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_token_slots_that_fit(stage, recompute):
    """At least a pair of the longest rows, at most a rank's part of a step."""
    units, long = [(Slot(row), Slot(row)) for row in range(4)] * 2, int(DATA.lengths.max())
    auto = {"micro_batch_size": None, "micro_batch_tokens": "auto"}
    options = replace(stage.options, activation_checkpointing=recompute, **auto)
    setup = setup_of(replace(stage, order=FixedOrder([units]), options=options))
    for slots, expected in ((5 * long, 5 * long), (long, 2 * long), (99 * long, 16 * long)):
        found = room_for(setup, slots, several=True, recompute=recompute) / USABLE + 1
        assert tokens_of(setup, found) == expected
    assert tokens_of(setup, math.inf) == 8 * long


def test_free_memory_is_that_of_the_system_and_of_the_group(tmp_path, monkeypatch):
    everything = memory.free_memory(torch.device("cpu"))
    assert 0 < everything < 2**50
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 150\nactive_file 400\nshmem 50\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 2550  # pages of files are given back, shared memory is not
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > 3000


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch):
    """The figures of a GPU of 80, of which a stage has left 60 to torch."""
    for name, number in (("mem_get_info", (15, 80)), ("memory_reserved", 60), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    assert memory.free_memory(torch.device("cuda", 0)) == 65


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_that_is_gone_takes_nothing_of_a_gpu():
    gpu = torch.device("cuda", 0)
    torch.zeros(1, device=gpu)
    before = memory.free_memory(gpu)
    held = torch.zeros(2**28, device=gpu)
    assert before - memory.free_memory(gpu) >= held.nbytes
    del held
    assert before - memory.free_memory(gpu) < 2**26
