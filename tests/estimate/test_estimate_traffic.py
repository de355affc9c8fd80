"""What ranks send each other, against the collectives of real ranks (gloo) and formulas written out; and its time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.common.world import World
from sftmix.components.reference import TrainedReference
from sftmix.components.reweighting import IRDRO
from sftmix.components.splitters import RandomSplit
from sftmix.estimate import estimate, make_machine
from sftmix.estimate.batches import MicroBatch, StepBatches
from sftmix.estimate.layout import make_layout
from sftmix.estimate.model import FakeModel
from sftmix.estimate.traffic import Traffic, reading_traffic, step_traffic
from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.training.module import TrainingModule, gradient_sync
from sftmix.training.parallel import recompute_activations, wrap
from sftmix.training.scoring import CPU_SCORING_TOKENS, SCORING_TOKENS, Scorer, scoring_plan
from tests.distributed.test_sharding import COUNTED
from tests.estimate.configs import INNER, LAYERS, TRAINING, VOCABULARY, WIDTH, config, small_llama
from tests.toy import on_ranks, toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"))


# --------------------------------------------------------------------------------------------- counted


class Moved(TorchDispatchMode):
    """Bytes that this rank passes on in collectives of a ring; whole tensors are gathered, reduced or averaged."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group, self.bytes = group, dict.fromkeys(COUNTED.values(), 0.0)
        self.copies = 2
        """Ranks that average."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = COUNTED.get(func.__name__.split(".")[0]) if func.namespace == "c10d" else None
        if name:
            whole = args[1] if name == "reduce_scatter" else args[0]
            size = sum(x.nbytes for x in ([whole] if isinstance(whole, torch.Tensor) else whole))
            ranks = self.copies if name == "all_reduce" else self.group
            self.bytes[name] += (1 + (name == "all_reduce")) * size * (ranks - 1) / ranks
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Way:
    """How ranks work together; so many micro-batches of so many segments make a step."""

    parallel: Any
    precision: Any = "fp32"
    segments: int = 1
    micro_batches: int = 2
    recompute: bool = False
    lora: LoraOptions = field(default_factory=LoraOptions)


WAYS = [
    Way("ddp"),
    Way("fsdp"),
    Way("fsdp", "bf16"),
    Way("ddp", segments=2),
    Way("fsdp", segments=2),
    Way("fsdp", segments=2, micro_batches=1),
    Way("fsdp", segments=4, recompute=True),
    Way("fsdp", recompute=True),
    Way("fsdp", "bf16", lora=LoraOptions(r=2)),
]
HYBRID = [Way("hsdp"), Way("hsdp", "bf16"), Way("hsdp", segments=2)]


def counted(world: World, way: Way, path: str) -> list[float]:
    """Bytes of weights and of gradients in the second step, and of weights in scoring."""
    model = load_model(path)
    if way.lora.r:
        add_adapters(model, way.lora, seed=0)
    if way.recompute:
        recompute_activations(model)
    wrapping = {"parallel": way.parallel, "precision": way.precision, "shard_group_size": 2}
    module = wrap(TrainingModule(model), world=world, **wrapping)
    step = partial(a_step, module, way)
    step()
    with Moved(group=2) as moved:
        step()
    assert not way.parallel.endswith("fsdp") or not moved.bytes["all_reduce"]
    gradients = moved.bytes["reduce_scatter"] + moved.bytes["all_reduce"]
    Scorer(world=world)(module, DATA)
    with Moved(group=2) as read:  # embeddings and head are still there
        Scorer(world=world)(module, DATA)
    return [moved.bytes["all_gather"], gradients, read.bytes["all_gather"]]


def a_step(module: torch.nn.Module, way: Way) -> None:
    for number in range(way.micro_batches):
        batch = collate([(Slot(k),) for k in range(4)], DATA, n_segments=way.segments)
        plan = scoring_plan(batch)
        plan.row_weight.fill_(1.0)
        with gradient_sync(module, number == way.micro_batches - 1):
            module(batch, plan).loss.backward()
    module.zero_grad(set_to_none=True)


def ranks_count(world: World, path: str, out: str, hybrid: bool) -> None:
    found = [counted(world, way, path) for way in (HYBRID if hybrid else WAYS)]
    Path(out, f"{hybrid}-{world.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def counts(tmp_path_factory, path) -> Path:
    out = tmp_path_factory.mktemp("counts")
    on_ranks(ranks_count, path, str(out), False)
    on_ranks(ranks_count, path, str(out), True, ranks=4)
    return out


def estimated(way: Way, path: str, ranks: int) -> list[float]:
    model, machine = FakeModel(path, None, way.lora), make_machine("H100", ranks, mfu=0.4, tflops=None)
    layout = make_layout(TrainingOptions(parallel=way.parallel, precision=way.precision, shard_group_size=2), machine)
    passes = way.micro_batches * way.segments
    batches = StepBatches(MicroBatch((), 1, True), way.micro_batches, passes)
    traffic = step_traffic(model, batches, layout, ranks)
    return [traffic.weights, traffic.gradients, reading_traffic(model, 1, layout)]


@pytest.mark.parametrize("hybrid", [False, True], ids=["two-ranks", "four-ranks"])
def test_what_is_sent_is_what_ranks_send(counts, path, hybrid):
    for rank in range(4 if hybrid else 2):
        told = json.loads((counts / f"{hybrid}-{rank}.json").read_text())
        for way, found in zip(HYBRID if hybrid else WAYS, told, strict=True):
            assert found == pytest.approx(estimated(way, path, 4 if hybrid else 2), rel=1e-6), way


# -------------------------------------------------------------------------------------------- formulas


def of_options(path: str, ranks: int, **options: Any) -> Traffic:
    machine = make_machine("H100", ranks, mfu=0.4, tflops=None)
    layout = make_layout(TrainingOptions(precision="bf16", **options), machine)
    batches = StepBatches(MicroBatch((), 1, True), micro_batches=3, passes=6)
    return step_traffic(FakeModel(path, None, LoraOptions()), batches, layout, ranks)


def test_the_formula_of_each_layout(path):
    """Eight ranks, three micro-batches of two segments, bf16 weights and float32 gradients."""
    layers = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH)
    ends = 2 * VOCABULARY * WIDTH + WIDTH
    whole = layers + ends
    assert of_options(path, 1) == Traffic(0.0, 0.0)
    assert of_options(path, 8, parallel="ddp") == Traffic(0.0, pytest.approx(4 * whole * 2 * 7 / 8))
    fsdp = of_options(path, 8, parallel="fsdp")
    assert fsdp.weights == pytest.approx(2 * 7 / 8 * (2 * 6 * layers + 3 * ends))
    assert fsdp.gradients == pytest.approx(4 * 7 / 8 * (2 * layers + ends))
    hsdp = of_options(path, 8, parallel="hsdp", shard_group_size=4)
    assert hsdp.weights == pytest.approx(fsdp.weights * (3 / 4) / (7 / 8))
    assert hsdp.gradients == pytest.approx(4 * (3 / 4 + 2 * 1 / 2 / 4) * (2 * layers + ends))
    assert hsdp.all == hsdp.weights + hsdp.gradients


# ---------------------------------------------------------------------------------------------- stages


def gpus(count: int = 4, **options: Any):
    return make_machine("H100", count, mfu=0.4, tflops=None, **options)


def test_steps_are_of_the_run_s_micro_batches(tiny):
    """29 rows, 8 a step: 3 steps of full batches and one of five rows in each epoch; on one rank, 4 at a time."""

    def batches(count: int, **options: Any) -> StepBatches:
        training = replace(TRAINING, **options)
        found = estimate(config(tiny, splitter=RandomSplit(), training=training), gpus(count))
        return found.stages[0].work.batches

    assert (batches(1).micro_batches, batches(1).passes) == (2, 2)
    assert (batches(2).micro_batches, batches(2).passes) == (1, 1)
    assert (batches(1, length_groups=2).micro_batches, batches(1, length_groups=2).passes) == (2, 4)


def test_scoring_takes_as_many_forwards_as_its_batches(tiny):
    def forwards(machine, **changes: Any) -> Iterable[float]:
        found = estimate(config(tiny, data={"eval": None}, callbacks=[], **changes), machine)
        return found, [stage.work.read.forwards for stage in found.stages]

    found, told = forwards(gpus(), reference=TrainedReference(checkpoints=3))
    assert found.tokens < 4 * SCORING_TOKENS
    assert told == [3, 1, 1]
    found, told = forwards(make_machine("cpu", 1, mfu=1, tflops=1), reference=TrainedReference(checkpoints=3))
    assert told[0] == 3 * -(-found.tokens // CPU_SCORING_TOKENS)
    ways = {"splitter": RandomSplit()}
    found, told = forwards(gpus(), objective=IRDRO(), **ways)
    train = found.stages[0].work
    assert told[0] - 1 == train.steps * train.batches.passes


def test_hours_are_the_longer_of_computing_and_sending(tiny):
    ways = {"splitter": RandomSplit()}
    slow, fast = (estimate(config(tiny, **ways), gpus(bandwidth=bandwidth)) for bandwidth in (1e-6, 1e9))
    for one, per_second in ((slow, 1e3), (fast, None)):
        for stage in one.stages:
            sent = [stage.traffic.all * stage.work.steps, stage.reading_sent]
            expected = sum(4 * size / 1e3 for size in sent) if per_second else stage.flops / (989e12 * 0.4)
            assert stage.hours(one.machine) == pytest.approx(expected / 3600)
    assert slow.hours == pytest.approx(sum(stage.hours(slow.machine) for stage in slow.stages))
    machine = gpus(bandwidth=1.0)  # both take long: what is sent takes half the time of the computation, or twice it
    assert machine.hours(4 * 989e12 * 0.4 * 3600, 1e9 * 1800) == pytest.approx(4)
    assert machine.hours(4 * 989e12 * 0.4 * 3600, 1e9 * 7200) == pytest.approx(8)


def test_the_data_sheet_s_bandwidth_holds_within_a_node():
    assert gpus(8).bandwidth == 450e9
    assert gpus(8, bandwidth=300.0).bandwidth == 300e9
    assert gpus(16).bandwidth is None
    assert gpus(16, bandwidth=50.0).bandwidth == 50e9
    assert make_machine("cpu", None, mfu=1, tflops=1).bandwidth is None
    assert make_machine("cpu", None, mfu=1, tflops=1).count == 1
    assert make_machine("H100", None, mfu=1, tflops=None).count == 8


# ------------------------------------------------------------------------------------------------ text


def test_traffic_is_printed_beside_tokens(finished, sftmix):
    words = ["estimate", *finished.tiny.options, "--splitter", "RandomSplit"]
    found = json.loads(sftmix(*words, "--json", "--gpus", "4").out)
    train = found["stages"]["train"]
    step, steps = train["step"], train["steps"]
    assert step["tokens_per_device"] == pytest.approx(train["training_tokens"] / steps / 4)
    sent = step["sent_bytes_per_device"]
    assert sent["all"] == sent["weights"] + sent["gradients"] > 0
    assert step["communicating_seconds"] == pytest.approx(sent["all"] / 450e9)
    assert step["computing_seconds"] == pytest.approx(train["training_flops"] / steps / (4 * 989e12 * 0.4))
    printed = sftmix(*words, "--gpus", "4", "--bandwidth", "0.001").out
    assert f"train: {step['tokens_per_device']:,.0f} tokens in 1 micro-batch, " in printed
    assert " sent and as much received (weights " in printed
    assert "note: communication takes longer than computation, so many times, in a step of train (" in printed
    assert "note: communication" not in sftmix(*words, "--gpus", "4", "--bandwidth", "1e9").out
    assert "note: no time is counted for communication" in sftmix(*words, "--gpus", "16").out
