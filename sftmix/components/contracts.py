"""The contracts of components, checked on every answer of theirs in a run.

A component that breaks its contract stops the run with one line: its name, its answer, and the answers that are
allowed. All of it is checked where the answer arrives. What a component is given is read-only.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, replace
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from sftmix.components.base import CallbackResult, ConfidenceEstimator
from sftmix.components.component import OF_DYNAMICS, Component, Need
from sftmix.types import (
    MOST_GROUPS,
    OF_TOKENS,
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
from sftmix.types.impossible import impossible_numbers
from sftmix.words.errors import ConfigError, ContractError, DataError

OF_EXAMPLES = ("epoch", "rows", "ntp_tokens", "mixup_tokens", "tokens", "tokens_total", "examples_total")
"""Metrics of a step that follow from its examples alone: the hash of its rows, and counts."""
OF_LOSSES = ("loss", "ntp", "ntp_loss", "mixup", "mu_effective", "learning_rate", "grad_norm")
"""Metrics of a step that follow from weights and examples."""
OF_CLOCKS = ("time", "tokens_per_second")
"""Metrics of a step that measure time."""
OWN_OF_STEP = {"step", *OF_EXAMPLES, *OF_LOSSES, *OF_CLOCKS}
"""All that the loop itself writes in a line of metrics.jsonl; callbacks add more."""
OWN_OF_STAGE = {"steps", "total_steps", "updates", "skipped", "stopped_by", "elapsed", "machines", "examples", "tokens"}
OWN_OF_STAGE |= {"ntp_tokens", "mixup_tokens", "ntp_count", "mixup_count", "mu_effective", "mu_own", "mu_ntp"}
"""The names of the loop's own figures of a stage, in figures.json."""
MEASURED = {"eval_nll", "eval_accuracy", "eval_exact_match", "eval_nll_as_trained", "eval_nll_best"}
MEASURED |= {"eval_nll_best_step", "eval_nll_best_epoch", "calibration", "calibration_seconds", "mixed_token_share"}
MEASURED |= {"scoring_seconds", "wall_seconds", "peak_memory_bytes", "made_by"}
"""The names of the other figures there, which the pipeline gives itself."""


Record = TypeVar("Record", Scores, Split, TrainingDynamics)


def read_only(record: Record) -> Record:
    """Return a record as a component gets it, who cannot change its arrays and lists: others read them after it."""
    return replace(record, **{one.name: _fixed(getattr(record, one.name)) for one in fields(record)})


def _fixed(value: Any, *, large: bool = False) -> Any:
    if isinstance(value, np.ndarray):
        # Copied, as torch.from_numpy writes to a read-only view. What is large, of each token or state, is a view.
        value = value.view() if large or value.dtype == np.float16 else value.copy()
        value.flags.writeable = False
    elif isinstance(value, Mapping):
        value = {name: _fixed(one) for name, one in value.items()}
    elif isinstance(value, (list, tuple)):
        value = tuple(_fixed(one, large=True) for one in value)
    return value


def broken(component: Component, answer: str, allowed: str) -> ContractError:
    """Return the error of a component whose answer is not allowed."""
    return ContractError(f"{type(component).option} {component} returned {answer}; allowed: {allowed}")


def check_dynamics(reference: Component, dynamics: Any) -> TrainingDynamics:
    """Return the dynamics if their columns fit together and hold possible numbers; else raise ContractError."""
    _check_type(reference, dynamics, TrainingDynamics)
    each = (len(dynamics.ids), len(dynamics.steps))
    shapes = {"steps": each[1:], "n_tokens": each[:1], "n_correct": each, "nll_sum": each, "alone_nll_sum": each}
    for name, shape in shapes.items():
        if (column := getattr(dynamics, name)) is not None:
            kinds = "iuf" if name.endswith("nll_sum") else "iu"
            dynamics = replace(dynamics, **{name: _array(reference, name, column, shape, kinds)})
    if len(set(dynamics.ids)) < len(dynamics.ids):
        raise broken(reference, "ids of which some are equal", "each example once")
    if (states := dynamics.states) is not None:  # [N, D], whatever D
        _array(reference, "states", states, (len(dynamics.ids), np.shape(states)[-1]), "f")
    for name in OF_TOKENS:
        if (column := getattr(dynamics, name)) is not None:
            _check_tokens(reference, name, column, dynamics)
    for name, wrong, allowed in impossible_numbers(dynamics):
        _check_each(reference, f"{name} of", getattr(dynamics, name), wrong.any(axis=1), dynamics.ids, allowed)
    return dynamics


def check_given(component: Component, dynamics: TrainingDynamics, by: str) -> None:
    """Raise DataError if a component needs a field that these dynamics lack.

    by  the reference that made them
    """
    for need in sorted(component.needs & OF_DYNAMICS.keys() - {Need.TEXTS}):
        if getattr(dynamics, OF_DYNAMICS[need]) is None:
            raise DataError(
                f"{component.option} {component} needs {need}, which the dynamics of reference {by} lack (field "
                f"{OF_DYNAMICS[need]}); use --reference TrainedReference or FromCheckpoints in another --out, or "
                f"another --{component.option}"
            )


def _check_tokens(reference: Component, name: str, column: Any, dynamics: TrainingDynamics) -> None:
    """Raise ContractError unless each example has a number for each of its tokens at each checkpoint."""
    if len(column) != len(dynamics.ids):
        raise broken(reference, f"{name} of {len(column)} examples", f"one array for each of {len(dynamics.ids)}")
    for example, tokens, nll in zip(dynamics.ids, dynamics.n_tokens.tolist(), column, strict=True):
        _array(reference, f"{name} of {example},", nll, (len(dynamics.steps), tokens), "f")


def check_confidence(estimator: Component, confidence: Any, dynamics: TrainingDynamics) -> Float64:
    """Return the confidence as f64[N] if it is finite, and NaN exactly where unscored; else raise ContractError."""
    values = _array(estimator, "confidence", confidence, (len(dynamics.ids),), "iuf").astype(np.float64)
    wrong = np.isinf(values) | (np.isnan(values) == dynamics.scored)  # NaN of a scored one, a number of an unscored
    allowed = "a finite number for each example that was scored, NaN for each that was not"
    _check_each(estimator, "confidence of", values, wrong, dynamics.ids, allowed)
    return values


def confidence_of(
    estimator: ConfidenceEstimator, dynamics: TrainingDynamics, texts: Sequence[tuple[str, str]] | None
) -> Float64:
    """Return the confidence f64[N] of dynamics, checked; an estimator that needs texts gets those of the rows."""
    given = replace(dynamics, texts=texts) if Need.TEXTS in estimator.needs else dynamics
    return check_confidence(estimator, estimator.estimate(read_only(given)), given)


def check_split(splitter: Component, split: Any, scores: Scores) -> Split:
    """Return the split if it has one of at most MOST_GROUPS groups for each example; else raise ContractError."""
    _check_type(splitter, split, Split)
    names = split.names
    words = {name for name in names if isinstance(name, str)} - {UNPAIRED_NAME}
    if not len(words) == len(names) <= MOST_GROUPS:  # in files, groups are known by their names
        allowed = f"at most {MOST_GROUPS} texts, each once, and none {UNPAIRED_NAME!r}"
        raise broken(splitter, f"{len(names)} groups with the names {list(names)}", allowed)
    group = _array(splitter, "group", split.group, (len(scores),), least=UNPAIRED, most=len(names) - 1)
    if np.isfinite(scores.confidence).any():  # else none was asked for, as by QualityLabel
        wrong = np.isnan(scores.confidence) & (group != UNPAIRED)
        allowed = "-1 (unpaired) for every example without a confidence (NaN)"
        _check_each(splitter, "group of", group, wrong, scores.id, allowed)
    return replace(split, group=group.astype(np.int8))


def check_pairs(sampler: Component, pairs: Any, split: Split, scores: Scores) -> Rows:
    """Return the pairs if they are i64[P, 2], each of two different rows that have a group; else raise ContractError.

    A row may be in several pairs, and both rows of a pair may be of one group.
    """
    rows = _array(sampler, "rows", pairs, (-1, 2), least=0, most=len(scores) - 1)
    wrong = (rows[:, 0] == rows[:, 1]) | (split.group[rows] == UNPAIRED).any(axis=1)
    allowed = "two different rows that have a group; leave out all others, they are trained on by NTP then"
    _check_each(sampler, "pair", rows, wrong, range(len(rows)), allowed)
    return rows.astype(np.int64)


def check_epoch_order(order: Component, rows: Any, n_rows: int) -> Rows:
    """Return the rows as i64[N] if they are 0..N-1, each once; else raise ContractError."""
    return _distinct_rows(order, rows, n_rows, n_rows)


def check_selection(selector: Component, rows: Any, n_rows: int) -> Rows:
    """Return the rows in file order if they are distinct rows of 0..N-1, at least one; else raise ConfigError."""
    if np.size(rows) == 0:
        raise ConfigError(f"selector {selector}: none of the {n_rows} examples is selected")
    return np.sort(_distinct_rows(selector, rows, -1, n_rows))


def _distinct_rows(component: Component, rows: Any, size: int, n_rows: int) -> Rows:
    """Return the rows as i64[size] if they are of 0..N-1, each once; else raise ContractError. -1: any size."""
    array = _array(component, "rows", rows, (size,), least=0, most=n_rows - 1)
    if (distinct := len(np.unique(array))) < len(array):
        raise broken(component, f"{len(array)} rows, {distinct} of them distinct", "each row once")
    return array.astype(np.int64)


def check_plan(objective: Component, plan: Any, batch: Batch) -> Plan:
    """Return the plan if its parts have the types, shapes and values of this micro-batch; else raise ContractError."""
    import torch

    _check_type(objective, plan, Plan)
    if plan.mixup_mean not in ("own", "ntp"):
        raise broken(objective, f"mixup_mean {plan.mixup_mean!r}", "own, ntp")
    tokens, pairs = batch.labels.shape, np.shape(plan.pairs)[:1]  # [T], [M]
    last, largest = len(batch.labels) - 1, np.finfo(np.float32).max  # pairs are rows of labels; inf is refused
    of_prompts = plan.prompt_weight if batch.prompt is None else batch.prompt.labels
    if batch.prompt is None and of_prompts is not None:
        raise broken(objective, "prompt_weight without Need.PROMPTS", "None, or add Need.PROMPTS to `needs`")
    for name, kinds, shape, least, most in (
        ("pairs", "iu", (*pairs, 2), 0, last),
        ("row_weight", "f", tokens, -largest, largest),
        ("pair_weight", "f", pairs, -largest, largest),
        ("lam", "f", pairs, 0, 1),
        ("prompt_weight", "f", np.shape(of_prompts), -largest, largest),
    ):
        if name == "prompt_weight" and plan.prompt_weight is None:
            continue
        _check_type(objective, getattr(plan, name), torch.Tensor, f"{name} ")
        _array(objective, name, getattr(plan, name), shape, kinds, least, most)
    for name in ("ntp_count", "mixup_count", "mu"):
        value = getattr(plan, name)
        if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise broken(objective, f"{name} {value!r}", "a finite number (float or int), 0 or more")
    _check_weights(objective, plan, batch)
    return replace(plan, pairs=plan.pairs.long())


def _check_weights(objective: Component, plan: Plan, batch: Batch) -> None:
    """Raise ContractError unless what weighs is counted, as the step leaves out a term whose count is 0, and once."""
    prompt_weight = batch.labels[:0] if plan.prompt_weight is None else plan.prompt_weight
    if not plan.ntp_count and (plan.row_weight.any() or prompt_weight.any()):
        raise broken(objective, "ntp_count 0 for tokens with a weight", "above 0, as their number")
    if not plan.mixup_count and plan.mixup_mean == "own" and plan.pair_weight.any():
        raise broken(objective, "mixup_count 0 for pairs with a weight", "above 0, as their number")
    if not plan.mu and plan.pair_weight.any():
        raise broken(objective, "mu 0 for pairs with a weight", "the mu in their weights, by which the log divides")
    repeats = plan.row_weight[batch.ntp_weight[batch.slot] == 0].any()  # slot: of each token its example, [T]
    if batch.prompt is not None and len(prompt_weight):
        repeats = repeats or prompt_weight[batch.ntp_weight[batch.prompt.slot] == 0].any()
    if repeats:
        answer = "row_weight above 0 for tokens of an example that is repeated"
        raise broken(objective, answer, "0, as batch.ntp_weight; it is there to be mixed, and NTP counts it once")


def check_loss(objective: Component, out: Any, plan: Plan) -> None:
    """Raise ContractError for a loss that is no scalar with a graph, or figures that are not detached, one for each."""
    from sftmix import functional

    _check_type(objective, out, functional.SFTLoss)
    shapes = {"loss": (), "nll": plan.row_weight.shape, "mixup": plan.lam.shape}
    for name, shape in shapes.items():
        value = getattr(out, name)
        _check_type(objective, value, functional.Tensor, f"{name} ")
        if value.shape != shape or value.requires_grad is not (name == "loss"):
            answer = f"{name} {_described(value)}, requires_grad {value.requires_grad}"
            raise broken(objective, answer, f"a tensor {list(shape)}, requires_grad {name == 'loss'}")


def check_embeddings(perturbation: Component, before: Tensor, changed: Tensor) -> Tensor:
    """Return the changed embeddings if their shape, type and graph are the given ones'; else raise ContractError."""
    if _described(changed) != _described(before):
        raise broken(perturbation, _described(changed), f"embeddings {_described(before)}")
    if before.requires_grad and not changed.requires_grad:
        raise broken(perturbation, "embeddings without a graph", "some with one: the input embeddings are trained")
    return changed


def check_callback_result(
    callback: Component, hook: str, result: Any, taken: Set[str] = frozenset()
) -> CallbackResult | None:
    """Return the result of a hook if it is None or a CallbackResult with numbers; else raise ContractError.

    None of its metrics may have a name that the loop gives itself, or one of `taken`, of the callbacks before it: it
    would take the place of the other. Evaluations may: a second one is of the same weights.
    """
    if result is None:
        return None
    _check_type(callback, result, CallbackResult)
    if not isinstance(result.metrics, Mapping) or not all(isinstance(value, Real) for value in result.metrics.values()):
        raise broken(callback, f"metrics {result.metrics!r}", "a mapping of names to numbers")
    reserved = OWN_OF_STAGE | MEASURED if hook == "on_stage_end" else OWN_OF_STEP
    reserved = reserved | {name for name in taken if not name.startswith("eval_")}
    if both := sorted(reserved & result.metrics.keys()):
        allowed = f"names that nothing else gives; rename it, as my_{both[0]}"
        raise broken(callback, f"the metric {both[0]} from {hook}()", allowed)
    for need, given in ((Need.STOP, result.stop), (Need.EVALUATIONS, "eval_nll" in result.metrics)):
        if given and need not in callback.gives:
            raise broken(callback, f"{need} from {hook}()", f"none, as {need.name} is not in its `gives`")
    # np.float32 and np.int64 are numbers that json does not write
    metrics = {name: value.item() if hasattr(value, "item") else value for name, value in result.metrics.items()}
    return replace(result, metrics=metrics)


def _check_type(component: Component, answer: object, kind: type, name: str = "") -> None:
    if not isinstance(answer, kind):
        raise broken(component, f"{name}{_described(answer)}", f"{kind.__module__}.{kind.__name__}")


def _array(
    component: Component, name: str, answer: Any, shape: Any, kinds: str = "iu", least: Any = None, most: Any = None
) -> np.ndarray:
    """Return an answer as an array; raise ContractError if it has another shape, other types or other values.

    shape        -1 in the first place: any length
    kinds        of numpy's dtypes: whole numbers, unless floats are allowed
    least, most  bounds of all values; None: any, NaN among them
    """
    try:
        array = np.asarray(answer)
    except (TypeError, ValueError, RuntimeError):  # [[1], [1, 2]], or a tensor with a graph
        array = np.empty(0, dtype=object)
    # (-1, 2) fits any number of pairs
    fits = array.ndim == len(shape) and shape in (array.shape, (-1, *array.shape[1:]))
    if array.dtype.kind not in kinds or not fits:
        numbers = {"iu": "whole numbers", "f": "floats without a graph"}.get(kinds, "numbers")
        raise broken(component, f"{name} {_described(answer)}", f"{numbers} {list(shape)}")
    # a NaN among the values is both their min and their max, and in no range
    if most is not None and array.size and not least <= array.min() <= array.max() <= most:
        raise broken(component, f"{name} {array.min()} to {array.max()}", f"{least} to {most}")
    return array


def _check_each(component: Component, name: str, values: np.ndarray, wrong: Any, ids: Any, allowed: str) -> None:
    """Raise ContractError that names the first of the values that are wrong, bool[N]."""
    if wrong.any():
        first = wrong.argmax()
        raise broken(component, f"{name} {ids[first]}: {values[first]} (one of {wrong.sum()})", allowed)


def _described(value: Any) -> str:
    """Name the type of a value, with dtype and shape if it has them."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
