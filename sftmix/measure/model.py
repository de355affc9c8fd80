"""Measurements of the base model and of the models trained from it, outside the training steps.

The base model: the held-out metrics, and the confidence of a sample of training rows. The trained target: the same, and
the share of the response tokens that was mixed. The NTP baseline is measured in the same way, on the same rows. What
callbacks measure beside that is in delivered.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sftmix.batches.order import RowSubset
from sftmix.data import LoadedData
from sftmix.disk.files import read_steps
from sftmix.disk.tables import read_dynamics, write_dynamics, write_eval
from sftmix.ranks.rng import stable_hash
from sftmix.training.dynamics import one_checkpoint
from sftmix.training.scoring import Scorer, held_out_metrics
from sftmix.types import Float64, Int64, RowLosses, Rows

SAMPLE = "sample.parquet"
"""The file in which a stage keeps the dynamics of the sample under its model."""

SAMPLE_SHARE, SAMPLE_MIN, SAMPLE_MAX = 0.05, 128, 1000
"""Share of the training rows whose confidence is measured under the base model and the trained ones, and its bounds in
rows: few beside the training itself, and enough for a standard deviation."""


def sample_rows(ids: Sequence[str]) -> Rows:
    """Return some of the N rows, in file order, chosen by a hash of the id: the same in every arm and every run."""
    size = min(SAMPLE_MAX, max(SAMPLE_MIN, int(SAMPLE_SHARE * len(ids))))
    ranked = sorted(range(len(ids)), key=lambda row: stable_hash("confidence_sample", ids[row]))
    return np.sort(ranked[:size])


def measure(
    directory: Path,
    data: LoadedData,
    scorer: Scorer,
    module: nn.Module,
    *,
    step: int = 0,
    scores: RowLosses | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Measure a model by all ranks together; return the files written into `directory`, and figures for figures.json.

    step    up to which the model was trained
    scores  of the held-out rows, if they are known; None: they are measured
    """
    on_main = scorer.world.on_main
    files = [SAMPLE]
    figures = dict[str, Any]()
    if (held_out := data.eval) is not None:
        of_rows = scores or scorer(module, held_out)
        figures |= held_out_metrics(of_rows)
        on_main(lambda: write_eval(directory / "eval.parquet", held_out.ids, of_rows, of_rows.kept.get("brier_sum")))
        files.append("eval.parquet")
    sample = RowSubset(data.train, sample_rows(data.train.ids))
    dynamics = one_checkpoint(sample.ids, step, scorer(module, sample))
    on_main(lambda: write_dynamics(directory / SAMPLE, dynamics))
    return files, figures


def confidence_std(run: Path, *arms: str) -> dict[str, Any]:
    """Return the population standard deviation over the sample of minus the perplexity, before and after training.

    The keys under `log_` hold the same of minus the mean NLL per token, which single outliers do not decide. `change`
    is after / before - 1, `vs_baseline` after / after NTP - 1. A figure that is not finite is None.

    arms  stages of the run: a trained model's, and NTP's, if it is to be held beside it
    """
    nll = [read_dynamics(run / stage / SAMPLE).mean_nll[:, -1] for stage in ("base", *arms)]  # [sample] each
    figures: dict[str, Any] = {"rows": len(nll[1])}
    for prefix, spread in (("", lambda n: np.exp(n).std()), ("log_", np.std)):
        before, after, *plain = (finite(spread, n) for n in nll)  # plain: NTP's, or nothing
        figures |= {f"{prefix}before": before, f"{prefix}after": after, f"{prefix}change": change(before, after)}
        figures |= {f"{prefix}vs_baseline": change(other, after) for other in plain}
    return figures


def finite(figure: Callable[..., Any], values: Float64 | Int64) -> float | None:
    """Return a figure of values; None if there are none, or it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):  # the perplexities of a model that diverged
        number = figure(values) if len(values) else np.nan
    return float(number) if np.isfinite(number) else None


def change(old: float | None, new: float | None) -> float | None:
    """Return new / old - 1; None if either is not known."""
    return new / old - 1 if old and new is not None else None


def best_evaluation(lines: Sequence[Any], last: float | None) -> dict[str, Any]:
    """Return the smallest held-out NLL of the evaluations during and after training: value, step, epoch (from 0).

    lines  of metrics.jsonl
    last   held-out NLL after the last step, of weights as they were trained, as all of these; None: no held-out rows
    """
    if last is None:
        return {}
    # An evaluation before the first step is in the line of step 1, under a name of its own.
    start = {"step": 0, "epoch": 0, "eval_nll": (lines or [{}])[0].get("start_eval_nll")}
    *earlier, end = [start, *lines]  # start, if training stopped before the first step
    evaluated = [line for line in [*earlier, {**end, "eval_nll": last}] if line.get("eval_nll") is not None]
    best = min(evaluated, key=lambda line: line["eval_nll"])
    return {
        "eval_nll_best": best["eval_nll"],
        "eval_nll_best_step": best["step"],
        "eval_nll_best_epoch": best["epoch"],
    }


def mixed_share(batch: Callable[[int], Any], lines: Sequence[Any], n_tokens: Int64) -> float:
    """Return the share of the response tokens seen in training that were mixed at least once in their epoch.

    The n-th response token of an example is mixed if its partner has at least n response tokens. A repeat of an example
    within an epoch may mix tokens that its first turn did not; it adds no tokens to the whole.

    batch     step (from 0) -> the units of its global batch
    lines     of metrics.jsonl
    n_tokens  i64[N], response tokens
    """
    counts, depths = n_tokens.tolist(), Counter[Any]()
    for line in lines:
        for unit in batch(line["step"] - 1):
            rows = [slot.row for slot in unit]
            depth = min(counts[row] for row in rows) if len(rows) == 2 and line["mixup_tokens"] else 0
            for row in rows:
                depths[line["epoch"], row] = max(depth, depths[line["epoch"], row])
    # 5, 3 and 2 tokens, the first two a pair: 3 + 3 of 10 were mixed
    return sum(depths.values()) / max(1, sum(counts[row] for _, row in depths))


def ends_of_loss(stage: Path) -> dict[str, float]:
    """Return the loss per token of the first and of the last steps of a stage: a tenth of all, or 8, or half.

    Steps whose loss was not finite are left out; {} with fewer than two others. It is weighted by tokens, because the
    last step of an epoch may hold a single short response.
    """
    lines = [line for line in read_steps(stage) if line["loss"] is not None and line["ntp_tokens"]]
    size = min(len(lines) // 2, max(8, len(lines) // 10))  # 200 lines: 20; 40: 8; 10: 5
    means = {}
    for name, end in (("loss_first", lines[:size]), ("loss_last", lines[-size:])):
        if size:
            tokens = [line["ntp_tokens"] for line in end]
            means[name] = float(np.average([line["loss"] for line in end], weights=tokens))
    return means
