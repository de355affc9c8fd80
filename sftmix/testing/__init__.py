"""Checks for your own components, and Hypothesis strategies for their inputs.

    from sftmix.testing import check_splitter
    from my_lab import ByLength

    def test_by_length():
        check_splitter(ByLength(threshold=20))

Each check runs the component on generated inputs, the same ones every time: its answers must keep the contract that a
run checks, and what a run takes on trust. It raises AssertionError with the smallest input that breaks the contract of
its base class. All need hypothesis (`pip install -e '.[test]'` in the checkout), no data and no GPU.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from sftmix.components import base, contracts
from sftmix.components.base import Order, StageState
from sftmix.components.component import Component, Need
from sftmix.components.row_format import RowFormat
from sftmix.components.splitters import Quantile
from sftmix.measure.delivered import check_delivered, check_sentences
from sftmix.options.training import TrainingOptions
from sftmix.testing.objectives import check_objective as check_objective
from sftmix.testing.renderers import check_renderer as check_renderer
from sftmix.testing.shared import Ask, answer_of, check_rows, no_global_draws, on_examples, with_needs_alone
from sftmix.testing.strategies import rows_in_memory as rows_in_memory
from sftmix.testing.strategies import score_tables, training_dynamics
from sftmix.training.update import build_optimizer
from sftmix.types import RowLosses, Scores, TrainingDynamics
from sftmix.words.errors import BadRow

SEED = 7
_ROLES = {"system", "user", "assistant", "tool"}
# what a field may hold in anyone's file: another type, nothing, JSON that was cut, empty or null inside
_OTHER_VALUES: list[Any] = [3, "", "{", [], {}, [[]], [{}], {"a": [None]}]
Tables = st.SearchStrategy[Scores]
_SCORED, _UNSCORED = score_tables(max_size=40), score_tables(confidence=False)


# --------------------------------------------------------------------------------------------- rows


def check_confidence_estimator(
    estimator: base.ConfidenceEstimator, *, dynamics: st.SearchStrategy[TrainingDynamics] | None = None
) -> None:
    """Check that each example gets one number, NaN exactly if unscored, whatever the order of the examples.

    dynamics  the dynamics to try; by default of three checkpoints, or of as many as the estimator needs
    """

    def ask(component, record):
        return contracts.check_confidence(component, component.estimate(record), record)

    if dynamics is None:
        dynamics = training_dynamics(checkpoints=max(3, estimator.least_checkpoints))
    check_rows(estimator, dynamics, ask)


def check_splitter(splitter: base.Splitter, *, scores: Tables | None = None) -> None:
    """Check that every example gets a group (unpaired without confidence), whatever the order of the file.

    scores  the tables to try; by default with confidence exactly if the splitter needs it
    """

    def ask(component, table):
        split = contracts.check_split(component, component.split(table, seed=SEED), table)
        return np.unique(split.labels, return_inverse=True)[1]

    check_rows(splitter, _tables_for(splitter) if scores is None else scores, ask)


def check_selector(selector: base.Selector, *, scores: Tables | None = None) -> None:
    """Check that the selected rows are distinct, and the same examples whatever the order of the file.

    scores  the tables to try; by default with confidence exactly if the selector needs it
    """

    def ask(component, table):
        return np.isin(table.row, contracts.check_selection(component, component.select(table, seed=SEED), len(table)))

    check_rows(selector, _tables_for(selector) if scores is None else scores, ask)


def _tables_for(component: Component) -> Tables:
    return _SCORED if Need.CONFIDENCE in component.needs else _UNSCORED


def check_order(order: Order, *, scores: Tables = _SCORED) -> None:
    """Check that each epoch has every row once, and the same order when it is asked for alone, as after a resume."""

    def ask(component, table, epochs=range(3)):
        found = [component.rows(table, epoch=epoch, seed=SEED) for epoch in epochs]
        return [contracts.check_epoch_order(component, rows, len(table)) for rows in found]

    on_examples(scores, lambda table: _of_epochs(order, ask, table))


def _of_epochs(component: Component, ask: Ask, *records: Any) -> Any:
    """Return ask(component, *records) of epochs 0 to 2; the last one is the same if it is asked for alone."""
    drawn = answer_of(component, with_needs_alone(ask), *records)
    alone = ask(copy.deepcopy(component), *records, epochs=[2])[0]
    np.testing.assert_array_equal(alone, drawn[2], "an epoch asked alone, as after a resume, is another")
    return drawn


def check_pair_sampler(sampler: base.PairSampler, *, groups: int = 2, scores: Tables = _SCORED) -> None:
    """Check that no pair has an unpaired row, a row twice, or the less confident row in column 0, in any epoch.

    Some of the inputs must give a pair: a sampler that never does would mix nothing.
    groups  number of groups in the splits to try, which are made by confidence
    """

    def ask(component, table, split, epochs=range(3)):
        drawn = [component.pairs(split, table, epoch=epoch, seed=SEED) for epoch in epochs]
        return [contracts.check_pairs(component, pairs, split, table) for pairs in drawn]

    def holds(table):
        split = Quantile(levels=groups).split(table, seed=SEED)
        drawn = _of_epochs(sampler, ask, table, split)
        first, second = table.confidence[np.concatenate(drawn)].T
        assert (first >= second).all(), "column 0 of a pair must be the more confident row"
        return len(first)

    assert any(on_examples(scores, holds)), "no input gave a pair; if it needs other tables, give `scores`"


def check_reference(reference: base.Reference) -> None:
    """Check that the dynamics are of exactly the requested examples, in their order, with possible numbers."""

    def ask(component, stored):
        services = {name: _service(name, stored) for name in ("train_and_score", "score_models", "score_rows")}
        context = SimpleNamespace(ids=stored.ids, **services)
        context.content_hashes = lambda: stored.ids  # made-up examples have no text
        return asdict(contracts.check_dynamics(component, component.collect(context)))

    def holds(stored):
        ids = answer_of(reference, ask, stored)["ids"]
        assert list(ids) == stored.ids, "it must return exactly context.ids, in that order"

    on_examples(training_dynamics(), holds)


def _service(name: str, stored: TrainingDynamics) -> Callable[..., TrainingDynamics]:
    """Return a service of a reference's context that is called as a run's is, and trains nothing: it gives `stored`."""

    def give(*words: object, **named: object) -> TrainingDynamics:
        try:
            inspect.signature(getattr(base.ReferenceContext, name)).bind(None, *words, **named)
        except TypeError as error:
            raise AssertionError(f"context.{name}: {error}") from error
        return stored

    return give


def check_row_format(format: RowFormat, rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that rows give turns of known roles, one of the assistant's trained, whatever was read before them.

    A row stays as it is. Rows without the fields, or with other values in them, raise BadRow; another error of theirs
    is raised as it is. Documents have no turns.

    rows  of the format, under our names (data.columns)
    """
    given, used = copy.deepcopy([*rows]), copy.deepcopy(format)
    read = [used.read(row, roles={}) for row in given]
    assert given == [*rows], "a row was changed in place"
    backwards = [used.read(row, roles={}) for row in given[::-1]]
    assert backwards[::-1] == read, "the turns of a row depend on the rows before it: keep no state"
    for turns in read:
        allowed = "turns of system, user, assistant and tool, at least one of the assistant's trained, no other"
        assert {turn.role for turn in turns} <= _ROLES, f"{turns!r}; allowed: {allowed}"
        assert {turn.role for turn in turns if turn.trained} == {"assistant"}, f"{turns!r}; allowed: {allowed}"
    for row in ({}, *({**given[0], name: value} for name in given[0] for value in _OTHER_VALUES)):
        with suppress(BadRow):
            used.read(row, roles={})
            # a row with another value in it may be read; {} must not
            assert row, "a row without any field is read; allowed: BadRow"


# --------------------------------------------------------------------------------------------- training


def check_schedule(schedule: base.Schedule) -> None:
    """Check that every step of runs of several lengths gives a finite number from 0, from the step alone."""
    places = [(step, total) for total in (1, 2, 10, 1000) for step in range(total)]
    values = answer_of(schedule, lambda component: [component.value(*place) for place in places])
    wrong = [
        f"value{place} is {value}" for place, value in zip(places, values, strict=True) if not 0 <= value < math.inf
    ]
    assert not wrong, f"{wrong[0]}; allowed: finite numbers from 0"
    backwards = [copy.deepcopy(schedule).value(*place) for place in reversed(places)]
    assert values == backwards[::-1], "a step's value depends on what was asked before"


def check_callback(callback: base.Callback) -> None:
    """Check that every hook returns what it may, with held-out rows or without; observers never stop.

    `state.measure` is None here: what `on_delivered` measures of a model is seen in a run alone.
    """
    held_out = {"eval_nll": 2.0, "eval_accuracy": 0.5, "eval_exact_match": 0.0}
    logged = dict.fromkeys(contracts.OWN_OF_STEP, 1.0) | held_out

    def score(rows: Sequence[int] | None = None, **_: bool) -> RowLosses:
        n = 2 if rows is None else len(rows)
        return RowLosses(np.full(n, 3.0), np.full(n, 2), np.full(n, 1))

    for evaluate in (None, lambda: held_out):
        state = StageState("train", 1, 4, 0, logged, score, evaluate)
        for hook in ("on_stage_start", "on_step_end", "on_epoch_end", "on_stage_end"):
            contracts.check_callback_result(callback, hook, getattr(callback, hook)(state))
        check_delivered(callback, callback.on_delivered(state), set(), 0)
    check_sentences(callback, callback.on_summary({}))


def check_perturbation(perturbation: base.Perturbation) -> None:
    """Check that embeddings keep their shape, are differentiable and drawn for each example, whatever its batch."""
    lengths, ids = [7, 4, 5], ["example-0", "example-1", "example-2"]
    e = torch.linspace(-1, 1, 3 * 7 * 8).view(3, 7, 8).requires_grad_()
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    with no_global_draws():
        together = perturbation.embeddings(e, mask, ids=ids, step=2, seed=SEED)
    contracts.check_embeddings(perturbation, e, together)
    (gradient,) = torch.autograd.grad(together.sum(), e)
    assert gradient.abs().sum() > 0, "no gradient reaches the embeddings"
    for row, length in enumerate(lengths):  # without padding, by a copy, which has seen none of the others
        one, fresh = slice(row, row + 1), copy.deepcopy(perturbation)
        alone = fresh.embeddings(e[one, :length], mask[one, :length], ids=ids[one], step=2, seed=SEED)
        torch.testing.assert_close(alone[0], together[row, :length], rtol=0, atol=0)


def check_optimizer(optimizer: base.Optimizer) -> None:
    """Check that the optimizer trains exactly its parameters, at its groups' rates.

    A state that a checkpoint does not hold ends a run after its first step.
    """
    start = torch.linspace(-1, 1, 28)

    def trained(component, rate=0.01):
        """Return the weights after two steps."""
        layer = nn.utils.skip_init(nn.Linear, 6, 4)  # without a random draw; 24 weights and 4 biases
        nn.utils.vector_to_parameters(start.clone(), layer.parameters())
        built = build_optimizer(layer, TrainingOptions(), component)
        for step in (1, 2):
            for group in built.param_groups:
                group["lr"] = rate
            for parameter in layer.parameters():
                parameter.grad = torch.cos(parameter.detach() / step)  # above 0: the steps do not undo each other
            built.step()
        return nn.utils.parameters_to_vector(layer.parameters()).detach()

    with no_global_draws():
        moved = trained(optimizer)
    assert (moved != start).all(), "a step changed nothing"
    assert torch.equal(trained(copy.deepcopy(optimizer)), moved), "a copy moves elsewhere: draw nothing at random"
    assert torch.equal(trained(optimizer, rate=0.0), start), "it moves although the rate is 0"
