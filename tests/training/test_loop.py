"""The loop over several steps and ranks: each step is the formula of its global batch, what is counted adds up over
steps, ranks and resumes, no dropout mask comes twice, and steps that are not finite are skipped, but not for ever."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from sftmix.components import NTP, AdamW, SFTMix
from sftmix.components.base import Callback, CallbackResult, Perturbation
from sftmix.data.batching import Slot, Unit
from sftmix.errors import NonFiniteError, Stopped
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.rng import generator
from sftmix.store import read_dynamics
from sftmix.testing import RowsInMemory
from sftmix.training.distributed import World
from sftmix.training.loop import StageResult, train
from sftmix.training.online import OnlineLosses
from sftmix.training.order import TrainingOrder
from sftmix.training.stage import Stage
from sftmix.types import Split
from tests.distributed.test_sharding import Collectives
from tests.toy import FixedOrder, on_ranks, toy_model, toy_rows
from tests.training.test_step import naive

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 4), (6, 2)])
# A repeat in the first epoch, which mixes without NTP; at its end, a batch that leaves a rank of two without work.
BATCHES: list[list[Unit]] = [
    [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(2, 0.0)), (Slot(5),)],
    [(Slot(6), Slot(7))],
    [(Slot(8),)],
]
MU, ALPHA, SEED = 0.75, 0.5, 11


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


def stage(directory: Path, batches: Sequence[list[Unit]], *, parallel: str = "auto", **more) -> Stage:
    """Of a learning rate so small that the weights stay as they are to the last but few bits."""
    options = {"learning_rate": 1e-14, "weight_decay": 0.0, "warmup_ratio": 0.0, "max_grad_norm": 0.0}
    options |= {"schedule": "constant", "micro_batch_size": 2, "parallel": parallel, **more.pop("options", {})}
    given = {"name": "train", "model": toy_model(), "data": DATA, "order": FixedOrder(list(batches)), "seed": SEED}
    given |= {"objective": NTP(), "checkpoint": CheckpointOptions(every=0), "directory": directory}
    return Stage(options=TrainingOptions(**options), **given | more)


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


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
    """Sends one rank a signal at a step, the first time."""

    def __init__(self, *, rank: int, world: World, step: int) -> None:
        self.left = int(rank == world.rank)
        self.step = step

    def on_step_end(self, state):
        if state.step == self.step and self.left:
            self.left = 0
            os.kill(os.getpid(), signal.SIGTERM)


def train_all(place: Path, world: World, parallel: str, optimizer: Recording, interrupt: int | None) -> StageResult:
    """Train on BATCHES; where a step is given at whose end the last rank is told to stop, on from there."""
    callbacks = [] if interrupt is None else [Interrupt(rank=world.size - 1, world=world, step=interrupt)]

    def again() -> StageResult:
        online = OnlineLosses(DATA.ids, place / "online", world)
        more = {"objective": SFTMix(mu=MU), "optimizer": optimizer, "online": online, "callbacks": callbacks}
        return train(stage(place, BATCHES, parallel=parallel, **more), world)

    if interrupt is not None:
        with pytest.raises(Stopped, match=f"step-0000000{interrupt} is saved"):
            again()
        assert len(optimizer.taken) == interrupt
    return again()


def check_steps(world: World, directory: str, parallel: str, interrupt: int | None = None) -> None:
    """Gradients and metrics of all steps, their sums, and the online losses, by formulas on one example at a time."""
    place, optimizer = Path(directory), Recording()
    with Collectives() as collectives:
        done = train_all(place, world, parallel, optimizer, interrupt)
    if parallel == "ddp":  # gradients are summed once a step, however many micro-batches; all else is small
        sizes = [(int(key.split()[1]), n) for key, n in collectives.count.items() if key.startswith("all_reduce")]
        assert sum(size * n for size, n in sizes if size > 5) == 3 * sum(p.numel() for p in toy_model().parameters())
    nll = {row: naive(toy_model(), DATA, [(Slot(row),)], {}, mu=0, mixup_mean="own")[0] for row in range(len(DATA))}
    sums = dict.fromkeys(("tokens", "ntp_tokens", "mixup_tokens"), 0)
    for step, units in enumerate(BATCHES):
        loss, expected = naive(toy_model(), DATA, units, drawn(step), mu=MU, mixup_mean="own")
        for name, gradient in expected.items():
            torch.testing.assert_close(optimizer.taken[step][name], gradient, rtol=1e-5, atol=1e-6)
        slots = [slot for unit in units for slot in unit]
        trained = {slot.row: int(DATA[slot.row].target.sum()) for slot in slots if slot.ntp_weight}
        mixed = sum(min(int(DATA[s.row].target.sum()) for s in unit) for unit in units if len(unit) == 2)
        mean = sum(nll[row] * n for row, n in trained.items()) / sum(trained.values())
        norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
        if not world.is_main:
            continue
        line = lines(place)[step]
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
        mixing = [m for m in lines(place) if m["mixup_tokens"]]
        both = [sum(m[k] for m in mixing) for k in ("ntp_tokens", "mixup_tokens")]
        assert done.figures["mu_effective"] == pytest.approx(MU * both[0] / both[1], rel=1e-12)
        assert len(lines(place)) == 3
        kept = read_dynamics(place / "online" / "epoch-000.parquet").of(DATA.ids)
        n_tokens = [int(example.target.sum()) for example in DATA]
        assert kept.n_tokens.tolist() == n_tokens
        np.testing.assert_allclose(kept.nll_sum[:, 0], [nll[row] * n for row, n in enumerate(n_tokens)], rtol=1e-9)


@pytest.mark.parametrize("interrupt", [None, 2])
def test_each_step_is_the_formula_and_what_is_counted_adds_up(tmp_path, interrupt):
    """Also where a signal parts the epoch."""
    check_steps(World(), str(tmp_path), "auto", interrupt)


def check_two(world: World, directory: str) -> None:
    assert world.sum([2.0**52 + world.rank, 0.0]) == [2.0**53 + 1, 0.0]  # a float32 ends at 2^24
    check_masks(world, directory)
    for parallel, interrupt in (("ddp", 2), ("fsdp", None)):
        check_steps(world, f"{directory}/{parallel}", parallel, interrupt)


def test_on_two_ranks_too_one_of_which_is_without_work(tmp_path):
    """The signal comes to one of them only; the ranks have unlike dropout masks."""
    on_ranks(check_two, str(tmp_path))


# ---------------------------------------------------------------------------------------------- epochs


class Groups(NTP):
    """Keeps the groups that it is shown, step by step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[int, int]] = {}

    def plan(self, batch, *, step, total_steps, seed):
        groups = zip(batch.rows.tolist(), batch.group.tolist(), strict=True)
        self.seen.setdefault(step, {}).update(groups)
        return super().plan(batch, step=step, total_steps=total_steps, seed=seed)


class Calls(Callback):
    """Keeps when it is called, with how many steps and epochs done."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.epochs: list[tuple[int, int]] = []

    def on_stage_start(self, state):
        return CallbackResult({"at_start": 1.0})

    def on_step_end(self, state):
        self.steps.append((state.step, state.epoch))

    def on_epoch_end(self, state):
        self.epochs.append((state.step, state.epoch))
        return CallbackResult({"at_epoch": float(state.epoch)})


def test_what_belongs_to_an_epoch_changes_at_its_end(tmp_path):
    """Three epochs of two steps, the last cut short: groups, the log, callbacks and online losses agree."""
    objective, calls = Groups(), Calls()
    order = TrainingOrder(7, lambda epoch: None, options=TrainingOptions(global_batch_size=4, max_steps=5), seed=1)
    data = RowsInMemory(list(DATA)[:7])
    online = OnlineLosses(data.ids, tmp_path / "online", World())
    groups = [np.roll([0, 1, 1, 0, -1, 0, 1], epoch).astype(np.int8) for epoch in range(3)]
    more = {"objective": objective, "callbacks": [calls], "data": data, "online": online, "order": order}
    train(stage(tmp_path, [], split_of=lambda epoch: Split(groups[epoch], ("a", "b")), **more), World())
    epochs = [0, 0, 1, 1, 2]
    for step, epoch in enumerate(epochs):
        rows = [unit[0].row for unit in order.batch(step)]
        assert objective.seen[step] == {row: groups[epoch][row] for row in rows}
    logged = lines(tmp_path)
    assert [m["epoch"] for m in logged] == epochs
    assert [m.get("at_start") for m in logged] == [1.0, None, None, None, None]
    assert [m.get("at_epoch") for m in logged] == [None, 1.0, None, 2.0, 3.0]
    assert calls.steps == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 3)]
    assert calls.epochs == [(2, 1), (4, 2), (5, 3)]
    assert online.epochs() == [0, 1]  # not every example had its turn in the third
    for epoch in (0, 1):
        kept = online.read(epoch)
        assert kept.steps.tolist() == [2 * epoch + 2]
        assert kept.n_tokens.tolist() == [int(example.target.sum()) for example in data]


class StopAfter(Callback):
    """Asks to stop after a step."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_step_end(self, state):
        return CallbackResult(stop=state.step == self.step)


def test_a_stage_that_was_stopped_stays_stopped(tmp_path):
    """Also for a process that finds only its checkpoint, which no callback of its own stops."""
    kept, batches = CheckpointOptions(every=5), [[(Slot(row),)] for row in range(4)]
    first = train(stage(tmp_path, batches, checkpoint=kept, callbacks=[StopAfter(step=2)]), World())
    again = train(stage(tmp_path, batches, checkpoint=kept), World())
    assert [done.figures["steps"] for done in (first, again)] == [2, 2]
    assert [m["step"] for m in lines(tmp_path)] == [1, 2]


# --------------------------------------------------------------------------------------------- dropout


def masks(world: World, directory: Path, seed: int = SEED) -> list[list[list[bool]]]:
    """What dropout leaves of the embeddings in each of three steps, rank by rank; all on examples of one length."""
    model, data = toy_model(dropout=0.5), toy_rows([(3, 5), (3, 5)])
    found: list[list[bool]] = []
    model.transformer.drop.register_forward_hook(lambda m, args, out: found.append((out != 0).flatten().tolist()))
    batches: list[list[Unit]] = [[(Slot(row),) for row in range(world.size)]] * 3
    train(stage(directory, batches, model=model, data=data, seed=seed), world)
    assert len(found) == 3
    return world.gather(found)


def check_masks(world: World, directory: str) -> None:
    first, again, other = (
        masks(world, Path(directory) / f"masks-{k}", s) for k, s in enumerate((SEED, SEED, SEED + 1))
    )
    assert first == again
    every = [tuple(mask) for ranks in (first, other) for steps in ranks for mask in steps]
    assert len(set(every)) == len(every) == 2 * 3 * world.size


def test_every_step_and_seed_has_a_dropout_mask_of_its_own(tmp_path):
    check_masks(World(), str(tmp_path))


# -------------------------------------------------------------------------------- steps that are not finite


class Broken(Perturbation):
    """Not a number in some steps (from 0)."""

    def __init__(self, *, steps: list[int]) -> None:
        self.steps = steps

    def embeddings(self, e, mask, *, ids, step, seed):
        return e * float("nan") if step in self.steps else e


def broken(directory: Path, bad: list[int], *, steps: int, **more) -> StageResult:
    """Steps of a learning rate that moves the weights, saved one by one."""
    return train(
        stage(
            directory,
            [[(Slot(0),), (Slot(1),)]] * steps,
            perturbation=Broken(steps=bad),
            checkpoint=CheckpointOptions(every=1, keep=9),
            options={"learning_rate": 0.01},
            **more,
        ),
        World(),
    )


def test_three_steps_in_a_row_may_be_skipped_and_change_nothing(tmp_path, capsys):
    done = broken(tmp_path / "a", [1, 2, 3, 5, 6, 7], steps=9)
    assert (done.figures["skipped"], done.figures["steps"]) == (6, 9)
    printed = capsys.readouterr().out
    assert all(
        f"train: step {step} skipped, gradient norm nan; examples ['example-" in printed for step in (2, 3, 4, 6)
    )
    assert [m["step"] for m in lines(tmp_path / "a") if m["grad_norm"] is None] == [2, 3, 4, 6, 7, 8]
    finite = broken(tmp_path / "b", [], steps=3)  # steps 0, 4 and 8
    for ours, theirs in zip(done.module.parameters(), finite.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_fourth_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="train: 4 steps in a row"):
        broken(tmp_path, [1, 2, 3, 4], steps=9)
    assert [m["step"] for m in lines(tmp_path)] == [1, 2, 3, 4]


def test_skipped_steps_are_counted_on_after_a_resume(tmp_path):
    """In a row, and altogether; after a finite one, the row is over, resumed or not."""
    bad = [1, 2, 4, 5, 6]
    assert broken(tmp_path, bad, steps=6).figures["skipped"] == 4
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "loss": 0.')  # as a kill may leave it
    with pytest.raises(NonFiniteError, match="train: 4 steps in a row"):
        broken(tmp_path, [*bad, 7], steps=9)
    done = broken(tmp_path, bad, steps=9)
    assert (done.figures["skipped"], done.figures["steps"]) == (5, 9)
    whole = broken(tmp_path / "whole", bad, steps=9)
    told = ("elapsed", "peak_memory_bytes")
    assert {k: v for k, v in done.figures.items() if k not in told} == {
        k: v for k, v in whole.figures.items() if k not in told
    }
    seconds = sum(m["tokens"] / m["tokens_per_second"] for m in lines(tmp_path))
    assert done.figures["elapsed"] == pytest.approx(seconds, rel=1e-9)
    for ours, theirs in zip(done.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
