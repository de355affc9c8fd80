"""The contracts of components, checked on every answer of theirs in a run.

A component that breaks its contract stops the run with one line: its name, its answer, and the answers that are
allowed. All of it is looked at where the answer arrives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from sftmix.common.errors import ConfigError, ContractError
from sftmix.common.tables import impossible_numbers
from sftmix.components.base import (
    Callback,
    CallbackResult,
    Component,
    ConfidenceEstimator,
    Objective,
    PairSampler,
    Perturbation,
    Reference,
    Selector,
    Splitter,
)
from sftmix.components.view import SFTLoss
from sftmix.types import (
    MOST_GROUPS,
    UNPAIRED,
    UNPAIRED_NAME,
    Batch,
    Float64,
    Plan,
    Rows,
    Scores,
    Split,
    Tensor,
    TrainingDynamics,
)

_OF_BOTH = frozenset({"tokens", "ntp_tokens", "mixup_tokens", "mu_effective"})
OWN_OF_STEP = _OF_BOTH | {"loss", "ntp", "mixup", "learning_rate", "grad_norm", "step", "time", "epoch", "rows"}
OWN_OF_STEP |= {"tokens_total", "examples_total", "tokens_per_second"}
"""The names of the loop's own metrics in a line of metrics.jsonl."""
OWN_OF_STAGE = _OF_BOTH | {"ntp_count", "mixup_count", "mu_own", "mu_ntp", "skipped", "updates"}
OWN_OF_STAGE |= {"elapsed", "examples", "steps", "total_steps", "stopped_by", "machines"}
"""The names of the loop's own figures of a stage, in figures.json."""


def broken(kind: str, component: Component, answer: str, allowed: str) -> ContractError:
    """Return the error of a component whose answer is not allowed; `kind` is the option that chooses it."""
    return ContractError(f"{kind} {type(component).__name__} returned {answer}; allowed: {allowed}")


def check_dynamics(reference: Reference, dynamics: TrainingDynamics) -> TrainingDynamics:
    """Return the dynamics if their columns fit together and hold possible numbers; else raise ConfigError."""
    _is(dynamics, TrainingDynamics, "reference", reference, "collect()")
    size, checkpoints = len(dynamics.ids), len(dynamics.steps)
    columns: dict[str, Any] = {}
    for name in ("steps", "n_tokens", "n_correct", "nll_sum", "alone_nll_sum"):
        shape = {"steps": (checkpoints,), "n_tokens": (size,)}.get(name, (size, checkpoints))
        kind = "numbers" if name.endswith("nll_sum") else "whole numbers (int64)"
        allowed = f"{kind} {list(shape)}, for {size} ids and {checkpoints} checkpoints"
        if (column := getattr(dynamics, name)) is not None:
            whole = kind != "numbers"
            columns[name] = _array(column, "reference", reference, allowed, shape=shape, whole=whole, name=f"{name} ")
    dynamics = replace(dynamics, **columns)
    for name, wrong, allowed in impossible_numbers(dynamics):
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            first = f"{name} {columns[name].reshape(size, -1)[row, column]} for {dynamics.ids[row]}"
            raise broken("reference", reference, first, allowed)
    if dynamics.token_nll is not None:
        shapes = [np.shape(nll) for nll in dynamics.token_nll]
        if shapes != [(checkpoints, count) for count in dynamics.n_tokens.tolist()]:
            allowed = f"for each of the {size} ids an array [{checkpoints}, n_tokens]"
            raise broken("reference", reference, "a token_nll of other shapes", allowed)
    return dynamics


def check_confidence(estimator: ConfidenceEstimator, confidence: Float64, dynamics: TrainingDynamics) -> Float64:
    """Return the confidence as f64[N] if it is finite, and NaN exactly where unscored; else raise ConfigError."""
    size = len(dynamics.ids)
    values = _array(confidence, "confidence", estimator, f"{size} numbers, one per example", shape=(size,), whole=False)
    values = values.astype(np.float64)
    wrong = np.flatnonzero(np.isinf(values) | (np.isnan(values) == dynamics.scored))
    if len(wrong):
        first = f"{values[wrong[0]]} for {dynamics.ids[wrong[0]]} and {len(wrong) - 1} other examples"
        allowed = "a finite number for each example that was scored, NaN for each that was not"
        raise broken("confidence", estimator, first, allowed)
    return values


def check_split(splitter: Splitter, split: Split, scores: Scores) -> Split:
    """Return the split if it has one of at most MOST_GROUPS groups for each example; else raise ConfigError."""
    _is(split, Split, "splitter", splitter, "split()")
    names = split.names
    if len(names) > MOST_GROUPS:
        allowed = f"at most {MOST_GROUPS}, as their numbers are int8; merge some"
        raise broken("splitter", splitter, f"{len(names)} groups ({names[0]}, {names[1]}, ..., {names[-1]})", allowed)
    if len({*names, UNPAIRED_NAME}) <= len(names):  # the files of a split tell groups by their names
        raise broken("splitter", splitter, f"the names {list(names)}", f"each name once, and none {UNPAIRED_NAME!r}")
    allowed = f"for each of {len(scores)} examples a whole number: -1 (unpaired), or 0 to {len(names) - 1}"
    group = _array(split.group, "splitter", splitter, allowed, shape=(len(scores),), name="groups ")
    outside = (group < UNPAIRED) | (group >= len(names))
    if outside.any():
        raise broken("splitter", splitter, f"group {group[outside][0]} with the names {list(names)}", allowed)
    unscored = np.isnan(scores.confidence) & (group != UNPAIRED)
    if np.isfinite(scores.confidence).any() and unscored.any():
        first = f"group {group[unscored][0]} for {scores.id[int(np.flatnonzero(unscored)[0])]}, which has no confidence"
        raise broken("splitter", splitter, first, "-1 (unpaired) for every example without a confidence (NaN)")
    return replace(split, group=group.astype(np.int8))


def check_pairs(sampler: PairSampler, pairs: Rows, split: Split, scores: Scores) -> Rows:
    """Return the pairs if they are i64[P, 2], each of two different rows that have a group; else raise ConfigError.

    A row may be in several pairs, and both rows of a pair may be of one group.
    """
    rows = _array(pairs, "pairing", sampler, "i64[P, 2], rows", shape=(None, 2))
    _in_range("pairing", sampler, rows, len(scores))
    unpaired_P2 = split.group[rows] == UNPAIRED
    of_group = f"rows of a group (split.group 0 to {len(split.names) - 1}); leave out a row of group {UNPAIRED}"
    for wrong, row, problem, allowed in (
        (
            rows[:, 0] == rows[:, 1],
            rows[:, 0],
            "a row with itself",
            "two different rows; leave out a row without a partner",
        ),
        (unpaired_P2.any(1), rows[range(len(rows)), unpaired_P2.argmax(1)], "with an unpaired row", of_group),
    ):
        if wrong.any():
            place = int(wrong.argmax())
            answer = f"pair {place}, {rows[place].tolist()}, {problem}: {scores.id[row[place]]} ({wrong.sum()} in all)"
            raise broken("pairing", sampler, answer, f"{allowed}, it is trained on by NTP then")
    return rows.astype(np.int64)


def check_selection(selector: Selector, rows: Rows, n_rows: int) -> Rows:
    """Return the rows in file order if they are distinct rows of 0..N-1, at least one; else raise ConfigError."""
    if np.size(rows) == 0:
        raise ConfigError(
            f"selector {type(selector).__name__}: none of the {n_rows} examples is selected, so nothing would be "
            "trained on"
        )
    selected = _array(rows, "selector", selector, "i64[K], distinct rows", shape=(None,))
    _in_range("selector", selector, selected, n_rows)
    rows_once, times = np.unique(selected, return_counts=True)
    if len(rows_once) != len(selected):
        raise broken("selector", selector, f"row {rows_once[times > 1][0]} twice", "each row once")
    return rows_once.astype(np.int64)


def check_plan(objective: Objective, plan: Plan, batch: Batch) -> Plan:
    """Return the plan if its parts have the types, shapes and values of this micro-batch; else raise ConfigError.

    What weighs is counted, as the step leaves out a term whose count is 0.
    """
    _is(plan, Plan, "objective", objective, "plan()")
    _check_tensors(objective, plan, len(batch.labels))
    for name in ("ntp_count", "mixup_count", "mu"):
        if not isinstance(value := getattr(plan, name), Real) or not 0 <= float(value) < float("inf"):
            answer = value if isinstance(value, Real) else _described(value)
            raise broken("objective", objective, f"{name} {answer}", "a finite number (float or int), 0 or more")
    if plan.mixup_mean not in ("own", "ntp"):
        raise broken("objective", objective, f"mixup_mean {plan.mixup_mean!r}", "own, ntp")
    if not plan.ntp_count and plan.row_weight.count_nonzero():
        raise broken("objective", objective, "ntp_count 0 for tokens with a weight", "above 0, as their number")
    if not plan.mixup_count and plan.mixup_mean == "own" and plan.pair_weight.count_nonzero():
        raise broken("objective", objective, "mixup_count 0 for pairs with a weight", "above 0, as their number")
    return plan


def _check_tensors(objective: Objective, plan: Plan, rows: int) -> None:
    """Check pairs, lambdas and weights for so many token rows."""
    import torch

    pairs = plan.pairs
    if not isinstance(pairs, torch.Tensor) or pairs.dtype != torch.int64 or pairs.shape[1:] != (2,):
        raise broken("objective", objective, f"pairs {_described(pairs)}", "i64[M, 2], token rows")
    for name, size, of in (
        ("pair_weight", len(pairs), "pair"),
        ("lam", len(pairs), "pair"),
        ("row_weight", rows, "response token"),
    ):
        value = getattr(plan, name)
        if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == (size,)):
            allowed = f"a tensor of floats [{size}], one for each {of} of the micro-batch"
            raise broken("objective", objective, f"{name} {_described(value)}", allowed)
        good, allowed = value.isfinite(), "finite numbers"
        if name == "lam":
            good, allowed = (value >= 0) & (value <= 1), "0 to 1"
        if not good.all():
            raise broken("objective", objective, f"{name} {value[~good][0].item()}", allowed)
    _in_range("objective", objective, pairs, rows, "pairs of the rows", "token rows ")


def check_loss(objective: Objective, out: SFTLoss, plan: Plan) -> None:
    """Raise ConfigError for a loss that is no scalar with a graph, or figures that are not detached, one for each."""
    from sftmix import functional

    _is(out, functional.SFTLoss, "objective", objective, "loss()")
    shapes = {"loss": (), "nll": tuple(plan.row_weight.shape), "mixup": tuple(plan.lam.shape)}
    for name, shape in shapes.items():
        value, has_graph = getattr(out, name), name == "loss"
        allowed = f"a tensor of floats {list(shape)}, {'with a graph' if has_graph else 'detached'}"
        if not hasattr(value, "requires_grad") or tuple(value.shape) != shape or not value.is_floating_point():
            raise broken("objective", objective, f"{name} {_described(value)}", allowed)
        if value.requires_grad is not has_graph:
            raise broken("objective", objective, f"{name} {'without' if has_graph else 'with'} a graph", allowed)


def check_embeddings(perturbation: Perturbation, before: Tensor, changed: Tensor) -> Tensor:
    """Return the changed embeddings if they have the shape and type of the given ones; else raise ConfigError."""
    if getattr(changed, "shape", None) != before.shape or changed.dtype != before.dtype:
        raise broken("perturbation", perturbation, _described(changed), f"embeddings {_described(before)}")
    return changed


def check_callback_result(callback: Callback, hook: str, result: CallbackResult | None) -> CallbackResult | None:
    """Return the result of a hook if it is None or a CallbackResult with numbers; else raise ConfigError.

    None of its metrics may have a name that the loop gives itself: it would take the place of the loop's own.
    """
    if result is None:
        return None
    _is(result, CallbackResult, "callbacks", callback, f"{hook}()", " or None")
    if not isinstance(result.metrics, Mapping) or not all(isinstance(v, Real) for v in result.metrics.values()):
        raise broken("callbacks", callback, f"metrics {result.metrics!r}", "a mapping of names to numbers")
    reserved = OWN_OF_STAGE if hook == "on_stage_end" else OWN_OF_STEP
    if taken := sorted(reserved & result.metrics.keys()):
        answer, other = f"the metric {taken[0]} from {hook}()", f"my_{taken[0]}"
        raise broken("callbacks", callback, answer, f"names that the loop does not use itself; rename it, as {other}")
    plain = {name: v if isinstance(v, (int, float)) else float(v) for name, v in result.metrics.items()}  # for JSON
    return replace(result, metrics=plain)


def _is(value: object, kind: type, option: str, component: Component, method: str, more: str = "") -> None:
    if not isinstance(value, kind):
        home = kind.__module__.removesuffix(".base")
        raise broken(option, component, _described(value), f"{method} returns {home}.{kind.__name__}{more}")


def _array(
    answer: Any,
    option: str,
    component: Component,
    allowed: str,
    *,
    shape: Sequence[int | None],
    whole: bool = True,
    name: str = "",
) -> np.ndarray:
    """Return an answer as an array of (whole) numbers of this shape, None for any length; else raise ConfigError."""
    try:
        array = np.asarray(answer)
    except (TypeError, ValueError, RuntimeError):  # a ragged list, or a tensor that no array can be made of
        array = np.empty(0, dtype=object)
    fits = array.ndim == len(shape) and all(n in (None, size) for n, size in zip(shape, array.shape, strict=True))
    if array.dtype.kind not in ("iu" if whole else "iuf") or not fits:
        raise broken(option, component, f"{name}{_described(answer)}", allowed)
    return array


def _in_range(
    option: str, component: Component, rows: np.ndarray | Tensor, n_rows: int, name: str = "rows", of: str = ""
) -> None:
    if len(rows) and not 0 <= rows.min() <= rows.max() < n_rows:
        raise broken(option, component, f"{name} {rows.min()} to {rows.max()}", f"{of}0 to {n_rows - 1}")


def _described(value: Any) -> str:
    """Name the type of a value, with dtype and shape if it has them."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    length = f" of {len(value)}" if isinstance(value, (list, tuple, dict, set)) else ""
    return f"{'None' if value is None else type(value).__name__}{length}"
