"""training.micro_batch_tokens auto is one number for all ranks and attempts, on which results do not depend."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftmix.batches.order import Slot
from sftmix.components import EmbeddingMixup, SFTMix
from sftmix.components.base import Callback
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training import choices, memory
from sftmix.training import plan as planning
from sftmix.training.footprint import Footprint, StepLayout, workload_of
from sftmix.training.loop import TrainingLoop, train
from sftmix.training.machine import decided_before
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import without_cudnn_if_padded, wrap
from sftmix.training.scoring import Scorer
from sftmix.training.step import prepare_step, train_step
from sftmix.words.errors import Stopped
from tests.forked import _forked, _work, on_ranks
from tests.toy import Interrupt, metrics_of, toy_model, toy_rows, toy_setup, toy_stage
from tests.training.loop_claims import BATCHES, DATA, SEED
from tests.training.test_step import DATA as DATA_OF_STEP
from tests.training.test_step import STEP, Exact
from tests.training.test_step import UNITS as UNITS_OF_STEP

UNLIKE, ALIKE = [(2, 3), (4, 5)], [(2, 3), (1, 4)]
AUTO: dict[str, Any] = {"micro_batch_size": None, "micro_batch_tokens": "auto"}


def fits(monkeypatch, tokens: Callable[[], int]) -> None:
    def planned(work, *_, **about):
        return replace(work.options, micro_batch_tokens=tokens(), activation_checkpointing=False), "as a test has it"

    monkeypatch.setattr(choices, "planned", planned)


# ------------------------------------------------------------------------------------------- the number


def test_it_is_decided_once_and_the_same_when_the_run_goes_on(tmp_path, monkeypatch, capsys):
    asked = iter([26, 99])
    fits(monkeypatch, lambda: next(asked))
    for callbacks in ([Interrupt(step=1)], []):
        stage = toy_stage(tmp_path, BATCHES, data=DATA, seed=SEED, options=AUTO, callbacks=callbacks)
        if callbacks:
            with pytest.raises(Stopped):
                train(stage, World())
    (machine,) = train(stage, World()).figures["machines"]
    assert machine["micro_batch_tokens"] == 26
    assert capsys.readouterr().out.count("train: training.micro_batch_tokens auto is 26\n") == 1
    by_hand = toy_stage(tmp_path / "26", BATCHES, data=DATA, seed=SEED, options={**AUTO, "micro_batch_tokens": 26})
    train(by_hand, World())
    assert [one["loss"] for one in metrics_of(stage.directory)] == [
        one["loss"] for one in metrics_of(by_hand.directory)
    ]


MACHINE = {"torch": "2", "device": "a", "ranks": 2, "compile": False, "activation_checkpointing": False}
RECORDED = [{**MACHINE, "after": 0, "micro_batch_tokens": 7}, {**MACHINE, "after": 4, "micro_batch_tokens": 9}]


@pytest.mark.parametrize(
    ("recorded", "here", "tokens"),
    [(RECORDED, {}, 9), ([], {}, None), (RECORDED, {"device": "b"}, None), (RECORDED, {"ranks": 4}, None)],
)
def test_another_machine_decides_anew(recorded, here, tokens):
    machine = {**MACHINE, "micro_batch_tokens": "auto", **here}
    assert decided_before(recorded, machine).get("micro_batch_tokens") == tokens


@pytest.mark.parametrize(
    ("lengths", "options", "most"),
    [(UNLIKE, {}, 12), (ALIKE, {}, 2 * 5), (UNLIKE, {"padding_free": True}, 2 * 9)],
    ids=["padded", "of one length", "padding-free"],
)
def test_it_is_no_larger_than_a_global_batch_needs(tmp_path, monkeypatch, lengths, options, most):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e15)
    monkeypatch.setattr(planning, "PADDED_TOKENS", 12)
    data = toy_rows(lengths)
    stage = toy_stage(tmp_path, [[(Slot(0),), (Slot(1),)]], data=data, options=AUTO | options)
    (machine,) = train(stage, World()).figures["machines"]
    assert machine["micro_batch_tokens"] == most


def check_ranks(world: World, directory: str) -> None:
    """The last rank has least memory; the first one could have all of its part of a step in a micro-batch."""
    options = AUTO | {"parallel": "fsdp"}  # no buckets of DDP hold gradients
    done = TrainingLoop(toy_stage(Path(directory), BATCHES, data=DATA, options=options), world)
    found = Footprint(workload_of(done.setup))
    layout = StepLayout(True, False, reshard_after_forward=True, reduce_each_micro_batch=False)
    taken = [found.optimizer + sum(found.peak(slots, layout)) for slots in (99, 33)]
    memory.free_memory = lambda device: world.size * (taken[world.rank] / planning.USABLE + 1)  # type: ignore[assignment]
    done.run()
    assert done.stage.options.micro_batch_tokens == done.setup.stage.options.micro_batch_tokens == 33


@pytest.mark.long
@pytest.mark.slow
def test_all_ranks_take_the_least_of_theirs(tmp_path):
    on_ranks(check_ranks, str(tmp_path))


def fail_on_one(world: World, directory: str) -> None:
    def out_of_memory(work):
        raise torch.OutOfMemoryError("of this rank")

    if world.rank:
        choices.Footprint = out_of_memory
    train(toy_stage(Path(directory), BATCHES, data=DATA, options=AUTO), world)


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_that_fails_to_measure_ends_all(tmp_path):
    """The others do not wait for its number."""
    processes = _forked(_work, [(__name__, "fail_on_one", (str(tmp_path),))] * 2, world=True)
    for process in processes:
        process.join(100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes
    assert 0 not in codes


# ------------------------------------------------------------------------------- the same results whatever it is


WAYS: list[dict[str, Any]] = [
    *({"micro_batch_size": size} for size in (2, 4, 32)),
    *({"micro_batch_tokens": tokens, "padding_free": tokens != 30} for tokens in (1, 30, 10**6)),
]


def pairs_and_lambdas(setup, ranks: int) -> set[tuple]:
    """The ids of each example and pair of the step on all ranks, with lambdas."""
    found = set()
    for rank in range(ranks):
        setup.world = World(rank=rank, size=ranks)
        prepared = prepare_step(setup, STEP, UNITS_OF_STEP, None)
        for batch, plan in zip(prepared.batches, prepared.plans, strict=True):
            found |= {(i, float(weight)) for i, weight in zip(batch.ids, batch.ntp_weight, strict=True) if weight}
            drawn = zip(batch.pair_index.tolist(), plan.lam.tolist(), strict=True)
            found |= {(*(batch.ids[slot] for slot in batch.slot_pairs[pair].tolist()), lam) for pair, lam in drawn}
    return found


def stepped(world: World, **options) -> tuple[set[tuple], list[float], dict[str, torch.Tensor]]:
    """Ids and lambdas, losses and norm, and the weights after a step of SGD, in float64."""
    model = toy_model()
    module = wrap(TrainingModule(model), parallel="ddp" if world.size > 1 else "none", precision="fp32", world=world)
    given = TrainingOptions(**{"learning_rate": 0.5, "warmup_ratio": 0.0, "max_grad_norm": 0.1} | options)
    getattr(module, "module", module).padding_free = given.padding_free is True
    about = {"data": DATA_OF_STEP, "objective": Exact(objective=SFTMix(mu=0.75), seen={}), "options": given}
    setup = toy_setup(module, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), **about)
    known = pairs_and_lambdas(setup, world.size)
    setup.world = world
    done = train_step(setup, prepare_step(setup, STEP, UNITS_OF_STEP, None))
    numbers = [done.loss, done.ntp, done.mixup, done.grad_norm, done.counts.ntp, done.counts.mixup]
    return known, numbers, {name: p.detach() for name, p in model.named_parameters()}


def check_ways(world: World) -> None:
    """Float64 keeps 16 digits; a sum of some thousand terms of unlike sign loses three or four of them."""
    known, numbers, weights = stepped(World(), micro_batch_size=32, length_groups=1)
    moved = stepped(World(), learning_rate=0.0, micro_batch_size=32)[2]
    assert max(float((weights[name] - moved[name]).abs().max()) for name in weights) > 1e-3
    for way in WAYS:
        found, others, after = stepped(world, **way)
        assert found == known
        assert others == pytest.approx(numbers, rel=1e-12)
        for name, expected in weights.items():
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-12)


def test_no_size_changes_ids_lambdas_losses_norm_or_weights():
    check_ways(World())


@pytest.mark.long
@pytest.mark.slow
def test_nor_does_it_on_two_ranks():
    on_ranks(check_ways)


# -------------------------------------------------------------------------------------------- cuDNN's attention


class Kernels(Callback):
    """Notes whether cuDNN's attention is allowed."""

    gives = frozenset()

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step_end(self, state):
        self.seen.append(torch.backends.cuda.cudnn_sdp_enabled())


@pytest.fixture(params=[True, False], ids=["on", "off"])
def allowed(request):
    """What a user has set, and finds again."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    assert torch.backends.cuda.cudnn_sdp_enabled() is request.param
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("rows", "padding_free", "shapes_repeat"),
    [(UNLIKE, False, False), (ALIKE, False, True), (UNLIKE, True, True)],
    ids=["padded", "of one length", "padding-free"],
)
def test_cudnn_plans_for_no_padded_shapes(tmp_path, allowed, rows, padding_free, shapes_repeat):
    kernels, data, options = Kernels(), toy_rows(rows), {"padding_free": padding_free}
    units = [(Slot(0),), (Slot(1),)]
    train(toy_stage(tmp_path, [units] * 2, data=data, options=options, callbacks=[kernels]), World())
    assert kernels.seen == [allowed and shapes_repeat] * 2
    module, seen = TrainingModule(toy_model()), []
    module.padding_free = padding_free

    def measure(target, batch):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return [batch.rows]

    Scorer(world=World()).columns(module, data, measure)
    assert seen == [allowed and shapes_repeat]
    with pytest.raises(RuntimeError), without_cudnn_if_padded(module, np.array([1, 2])):
        raise RuntimeError


class Watched(EmbeddingMixup):
    """Notes whether cuDNN is allowed when the model is run, in its own passes and in that of the batch."""

    def loss(self, view, batch, plan):
        layer = view._model.get_decoder().h[0]
        with layer.register_forward_hook(lambda *_: WATCHED.append(torch.backends.cuda.cudnn_sdp_enabled())):
            return super().loss(view, batch, plan)


WATCHED: list[bool] = []


def test_cudnn_is_left_out_of_passes_of_an_objective(tmp_path, allowed):
    """Those of mixtures are padded, though the examples of the batch share a row."""
    WATCHED.clear()
    data, options = toy_rows(UNLIKE), {"padding_free": True}
    train(toy_stage(tmp_path, [[(Slot(0), Slot(1))]], data=data, options=options, objective=Watched(mu=0.5)), World())
    assert {*WATCHED} == {False, allowed}
    assert torch.backends.cuda.cudnn_sdp_enabled() is allowed


# ----------------------------------------------------------------------------------------------- what fits
