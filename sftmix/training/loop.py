"""The training loop around `sftmix.training.step.train_step`: resume, log, callbacks, checkpoints, online losses.

Nothing random has a state: order, pairs and lambdas are functions of (seed, step), dropout of these and the layout, so
a run that is resumed in its layout is the uninterrupted run, bit for bit.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from sftmix.batches.order import digest
from sftmix.components.base import StageState
from sftmix.components.contracts import check_callback_result
from sftmix.disk.files import CHECKPOINTS, check_room, naming_damage
from sftmix.ranks.world import World
from sftmix.training.asked import evaluate, read_step, score_training_rows
from sftmix.training.best import BestWeights
from sftmix.training.callback_state import CallbackState
from sftmix.training.checkpoint import CheckpointStore
from sftmix.training.choices import compiled, decide, plan_wrapping
from sftmix.training.garbage import Collector
from sftmix.training.machine import Machine, adding_in_order, flash_kernels, going_on, machine_of, of_before
from sftmix.training.memory import check_memory
from sftmix.training.metrics import MetricsLog, Totals, figures_shown
from sftmix.training.pace import Pace
from sftmix.training.parallel import resolve_precision, training_module, without_cudnn_if_padded
from sftmix.training.rehearsal import kept, rehearse
from sftmix.training.signals import StopSignal
from sftmix.training.spacing import Spacing
from sftmix.training.step import PreparedStep, Stage, StepResult, StepSetup, prepare_step, train_step
from sftmix.training.teacher import give_teacher
from sftmix.training.update import build_optimizer
from sftmix.words.errors import ConfigError, NonFiniteError, NoSpaceError, Stopped
from sftmix.words.progress import progress_bar

MAX_IN_A_ROW = 3
"""Consecutive steps that may be skipped because a loss or a gradient is not finite; one more stops the run."""
MAX_SKIPPED = 9
"""Skipped steps that a run may have in any case; beyond them, MAX_SHARE of its steps so far."""
MAX_SHARE = 0.01
RELIED_ON = ("metrics.jsonl", "scores/*.parquet", "online/*.parquet")
"""Files of the stage that a resume relies on; what was written after the checkpoint is made again."""
SAVED = {"machines": list, "stopped_by": str, "skipped_in_a_row": int}
"""What a checkpoint holds of the loop as it is, beside its totals and evaluations, with its types."""


@dataclass
class StageResult:
    """The trained (wrapped) module, and figures for summary.json."""

    module: nn.Module
    figures: dict[str, Any]


def train(stage: Stage, world: World) -> StageResult:
    """Run the stage to its end, resuming from its newest valid checkpoint."""
    options = stage.options
    with adding_in_order(options.deterministic), flash_kernels(options.flash_kernels, world.device):
        return TrainingLoop(stage, world).run()


class TrainingLoop:
    """The state of one stage on one rank; `run` goes to the end, `advance` makes one step and the work after it."""

    def __init__(self, stage: Stage, world: World, machines: Sequence[Machine] = ()) -> None:
        """Read the newest valid checkpoint but for its tensors, or go on after these machines, and wrap the module."""
        self.stage, self.world, self.total = stage, world, stage.order.total_steps
        self.store = CheckpointStore(stage.directory / CHECKPOINTS, stage.checkpoint.keep, world, beside=RELIED_ON)
        self.machines = [*machines]
        """The machines that made the steps so far, this one last."""
        self.totals = Totals()
        self.skipped_in_a_row = 0
        self.pending: dict[str, float] = {}
        self.evaluations: dict[int, float] = {}  # step -> the held-out NLL after it
        self.step, self.stopped_by = 0, ""
        self.saved = 0  # the last step that has a checkpoint, or needs none: the start
        self.pace = Pace(world, stage.model)
        self.done: StepResult | None = None
        self.ahead: PreparedStep | None = None
        self.newest = self._newest()
        stage.objective.begin(map(stage.data.__getitem__, stage.order.rows.tolist()))
        precision = resolve_precision(stage.options.precision, world.device)
        stage = self.stage = replace(stage, options=plan_wrapping(stage, precision, world, self.machines, self._say))
        self.module = training_module(
            stage.model,
            stage.options,
            precision=precision,
            world=world,
            attention=stage.attention,
            packed=stage.packed,
            trains=True,
        )
        self.optimizer = build_optimizer(stage.model, stage.options, stage.optimizer)
        self.built = kept(self.module, self.optimizer)
        self.callback_state = CallbackState(stage.callbacks, world, (stage.objective, stage.perturbation))
        self.setup = StepSetup(stage, self.module, self.optimizer, precision, world)
        self.store.second = give_teacher(self.setup)  # of the weights before a checkpoint is loaded
        keeps_best = stage.checkpoint.keep_best and stage.eval_data is not None
        self.best = BestWeights(stage.directory, world) if keeps_best else None
        self.spacing = Spacing(stage.checkpoint, self.total)

    # ------------------------------------------------------------------------------------------ stage

    def run(self) -> StageResult:
        self._resume()
        stage, world = self.stage, self.world
        with (
            closing(MetricsLog(stage.directory / "metrics.jsonl", resume_step=self.step, world=world)) as log,
            progress_bar(
                stage.name, total=self.total, unit="step", done=self.step, enabled=world.is_main, rate="{postfix}"
            ) as bar,
            StopSignal("at_step") as signal,
            without_cudnn_if_padded(self.module, stage.data.lengths),
            self.store.finishing(),
            Collector() as garbage,
        ):
            metrics = log.last
            log.check_order(stage)
            before = self._call("on_stage_start", metrics)
            # They go into the line of step 1, which may be evaluated as well.
            self.pending = {f"start_{k}" if k.startswith("eval_") else k: value for k, value in before.items()}
            self._save_or_stop(signal)  # ranks also agree on an end before the first step
            while self.step < self.total and not self.stopped_by:
                metrics = self.advance()
                garbage.after_step()
                bar.set_postfix_str(figures_shown(metrics), refresh=False)
                bar.update()
                full_disk = self._note(log, metrics)  # the line before the checkpoint, which has its hash
                # Ask after the callbacks: an evaluation may take long, and a scheduler does not wait for one more step.
                self._save_or_stop(signal, full_disk)
            if self.best and self.best.evaluated != self.step:  # the last step may be the best one
                self.best.offer(self.step, self.module, evaluate(stage, self.module))
            last = self._call("on_stage_end", metrics)
            self._save_or_stop(signal)
        figures = {
            **self.totals.figures(),
            "steps": self.step,
            "total_steps": self.total,
            "stopped_by": self.stopped_by if self.step < self.total else None,
            "machines": self.machines,
            **compiled(stage.options, self._say),
            **last,
        }
        return StageResult(self.module, figures)

    def _note(self, log: MetricsLog, metrics: Mapping[str, float]) -> NoSpaceError | None:
        """Write the line of the step that was made; return the error of a full disk, which ends all ranks later."""
        try:
            log.write({**metrics, "rows": digest(self.stage.order.batch(self.step - 1))})
            self.stage.on_progress(self.step, self.total)
        except NoSpaceError as error:
            error.everywhere = True
            return error
        return None

    def _newest(self) -> int | None:
        """Take over the state of the newest valid checkpoint, without tensors; return its step, or None."""
        store = self.store
        store.clean()
        if (newest := store.newest_valid()) is None:
            return None
        state = store.state(newest, identity=str, totals=dict, evaluations=list, callbacks=list, **SAVED)
        if state["identity"] != self.stage.identity:  # checked before its tensors, which may have other shapes
            raise ConfigError(
                f"{store.path(newest)} belongs to a run on other inputs; move {store.directory} away, "
                "or use another --out"
            )
        self.step = self.saved = newest
        for name in SAVED:
            setattr(self, name, state[name])
        with naming_damage(store.path(newest)):  # a run of somebody else may hold anything
            round(sum(state["totals"].values()))  # raises an error for what is no finite number
            self.totals = Totals(**state["totals"])
            self.machines = [*map(of_before, self.machines)]
            self.evaluations = {int(step): float(nll) for step, nll in state["evaluations"]}
        return newest

    def _resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one, and see that those to come have room.

        Raises NoSpaceError on every rank, before a step is made, where they do not fit.
        """
        store = self.store
        decide(self.setup, self.machines, self._say)  # before the optimizer has its state, which it counts
        stage = self.stage = self.setup.stage
        if self.newest is not None:
            store.load(self.newest, self.module, self.optimizer)
            with naming_damage(store.path(self.newest)):
                self.callback_state.put(store.state(self.newest)["callbacks"])
            if stage.online:
                stage.online.restore(store.arrays(self.newest))  # the epoch is under way
            self._say(f"resuming after step {self.step} of {self.total}")
        if saves := self.spacing.most(self.step):
            needed = store.bytes_to_come(self.module, state_bytes=stage.optimizer.state_bytes, saves=saves)
            if self.best:  # the old ones go when the new ones are there
                needed += self.best.store.bytes_to_come(self.module, state_bytes=0, saves=2)
            self.world.on_main(lambda: check_room(store.directory, needed))
        if self.step == 0:
            check_memory(self.setup)
        if self.best:
            self.best.go_on(self.evaluations)
        self.machines = going_on(self.machines, self.step, machine_of(self.world, self.stage.options))

    def _say(self, text: str | None) -> None:
        if text and self.world.is_main:
            print(f"{self.stage.name}: {text}", flush=True)

    def _save_or_stop(self, signal: StopSignal, full_disk: NoSpaceError | None = None) -> None:
        """Agree with all ranks on an end, and save where it is due; raise Stopped if any rank received a signal.

        A callback that stops one rank, as by its clock, stops all: `stopped_by` then has its name on each of them.

        full_disk  the error of rank 0, which could not write its report; it is raised on all
        """
        by_clock, by_callback, by_signal, by_full_disk = range(1, 5)  # of what several ranks say, the largest counts
        late = self.world.is_main and self.spacing.late(self.store.seconds)
        told = by_callback if self.stopped_by else by_clock if late else 0  # by the clock of rank 0
        if signal.received:
            told = by_signal
        agreed = self.world.max(by_full_disk if full_disk else told)
        if agreed == by_full_disk:
            raise self.world.share(full_disk)
        if agreed == by_callback:
            self.stopped_by = next(filter(None, self.world.gather(self.stopped_by)))
        self.store.finish(wait=False)  # a collective: all ranks are here, between two steps
        due = self.spacing.due(self.step) or (agreed in (by_clock, by_callback) and self.spacing.every)
        if (due or agreed == by_signal) and self.saved != self.step:  # written anew, it would be missing for a moment
            self._save()
        if agreed == by_signal:
            self.store.finish()
            raise Stopped(f"stopped by a signal after step {self.step}; the same command continues")

    def _save(self) -> None:
        """Save a checkpoint of the step that was made last."""
        online = self.stage.online
        state = {name: getattr(self, name) for name in SAVED}
        state |= {"identity": self.stage.identity, "totals": asdict(self.totals)}
        state["evaluations"] = list(self.evaluations.items())  # JSON has no numbers as keys
        state["callbacks"] = self.callback_state.out()
        self.store.save(self.step, self.module, self.optimizer, state, online.gathered() if online else {})
        self.saved = self.step
        self.spacing.since = time.monotonic()

    # ------------------------------------------------------------------------------------------- step

    def advance(self) -> dict[str, float]:
        """Make one optimizer step, and call the callbacks; return its metrics."""
        stage, order, started = self.stage, self.stage.order, time.perf_counter()
        epoch = order.epoch_of(self.step)
        # `_prepare` leaves its result in `ahead`, for the next step; this step takes it out.
        prepared = self.ahead or self._prepare(self.step)
        self.ahead = None
        following = self.step + 1  # of the same epoch, whose losses may decide on the split of the next one
        meanwhile = None if following in order.ends else lambda: self._prepare(following)
        done = self.done = train_step(self.setup, prepared, meanwhile)
        rows = [slot.row for unit in order.batch(self.step) for slot in unit]  # of all ranks
        self.step += 1
        tokens, seconds = int(stage.data.lengths[rows].sum()), time.perf_counter() - started
        self._say(self.pace.after(tokens, seconds))
        metrics = {"step": self.step, "time": time.time(), "epoch": epoch}
        metrics |= self.totals.add(done, tokens=tokens, examples=len(rows), seconds=seconds)
        # A skipped step has changed nothing; too many of them, in a row or in all, end the run.
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if done.skipped else 0
        if done.skipped:
            skipped, ids = int(self.totals.skipped), [i for batch in done.batches for i in batch.ids]
            self._say(f"step {self.step} skipped, gradient norm {done.grad_norm}; examples {ids[:8]} ...")
            if self.skipped_in_a_row > MAX_IN_A_ROW or skipped > max(MAX_SKIPPED, MAX_SHARE * self.step):
                raise NonFiniteError(
                    f"{stage.name}: {skipped} of the first {self.step} steps, {self.skipped_in_a_row} in a row, have a "
                    "loss or gradient that is not finite; lower training.learning_rate. Checkpoints are as they were"
                )
        if stage.online:
            stage.online.record(done.batches, done.nll)
        metrics |= self.pending
        self.pending = {}
        metrics |= self._call("on_step_end", metrics)
        if self.step in order.ends:  # also the last epoch's, if it is cut short
            if stage.online:
                stage.online.end_epoch(epoch, self.step)
            metrics |= self._call("on_epoch_end", metrics)
        if done.updates and self.totals.updates == 1:
            self._rehearse()
        return metrics

    def _rehearse(self) -> None:
        """Raise ConfigError if no checkpoint would bring back what optimizer, model or callbacks keep by now."""
        self.callback_state.out()
        if left := rehearse(self.module, self.optimizer, self.built, self.world):
            names = f"{len(left)} trained parameters, as {', '.join(left[:3])}"
            self._say(f"after the first update the optimizer keeps no state of {names}: no gradient, or it needs none")

    def _prepare(self, step: int) -> PreparedStep:
        order = self.stage.order
        self.ahead = prepare_step(self.setup, step, order.batch(step), self.stage.split_of(order.epoch_of(step)))
        return self.ahead

    # -------------------------------------------------------------------------------------- callbacks

    def _call(self, hook: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Call a hook of every callback, each with the metrics that those before it have added.

        After a resume, the log has what they said before the first step.
        """
        stage, step = self.stage, self.step
        logged = hook == "on_stage_start" and step > 0
        added: dict[str, float] = {}
        for callback in stage.callbacks:
            state = StageState(
                stage=stage.name,
                step=step,
                total_steps=self.total,
                epoch=stage.order.epoch_of(step),
                metrics={**metrics, **added},
                score=partial(score_training_rows, stage, self.module),
                evaluate=None if stage.eval_data is None else partial(evaluate, stage, self.module),
                read=None if self.done is None else partial(read_step, self.setup, self.done),
                objective=stage.objective,
                evaluations=tuple(self.evaluations.items()),
                directory=stage.directory,
                is_main=self.world.is_main,
            )
            result = check_callback_result(callback, hook, getattr(callback, hook)(state), added.keys())
            if result is None:
                continue
            if not logged:
                added |= result.metrics
                if "eval_nll" in result.metrics:  # a second evaluation of the same weights replaces the first
                    self.evaluations[step] = float(result.metrics["eval_nll"])
            if result.stop and not self.stopped_by:
                self.stopped_by = type(callback).__name__
        if self.best:
            self.best.offer(step, self.module, added)
        return added
