"""The loop over several steps, layouts and ranks: each step is the formula of its global batch, what is counted adds up
over steps, ranks and resumes, and no dropout mask comes twice."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from sftmix.batches.order import Slot, Unit
from sftmix.common.errors import Stopped
from sftmix.common.rng import generator
from sftmix.common.tables import read_dynamics
from sftmix.common.world import World
from sftmix.components import AdamW, SFTMix
from sftmix.components.base import Callback, CallbackResult
from sftmix.training.dynamics import OnlineLosses
from sftmix.training.loop import StageResult, train
from sftmix.training.signals import StopAtOnce
from tests.distributed.test_sharding import Collectives
from tests.forked import on_ranks
from tests.toy import logged, toy_model, toy_rows, toy_stage
from tests.training.test_step import Exact, naive

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 4), (6, 2)])
# A repeat in the first epoch, which mixes without NTP; at its end, a batch that leaves a rank of two without work.
BATCHES: list[list[Unit]] = [
    [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(2, 0.0)), (Slot(5),)],
    [(Slot(6), Slot(7))],
    [(Slot(8),)],
]
MU, ALPHA, SEED = 0.75, 0.5, 11
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


def drawn(step: int) -> dict[tuple[str, str], list[float]]:
    """Lambdas of the pairs of a step, as their legend says: float32, keyed by seed, step and the two ids."""
    found = {}
    for a, b in ((u[0].row, u[1].row) for u in BATCHES[step] if len(u) == 2):
        ids = (DATA[a].id, DATA[b].id)
        lam = float(np.float32(generator(SEED, "lambda", step, *ids).beta(ALPHA, ALPHA)))
        found[ids] = [lam] * 99
    return found


class Interrupt(Callback):
    """Sends the last rank a signal at a step, or at the end of the stage, the first time."""

    def __init__(self, world: World, *, step: int | None) -> None:
        self.left, self.step = world.rank == world.size - 1, step

    def on_step_end(self, state):
        if self.left and state.step == self.step:
            self.left = False
            os.kill(os.getpid(), signal.SIGTERM)

    def on_stage_end(self, state):
        self.step = state.step if self.step is None else -1
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


def check_steps(world: World, directory: str, interrupt: int | None = None, **options) -> None:
    """Gradients and metrics of all steps, their sums, and the online losses, by formulas on one example at a time."""
    place, optimizer = Path(directory), Recording()
    with Collectives() as collectives:
        done = train_all(place, world, optimizer, interrupt, **options)
    if options.get("parallel") == "ddp":  # gradients are summed once a step, and all else is small
        sizes = [(int(key.split()[1]), n) for key, n in collectives.count.items() if key.startswith("all_reduce")]
        assert sum(size * n for size, n in sizes if size > 6) == 3 * sum(p.numel() for p in toy_model().parameters())
    nll = {row: naive(toy_model(), DATA, [(Slot(row),)], {}, mu=0, mixup_mean="own")[0] for row in range(len(DATA))}
    sums = dict.fromkeys(("tokens", "ntp_tokens", "mixup_tokens"), 0)
    for step, units in enumerate(BATCHES):
        loss, expected = naive(toy_model(), DATA, units, drawn(step), mu=MU, mixup_mean="own")
        for name, gradient in expected.items():
            torch.testing.assert_close(optimizer.taken[step][name], gradient, rtol=0, atol=1e-10)
        slots = [slot for unit in units for slot in unit]
        trained = {slot.row: int(DATA[slot.row].target.sum()) for slot in slots if slot.ntp_weight}
        mixed = sum(min(int(DATA[s.row].target.sum()) for s in unit) for unit in units if len(unit) == 2)
        mean = sum(nll[row] * n for row, n in trained.items()) / sum(trained.values())
        norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
        if not world.is_main:
            continue
        line = logged(place)[step]
        counts = {"ntp_tokens": sum(trained.values()), "mixup_tokens": mixed}
        counts["tokens"] = sum(len(DATA[slot.row].input_ids) for slot in slots)
        assert {k: line[k] for k in ("step", "epoch", *counts)} == {"step": step + 1, "epoch": 0, **counts}
        found = [line[k] for k in ("loss", "ntp", "mixup", "mu_effective", "grad_norm")]
        per_mixed = MU * counts["ntp_tokens"] / mixed if mixed else 0
        of_mixup = (loss - mean) / MU if mixed else 0
        assert found == pytest.approx([loss, mean, of_mixup, per_mixed, norm], rel=1e-6, abs=1e-12)
        sums = {k: n + counts[k] for k, n in sums.items()}
    if world.is_main:
        assert {k: done.figures[k] for k in sums} == sums
        mixing = [m for m in logged(place) if m["mixup_tokens"]]
        both = [sum(m[k] for m in mixing) for k in ("ntp_tokens", "mixup_tokens")]
        assert done.figures["mu_effective"] == pytest.approx(MU * both[0] / both[1], rel=1e-12)
        assert len(logged(place)) == 3
        kept = read_dynamics(place / "online" / "epoch-000.parquet").of(DATA.ids)
        n_tokens = [int(example.target.sum()) for example in DATA]
        assert kept.n_tokens.tolist() == n_tokens
        np.testing.assert_allclose(kept.nll_sum[:, 0], [nll[row] * n for row, n in enumerate(n_tokens)], rtol=1e-9)


@pytest.mark.parametrize("interrupt", [None, 2])
def test_each_step_is_the_formula_and_what_is_counted_adds_up(tmp_path, interrupt):
    """Also where a signal parts the epoch."""
    check_steps(World(), str(tmp_path), interrupt)


def test_a_signal_after_the_last_step_saves_what_was_trained(tmp_path):
    callback, optimizer = Interrupt(World(), step=None), Recording()
    for stopped in (True, False):
        stage = toy_stage(tmp_path, BATCHES, data=DATA, seed=SEED, callbacks=[callback], optimizer=optimizer)
        with pytest.raises(Stopped, match="after step 3;") if stopped else contextlib.nullcontext():
            train(stage, World())
    assert len(optimizer.taken) == 3  # in the first attempt


def test_a_signal_handler_gives_way_to_the_one_before_it():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), StopAtOnce():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with StopAtOnce() as stop:
        stop.check(World())  # nothing has arrived


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
        check_steps(world, f"{directory}/{parallel}", interrupt, parallel=parallel)
        for layout in LAYOUTS:
            check_steps(world, f"{directory}/{parallel}-{len(layout)}", parallel=parallel, **layout)


@pytest.mark.slow
def test_on_two_ranks_too_one_of_which_is_without_work(tmp_path):
    """The signal comes to one of them only; the ranks have unlike dropout masks."""
    on_ranks(check_two, str(tmp_path))


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
    with StopAtOnce():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="after step 0;"):
            train(stage, World())


class Swallows(Callback):
    """Is interrupted by Ctrl-C where nothing comes of it."""

    def on_step_end(self, state):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


class Destroys(Callback):
    """Is interrupted in a destructor, whose errors Python prints and forgets: pytest would turn them into failures."""

    def on_step_end(self, state):
        Interrupted()


@pytest.fixture
def _in_the_foreground():
    """A shell's background job ignores Ctrl-C, and its tests would."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_in_the_foreground")
@pytest.mark.parametrize("callback", [Swallows, Destroys])
def test_the_loop_ends_for_a_ctrl_c_that_was_swallowed(tmp_path, callback):
    optimizer = Recording()
    stage = toy_stage(tmp_path, BATCHES, data=DATA, seed=SEED, callbacks=[callback()], optimizer=optimizer)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(stage, World())
    assert len(optimizer.taken) == 1
    assert signal.getsignal(signal.SIGINT) is before
