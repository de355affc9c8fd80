"""Measurements of the base model and of the models trained from it, outside the training steps.

The base model: the held-out metrics, and the confidence of a sample of training rows. The trained target: the same,
token calibration, and the share of the response tokens that was mixed. The NTP baseline is measured in the same way, on
the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sftmix.batches.order import Unit
from sftmix.batches.rows import RowSubset, TokenisedRows
from sftmix.common.files import write_json
from sftmix.common.rng import stable_hash
from sftmix.common.steps import read_steps
from sftmix.common.tables import read_dynamics, write_dynamics, write_eval
from sftmix.common.world import World
from sftmix.data import LoadedData
from sftmix.measure.calibration import calibrate, report
from sftmix.training.dynamics import one_checkpoint
from sftmix.training.loop import Stage
from sftmix.training.scoring import held_out_metrics, nll_by
from sftmix.types import Float64, Int64, Rows, RowScores, TrainingDynamics

SAMPLE = "sample.parquet"
"""The file in which a stage keeps the dynamics of the sample under its model."""

SAMPLE_SHARE, SAMPLE_MIN, SAMPLE_MAX = 0.05, 128, 1000
"""Share of the training rows whose confidence is measured under the base model and the trained ones, and its bounds in
rows: few beside the training itself, and enough for a standard deviation."""


def sample_rows(ids: Sequence[str]) -> Rows:
    """Return some of the N rows, in file order, chosen by a hash of the id: the same in every arm and every run."""
    size = min(SAMPLE_MAX, max(SAMPLE_MIN, int(SAMPLE_SHARE * len(ids))))
    ranked = sorted(range(len(ids)), key=lambda row: stable_hash("confidence_sample", ids[row]))
    return np.sort(np.asarray(ranked[:size], dtype=np.int64))


class Measurement:
    """The figures of one model, by all ranks together: `base` for the untrained one, `trained` after a stage.

    Both return the files that they wrote into `directory`, and figures for figures.json.

    eval_groups  the group of each held-out row; None: one group
    """

    def __init__(
        self, directory: Path, world: World, data: LoadedData, eval_groups: Sequence[str] | None = None
    ) -> None:
        self._directory, self._world, self._data, self._groups = directory, world, data, eval_groups
        self._sample = RowSubset(data.train, sample_rows(data.train.ids))

    def base(self, score: Callable[[TokenisedRows], RowScores]) -> tuple[list[str], dict[str, Any]]:
        """Measure the untrained model, whose scores of rows `score` gives."""
        data, figures = self._data.eval, dict[str, Any]()
        if data is not None:
            figures = self._held_out(data.ids, score(data))
        self._keep_sample(0, score(self._sample))
        return [SAMPLE, *([] if data is None else ["eval.parquet"])], figures

    def trained(self, stage: Stage, module: nn.Module, *, steps: int) -> tuple[list[str], dict[str, Any]]:
        """Measure the module that the stage has trained for so many steps."""
        started, data, scorer = time.perf_counter(), self._data.eval, stage.scorer
        assert scorer is not None
        files, figures = [SAMPLE], dict[str, Any]()
        if data is not None:
            measured = calibrate(module, data, replace(scorer, progress=f"{stage.name}: calibration"))
            calibration = report(measured, data.ids)
            figures = self._held_out(data.ids, measured.scores, measured.brier_sum)
            self._world.on_main(lambda: write_json(self._directory / "calibration.json", calibration))
            figures["calibration"] = {k: v for k, v in calibration.items() if k != "reliability"}
            files += ["eval.parquet", "calibration.json"]
        self._keep_sample(steps, scorer(module, self._sample))
        lines = self._world.share(self._world.on_main(lambda: read_steps(self._directory)))
        figures["mixed_token_share"] = mixed_share(stage.order.batch, lines, self._data.train.n_targets)
        figures |= best_evaluation(lines, figures.get("eval_nll"))
        figures["calibration_seconds"] = time.perf_counter() - started
        return files, figures

    def _held_out(self, ids: Sequence[str], scores: RowScores, brier_sum: Float64 | None = None) -> dict[str, Any]:
        """Write eval.parquet, and return the metrics of the held-out rows: of each group, too, if there are several."""
        self._world.on_main(lambda: write_eval(self._directory / "eval.parquet", ids, scores, brier_sum))
        by = {} if self._groups is None else {"eval_nll_by": nll_by(scores, self._groups)}
        return {**held_out_metrics(scores), **by}

    def _keep_sample(self, step: int, scores: RowScores) -> None:
        ids = [self._data.train.ids[row] for row in self._sample.rows]
        self._world.on_main(lambda: write_dynamics(self._directory / SAMPLE, one_checkpoint(ids, step, scores)))


def confidence_std(base: Path, trained: Path) -> dict[str, Any]:
    """Return the population standard deviation over the sample of minus the perplexity, before and after training.

    The keys under `log_` hold the same of minus the mean NLL per token, which single outliers do not decide. `change`
    is after / before - 1. A figure that is not finite, or whose before is not known, is None.

    base, trained  directories of the stages of the base model and of the trained one
    """
    stages = {name: place / SAMPLE for name, place in (("before", base), ("after", trained))}
    samples = {name: read_dynamics(file) for name, file in stages.items() if file.exists()}
    figures: dict[str, Any] = {"rows": len(samples["after"].ids)}
    for prefix in ("", "log_"):
        old, new = (_spread(samples.get(name), prefix) for name in ("before", "after"))
        change = None if not old or new is None else new / old - 1
        figures |= {f"{prefix}before": old, f"{prefix}after": new, f"{prefix}change": change}
    return figures


def _spread(dynamics: TrainingDynamics | None, prefix: str) -> float | None:
    """Return the standard deviation of the perplexity at the last checkpoint, or with `log_` of its logarithm."""
    if dynamics is None:
        return None
    nll = dynamics.nll_sum[:, -1] / dynamics.n_tokens
    with np.errstate(over="ignore", invalid="ignore"):
        spread = float((nll if prefix else np.exp(nll)).std())
    return spread if np.isfinite(spread) else None


def best_evaluation(lines: Sequence[Mapping[str, Any]], last: float | None) -> dict[str, Any]:
    """Return the smallest held-out NLL of the evaluations during and after training: value, step, epoch (from 0).

    lines  of metrics.jsonl
    last   held-out NLL after the last step; None: no held-out rows
    """
    if last is None:
        return {}
    *earlier, end = lines or [{"step": 0, "epoch": 0}]  # training stopped before the first step
    evaluations = [
        (line["eval_nll"], line["step"], line["epoch"]) for line in earlier if line.get("eval_nll") is not None
    ]
    nll, step, epoch = min([*evaluations, (last, end["step"], end["epoch"])])
    return {"eval_nll_best": nll, "eval_nll_best_step": step, "eval_nll_best_epoch": epoch}


def mixed_share(batch: Callable[[int], Sequence[Unit]], lines: Sequence[Mapping[str, Any]], n_tokens: Int64) -> float:
    """Return the share of the response tokens seen in training that were mixed at least once in their epoch.

    The n-th response token of an example is mixed if its partner has at least n response tokens. A repeat of an example
    within an epoch (NTP weight 0) may mix tokens that its first turn did not; it adds no tokens to the whole.

    batch     step (from 0) -> the units of its global batch
    lines     of metrics.jsonl
    n_tokens  i64[N], response tokens
    """
    if not any(line["mixup_tokens"] for line in lines):
        return 0.0
    mixed, total, done = 0, 0, np.zeros(len(n_tokens), dtype=np.int64)
    for line in lines:
        for unit in batch(line["step"] - 1):
            is_pair = len(unit) == 2 and line["mixup_tokens"]
            depth = min(int(n_tokens[slot.row]) for slot in unit) if is_pair else 0
            for slot in unit:
                if slot.ntp_weight:  # the first turn of an epoch
                    total += int(n_tokens[slot.row])
                    done[slot.row] = 0
                mixed += max(0, depth - int(done[slot.row]))
                done[slot.row] = max(depth, int(done[slot.row]))
    return mixed / total
