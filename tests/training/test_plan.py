"""The plan of a step: the cheapest that fits, on devices of which nothing but the data sheet is there."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig

from sftmix.batches.order import Slot
from sftmix.components import ASFT, NTP
from sftmix.components.optimizers import AdamW
from sftmix.components.others.places import ManifoldMixup
from sftmix.model.mapped import empty_model
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.tools.estimate.model import FakeModel
from sftmix.training import choices
from sftmix.training.footprint import Workload
from sftmix.training.gpus import GPUS
from sftmix.training.parallel import prepare_layers, training_module
from sftmix.training.plan import USABLE, StepPlan, by_cost, imitated, parallels_of, said, step_plans
from sftmix.words.errors import ConfigError
from tests.forked import on_ranks
from tests.model.test_models import TINY, random_model
from tests.tools.estimate.configs import fake_ranks, small_llama
from tests.toy import FakeRank, FixedOrder, toy_model, toy_rows

SIZES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LONG = np.full(256, 2048)
SHORT = np.clip(np.random.default_rng(0).lognormal(4.1, 0.6, 256).astype(int), 8, 450)
"""About as long as rows of Alpaca: 75 tokens, the longest 450."""
LORA = LoraOptions(r=16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def planned(
    directory: Path,
    size: str,
    lengths: np.ndarray,
    gpus: int,
    *,
    batch: int = 32,
    gpu: str = "H100",
    lora: LoraOptions | None = None,
    known: bool = True,
    objective: Any = None,
    **options: Any,
) -> list[StepPlan]:
    """The plans of a model of this size, trained in bf16 on so many GPUs of a kind, in nodes of eight."""
    more: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 2048}
    path = small_llama(directory / size, empty=True, dtype="bfloat16", **more, **SIZES[size])
    world = World(size=gpus, local_size=min(gpus, 8), device=torch.device("cuda", 0))
    model = FakeModel(path, None, lora or LoraOptions(), precision="bf16").model
    data = toy_rows([(1, int(length) - 1) for length in lengths])
    given = TrainingOptions(**{"global_batch_size": batch, "micro_batch_tokens": "auto"} | options)
    order: Any = FixedOrder([[(Slot(row % len(lengths)),) for row in range(batch)]])
    work = Workload(model, data, order, objective or NTP(), AdamW(), given, "bf16", world)
    memories = imitated(model, work, parallels_of(given, world, by_node=True))
    held = sum(one.nbytes for one in model.parameters())
    free = {name: 1e9 * GPUS[gpu].gigabytes - held / one.shards for name, one in memories.items()}
    return step_plans(memories, work, free, padded=False, gpu=GPUS[gpu] if known else None)


def layout(plan: StepPlan) -> tuple[str, bool, bool, bool]:
    several, recompute, reshard, _ = plan.layout
    return plan.parallel, several, recompute, reshard


ROWS: dict[str, tuple[Sequence[Any], dict[str, Any], tuple[str, bool, bool, bool]]] = {
    "8B, 2,048 tokens: not recomputed": (("8b", LONG, 8), {}, ("fsdp", False, False, True)),
    "8B on two GPUs, short rows: one pass": (("8b", SHORT, 2), {}, ("fsdp", False, True, True)),
    "8B, short rows: gathered once": (("8b", SHORT, 8), {}, ("fsdp", False, False, False)),
    "8B, adapters, short rows: no gathering": (("8b", SHORT, 8), {"lora": LORA}, ("ddp", False, False, True)),
    "70B, 256 rows of 2,048 tokens": (("70b", LONG, 64), {"batch": 256}, ("fsdp", False, True, True)),
    "8B on two nodes, short rows": (("8b", SHORT, 16), {}, ("fsdp", False, False, False)),
}
FAST = next(iter(ROWS))


@pytest.mark.parametrize("row", [pytest.param(row, marks=() if row == FAST else pytest.mark.slow) for row in ROWS])
def test_what_is_chosen_is_the_cheapest_that_fits(directory, row):
    about, changes, expected = ROWS[row]
    found = planned(directory, *about, **changes)
    best, *others = by_cost(found)
    assert layout(best) == expected
    assert best.fits
    assert best.need <= USABLE * best.free
    assert all(best.seconds <= 1.05 * other.seconds for other in others)
    second = f"; the second is {others[0]}" if others else ""
    assert said(found) == f"{best}: the cheapest of {len(found)} plans, of which {len(others) + 1} fit{second}"


def test_a_plan_takes_what_options_ask_for(directory):
    asked = {"activation_checkpointing": True, "reshard_after_forward": False, "reduce_each_micro_batch": True}
    found = planned(directory, "8b", LONG, 8, parallel="fsdp", **asked, micro_batch_tokens=4096)
    assert [layout(plan) for plan in found] == [("fsdp", True, True, False)]
    options = found[0].decided(TrainingOptions(parallel="fsdp", **asked, micro_batch_tokens=4096))
    assert options == TrainingOptions(parallel="fsdp", **asked, micro_batch_tokens=4096)
    rows = planned(directory, "8b", LONG, 8, parallel="fsdp", micro_batch_tokens=None, micro_batch_size=2)
    assert {(plan.layout.several_micro_batches, plan.slots) for plan in rows} == {(True, 4096)}


def test_states_that_an_objective_changes_are_not_recomputed(directory):
    found = planned(directory, "8b", LONG, 8, parallel="fsdp", objective=ManifoldMixup(layers=[1]))
    assert {plan.layout.activation_checkpointing for plan in found} == {False}


@pytest.mark.parametrize(("family", "layouts"), [("gpt_neox", {False, True}), ("gpt_neox_japanese", {False})])
def test_layers_are_not_recomputed_in_a_model_that_cannot(family, layouts):
    model, one = random_model(AutoConfig.for_model(family, **TINY)), World(device=torch.device("cuda", 0))
    order: Any = FixedOrder([[(Slot(0),)]])
    work = Workload(model, toy_rows([(3, 5)]), order, NTP(), AdamW(), TrainingOptions(), "fp32", one)
    found = step_plans(imitated(model, work, ["none"]), work, {"none": 1e9}, padded=False, gpu=None)
    assert {plan.layout.activation_checkpointing for plan in found} == layouts
    if layouts == {False}:
        with pytest.raises(ConfigError, match=r"activation_checkpointing true: GPTNeoXJapanese.* Set it to false\."):
            prepare_layers(model, TrainingOptions(activation_checkpointing=True))


@pytest.mark.slow
def test_on_an_unknown_device_the_first_that_fits_is_taken(directory):
    """Without figures fsdp stays what it was, and nothing is recomputed that need not be."""
    short, long = (planned(directory, "8b", lengths, 8, known=False) for lengths in (SHORT, LONG))
    assert layout(by_cost(short)[0]) == ("fsdp", False, False, True)
    assert layout(by_cost(long)[0]) == ("fsdp", False, False, True)
    assert "the speed of the device is not known" in said(short)
    assert {plan.seconds for plan in short} == {None}


@pytest.mark.slow
def test_what_fits_nowhere_is_planned_with_the_least_memory(directory):
    found = planned(directory, "70b", LONG, 8)
    assert not any(plan.fits for plan in found)
    best = by_cost(found)[0]
    assert best.need - best.free == min(plan.need - plan.free for plan in found)
    assert "the least memory" in said(found)


@pytest.mark.slow
def test_two_micro_batches_hold_the_whole_gradient_unless_each_reduces_its_own(directory):
    """As 70B on 64 GPUs had them: 282 GB a rank."""
    found = planned(directory, "70b", LONG, 64, batch=256, parallel="fsdp", micro_batch_tokens=4096)
    end, each = (max(p.need for p in found if p.layout.reduce_each_micro_batch is way) for way in (False, True))
    assert end - each > 250e9


@pytest.mark.slow
def test_gradients_added_up_in_bfloat16_are_less_traffic_and_not_chosen(directory):
    """8B on short rows is bound by what is sent."""
    about = {"parallel": "fsdp", "reshard_after_forward": False, "activation_checkpointing": False}
    full, half = (
        by_cost(planned(directory, "8b", SHORT, 8, reduce_dtype=name, **about))[0] for name in ("float32", "bfloat16")
    )
    assert full.seconds - half.seconds > 0.01
    assert full.decided(TrainingOptions()).reduce_dtype == "float32"


# ------------------------------------------------------------------------------------------------- ranks


def plan_wrapping(
    world: World, recorded: Sequence[Any] = (), model: Any = None, objective: Any = None, **options: Any
) -> tuple[TrainingOptions, list[str]]:
    stage: Any = SimpleNamespace(
        data=toy_rows([(3, 5), (7, 2), (20, 12), (4, 4)]),
        order=FixedOrder([[(Slot(row),) for row in range(4)]]),
        model=model or toy_model(dtype=torch.float32),
        objective=objective or NTP(),
        optimizer=AdamW(),
        options=TrainingOptions(**options),
        attention=None,
    )
    lines: list[str] = []
    return choices.plan_wrapping(stage, "bf16", world, recorded, lines.append), lines


def on_gpus(free: float) -> None:
    """GPUs in name, of which this rank's has so much room."""
    choices.free_memory = lambda device: free  # type: ignore[assignment]
    choices.machine_of = lambda world, options: {"device": "NVIDIA H100", **vars(options)}  # type: ignore[assignment]


def check_ranks(world: World) -> None:
    """The last rank has too little for what the first one would choose."""
    gpus = replace(world, device=torch.device("cuda", 0), local_size=2, local_rank=world.rank)
    on_gpus(1e12)
    _, (line,) = plan_wrapping(gpus)
    assert line.startswith("weights are laid out for fsdp")
    assert "the cheapest" in line
    on_gpus(1e12 if world.rank == 0 else 1.0)
    poor, (line,) = plan_wrapping(gpus)
    assert world.gather((poor, line)) == [(poor, line)] * 2
    assert "the least memory" in line
    # What was recorded is kept while it fits.
    on_gpus(1e12)
    decided = {"parallel": "fsdp", "reshard_after_forward": False, "activation_checkpointing": True, "compile": False}
    decided |= {"micro_batch_tokens": 64, "reduce_each_micro_batch": False, "padding_free": True}
    recorded = [{"device": "NVIDIA H100", **vars(TrainingOptions()), **decided, "after": 0}]
    again, (line,) = plan_wrapping(gpus, recorded)
    assert (again.parallel, again.reshard_after_forward) == ("fsdp", False)
    assert "as recorded" in line
    on_gpus(1.0)
    assert "not as recorded, for which there is too little memory now" in plan_wrapping(gpus, recorded)[1][0]
    assert plan_wrapping(gpus, parallel="ddp") == (TrainingOptions(parallel="ddp"), [])


@pytest.mark.slow
def test_all_ranks_have_the_plan_of_the_rank_with_the_least_memory():
    on_ranks(check_ranks)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("asked", "reduced"), [({}, None), ({"reduce_dtype": "bfloat16"}, torch.bfloat16)])
@pytest.mark.filterwarnings("ignore:Set timeout")
def test_gradients_are_added_up_in_the_dtype_that_is_asked_for(directory, precision, asked, reduced):
    """None: float32, as that of the parameters is."""
    path, world = small_llama(directory / "tiny"), FakeRank(size=2)
    options = TrainingOptions(parallel="fsdp", precision=precision, padding_free=False, **asked)
    with fake_ranks(world):
        module = training_module(empty_model(path), options, precision=precision, world=world, trains=True)
        parts: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
        policies = [group.mp_policy for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    expected = reduced or (torch.float32 if precision == "bf16" else None)
    assert {policy.reduce_dtype for policy in policies} == {expected}
    assert {policy.param_dtype for policy in policies} == {torch.bfloat16 if precision == "bf16" else None}


@pytest.fixture
def two_gpus(monkeypatch) -> World:
    """Two GPUs in name, of which this rank's is there, with a terabyte."""
    monkeypatch.setattr(choices, "free_memory", lambda device: 1e12)
    monkeypatch.setattr(choices, "machine_of", lambda world, options: {"device": "NVIDIA H100", **vars(options)})
    for name in ("max", "share"):
        monkeypatch.setattr(World, name, lambda self, value: value)
    return World(size=2, local_size=2, device=torch.device("cuda", 0))


def test_a_teacher_leaves_less_room_for_each_layout(two_gpus, monkeypatch):
    """Its weights in float32, and its head as the layout computes with it."""
    seen, plan, model = [], choices.planned, toy_model(dtype=torch.float32)

    def planned(work, memories, room, *given, **more):
        seen.append(room)
        return plan(work, memories, room, *given, **more)

    monkeypatch.setattr(choices, "planned", planned)
    for objective in (NTP(), ASFT()):
        plan_wrapping(two_gpus, model=model, objective=objective)
    numbers, head = sum(p.numel() for p in model.parameters()), model.get_output_embeddings().weight.numel()
    less = {name: seen[0][name] - seen[1][name] for name in seen[0]}
    assert less == {"fsdp": 2 * numbers + 2 * head, "ddp": 4 * numbers + 4 * head}


def test_a_model_that_cannot_be_followed_is_sharded(two_gpus, monkeypatch):
    tried: list[str] = []

    def imitated(model, work, parallels):
        tried.extend(parallels)
        raise RuntimeError("depends on values")

    monkeypatch.setattr(choices, "imitated", imitated)
    options, (line,) = plan_wrapping(two_gpus)
    assert tried == ["fsdp", "ddp"]
    assert (options.parallel, options.reshard_after_forward) == ("fsdp", True)
    assert "the model cannot be followed" in line
