"""The training loop around the step: resume, log, hooks and checkpoints.

Nothing random has a state: order, pairs, lambdas and dropout are functions of (seed, step), so a resumed run is the
uninterrupted run, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sftmix.batches.collate import ResponsesAlone, RowSubset, TokenisedRows
from sftmix.batches.order import TrainingOrder, Unit
from sftmix.batches.share import micro_batches, too_long
from sftmix.common.errors import ConfigError, NonFiniteError, Stopped
from sftmix.common.progress import progress_bar
from sftmix.common.rng import stable_hash
from sftmix.common.world import World
from sftmix.components.base import Callback, CallbackResult, Objective, Optimizer, Perturbation, StageState
from sftmix.components.optimizers import AdamW
from sftmix.model.meta import Values
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.training.checkpoint import CheckpointStore
from sftmix.training.log import MetricsLog, PeakMemory, StopSignal
from sftmix.training.module import Perturb, training_module, unwrap
from sftmix.training.online import OnlineLosses
from sftmix.training.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from sftmix.training.parallel import autocast, gradient_sync, resolve_precision
from sftmix.training.scoring import scoring_plan, with_batch_nll
from sftmix.training.step import normalise, step_sums
from sftmix.types import Batch, Plan, Rows, RowScores, Split

Scorer = Callable[[nn.Module, TokenisedRows], RowScores]


@dataclass(kw_only=True)
class Stage:
    """One training stage: what to train, on what, in which order, towards what."""

    name: str
    model: PreTrainedModel
    data: TokenisedRows
    order: TrainingOrder
    objective: Objective
    options: TrainingOptions
    checkpoint: CheckpointOptions
    directory: Path
    seed: int
    identity: str = ""
    """Hash of what the stage is made from; a checkpoint of another identity is refused."""
    values: Values | None = None
    """Those of a model on the meta device, where ranks share the weights."""
    memory: PeakMemory | None = None
    """What measures the stage since it began; None: the loop measures itself."""
    pad_id: int = 0
    split_of: Callable[[int], Split | None] = field(default=lambda epoch: None)
    """The groups in each epoch."""
    optimizer: Optimizer = field(default_factory=AdamW)
    perturbation: Perturbation | None = None
    online: OnlineLosses | None = None
    """Keeps the losses of the epoch that is being trained on."""
    eval_data: TokenisedRows | None = None
    packed: bool = False
    """Some rows hold several documents, which must not attend to each other."""
    scorer: Scorer | None = None
    callbacks: Sequence[Callback] = ()
    on_progress: Callable[[int, int], None] = field(default=lambda step, total: None)


MAX_SKIPPED = 3
"""Consecutive steps with a non-finite gradient norm that are skipped before the run stops with exit code 6."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """The trained (wrapped) module, and figures for summary.json."""

    module: nn.Module
    figures: dict[str, float]


def train(stage: Stage, world: World) -> StageResult:
    """Run the stage to its end, resuming from its newest valid checkpoint."""
    return TrainingLoop(stage, world).run()


class TrainingLoop:
    """The state of one stage on one rank; `run` goes to the end, `advance` is one optimizer step."""

    def __init__(self, stage: Stage, world: World) -> None:
        self.stage, self.world, self.options = stage, world, stage.options
        self.memory = stage.memory or PeakMemory(world.device)
        self.precision = resolve_precision(self.options.precision, world.device)
        self.module = training_module(
            stage.model,
            self.options,
            precision=self.precision,
            world=world,
            packed=stage.packed,
            trains=True,
            values=stage.values,
        )
        if self.options.compile and world.is_main:
            print(f"{stage.name}: layers are compiled in the first steps, which may take minutes", flush=True)
        padding_free = unwrap(self.module).padding_free
        for line in too_long(stage.data.lengths, self.options, device=world.device, padding_free=padding_free):
            if world.is_main:
                print(f"{stage.name}: {line}", flush=True)
        self.optimizer = build_optimizer(stage.model, self.options, stage.optimizer)
        self.store = CheckpointStore(stage.directory / "checkpoints", keep=stage.checkpoint.keep, world=world)
        self.total = stage.order.total_steps
        self.every = checkpoint_interval(stage.checkpoint, self.total)
        self.totals = {"elapsed": 0.0, "tokens": 0.0, "ntp_tokens": 0.0, "mixup_tokens": 0.0, "mu_effective": 0.0}
        self.totals |= {"ntp_count": 0.0, "mixup_count": 0.0, "mu_own": 0.0, "mu_ntp": 0.0, "skipped": 0.0}
        self.skipped_in_a_row = 0
        self.pending: dict[str, float] = {}
        self.step, self.stopped = 0, False

    # ------------------------------------------------------------------------------------------ stage

    def run(self) -> StageResult:
        self._resume()
        log = MetricsLog(self.stage.directory / "metrics.jsonl", resume_step=self.step, enabled=self.world.is_main)
        bar = progress_bar(self.stage.name, total=self.total, unit="step", done=self.step, enabled=self.world.is_main)
        try:
            with StopSignal() as signal:
                metrics: dict[str, Any] = {}
                self.pending = self._call("on_stage_start", metrics)
                while self.step < self.total and not self.stopped:
                    metrics, interrupted = self.advance(signal)
                    log.write(metrics)
                    bar.update()
                    bar.set_postfix(loss=f"{metrics['loss']:.4f}", lr=f"{metrics['learning_rate']:.2e}")
                    self.stage.on_progress(self.step, self.total)
                    self._save_if_due(interrupted=interrupted)
                last = self._call("on_stage_end", metrics)
        finally:
            bar.close()
            log.close()
        figures = {
            **self.totals,
            "steps": self.step,
            "total_steps": self.total,
            "peak_memory_bytes": self._peak(),
            **last,
        }
        return StageResult(self.module, figures)

    def _resume(self) -> None:
        self.store.clean()
        newest = self.store.newest_valid()
        if newest is None:
            return
        state = self.store.state(newest)
        if state["identity"] != self.stage.identity:  # before its tensors, which may have other shapes
            raise ConfigError(
                f"{self.store.path(newest)} belongs to a run on other inputs; move {self.store.directory} away, "
                "or use another --out"
            )
        self.store.load(newest, self.module, self.optimizer)
        self.step, self.totals, self.stopped = state["step"], state["totals"], state["stopped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        if self.stage.online is not None:
            self.stage.online.restore(self.store.arrays(newest))
        if self.world.is_main:
            print(f"{self.stage.name}: resuming after step {self.step} of {self.total}")

    def _save_if_due(self, *, interrupted: bool) -> None:
        due = self.every and (self.step % self.every == 0 or self.step == self.total or self.stopped)
        if due or interrupted:
            state = {"identity": self.stage.identity, "totals": self.totals, "stopped": self.stopped}
            state["skipped_in_a_row"] = self.skipped_in_a_row
            arrays = self.stage.online.gathered() if self.stage.online is not None else {}
            self.store.save(self.step, self.module, self.optimizer, state, arrays)
        if interrupted:
            raise Stopped(f"stopped by a signal; {self.store.path(self.step)} is saved, the same command continues")

    def _peak(self) -> float:
        return self.world.max(self.memory.bytes())

    # ------------------------------------------------------------------------------------------- step

    def advance(self, signal: StopSignal | None = None) -> tuple[dict[str, Any], bool]:
        """One optimizer step: its metrics, and whether any rank was told to stop."""
        started = time.perf_counter()
        self.module.train()
        lr = learning_rate(self.step, self.total, self.options)
        set_learning_rate(self.optimizer, lr)
        torch.manual_seed(stable_hash(self.stage.seed, "dropout", self.step, self.world.rank) % 2**63)
        units = self.stage.order.batch(self.step)
        window = self._window(units)
        plans = [self._plan(batch) for batch in window]
        ntp, mixup = self.world.sum([sum(p.ntp_count for p in plans), sum(p.mixup_count for p in plans)])
        perturb = self._perturb()
        sums = torch.zeros(5, dtype=torch.float64, device=self.world.device)
        for k, (batch, plan) in enumerate(zip(window, plans, strict=True)):
            scaled = normalise(plan, batch, ntp_count=ntp, mixup_count=mixup, world_size=self.world.size)
            sums += self._forward_backward(batch, plan, scaled, perturb, last=k == len(window) - 1)
        norm = clip_gradients(self.module, self.options.max_grad_norm)
        self._apply(norm, window)
        if self.stage.online is not None and not math.isfinite(norm):
            self._record_again(self.stage.online, units, perturb, noted=len(window))
        loss, nll, mixed, trained, aligned = self.world.sum(sums.tolist())
        tokens = int(sum(self.stage.data.lengths[slot.row] for unit in units for slot in unit))
        self.step += 1
        seconds = time.perf_counter() - started
        counts = {"tokens": tokens, "ntp_tokens": trained, "mixup_tokens": aligned}
        beside = {"ntp_count": ntp if mixup else 0.0, "mixup_count": mixup}  # for mu_effective: steps that mixed
        for key, value in {"elapsed": seconds, **counts, **beside}.items():
            self.totals[key] += value
        self.totals[f"mu_{plans[0].mixup_mean}"] += plans[0].mu * mixup
        self.totals["mu_effective"] = self._mu_effective_so_far()
        metrics = {
            "step": self.step,
            "time": time.time(),
            "epoch": self.stage.order.epoch_of(self.step - 1),
            "loss": loss / self.world.size,
            "ntp": nll / ntp if ntp else 0.0,
            "mixup": mixed / mixup if mixup else 0.0,
            "mu_effective": mu_effective(plans[0].mu, plans[0].mixup_mean, ntp, mixup),
            "learning_rate": lr,
            "grad_norm": norm,
            "ntp_tokens": int(trained),
            "mixup_tokens": int(aligned),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
        }
        metrics |= self.pending
        self.pending = {}
        metrics |= self._call("on_step_end", metrics)
        if self.stage.order.ends_epoch(self.step):
            if self.stage.online is not None:
                self.stage.online.end_epoch(self.stage.order.epoch_of(self.step - 1), self.step)
            metrics |= self._call("on_epoch_end", metrics)
        # Asked after the callbacks: an evaluation may take longer than a scheduler's patience for one more step.
        return metrics, self.world.max(float(signal is not None and signal.received)) > 0

    def _mu_effective_so_far(self) -> float:
        """Of the steps that mixed together, with the mean of mu over what was mixed (mu may follow a schedule)."""
        ntp, mixup = self.totals["ntp_count"], self.totals["mixup_count"]
        own, direct = (self.totals[key] / mixup if mixup else 0.0 for key in ("mu_own", "mu_ntp"))
        return mu_effective(own, "own", ntp, mixup) + mu_effective(direct, "ntp", ntp, mixup)

    def _window(self, units: Sequence[Unit]) -> list[Batch]:
        """All micro-batches of this rank in this step; their counts must be known before the first backward."""
        stage = self.stage
        split = stage.split_of(stage.order.epoch_of(self.step))
        window = micro_batches(
            units, stage.data, self.options, self.world, self.module, split=split, pad_id=stage.pad_id
        )
        if stage.objective.needs_batch_nll:
            window = with_batch_nll(window, self.module, self.world, self.precision)
        return window

    def _plan(self, batch: Batch) -> Plan:
        return self.stage.objective.plan(batch, step=self.step, total_steps=self.total, seed=self.stage.seed)

    def _perturb(self) -> Perturb | None:
        perturbation, stage = self.stage.perturbation, self.stage
        return None if perturbation is None else partial(perturbation.embeddings, step=self.step, seed=stage.seed)

    def _forward_backward(
        self, batch: Batch, plan: Plan, scaled: Plan, perturb: Perturb | None, *, last: bool
    ) -> torch.Tensor:
        """Sums of one micro-batch, as `step_sums` has them."""
        with gradient_sync(self.module, last):
            with autocast(self.module, self.precision, self.world.device):
                out = self.module(batch, scaled, perturb=perturb)
            out.loss.backward()
        if self.stage.online is not None:
            self.stage.online.record(batch, out.nll)
        return step_sums(batch, plan, out)

    def _record_again(
        self, online: OnlineLosses, units: Sequence[Unit], perturb: Perturb | None, *, noted: int
    ) -> None:
        """Note the losses of a skipped step anew, with padding; the weights are still those of the step.

        In a row that examples share, one that is not finite spoils all: what attention masks is multiplied by 0, and
        0 times NaN is NaN. Every rank skips the same steps, so this forward is one of all ranks, too.
        """
        stage, target = self.stage, unwrap(self.module)
        if not target.padding_free:
            return
        online.take_back(noted)
        split = stage.split_of(stage.order.epoch_of(self.step))
        padded = micro_batches(
            units, stage.data, self.options, self.world, self.module, split=split, pad_id=stage.pad_id, padded=True
        )
        with torch.no_grad(), autocast(self.module, self.precision, self.world.device):
            for batch in padded:
                online.record(batch, target(batch, scoring_plan(batch), perturb=perturb).nll)

    def _apply(self, norm: float, window: Sequence[Batch]) -> None:
        """Step, or skip it on every rank where the (global) gradient norm is not finite."""
        if math.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            self.totals["skipped"] += 1
            if self.world.is_main:
                ids = [i for b in window for i in b.ids]
                print(f"{self.stage.name}: step {self.step + 1} skipped, gradient norm {norm}; examples {ids[:8]} ...")
            if self.skipped_in_a_row > MAX_SKIPPED:
                raise NonFiniteError(
                    f"{self.stage.name}: {self.skipped_in_a_row} steps in a row have a non-finite gradient; "
                    "lower training.learning_rate (the last checkpoint is untouched)"
                )
        self.optimizer.zero_grad(set_to_none=True)

    # -------------------------------------------------------------------------------------- callbacks

    def _call(self, hook: str, metrics: Mapping[str, float]) -> dict[str, float]:
        state = StageState(
            stage=self.stage.name,
            step=self.step,
            total_steps=self.total,
            epoch=self.stage.order.epoch_of(self.step),
            metrics=metrics,
            score=self._score,
            evaluate=self._evaluate if self.stage.eval_data is not None else None,
        )
        added: dict[str, float] = {}
        for callback in self.stage.callbacks:
            result: CallbackResult | None = getattr(callback, hook)(state)
            if result is not None:
                added |= result.metrics
                self.stopped = self.stopped or result.stop
        return added

    def _score(self, rows: Rows | None = None, *, alone: bool = False) -> RowScores:
        assert self.stage.scorer is not None
        data: TokenisedRows = self.stage.data if rows is None else RowSubset(self.stage.data, rows)
        return self.stage.scorer(self.module, ResponsesAlone(data) if alone else data)

    def _evaluate(self) -> Mapping[str, float]:
        assert self.stage.scorer is not None
        assert self.stage.eval_data is not None
        return held_out_metrics(self.stage.scorer(self.module, self.stage.eval_data))


def held_out_metrics(scores: RowScores) -> dict[str, float]:
    """NLL per response token (nats), token accuracy, and the share of rows whose every token is the argmax.

    The last is exact match under greedy decoding: greedy decoding returns the reference answer if and only if each of
    its tokens is the argmax given the ones before it.
    """
    tokens = max(int(scores.n_tokens.sum()), 1)
    rows = max(len(scores.n_tokens), 1)
    return {
        "eval_nll": float(scores.nll_sum.sum()) / tokens,
        "eval_accuracy": float(scores.n_correct.sum()) / tokens,
        "eval_exact_match": float((scores.n_correct == scores.n_tokens).sum()) / rows,
    }


def checkpoint_interval(options: CheckpointOptions, total_steps: int) -> int:
    """Steps between checkpoints; 0 = none."""
    return options.every if options.every is not None else max(50, math.ceil(total_steps / 10))


def mu_effective(mu: float, mixup_mean: str, ntp: float, mixup: float) -> float:
    """mu N_ntp / N_mix: what mu would be if both terms were divided by the NTP count (method.md)."""
    if not mixup or not mu:
        return 0.0
    return mu * ntp / mixup if mixup_mean == "own" else mu
