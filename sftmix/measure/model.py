"""Measurements of the base model and of the models trained from it, outside the training steps.

The base model: the held-out metrics, and the confidence of a sample of training rows. The trained target: the same,
token calibration, and the share of the response tokens that was mixed. The NTP baseline is measured in the same way, on
the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from sftmix.data import EncodedDataset, LoadedData
from sftmix.measure.calibration import calibrate, report
from sftmix.training.dynamics import one_checkpoint
from sftmix.training.loop import Stage
from sftmix.training.scoring import held_out_metrics, nll_by
from sftmix.types import Rows, RowScores, TrainingDynamics

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

    directory    the stage's directory, for the files
    eval_groups  the group of each held-out row; None: one group
    """

    def __init__(
        self, directory: Path, world: World, data: LoadedData, eval_groups: Sequence[str] | None = None
    ) -> None:
        self._directory, self._world, self._data, self._groups = directory, world, data, eval_groups
        self._sample = RowSubset(data.train, sample_rows(data.train.ids))

    def base(self, score: Callable[[TokenisedRows], RowScores]) -> Measured:
        """Measure the untrained model, whose scores of rows `score` gives."""
        files, figures, data = [SAMPLE], dict[str, Any](), self._data.eval
        if data is not None:
            held_out = score(data)
            figures = self._of_rows(held_out)
            self._world.on_main(lambda: write_eval(self._directory / "eval.parquet", data.ids, held_out))
            files.append("eval.parquet")
        self._keep_sample(0, score(self._sample))
        return Measured(files, figures)

    def trained(self, stage: Stage, module: nn.Module, *, steps: int) -> Measured:
        """Measure the module that the stage has trained for so many steps."""
        started = time.perf_counter()
        files, figures = [SAMPLE], dict[str, Any]()
        if self._data.eval is not None:
            files += ["eval.parquet", "calibration.json"]
            figures |= self._held_out(stage, module, self._data.eval)
        assert stage.scorer is not None
        self._keep_sample(steps, stage.scorer(module, self._sample))
        figures |= self._of_steps(stage, figures)
        figures["calibration_seconds"] = time.perf_counter() - started
        return Measured(files, figures)

    def _held_out(self, stage: Stage, module: nn.Module, data: EncodedDataset) -> dict[str, Any]:
        world = self._world
        assert stage.scorer is not None
        measured = calibrate(module, data, replace(stage.scorer, progress=f"{stage.name}: calibration"))
        calibration = report(measured, data.ids)
        file = self._directory / "eval.parquet"
        world.on_main(lambda: write_eval(file, data.ids, measured.scores, measured.brier_sum))
        world.on_main(lambda: write_json(self._directory / "calibration.json", calibration))
        del calibration["reliability"]
        return {**self._of_rows(measured.scores), "calibration": calibration}

    def _of_rows(self, scores: RowScores) -> dict[str, Any]:
        """Return the metrics of the held-out rows, with the NLL of each group if there are several."""
        by = {} if self._groups is None else {"eval_nll_by": nll_by(scores, self._groups)}
        return {**held_out_metrics(scores), **by}

    def _of_steps(self, stage: Stage, figures: Mapping[str, Any]) -> dict[str, Any]:
        lines = self._world.share(self._lines() if self._world.is_main else None)
        mixed = [line["step"] - 1 for line in lines if line["mixup_tokens"]]
        share = mixed_share(stage.order.batch, mixed, [line["step"] - 1 for line in lines], self._data.train.n_targets)
        return {"mixed_token_share": share, **best_evaluation(lines, figures.get("eval_nll"))}

    def _lines(self) -> list[dict[str, Any]]:
        """Return the needed figures of each line of metrics.jsonl."""
        kept = ("step", "epoch", "mixup_tokens", "eval_nll")
        return [{k: line.get(k) for k in kept} for line in read_steps(self._directory)]

    def _keep_sample(self, step: int, scores: RowScores) -> None:
        ids = [self._data.train.ids[row] for row in self._sample.rows]
        self._world.on_main(lambda: write_dynamics(self._directory / SAMPLE, one_checkpoint(ids, step, scores)))


@dataclass(frozen=True, slots=True)
class Measured:
    """Files written into the stage's directory, and figures for figures.json."""

    files: list[str]
    figures: Mapping[str, object]


def confidence_std(base: Path, trained: Path) -> dict[str, Any]:
    """Return the population standard deviation over the sample of minus the perplexity, before and after training.

    The keys under `log_` hold the same of minus the mean NLL per token, which single outliers do not decide. `change`
    is after / before - 1. A figure that is not finite, or whose before is not known, is None.

    base, trained  directories of the stages of the base model and of the trained one
    """
    after = read_dynamics(trained / SAMPLE)
    found: dict[str, Any] = {"rows": len(after.ids)}
    spread = _spread(after)
    before = _spread(read_dynamics(base / SAMPLE).of(after.ids)) if (base / SAMPLE).exists() else {}
    for prefix, new in spread.items():
        old = before.get(prefix)
        change = None if not old or new is None else new / old - 1
        found |= {f"{prefix}before": old, f"{prefix}after": new, f"{prefix}change": change}
    return found


def _spread(dynamics: TrainingDynamics) -> dict[str, float | None]:
    """Return the standard deviation of the perplexity at the last checkpoint, and under `log_` of its logarithm."""
    nll_N = dynamics.nll_sum[:, -1] / dynamics.n_tokens
    with np.errstate(over="ignore", invalid="ignore"):
        return {prefix: _finite(float(values.std())) for prefix, values in (("", np.exp(nll_N)), ("log_", nll_N))}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def best_evaluation(lines: Iterable[Mapping[str, Any]], last: float | None) -> dict[str, Any]:
    """Return the smallest held-out NLL of the evaluations during and after training: value, step, epoch (from 0).

    lines  of metrics.jsonl
    last   held-out NLL after the last step; None: no held-out rows
    """
    if last is None:
        return {}
    lines = list(lines) or [{"step": 0, "epoch": 0}]  # training stopped before the first step
    found = [(line["eval_nll"], line["step"], line["epoch"]) for line in lines[:-1] if line.get("eval_nll") is not None]
    nll, step, epoch = min([*found, (last, lines[-1]["step"], lines[-1]["epoch"])])
    return {"eval_nll_best": nll, "eval_nll_best_step": step, "eval_nll_best_epoch": epoch}


def mixed_share(
    batch: Callable[[int], Sequence[Unit]], mixed: Sequence[int], steps: Sequence[int], counts: np.ndarray
) -> float:
    """Return the share of the response tokens seen in training that were mixed at least once in their epoch.

    The n-th response token of an example is mixed if its partner has at least n response tokens. A repeat of an example
    within an epoch (NTP weight 0) may mix tokens that its first turn did not; it adds no tokens to the whole.

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
