"""Measurements of the base model and of the models trained from it, outside the training steps.

The base model: the held-out metrics, and the confidence of a sample of training rows. The trained target: the same,
token calibration, and the share of the response tokens that was mixed. The NTP baseline is measured in the same way, on
the same rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from sftmix.measure.calibration import TokenCalibration, calibrate, report
from sftmix.training.dynamics import one_checkpoint
from sftmix.training.loop import Stage
from sftmix.training.scoring import held_out_metrics, nll_by
from sftmix.types import Float64, Int64, Rows, RowScores

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


def measure(
    directory: Path,
    world: World,
    data: LoadedData,
    score: Callable[[TokenisedRows], RowScores],
    *,
    groups: Sequence[str] | None = None,
    step: int = 0,
    calibration: TokenCalibration | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Measure a model, whose scores of rows `score` gives, by all ranks together.

    Return the files that were written into `directory`, and figures for figures.json.

    groups       the group of each held-out row; None: one group
    step         at which the model is
    calibration  of the held-out rows, if it was measured: they are not scored again
    """
    files, figures = [SAMPLE], dict[str, Any]()
    if data.eval is not None:
        ids, brier = data.eval.ids, None if calibration is None else calibration.brier_sum
        scores = score(data.eval) if calibration is None else calibration.scores
        world.on_main(lambda: write_eval(directory / "eval.parquet", ids, scores, brier))
        files.append("eval.parquet")
        figures = held_out_metrics(scores) | ({} if groups is None else {"eval_nll_by": nll_by(scores, groups)})
    sample = RowSubset(data.train, sample_rows(data.train.ids))
    dynamics = one_checkpoint([data.train.ids[row] for row in sample.rows], step, score(sample))
    world.on_main(lambda: write_dynamics(directory / SAMPLE, dynamics))
    return files, figures


def measure_trained(
    world: World, data: LoadedData, stage: Stage, module: nn.Module, *, groups: Sequence[str] | None, steps: int
) -> tuple[list[str], dict[str, Any]]:
    """Measure the module that the stage has trained for so many steps, as `measure` does; with its calibration."""
    started, directory, calibration = time.perf_counter(), stage.directory, None
    assert stage.scorer is not None
    if data.eval is not None:
        calibration = calibrate(module, data.eval, stage.scorer)
    score = partial(stage.scorer, module)
    files, figures = measure(directory, world, data, score, groups=groups, step=steps, calibration=calibration)
    if data.eval is not None and calibration is not None:
        reported = report(calibration, data.eval.ids)
        world.on_main(lambda: write_json(directory / "calibration.json", reported))
        files.append("calibration.json")
        figures["calibration"] = {k: v for k, v in reported.items() if k != "reliability"}
    lines = world.share(world.on_main(lambda: read_steps(directory)))
    figures["mixed_token_share"] = mixed_share(stage.order.batch, lines, data.train.n_targets)
    figures |= best_evaluation(lines, figures.get("eval_nll"))
    figures["calibration_seconds"] = time.perf_counter() - started
    return files, figures


def confidence_std(base: Path, trained: Path) -> dict[str, Any]:
    """Return the population standard deviation over the sample of minus the perplexity, before and after training.

    The keys under `log_` hold the same of minus the mean NLL per token, which single outliers do not decide. `change`
    is after / before - 1. A figure that is not finite is None.

    base, trained  directories of the stages of the base model and of the trained one
    """
    samples = [read_dynamics(stage / SAMPLE) for stage in (base, trained)]
    nll = [dynamics.mean_nll[:, -1] for dynamics in samples]
    figures: dict[str, Any] = {"rows": len(samples[1].ids)}
    for prefix, spread in (("", lambda n: np.exp(n).std()), ("log_", np.std)):
        before, after = (finite(spread, n) for n in nll)
        figures |= {f"{prefix}before": before, f"{prefix}after": after, f"{prefix}change": change(before, after)}
    return figures


def finite(figure: Callable[..., Any], values: Float64 | Int64) -> float | None:
    """Return a figure of values; None if there are none, or it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):  # the perplexities of a model that diverged
        number = figure(values) if len(values) else np.nan
    return float(number) if np.isfinite(number) else None


def change(old: float | None, new: float | None) -> float | None:
    """Return new / old - 1; None if either is not known."""
    return new / old - 1 if old and new is not None else None


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
    within an epoch may mix tokens that its first turn did not; it adds no tokens to the whole.

    batch     step (from 0) -> the units of its global batch
    lines     of metrics.jsonl
    n_tokens  i64[N], response tokens
    """
    depths: dict[tuple[int, int], int] = {}
    for line in lines:
        for unit in batch(line["step"] - 1):
            is_pair = len(unit) == 2 and line["mixup_tokens"]
            depth = min(int(n_tokens[slot.row]) for slot in unit) if is_pair else 0
            for slot in unit:
                turn = line["epoch"], slot.row
                depths[turn] = max(depth, depths.get(turn, 0))
    return sum(depths.values()) / max(1, sum(int(n_tokens[row]) for _, row in depths))
