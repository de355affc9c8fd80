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
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import nn

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import base, contracts
from sftmix.components.base import StageState
from sftmix.components.component import Need
from sftmix.components.order import Order
from sftmix.components.row_format import RowFormat
from sftmix.components.splitters import Quantile
from sftmix.measure.delivered import check_delivered, check_sentences
from sftmix.options.training import TrainingOptions
from sftmix.testing.renderers import check_renderer as check_renderer
from sftmix.testing.shared import answer_of, check_rows, no_global_draws, on_examples, with_needs_alone
from sftmix.testing.strategies import rows_in_memory, score_tables, training_dynamics
from sftmix.training.module import TrainingModule
from sftmix.training.step import build_optimizer, normalise
from sftmix.types import Batch, BatchNLL, RowScores, Scores, Split, TrainingDynamics
from sftmix.words.errors import BadRow

SEED, STEPS = 7, 3
_ROLES = {"system", "user", "assistant", "tool"}
# what a field may hold in anyone's file: another type, nothing, JSON that was cut, empty or null inside
_OTHER_VALUES: list[Any] = [3, "", "{", [], {}, [[]], [{}], {"a": [None]}]
Tables = st.SearchStrategy[Scores]
_DYNAMICS, _SCORED, _UNSCORED = training_dynamics(), score_tables(max_size=40), score_tables(confidence=False)
_DATA = rows_in_memory([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 1), (6, 8)])
# three pairs; row 6 with row 2 once more, which NTP counts once (weight 0); a row without a pair
_UNITS = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(5)), (Slot(6), Slot(2, 0.0)), (Slot(7),)]
_SPLIT = Split(group=np.array([0, 1, 0, 1, 0, 1, 0, -1, -1], dtype=np.int8), names=("confident", "unconfident"))


# --------------------------------------------------------------------------------------------- rows


def check_confidence_estimator(
    estimator: base.ConfidenceEstimator, *, dynamics: st.SearchStrategy[TrainingDynamics] = _DYNAMICS
) -> None:
    """Check that each example gets one number, NaN exactly if unscored, whatever the order of the examples."""

    def ask(component, record):
        return contracts.check_confidence(component, component.estimate(record), record)

    check_rows(estimator, dynamics, ask)


def check_splitter(splitter: base.Splitter, *, scores: Tables | None = None) -> None:
    """Check that every example gets a group (unpaired without confidence), whatever the order of the file.

    scores  the tables to try; by default with confidence exactly if the splitter needs it
    """

    def ask(component, table):
        split = contracts.check_split(component, component.split(table, seed=SEED), table)
        return np.unique(split.labels, return_inverse=True)[1]

    if scores is None:
        scores = _SCORED if Need.CONFIDENCE in splitter.needs else _UNSCORED
    check_rows(splitter, scores, ask)


def check_selector(selector: base.Selector, *, scores: Tables | None = None) -> None:
    """Check that the selected rows are distinct, and the same examples whatever the order of the file.

    scores  the tables to try; by default with confidence exactly if the selector needs it
    """
    scores = scores or (_SCORED if Need.CONFIDENCE in selector.needs else _UNSCORED)

    def ask(component, table):
        return np.isin(table.row, contracts.check_selection(component, component.select(table, seed=SEED), len(table)))

    check_rows(selector, scores, ask)


def check_order(order: Order, *, scores: Tables = _SCORED) -> None:
    """Check that each epoch has every row once, and the same order when it is asked for alone, as after a resume."""

    def ask(component, table, epochs=range(3)):
        found = [component.rows(table, epoch=epoch, seed=SEED) for epoch in epochs]
        return [contracts.check_epoch_order(component, rows, len(table)) for rows in found]

    def holds(table):
        asked = answer_of(order, with_needs_alone(ask), table)
        np.testing.assert_array_equal(ask(copy.deepcopy(order), table, epochs=[2])[0], asked[2], "of an epoch alone")

    on_examples(scores, holds)


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
        drawn = answer_of(sampler, with_needs_alone(ask), table, split)
        resumed = ask(copy.deepcopy(sampler), table, split, epochs=[2])[0]
        np.testing.assert_array_equal(resumed, drawn[2], "an epoch asked alone, as after a resume, has other pairs")
        first, second = table.confidence[np.concatenate(drawn)].T
        assert (first >= second).all(), "column 0 of a pair must be the more confident row"
        return len(first)

    assert any(on_examples(scores, holds)), "no input gave a pair; if it needs other tables, give `scores`"


def check_reference(reference: base.Reference) -> None:
    """Check that the dynamics are of exactly the requested examples, in their order, with possible numbers."""

    def ask(component, stored):
        def give(*_, **__):
            return stored  # nothing is trained: as if a run had made these

        context = SimpleNamespace(ids=stored.ids, train_and_score=give, score_models=give, score_rows=give)
        context.content_hashes = lambda: stored.ids  # made-up examples have no text
        return asdict(contracts.check_dynamics(component, component.collect(context)))

    def holds(stored):
        ids = answer_of(reference, ask, stored)["ids"]
        assert list(ids) == stored.ids, "it must return exactly context.ids, in that order"

    on_examples(_DYNAMICS, holds)


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
    assert all(0 <= value < math.inf for value in values), f"allowed: finite numbers from 0, not {values}"
    backwards = [copy.deepcopy(schedule).value(*place) for place in reversed(places)]
    assert values == backwards[::-1], "a step's value depends on what was asked before"


def check_callback(callback: base.Callback) -> None:
    """Check that every hook returns what it may, with held-out rows or without; observers never stop.

    `state.measure` is None here: what `on_delivered` measures of a model is seen in a run alone.
    """
    held_out = {"eval_nll": 2.0, "eval_accuracy": 0.5, "eval_exact_match": 0.0}
    logged = dict.fromkeys(contracts.OWN_OF_STEP, 1.0) | held_out

    def score(rows: Sequence[int] | None = None, **_: bool) -> RowScores:
        n = 2 if rows is None else len(rows)
        return RowScores(np.full(n, 3.0), np.full(n, 2), np.full(n, 1))

    for evaluate in (None, lambda: held_out):
        state = StageState("train", 1, 4, 0, logged, score, evaluate)
        for hook in ("on_stage_start", "on_step_end", "on_epoch_end", "on_stage_end"):
            contracts.check_callback_result(callback, hook, getattr(callback, hook)(state))
        check_delivered(callback, callback.on_delivered(state), set(), 0)
    check_sentences(callback, callback.on_summary({}))


def _loss(objective: base.Objective, batches: Sequence[Batch], step: int, move: float | np.ndarray = 0.0) -> np.ndarray:
    """Return the loss of a global batch on a small GPT-2 in float64 and its gradient, in one vector.

    move  is added to the weights
    """
    plans = []
    for batch in batches:
        plan = objective.plan(batch, step=step, total_steps=STEPS, seed=SEED)
        plans.append(contracts.check_plan(objective, plan, batch))
    config = transformers.GPT2Config(vocab_size=64, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):  # the weights are drawn from torch's global state, which is watched
        torch.manual_seed(SEED)
        module = TrainingModule(transformers.GPT2LMHeadModel(config).double().eval())  # eval: no dropout
    weights = list(module.parameters())
    moved = nn.utils.parameters_to_vector(weights).detach() + torch.as_tensor(move)
    nn.utils.vector_to_parameters(moved, weights)
    ntp, mixup = sum(plan.ntp_count for plan in plans), sum(plan.mixup_count for plan in plans)
    total, passes = torch.zeros((), dtype=torch.float64), Counter[int]()
    for number, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=1)
        counting = module.model.get_decoder().register_forward_pre_hook(lambda *_, of=number: passes.update([of]))
        with counting:
            out = module(batch, scaled, loss=objective.loss)
        contracts.check_loss(objective, out, scaled)
        total = total + out.loss
    found = sorted({passes[number] for number in range(len(batches))})
    assert len(found) == 1, (
        f"loss() makes {' or '.join(map(str, found))} passes of the decoder in the micro-batches of a step: under FSDP "
        "all ranks join each pass, and wait until training.timeout for one that makes fewer; call view.hidden and "
        "view.states in every micro-batch, also where nothing is mixed"
    )
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(total, weights, materialize_grads=True))
    return torch.cat([total.detach()[None], gradient]).numpy()


def check_objective(objective: base.Objective, *, finite_differences: bool = True) -> None:
    """Check plans and loss: well formed, drawn from (seed, step, ids) alone, and equal however the batch is cut.

    The last point makes a run independent of ranks and micro-batches: the loss and its gradient on a small model,
    divided by the counts of the whole global batch, must not depend on the cut. The gradient is held against finite
    differences. The model is a GPT-2 of two decoder layers in float64, so states can be changed in the embeddings (0)
    or after layer 1 or 2.

    The loss makes as many passes of the decoder in each micro-batch, also in one without pairs: under FSDP all ranks
    join each pass. `Objective.check` is not called, and `begin` once.

    finite_differences  False for a loss with detached parts, which have none: its gradient is not checked
    """
    rows, counts = torch.arange(8), torch.tensor([int(example.target.sum()) for example in _DATA[:8]])
    nll = BatchNLL(rows=rows, nll_sum=counts.double() * (1.0 + rows.double() / 3), n_tokens=counts, ids=_DATA.ids[:8])
    asked = Need.PROMPTS in objective.needs
    whole, *cuts = (
        [replace(collate(units, _DATA, split=_SPLIT, prompts=asked), batch_nll=nll) for units in cut]
        for cut in ([_UNITS], [[unit] for unit in _UNITS], [_UNITS[3:], _UNITS[:3]])
    )
    objective.begin(_DATA)
    # whole: one micro-batch; cuts: one for each unit, and two with the second half first
    values = answer_of(objective, lambda component: [_loss(component, whole, step) for step in range(STEPS)])
    for step, value in enumerate(values):
        for batches in cuts:
            other = _loss(objective, batches, step)
            message = "it depends on how the batch is cut into micro-batches"
            np.testing.assert_allclose(other, value, rtol=1e-6, atol=1e-8, err_msg=message)
    if finite_differences:
        gradient = values[-1][1:]
        # along sign(gradient) the slope is the sum of |gradient|, in which nothing cancels
        ahead, behind = (_loss(objective, whole, STEPS - 1, way * np.sign(gradient))[0] for way in (1e-6, -1e-6))
        slope, measured = np.abs(gradient).sum(), (ahead - behind) / 2e-6
        assert math.isclose(measured, slope, rel_tol=1e-5, abs_tol=1e-8), (
            "the gradient is not the loss's by finite differences. If the loss detaches a factor on purpose, as DFT's "
            "does, that is so: give finite_differences=False (`components --check --finite_differences false`)"
        )


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
    """Check that the optimizer trains exactly its parameters, at its groups' rates, with a state that can be saved."""
    start = torch.linspace(-1, 1, 28)

    def trained(component, rate=0.01):
        """Return the weights after two steps, and the optimizer."""
        layer = nn.utils.skip_init(nn.Linear, 6, 4)  # without a random draw; 24 weights and 4 biases
        nn.utils.vector_to_parameters(start.clone(), layer.parameters())
        built = build_optimizer(layer, TrainingOptions(), component)
        for step in (1, 2):
            for group in built.param_groups:
                group["lr"] = rate
            for parameter in layer.parameters():
                parameter.grad = torch.cos(parameter.detach() / step)  # above 0: the steps do not undo each other
            built.step()
        return nn.utils.parameters_to_vector(layer.parameters()).detach(), built

    with no_global_draws():
        moved, built = trained(optimizer)
    assert (moved != start).all(), "a step changed nothing"
    assert torch.equal(trained(copy.deepcopy(optimizer))[0], moved), "a copy moves elsewhere: draw nothing at random"
    assert torch.equal(trained(optimizer, rate=0.0)[0], start), "it moves although the rate is 0"
    for state in built.state.values():
        for name, value in state.items():
            assert isinstance(value, (torch.Tensor, int, float)), (
                f"state {name} is a {type(value).__name__}; a checkpoint holds tensors and numbers"
            )
