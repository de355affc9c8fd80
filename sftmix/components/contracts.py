"""The contracts of components, checked on every answer of theirs in a run.

A component that breaks its contract stops the run with one line: its name, its answer, and the answers that are
allowed. All of it is looked at where the answer arrives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from sftmix.common.errors import ConfigError, ContractError
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
from sftmix.types import (
    MOST_GROUPS,
    NOT_COUNTED,
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

if TYPE_CHECKING:
    from sftmix.functional import SFTLoss

_OF_BOTH = frozenset({"tokens", "ntp_tokens", "mixup_tokens", "mu_effective"})
_SUMS = frozenset({"tokens_total", "examples_total", "tokens_per_second"})
_COUNTS = frozenset({"ntp_count", "mixup_count", "mu_own", "mu_ntp", "skipped", "updates"})
_LOSSES = frozenset({"loss", "ntp", "mixup", "learning_rate", "grad_norm"})
OWN_OF_STEP = _OF_BOTH | _LOSSES | _SUMS | {"step", "time", "epoch", "rows"}
"""The names of the loop's own metrics in a line of metrics.jsonl."""
OWN_OF_STAGE = _OF_BOTH | _COUNTS | {"elapsed", "examples", "steps", "total_steps", "stopped_by", "machines"}
"""The names of the loop's own figures of a stage, in figures.json."""


def broken(kind: str, component: Component, answer: str, allowed: str) -> ContractError:
    """Return the error of a component whose answer is not allowed; `kind` is the option that chooses it."""
    return ContractError(f"{kind} {type(component).__name__} returned {answer}; allowed: {allowed}")


def check_dynamics(reference: Reference, dynamics: TrainingDynamics) -> TrainingDynamics:
    """Return the dynamics if their columns fit together and hold possible numbers; else raise ConfigError."""
    _is(dynamics, TrainingDynamics, "reference", reference, "collect()")
    size, checkpoints = len(dynamics.ids), len(dynamics.steps)
    shapes: dict[str, tuple[int, ...]] = {"steps": (checkpoints,), "n_tokens": (size,)}
    shapes |= dict.fromkeys(("n_correct", "nll_sum", "alone_nll_sum"), (size, checkpoints))
    if dynamics.alone_nll_sum is None:
        del shapes["alone_nll_sum"]
    columns: dict[str, Any] = {}
    for name, shape in shapes.items():
        values = columns[name] = _numbers(getattr(dynamics, name), "reference", reference, f"numbers as {name}")
        if values.shape != shape:
            allowed = f"{list(shape)}, for {size} ids and {checkpoints} checkpoints"
            raise broken("reference", reference, f"{name} of shape {list(values.shape)}", allowed)
        if not name.endswith("nll_sum") and not np.issubdtype(values.dtype, np.integer):
            raise broken("reference", reference, f"{name} of type {values.dtype}", "whole numbers (int64)")
    for name, good, allowed in _possible(columns):
        if not good.all():
            row, column = np.argwhere(~good)[0]
            first = f"{name} {columns[name].reshape(size, -1)[row, column]} for {dynamics.ids[row]}"
            raise broken("reference", reference, first, allowed)
    if dynamics.token_nll is not None:
        shapes_found = [np.shape(nll) for nll in dynamics.token_nll]
        if shapes_found != [(checkpoints, count) for count in columns["n_tokens"].tolist()]:
            allowed = f"for each of the {size} ids an array [{checkpoints}, n_tokens]"
            raise broken("reference", reference, "a token_nll of other shapes", allowed)
    return replace(dynamics, **columns)


def _possible(columns: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray, str]]:
    """Return (name, which values are possible [N, C] or [N, 1], in words) of the columns of dynamics."""
    n_tokens, n_correct = columns["n_tokens"][:, None], columns["n_correct"]
    counted = (n_correct >= NOT_COUNTED) & (n_correct <= n_tokens)
    possible = [
        ("n_tokens", n_tokens >= 0, "0 (not scored) and above"),
        ("n_correct", counted, f"0 to n_tokens, or {NOT_COUNTED} (not counted)"),
    ]
    for name in ("nll_sum", "alone_nll_sum"):
        if name in columns:
            good = np.isfinite(columns[name]) & (columns[name] >= 0)
            possible.append((name, good | (n_tokens <= 0), "finite numbers from 0 where n_tokens is above 0"))
    return possible


def check_confidence(estimator: ConfidenceEstimator, confidence: Float64, dynamics: TrainingDynamics) -> Float64:
    """Return the confidence as f64[N] if it is finite, and NaN exactly where unscored; else raise ConfigError."""
    allowed = f"{len(dynamics.ids)} numbers, one per example"
    values = _numbers(confidence, "confidence", estimator, allowed).astype(np.float64)
    if values.shape != (len(dynamics.ids),):
        raise broken("confidence", estimator, f"shape {list(values.shape)}", allowed)
    wrong = np.flatnonzero(np.isinf(values) | (np.isnan(values) == dynamics.scored))
    if len(wrong):
        first = f"{values[wrong[0]]} for {dynamics.ids[wrong[0]]} and {len(wrong) - 1} other examples"
        allowed = "a finite number for each example that was scored, NaN for each that was not"
        raise broken("confidence", estimator, first, allowed)
    return values


def check_split(splitter: Splitter, split: Split, scores: Scores) -> Split:
    """Return the split if it has one of at most MOST_GROUPS groups for each example; else raise ConfigError."""
    _is(split, Split, "splitter", splitter, "split()")
    group, names = np.asarray(split.group), split.names
    if len(names) > MOST_GROUPS:
        allowed = f"at most {MOST_GROUPS}, as their numbers are int8; merge some"
        raise broken("splitter", splitter, f"{len(names)} groups ({names[0]}, {names[1]}, ..., {names[-1]})", allowed)
    if len({*names, UNPAIRED_NAME}) <= len(names):  # the files of a split tell groups by their names
        raise broken("splitter", splitter, f"the names {list(names)}", f"each name once, and none {UNPAIRED_NAME!r}")
    allowed = f"for each of {len(scores)} examples a whole number: -1 (unpaired), or 0 to {len(names) - 1}"
    if group.shape != (len(scores),):
        raise broken("splitter", splitter, f"groups of shape {list(group.shape)}", allowed)
    if not np.issubdtype(group.dtype, np.integer):
        raise broken("splitter", splitter, f"groups of type {group.dtype}", f"{allowed} (int8)")
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
    rows = _numbers(pairs, "pairing", sampler, "i64[P, 2], rows")
    if rows.ndim != 2 or rows.shape[1] != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise broken("pairing", sampler, f"{rows.dtype}{list(rows.shape)}", "i64[P, 2], rows")
    _in_range("pairing", sampler, rows, len(scores))
    alone, unpaired_P2 = rows[:, 0] == rows[:, 1], split.group[rows] == UNPAIRED
    if alone.any():
        first = f"of {scores.id[rows[alone][0, 0]]} with itself"
        raise _wrong_pair(sampler, rows, alone, first, "two different rows; leave out a row without a partner")
    if unpaired_P2.any():
        first = f"with {scores.id[rows[unpaired_P2][0]]}, which is unpaired"
        allowed = f"rows of a group (split.group 0 to {len(split.names) - 1}); leave out a row of group {UNPAIRED}"
        raise _wrong_pair(sampler, rows, unpaired_P2.any(axis=1), first, allowed)
    return rows.astype(np.int64)


def _wrong_pair(sampler: PairSampler, pairs: Rows, wrong: np.ndarray, first: str, allowed: str) -> ContractError:
    """Return the error of the pairs that are `wrong`, bool[P], of which the first is described."""
    places = np.flatnonzero(wrong)
    count = f"{len(places)} such pair{'s' * (len(places) > 1)}"
    answer = f"pair {places[0]}, {pairs[places[0]].tolist()}, {first} ({count})"
    return broken("pairing", sampler, answer, f"{allowed}, it is trained on by NTP then")


def check_selection(selector: Selector, rows: Rows, n_rows: int) -> Rows:
    """Return the rows in file order if they are distinct rows of 0..N-1, at least one; else raise ConfigError."""
    selected = _numbers(rows, "selector", selector, "i64[K], distinct rows")
    if selected.shape == (0,):
        raise ConfigError(
            f"selector {type(selector).__name__}: none of the {n_rows} examples is selected, so nothing would be "
            "trained on"
        )
    if selected.ndim != 1 or not np.issubdtype(selected.dtype, np.integer):
        raise broken("selector", selector, f"{selected.dtype}{list(selected.shape)}", "i64[K], distinct rows")
    _in_range("selector", selector, selected, n_rows)
    rows_once, times = np.unique(selected, return_counts=True)
    if len(rows_once) != len(selected):
        raise broken("selector", selector, f"row {rows_once[times > 1][0]} twice", "each row once")
    return rows_once.astype(np.int64)


def check_plan(objective: Objective, plan: Plan, batch: Batch) -> Plan:
    """Return the plan if its parts have the types, shapes and values of this micro-batch; else raise ConfigError."""
    _is(plan, Plan, "objective", objective, "plan()")
    _check_tensors(objective, plan, batch.labels)
    for name in ("ntp_count", "mixup_count", "mu"):
        if not isinstance(value := getattr(plan, name), Real) or not 0 <= float(value) < float("inf"):
            answer = value if isinstance(value, Real) else _described(value)
            raise broken("objective", objective, f"{name} {answer}", "a finite number (float or int), 0 or more")
    if plan.mixup_mean not in ("own", "ntp"):
        raise broken("objective", objective, f"mixup_mean {plan.mixup_mean!r}", "own, ntp")
    _check_counts(objective, plan)
    return plan


def _check_counts(objective: Objective, plan: Plan) -> None:
    """Check that what weighs is counted: the step leaves out a term whose count is 0. Looks at values only then."""
    if not plan.ntp_count and plan.row_weight.count_nonzero():
        raise broken("objective", objective, "ntp_count 0 for tokens with a weight", "above 0, as their number")
    if not plan.mixup_count and plan.mixup_mean == "own" and plan.pair_weight.count_nonzero():
        raise broken("objective", objective, "mixup_count 0 for pairs with a weight", "above 0, as their number")


def _check_tensors(objective: Objective, plan: Plan, labels: Tensor) -> None:
    """Check pairs, lambdas and weights. Each look at values waits for the device, as the counts of a plan do, too."""
    import torch

    pairs = plan.pairs
    if not isinstance(pairs, torch.Tensor) or pairs.dtype != torch.int64 or pairs.shape[1:] != (2,):
        raise broken("objective", objective, f"pairs {_described(pairs)}", "i64[M, 2], token rows")
    _check_device(objective, "pairs", pairs, labels)
    weights = {"pair_weight": len(pairs), "lam": len(pairs), "row_weight": len(labels)}
    for name, size in weights.items():
        value = getattr(plan, name)
        of = f"[{size}], one for each {'response token' if 'row' in name else 'pair'} of the micro-batch"
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            raise broken("objective", objective, f"{name} {_described(value)}", f"a tensor of floats {of}")
        if tuple(value.shape) != (size,):
            raise broken("objective", objective, f"{name} {list(value.shape)}", of)
        _check_device(objective, name, value, labels)
        good, allowed = value.isfinite(), "finite numbers"
        if name == "lam":
            good, allowed = (value >= 0) & (value <= 1), "0 to 1"
        if not good.all():
            raise broken("objective", objective, f"{name} {value[~good][0].item()}", allowed)
    low, high = (int(pairs.min()), int(pairs.max())) if len(pairs) else (0, -1)
    if low < 0 or high >= len(labels):
        raise broken("objective", objective, f"pairs of the rows {low} to {high}", f"token rows 0 to {len(labels) - 1}")


def _check_device(objective: Objective, name: str, value: Tensor, labels: Tensor) -> None:
    if value.device != labels.device:
        raise broken("objective", objective, f"{name} on {value.device}", f"tensors on {labels.device}, as the batch's")


def check_loss(objective: Objective, out: SFTLoss, plan: Plan) -> None:
    """Raise ConfigError for a loss that is no scalar with a graph, or figures that are not detached, one for each."""
    from sftmix.functional import SFTLoss

    _is(out, SFTLoss, "objective", objective, "loss()")
    shapes = {"loss": (), "nll": tuple(plan.row_weight.shape), "mixup": tuple(plan.lam.shape)}
    for name, shape in shapes.items():
        value, has_graph = getattr(out, name), name == "loss"
        allowed = f"a tensor of floats {list(shape)}, {'with a graph' if has_graph else 'detached'}"
        if not hasattr(value, "requires_grad") or tuple(value.shape) != shape or not value.is_floating_point():
            raise broken("objective", objective, f"{name} {_described(value)}", allowed)
        if value.requires_grad is not has_graph:
            raise broken("objective", objective, f"{name} {'without' if has_graph else 'with'} a graph", allowed)


def check_embeddings(perturbation: Perturbation, given: Tensor, changed: Tensor) -> Tensor:
    """Return the changed embeddings if they have the shape and type of the given ones; else raise ConfigError."""
    if getattr(changed, "shape", None) != given.shape or changed.dtype != given.dtype:
        raise broken("perturbation", perturbation, _described(changed), f"embeddings {_described(given)}")
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
    own = OWN_OF_STAGE if hook == "on_stage_end" else OWN_OF_STEP
    if taken := sorted(own & result.metrics.keys()):
        answer, other = f"the metric {taken[0]} from {hook}()", f"my_{taken[0]}"
        raise broken("callbacks", callback, answer, f"names that the loop does not use itself; rename it, as {other}")
    plain = {name: v if isinstance(v, (int, float)) else float(v) for name, v in result.metrics.items()}  # for JSON
    return replace(result, metrics=plain)


def _is(value: object, kind: type, option: str, component: Component, method: str, more: str = "") -> None:
    if not isinstance(value, kind):
        allowed = f"{method} returns sftmix.{_home(kind)}.{kind.__name__}{more}"
        raise broken(option, component, _described(value), allowed)


def _home(kind: type) -> str:
    return kind.__module__.removeprefix("sftmix.").removesuffix(".base")


def _numbers(values: Any, option: str, component: Component, allowed: str) -> np.ndarray:
    """Return the answer as an array of numbers; else raise ConfigError."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # a ragged list, or a tensor that no array can be made of
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf":
        raise broken(option, component, _described(values), allowed)
    return array


def _in_range(option: str, component: Component, rows: np.ndarray, n_rows: int) -> None:
    if rows.size and not 0 <= rows.min() <= rows.max() < n_rows:
        raise broken(option, component, f"rows {rows.min()} to {rows.max()}", f"0 to {n_rows - 1}")


def _described(value: Any) -> str:
    """Name the type of a value, with dtype and shape if it has them."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    length = f" of {len(value)}" if isinstance(value, (list, tuple, dict, set)) else ""
    return f"{'None' if value is None else type(value).__name__}{length}"
