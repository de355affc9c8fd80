"""What is measured of a target before and after its training, beside the steps themselves.

Before: the held-out metrics, and the confidence of a sample of training rows under the base model. After: the same,
token calibration, and which share of the response tokens was mixed. The NTP baseline is measured in the same way, on
the same rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sftmix.artefacts import write_json
from sftmix.calibration import calibrate, report
from sftmix.components.base import Callback, CallbackResult, StageState
from sftmix.data.batching import RowSubset, Unit
from sftmix.dynamics import merge, one_checkpoint
from sftmix.rng import stable_hash
from sftmix.store import read_dynamics, write_dynamics, write_eval
from sftmix.training.distributed import World, resolve_precision
from sftmix.training.loop import held_out_metrics
from sftmix.training.stage import Stage
from sftmix.types import Rows, RowScores, TrainingDynamics

SAMPLE_SHARE, SAMPLE_MIN, SAMPLE_MAX = 0.05, 128, 1000
"""Share of the training rows whose confidence is measured before and after training, and its bounds in rows: small
beside the training itself, and never so few that a standard deviation says nothing."""

_HELD_OUT_BEFORE = "eval_before.json"
_SAMPLE_BEFORE = "sample_before.parquet"


def sample_rows(ids: Sequence[str]) -> Rows:
    """Some of the N rows, in file order, chosen by a hash of the id: the same ones in every arm and every run."""
    size = min(SAMPLE_MAX, max(SAMPLE_MIN, int(SAMPLE_SHARE * len(ids))))
    ranked = sorted(range(len(ids)), key=lambda row: stable_hash("confidence_sample", ids[row]))
    return np.sort(np.asarray(ranked[:size], dtype=np.int64))


class Measurement(Callback):
    """As a callback of the loop: the figures before training, kept on disk, so that a resumed run has them. `after`
    adds those of the trained model.

    directory   of the stage
    ids         of the N training rows; n_tokens: i64[N], their response tokens
    """

    def __init__(self, directory: Path, world: World, *, ids: Sequence[str], n_tokens: Rows) -> None:
        self._directory, self._world, self._n_tokens = directory, world, n_tokens
        self._sample = sample_rows(ids)
        self._sample_ids = [ids[row] for row in self._sample]
        self.seconds = 0.0

    def on_stage_start(self, state: StageState) -> CallbackResult | None:
        if state.step > 0:
            return None
        if state.evaluate is not None and not self._has(_HELD_OUT_BEFORE):
            before = dict(state.evaluate())
            self._world.on_main(lambda: write_json(self._directory / _HELD_OUT_BEFORE, before))
        if not self._has(_SAMPLE_BEFORE):
            assert state.score is not None
            started = time.perf_counter()
            self._keep(_SAMPLE_BEFORE, [self._one(0, state.score(self._sample))])
            self.seconds += time.perf_counter() - started
        return None

    def after(self, stage: Stage, module: nn.Module, *, steps: int) -> Measured:
        """Measure the trained module, together with all ranks, and write the files."""
        started = time.perf_counter()
        files = ["sample.parquet"]
        figures: dict[str, Any] = {}
        if stage.eval_data is not None:
            files += ["eval.parquet", "calibration.json"]
            figures |= self._held_out(stage, module)
        assert stage.scorer is not None
        trained = self._one(steps, stage.scorer(module, RowSubset(stage.data, self._sample)))
        before = [read_dynamics(self._directory / _SAMPLE_BEFORE)] if self._has(_SAMPLE_BEFORE) else []
        dynamics = [one.of(self._sample_ids) for one in before] + [trained]
        self._keep("sample.parquet", dynamics)
        figures["confidence_std"] = confidence_std(merge(dynamics))
        figures |= self._of_steps(stage, figures)
        figures["calibration_seconds"] = self.seconds + time.perf_counter() - started
        return Measured(files, figures)

    def _held_out(self, stage: Stage, module: nn.Module) -> dict[str, Any]:
        data, world = stage.eval_data, self._world
        assert data is not None
        precision = resolve_precision(stage.options.precision, world.device)
        progress = f"{stage.name}: calibration"
        measured = calibrate(module, data, world=world, precision=precision, pad_id=stage.pad_id, progress=progress)
        ids = [data[row].id for row in range(len(data))]
        calibration = report(measured, ids)
        world.on_main(lambda: write_eval(self._directory / "eval.parquet", ids, measured.scores, measured.brier_sum))
        world.on_main(lambda: write_json(self._directory / "calibration.json", calibration))
        del calibration["reliability"]
        return {**held_out_metrics(measured.scores), "calibration": calibration}

    def _of_steps(self, stage: Stage, figures: Mapping[str, Any]) -> dict[str, Any]:
        lines = self._world.share(self._lines() if self._world.is_main else None)
        mixed = [line["step"] - 1 for line in lines if line["mixup_tokens"]]
        share = mixed_share(stage.order.batch, mixed, [line["step"] - 1 for line in lines], self._n_tokens)
        return {"mixed_token_share": share, **best_evaluation(lines, figures.get("eval_nll"))}

    def _lines(self) -> list[dict[str, Any]]:
        """What is needed of each line of metrics.jsonl."""
        text = (self._directory / "metrics.jsonl").read_text(encoding="utf-8")
        kept = ("step", "epoch", "mixup_tokens", "eval_nll")
        return [{k: line.get(k) for k in kept} for line in map(json.loads, text.splitlines())]

    def _has(self, name: str) -> bool:
        return bool(self._world.share((self._directory / name).exists()))

    def _one(self, step: int, scores: RowScores) -> TrainingDynamics:
        return one_checkpoint(self._sample_ids, step, scores)

    def _keep(self, name: str, dynamics: Sequence[TrainingDynamics]) -> None:
        self._world.on_main(lambda: write_dynamics(self._directory / name, merge(dynamics)))


@dataclass(frozen=True, slots=True)
class Measured:
    """Files written into the stage's directory, and figures for figures.json."""

    files: list[str]
    figures: dict[str, Any]


def confidence_std(dynamics: TrainingDynamics) -> dict[str, Any]:
    """Population standard deviation over the examples of minus the perplexity, at the first and the last checkpoint.

    Under `log_` that of minus the mean NLL per token, which single outliers do not decide. `change` is after / before
    - 1. A figure that is not finite, or whose before is not known, is None.
    """
    found: dict[str, Any] = {"rows": len(dynamics.ids)}
    nll_NC = dynamics.nll_sum / dynamics.n_tokens[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        for prefix, values_NC in (("", np.exp(nll_NC)), ("log_", nll_NC)):
            spread = [_finite(float(s)) for s in values_NC.std(axis=0)]
            before, after = (spread[0] if len(spread) > 1 else None), spread[-1]
            change = None if not before or after is None else after / before - 1
            found |= {f"{prefix}before": before, f"{prefix}after": after, f"{prefix}change": change}
    return found


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def best_evaluation(lines: Iterable[Mapping[str, Any]], last: float | None) -> dict[str, Any]:
    """The smallest held-out NLL of the evaluations during training and at its end: value, step, epoch (from 0).

    lines  of metrics.jsonl
    last   held-out NLL after the last step; None: no held-out rows
    """
    if last is None:
        return {}
    lines = list(lines) or [{"step": 0, "epoch": 0}]  # stopped before the first step
    found = [(line["eval_nll"], line["step"], line["epoch"]) for line in lines[:-1] if line.get("eval_nll") is not None]
    nll, step, epoch = min([*found, (last, lines[-1]["step"], lines[-1]["epoch"])])
    return {"eval_nll_best": nll, "eval_nll_best_step": step, "eval_nll_best_epoch": epoch}


def mixed_share(
    batch: Callable[[int], Sequence[Unit]], mixed: Sequence[int], steps: Sequence[int], counts: np.ndarray
) -> float:
    """Share of the response tokens seen in training that were mixed at least once in that epoch.

    The n-th response token of an example is mixed when it has a partner with at least n of them. A repeat of an
    example within an epoch (NTP weight 0) may mix tokens that its first turn did not; it adds no tokens to the whole.

    batch   step (from 0) -> the units of its global batch
    mixed   the steps that mixed; steps: all of them
    counts  i64[N], response tokens
    """
    mixing = set(mixed)
    if not mixing:
        return 0.0
    seen, total, done = 0, 0, np.zeros(len(counts), dtype=np.int64)
    for step in steps:
        for unit in batch(step):
            depth = min(int(counts[slot.row]) for slot in unit) if len(unit) == 2 and step in mixing else 0
            for slot in unit:
                if slot.ntp_weight:  # the first turn of an epoch
                    total += int(counts[slot.row])
                    done[slot.row] = 0
                seen += max(0, depth - int(done[slot.row]))
                done[slot.row] = max(depth, int(done[slot.row]))
    return seen / total
