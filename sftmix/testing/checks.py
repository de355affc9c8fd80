"""Conformance checks of the components that work on tables."""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftmix.common.errors import DataError, SFTMixError
from sftmix.components import base, contracts
from sftmix.components.base import (
    Callback,
    ConfidenceEstimator,
    Need,
    PairSampler,
    Reference,
    Schedule,
    Selector,
    Splitter,
    StageState,
)
from sftmix.testing.strategies import equal_groups, score_tables, training_dynamics
from sftmix.types import Int64, Rows, RowScores, Scores, TrainingDynamics

C = TypeVar("C", bound=base.Component)
V = TypeVar("V")
SEED = 7


def on_examples(strategy: st.SearchStrategy[V], holds: Callable[[V], object], examples: int) -> None:
    """Run `holds` on generated inputs. An SFTMixError refuses an input: some inputs may be refused, but not all."""
    answered = 0

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,  # one failure in words; several come as an ExceptionGroup without any
    )
    @given(strategy)
    def check(value: V) -> None:
        nonlocal answered
        try:
            holds(value)
        except SFTMixError as refusal:
            refused.append(str(refusal))
        else:
            answered += 1

    refused: list[str] = []
    check()
    assert answered, f"every input was refused, the last one with: {refused[-1]}"


def copy_of(component: C) -> C:
    """Return a copy without any history, as in a resumed run or on another rank."""
    try:
        return copy.deepcopy(component)  # by the same protocol as pickle
    except Exception as error:
        raise AssertionError(f"{type(component).__name__} cannot be copied: {error}") from error


def assert_is(component: base.Component, kind: type) -> None:
    name = type(component).__name__
    assert isinstance(component, kind), f"{name} is not a {kind.__name__}"
    parameters = type(component).__init__
    if parameters is not object.__init__:
        kinds = [p.kind for p in list(inspect.signature(parameters).parameters.values())[1:]]
        assert all(k is inspect.Parameter.KEYWORD_ONLY for k in kinds), (
            f"{name}.__init__ must take keyword-only arguments (`*` after self): they are its options"
        )


def valid(check: Callable[..., V], *values: object) -> V:
    """Run a check of the pipeline; here its refusal means a wrong answer."""
    try:
        return check(*values)
    except SFTMixError as error:
        raise AssertionError(str(error)) from error


@contextmanager
def untouched(*records: Any) -> Iterator[None]:
    """Check that the records and the global random states are the same afterwards."""
    import torch

    before = [copy.deepcopy(record) for record in records]
    states = (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state())
    yield
    for now, old in zip(records, before, strict=True):
        for field in fields(old):
            changed = f"{type(old).__name__}.{field.name} was changed in place"
            np.testing.assert_equal(getattr(now, field.name), getattr(old, field.name), err_msg=changed)
    same = [states[0] == random.getstate(), states[1] == str(np.random.get_state())]
    same.append(torch.equal(states[2], torch.random.get_rng_state()))
    assert all(same), "it drew from a global random state; draw from sftmix.common.rng.generator(seed, purpose, ...)"


def permuted(record: V, order: Int64) -> V:
    """Return a record of N examples with these in another order; `row` stays 0..N-1."""
    assert is_dataclass(record)
    changed: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name in ("row", "names", "steps") or value is None:
            continue
        if field.name == "columns":
            changed[field.name] = {k: [v[i] for i in order] for k, v in value.items()}
        else:
            changed[field.name] = value[order] if isinstance(value, np.ndarray) else [value[i] for i in order]
    return replace(record, **changed)  # type: ignore[type-var]


def _keeps_to_the_examples(component: C, record: V, answer: Callable[[C, V], np.ndarray]) -> np.ndarray:
    """Return answer(component, record), [N], if a copy gives the same, and another order of the examples no other."""
    with untouched(record):
        values = answer(component, record)
    np.testing.assert_array_equal(values, answer(copy_of(component), record), "a second call gives something else")
    order = np.random.default_rng(len(values)).permutation(len(values))
    message = "it depends on the order of the examples; break ties by id"
    np.testing.assert_allclose(answer(component, permuted(record, order)), values[order], rtol=1e-12, err_msg=message)
    return values


def check_confidence_estimator(
    estimator: ConfidenceEstimator, *, dynamics: st.SearchStrategy[TrainingDynamics] | None = None, examples: int = 50
) -> None:
    """Check that each example gets one number, NaN exactly if unscored, whatever the order of the examples."""
    assert_is(estimator, ConfidenceEstimator)

    def answer(asked: ConfidenceEstimator, record: TrainingDynamics) -> np.ndarray:
        return valid(contracts.check_confidence, asked, asked.estimate(record), record)

    inputs = training_dynamics() if dynamics is None else dynamics
    on_examples(inputs, partial(_keeps_to_the_examples, estimator, answer=answer), examples)


def check_splitter(splitter: Splitter, *, scores: st.SearchStrategy[Scores] | None = None, examples: int = 50) -> None:
    """Check that every example gets a group (unpaired without confidence), whatever the order of the file.

    scores  the tables to try; by default with confidence exactly if the splitter needs it
    """
    assert_is(splitter, Splitter)

    def answer(asked: Splitter, table: Scores) -> np.ndarray:
        split = valid(contracts.check_split, asked, asked.split(table, seed=SEED), table)
        return np.unique(split.labels, return_inverse=True)[1]

    tables = score_tables(confidence=Need.CONFIDENCE in splitter.needs) if scores is None else scores
    on_examples(tables, partial(_keeps_to_the_examples, splitter, answer=answer), examples)


def check_pair_sampler(
    sampler: PairSampler, *, groups: int = 2, scores: st.SearchStrategy[Scores] | None = None, examples: int = 50
) -> None:
    """Check that no pair has an unpaired row, a row twice, or the less confident row in column 0, in any epoch.

    Some of the inputs must give a pair: a sampler that never does would mix nothing.
    groups  number of groups in the splits to try, which are made by confidence
    """
    assert_is(sampler, PairSampler)
    tables = score_tables(max_size=8 * groups + 8) if scores is None else scores
    pairs = 0

    def holds(table: Scores) -> None:
        nonlocal pairs
        split = equal_groups(table, groups)
        with untouched(table, split):
            epochs = [
                valid(contracts.check_pairs, sampler, sampler.pairs(split, table, epoch=e, seed=SEED), split, table)
                for e in range(3)
            ]
        for epoch, drawn_pairs in enumerate(epochs):
            first, second = table.confidence[drawn_pairs].T
            assert (first >= second).all(), f"epoch {epoch}: column 0 of a pair must be the more confident row"
            again = copy_of(sampler).pairs(split, table, epoch=epoch, seed=SEED)
            np.testing.assert_array_equal(drawn_pairs, again, err_msg=f"epoch {epoch} asked alone gives something else")
            pairs += len(drawn_pairs)

    on_examples(tables, holds, examples)
    assert pairs, "no input gave a pair, so nothing would be mixed; if it needs other tables, give them as `scores`"


def check_selector(selector: Selector, *, scores: st.SearchStrategy[Scores] | None = None, examples: int = 50) -> None:
    """Check that the selected rows are distinct, and the same examples whatever the order of the file."""
    assert_is(selector, Selector)

    def answer(asked: Selector, table: Scores) -> np.ndarray:
        rows = asked.select(table, seed=SEED)
        if len(rows) == 0:
            raise DataError("nothing is selected")  # the pipeline refuses this, but other data may give rows
        return np.isin(table.row, valid(contracts.check_selection, asked, rows, len(table)))

    tables = score_tables(confidence=False) if scores is None else scores
    on_examples(tables, partial(_keeps_to_the_examples, selector, answer=answer), examples)


def check_schedule(schedule: Schedule, *, minimum: float = 0.0) -> None:
    """Check that every step of runs of several lengths gives a finite number >= `minimum`, from the step alone."""
    assert_is(schedule, Schedule)
    for total in (1, 2, 10, 1000):
        values = [schedule.value(step, total) for step in range(total)]
        for step, value in enumerate(values):
            assert isinstance(value, Real), f"step {step} of {total}: {value!r} is not a number"
            assert math.isfinite(value), f"step {step} of {total}: {value} is not finite"
            assert value >= minimum, f"step {step} of {total}: {value} is below {minimum}"
        backwards = [copy_of(schedule).value(step, total) for step in reversed(range(total))]
        assert values == backwards[::-1], "a step's value depends on what was asked before"


class _Lent:
    """A context that trains nothing and returns stored dynamics as if a run had made them."""

    def __init__(self, stored: TrainingDynamics) -> None:
        self.ids, self._stored = stored.ids, stored

    def content_hashes(self) -> list[str]:
        return list(self.ids)  # made-up examples have no text

    def train_and_score(self, *_: object, **__: object) -> TrainingDynamics:
        return self._stored

    score_models = score_rows = train_and_score


def check_reference(reference: Reference, *, examples: int = 20) -> None:
    """Check that the dynamics are of exactly the requested examples, in their order, with possible numbers."""
    assert_is(reference, Reference)

    def holds(stored: TrainingDynamics) -> None:
        context = _Lent(stored)
        with untouched(stored):
            dynamics = valid(contracts.check_dynamics, reference, reference.collect(context))
        assert list(dynamics.ids) == list(context.ids), "it must return exactly context.ids, in that order"

    on_examples(training_dynamics(), holds, examples)


def check_callback(callback: Callback, *, metrics: dict[str, float] | None = None) -> None:
    """Check that every hook returns None or a CallbackResult, with held-out rows or without; observers never stop."""
    assert_is(callback, Callback)
    copy_of(callback)
    held_out = {"eval_nll": 2.0, "eval_accuracy": 0.5, "eval_exact_match": 0.0} | (metrics or {})

    def score(rows: Rows | None = None, *, alone: bool = False) -> RowScores:
        return RowScores(np.array([3.0, 4.0]), np.array([2, 2]), np.array([1, 0]))

    for evaluate in (None, lambda: held_out):
        state = StageState("train", 1, 4, 0, {**dict.fromkeys(contracts.OWN_OF_STEP, 1.0), **held_out}, score, evaluate)
        for hook in ("on_stage_start", "on_step_end", "on_epoch_end", "on_stage_end"):
            result = valid(contracts.check_callback_result, callback, hook, getattr(callback, hook)(state))
            stops = result is not None and result.stop
            assert not stops or Need.STOP in callback.gives, f"{hook} stopped training, but `gives` has no Need.STOP"
