"""The loop over several steps, layouts and ranks: each step is the formula of its global batch, what is counted adds up
over steps, ranks and resumes, and no dropout mask comes twice."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from sftmix.batches.order import Slot, Unit
from sftmix.components import AdamW, SFTMix
from sftmix.components.base import Callback, CallbackResult
from sftmix.pipeline.context import RunContext
from sftmix.ranks.world import World
from sftmix.training.dynamics import OnlineLosses
from sftmix.training.loop import StageResult, train
from sftmix.training.signals import StopSignal
from sftmix.words.errors import Stopped
from tests.distributed.test_sharding import Collectives
from tests.forked import on_ranks
from tests.toy import metrics_of, toy_model, toy_rows, toy_stage
from tests.training.loop_claims import (
    BATCHES,
    CLAIMS_OF_FILES,
    DATA,
    MU,
    SEED,
    Trained,
    ddp_sums_the_gradients_once_a_step,
    gradients_are_those_of_the_formula,
)
from tests.training.test_step import Exact

LAYOUTS: list[dict[str, Any]] = [
    {"micro_batch_size": None, "micro_batch_tokens": 26, "length_groups": 4},  # ranks with idle segments
    {"micro_batch_size": None, "micro_batch_tokens": 26, "length_groups": None, "padding_free": True},
]


class Recording(AdamW):
    """AdamW that keeps the gradients of each of its steps, whole."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[dict[str, torch.Tensor]] = []

    def build(self, parameters, *, training):
        optimizer = super().build(parameters, training=training)

        def take(*_):
            grads = {name: p.grad for name, p in parameters.items()}
            whole = {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in grads.items()}
            if any(g.any() for g in whole.values()):  # to load its state, torch steps a new optimizer on zeros
                self.taken.append({k: g.clone() for k, g in whole.items()})

        optimizer.register_step_pre_hook(take)
        return optimizer


# ----------------------------------------------------------------------------------------------- steps


class Interrupt(Callback):
    """Sends the last rank a signal at a step, or at the end of the stage, the first time."""

    def __init__(self, world: World, *, step: int | None) -> None:
        self.left, self.at = world.rank == world.size - 1, step

    def on_step_end(self, state):
        if self.left and state.step == self.at:
            self.left = False
            os.kill(os.getpid(), signal.SIGTERM)

    def on_stage_end(self, state):
        self.at = state.step if self.at is None else -1
        self.on_step_end(state)


def train_all(place: Path, world: World, optimizer: Recording, interrupt: int | None, **options) -> StageResult:
    """Train on BATCHES; where a step is given at whose end the last rank is told to stop, on from there."""
    callbacks = [] if interrupt is None else [Interrupt(world, step=interrupt)]

    def again() -> StageResult:
        online = OnlineLosses(DATA.ids, place / "online", world)
        objective = Exact(objective=SFTMix(mu=MU), seen={})
        more = {"objective": objective, "optimizer": optimizer, "online": online, "callbacks": callbacks}
        return train(toy_stage(place, BATCHES, data=DATA, seed=SEED, options=options, **more), world)

    if interrupt is not None:
        with pytest.raises(Stopped, match=f"stopped by a signal after step {interrupt};"):
            again()
        assert len(optimizer.taken) == interrupt
    return again()


def trained_on_batches(world: World, directory: Path, interrupt: int | None = None, **options) -> Trained:
    optimizer = Recording()
    with Collectives() as collectives:
        done = train_all(directory, world, optimizer, interrupt, **options)
    return Trained(directory, optimizer.taken, done.figures, collectives.count)


@pytest.fixture(scope="module", params=[None, 2], ids=["at once", "parted by a signal"])
def trained(request, tmp_path_factory) -> Trained:
    return trained_on_batches(World(), tmp_path_factory.mktemp("trained"), request.param)


@pytest.mark.parametrize("claim", [gradients_are_those_of_the_formula, *CLAIMS_OF_FILES], ids=lambda f: f.__name__)
def test_each_step_is_the_formula_and_what_is_counted_adds_up(trained, claim):
    claim(trained)


def check_claims(world: World, directory: str, interrupt: int | None = None, **options) -> None:
    """The same claims on a rank among others."""
    trained = trained_on_batches(world, Path(directory), interrupt, **options)
    gradients_are_those_of_the_formula(trained)
    if options["parallel"] == "ddp":
        ddp_sums_the_gradients_once_a_step(trained, starts=1 if interrupt is None else 2)
    for claim in CLAIMS_OF_FILES if world.is_main else []:
        claim(trained)


def test_a_signal_after_the_last_step_saves_what_was_trained(tmp_path):
    callback, optimizer = Interrupt(World(), step=None), Recording()
    for stopped in (True, False):
        stage = toy_stage(tmp_path, BATCHES, data=DATA, seed=SEED, callbacks=[callback], optimizer=optimizer)
        with pytest.raises(Stopped, match="after step 3;") if stopped else contextlib.nullcontext():
            train(stage, World())
    assert len(optimizer.taken) == 3  # in the first attempt


def test_a_signal_handler_gives_way_to_the_one_before_it():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), StopSignal("at_once"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with StopSignal("at_once") as stop:
        stop.check(World())  # nothing has arrived


def test_a_process_has_one_handler_and_the_innermost_work_decides():
    with StopSignal("at_once") as outer:
        handler = signal.getsignal(signal.SIGTERM)
        with contextlib.suppress(KeyError), StopSignal("at_step") as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.received
            raise KeyError("what came of the signal")
        assert not outer.received
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        assert outer.received
    with StopSignal("at_step") as later:
        assert not later.received  # the outermost work is over


class OnOneRank(Callback):
    """Stops the last rank alone after a step, as a clock may; step 0 is before the first."""

    def __init__(self, world: World, step: int) -> None:
        self.world, self.step = world, step

    def on_stage_start(self, state):
        return self.on_step_end(state)

    def on_step_end(self, state):
        return CallbackResult(stop=state.step == self.step and self.world.rank == self.world.size - 1)


def check_stop(world: World, directory: str) -> None:
    for step in (0, 2):
        callbacks = [OnOneRank(world, step)]
        stage = toy_stage(Path(directory, str(step)), BATCHES, data=DATA, seed=SEED, callbacks=callbacks)
        figures = train(stage, world).figures
        assert (figures["steps"], figures["stopped_by"]) == (step, "OnOneRank")


def test_a_callback_stops_the_training(tmp_path):
    check_stop(World(), str(tmp_path))


def check_two(world: World, directory: str) -> None:
    check_stop(world, f"{directory}/stop")
    assert world.sum([2.0**40 + world.rank, 0.0]) == [2.0**41 + 1, 0.0]  # a float32 ends at 2^24
    check_masks(world, directory)
    for parallel, interrupt in (("ddp", 2), ("fsdp", None)):
        check_claims(world, f"{directory}/{parallel}", interrupt, parallel=parallel)
        for layout in LAYOUTS:
            check_claims(world, f"{directory}/{parallel}-{len(layout)}", parallel=parallel, **layout)


@pytest.mark.slow
def test_on_two_ranks_too_one_of_which_is_without_work(tmp_path):
    """The signal comes to one of them only; the ranks have unlike dropout masks."""
    on_ranks(check_two, str(tmp_path))


def check_bits(world: World, directory: str) -> None:
    """Steps of which each rank has a part, at once and parted by a signal after the first."""
    batches: list[list[Unit]] = [[(Slot(row),) for row in range(6)]] * 3
    found = []
    for place, callbacks in (("whole", []), ("parted", [Interrupt(world, step=1)])):
        about = {"data": DATA, "options": {"parallel": "ddp"}, "callbacks": callbacks, "optimizer": Recording()}
        for _ in range(1 + len(callbacks)):
            with contextlib.suppress(Stopped):
                train(toy_stage(Path(directory, place), batches, **about), world)
        found.append(about["optimizer"].taken)
    whole, parted = found
    assert len(whole) == len(parted) == 3
    for one, other in zip(whole, parted, strict=True):
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_three_ranks_go_on_with_the_same_bits(tmp_path):
    """A sum of three depends on where it begins, which a ring decides by the gradient's place in its bucket."""
    on_ranks(check_bits, str(tmp_path), ranks=3)


# --------------------------------------------------------------------------------------------- dropout


def masks(world: World, directory: Path, seed: int) -> list[list[list[bool]]]:
    """What dropout leaves of the embeddings in each of three steps, rank by rank; all on examples of one length."""
    model, data = toy_model(dropout=0.5), toy_rows([(3, 5), (3, 5)])
    found: list[list[bool]] = []
    model.transformer.drop.register_forward_hook(
        lambda m, args, out: found.append((out != 0).flatten().tolist()) if m.training else None
    )
    batches: list[list[Unit]] = [[(Slot(row),) for row in range(world.size)]] * 3
    train(toy_stage(directory, batches, model=model, data=data, seed=seed), world)
    assert len(found) == 3
    return world.gather(found)


def check_masks(world: World, directory: str) -> None:
    found = [masks(world, Path(directory) / f"masks-{seed}", seed) for seed in (SEED, SEED + 1)]
    every = [tuple(mask) for ranks in found for steps in ranks for mask in steps]
    assert len(set(every)) == len(every) == 2 * 3 * world.size


def test_every_step_and_seed_has_a_dropout_mask_of_its_own(tmp_path):
    check_masks(World(), str(tmp_path))


def test_the_loop_stops_for_a_signal_that_was_swallowed_before_it(tmp_path):
    stage = toy_stage(tmp_path, BATCHES, data=DATA, seed=SEED)
    with StopSignal("at_once"):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="after step 0;"):
            train(stage, World())


class LateSignal(World):
    """Sends a signal while a rank waits for the others, in the last look of a stage."""

    def max(self, value):
        if AT_END:
            os.kill(os.getpid(), AT_END.pop())
        return super().max(value)


class Ends(Callback):
    gives = frozenset()

    def on_stage_end(self, state):
        AT_END.append(signal.SIGTERM)


AT_END: list[signal.Signals] = []


def test_a_signal_after_the_last_look_of_the_loop_ends_the_run_before_it_measures(tmp_path):
    stage = toy_stage(tmp_path, BATCHES, data=DATA, seed=SEED, callbacks=[Ends()])
    with StopSignal("at_once") as stop:
        run = RunContext(None, LateSignal(), None, stop, None)  # type: ignore[arg-type]
        with pytest.raises(Stopped, match="what was finished is kept"):
            run.train(stage)
    assert AT_END == []
    assert len(metrics_of(tmp_path)) == 3
