"""Conformance checks of components, each by the contract that a run checks and by what a run takes on trust."""

import copy
import inspect
import math
import random
import traceback
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot, Unit
from sftmix.common.errors import ContractError, SFTMixError
from sftmix.components import base, contracts
from sftmix.components.base import Need, StageState
from sftmix.options import TrainingOptions
from sftmix.testing.strategies import equal_groups, rows_in_memory, score_tables, training_dynamics
from sftmix.training.module import TrainingModule
from sftmix.training.step import build_optimizer, normalise
from sftmix.types import BatchNLL, RowScores, Scores, Split, TrainingDynamics

SEED, STEPS = 7, 3
Tables = st.SearchStrategy[Scores]
_DYNAMICS, _UNSCORED = training_dynamics(), score_tables(confidence=False)
_DATA = rows_in_memory([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 1), (6, 8)])
_READS = {"item", "tolist", "numpy", "cpu", "nonzero", "bincount", "__bool__", "__int__", "__float__", "__index__"}
_TORCH = f"{torch.__path__[0]}/"
_LIBRARIES = (f"{transformers.__path__[0]}/", f"{Path(contracts.__file__).parents[1]}/functional/")
_UNITS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(5)), (Slot(6), Slot(2, 0.0)), (Slot(7),)]
_SPLIT = Split(group=np.array([0, 1, 0, 1, 0, 1, 0, -1, -1], dtype=np.int8), names=("confident", "unconfident"))


def on_examples(strategy, holds):
    """Return what `holds` gives for inputs. An SFTMixError refuses an input: some may be refused, but not all."""
    answers, refusals = [], []

    @settings(
        max_examples=50,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,  # one failure in words; several come as an ExceptionGroup without any
    )
    @given(strategy)
    def check(value):
        try:
            answers.append(holds(value))
        except ContractError:
            raise
        except SFTMixError as refusal:
            refusals.append(str(refusal))

    check()
    assert answers, f"every input was refused, the last one with: {refusals[-1]}"
    return answers


def assert_is(component, kind):
    name, init = type(component).__name__, type(component).__init__
    assert isinstance(component, kind), f"{name} is not a {kind.__name__}"
    kinds = [p.kind for p in inspect.signature(init).parameters.values()][1:]
    assert init is object.__init__ or set(kinds) <= {inspect.Parameter.KEYWORD_ONLY}, (
        f"{name}.__init__ must take keyword-only arguments (`*` after self): they are its options"
    )


@contextmanager
def untouched(*records):
    """Check that the records and the global random states are the same afterwards."""

    def states():
        drawn = [random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()]
        return [asdict(record) for record in records], drawn

    before = states()
    yield
    after = states()
    np.testing.assert_equal(after[0], before[0], "a record was changed in place")
    assert after[1] == before[1], "it drew from a global random state; draw from sftmix.common.rng.generator(seed, ...)"


def permuted(record, order):
    """Return a record of N examples with these in another order; `row` stays 0..N-1."""
    changed: dict = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name == "columns":
            changed["columns"] = {name: [column[i] for i in order] for name, column in value.items()}
        elif field.name not in ("row", "steps") and value is not None:
            changed[field.name] = value[order] if isinstance(value, np.ndarray) else [value[i] for i in order]
    return replace(record, **changed)


def _check_rows(component, kind, inputs, answer):
    """Check answer(component, record), [N]: a copy gives the same, and another order of the examples no other."""

    def holds(record):
        with untouched(record):
            values = answer(component, record)
        again = answer(copy.deepcopy(component), record)
        np.testing.assert_array_equal(values, again, "a second call gives something else")
        order = np.random.default_rng(len(values)).permutation(len(values))
        moved = answer(component, permuted(record, order))
        told = "it depends on the order of the examples; break ties by id"
        np.testing.assert_allclose(moved, values[order], rtol=1e-12, err_msg=told)

    assert_is(component, kind)
    on_examples(inputs, holds)


def check_confidence_estimator(
    estimator: base.ConfidenceEstimator, *, dynamics: st.SearchStrategy[TrainingDynamics] = _DYNAMICS
) -> None:
    """Check that each example gets one number, NaN exactly if unscored, whatever the order of the examples."""

    def answer(asked, record):
        return contracts.check_confidence(asked, asked.estimate(record), record)

    _check_rows(estimator, base.ConfidenceEstimator, dynamics, answer)


def check_splitter(splitter: base.Splitter, *, scores: Tables | None = None) -> None:
    """Check that every example gets a group (unpaired without confidence), whatever the order of the file.

    scores  the tables to try; by default with confidence exactly if the splitter needs it
    """

    def answer(asked, table):
        split = contracts.check_split(asked, asked.split(table, seed=SEED), table)
        return np.unique(split.labels, return_inverse=True)[1]

    tables = score_tables(confidence=Need.CONFIDENCE in splitter.needs) if scores is None else scores
    _check_rows(splitter, base.Splitter, tables, answer)


def check_selector(selector: base.Selector, *, scores: Tables = _UNSCORED) -> None:
    """Check that the selected rows are distinct, and the same examples whatever the order of the file."""

    def answer(asked, table):
        return np.isin(table.row, contracts.check_selection(asked, asked.select(table, seed=SEED), len(table)))

    _check_rows(selector, base.Selector, scores, answer)


def check_pair_sampler(sampler: base.PairSampler, *, groups: int = 2, scores: Tables | None = None) -> None:
    """Check that no pair has an unpaired row, a row twice, or the less confident row in column 0, in any epoch.

    Some of the inputs must give a pair: a sampler that never does would mix nothing.
    groups  number of groups in the splits to try, which are made by confidence
    """

    def holds(table):
        split = equal_groups(table, groups)
        for epoch in range(3):
            with untouched(table, split):
                drawn = sampler.pairs(split, table, epoch=epoch, seed=SEED)
            pairs = contracts.check_pairs(sampler, drawn, split, table)
            first, second = table.confidence[pairs].T
            assert (first >= second).all(), f"epoch {epoch}: column 0 of a pair must be the more confident row"
            again = copy.deepcopy(sampler).pairs(split, table, epoch=epoch, seed=SEED)
            np.testing.assert_array_equal(pairs, again, err_msg=f"epoch {epoch} asked alone gives something else")
        return len(pairs)

    assert_is(sampler, base.PairSampler)
    tables = score_tables(max_size=8 * groups + 8) if scores is None else scores
    assert any(on_examples(tables, holds)), "no input gave a pair; if it needs other tables, give `scores`"


def check_schedule(schedule: base.Schedule) -> None:
    """Check that every step of runs of several lengths gives a finite number from 0, from the step alone."""
    assert_is(schedule, base.Schedule)
    for total in (1, 2, 10, 1000):
        values = [schedule.value(step, total) for step in range(total)]
        assert all(0 <= value < math.inf for value in values), f"allowed: finite numbers from 0, not {values}"
        backwards = [copy.deepcopy(schedule).value(step, total) for step in reversed(range(total))]
        assert values == backwards[::-1], "a step's value depends on what was asked before"


def check_reference(reference: base.Reference) -> None:
    """Check that the dynamics are of exactly the requested examples, in their order, with possible numbers."""
    assert_is(reference, base.Reference)

    def holds(stored):
        def give(*_, **__):
            return stored  # nothing is trained: as if a run had made these

        context: Any = SimpleNamespace(ids=stored.ids, train_and_score=give, score_models=give, score_rows=give)
        context.content_hashes = lambda: stored.ids  # made-up examples have no text
        with untouched(stored):
            dynamics = contracts.check_dynamics(reference, reference.collect(context))
        assert list(dynamics.ids) == list(stored.ids), "it must return exactly context.ids, in that order"

    on_examples(_DYNAMICS, holds)


def check_callback(callback: base.Callback) -> None:
    """Check that every hook returns None or a CallbackResult, with held-out rows or without; observers never stop."""
    assert_is(callback, base.Callback)
    held_out = {"eval_nll": 2.0, "eval_accuracy": 0.5, "eval_exact_match": 0.0}
    logged = dict.fromkeys(contracts.OWN_OF_STEP, 1.0) | held_out
    scores = RowScores(np.array([3.0, 4.0]), np.array([2, 2]), np.array([1, 0]))
    for evaluate in (None, lambda: held_out):
        state = StageState("train", 1, 4, 0, logged, lambda **_: scores, evaluate)
        for hook in ("on_stage_start", "on_step_end", "on_epoch_end", "on_stage_end"):
            result = contracts.check_callback_result(callback, hook, getattr(callback, hook)(state))
            stops = result is not None and result.stop
            assert Need.STOP in callback.gives or not stops, f"{hook} stopped training, but `gives` has no Need.STOP"


class _HostReads(TorchFunctionMode):
    """The places outside torch, transformers and the fused loss that read a tensor's values while it is entered."""

    def __init__(self):
        self.places = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.Tensor.__getitem__ and any(getattr(x, "dtype", None) == torch.bool for x in args[1:])
        if by_mask or getattr(func, "__name__", "") in _READS:
            stack = reversed(traceback.extract_stack()[:-1])
            caller = next(frame for frame in stack if not frame.filename.startswith(_TORCH))
            if not caller.filename.startswith(_LIBRARIES):
                self.places.append(f"{Path(caller.filename).name}:{caller.lineno}")
        return func(*args, **(kwargs or {}))


def _loss(objective, batches, step, move=0.0):
    """Return the loss of a global batch on a small GPT-2 in float64 and its gradient in one vector, and the plans.

    move  is added to the weights
    """
    plans = []
    for batch in batches:
        plan = contracts.check_plan(objective, objective.plan(batch, step=step, total_steps=STEPS, seed=SEED), batch)
        assert plan.mu or not len(plan.pairs), "pairs are mixed, but mu is 0"
        repeats = plan.row_weight[batch.ntp_weight[batch.slot] == 0]
        assert not repeats.any(), f"a repeated slot carries no NTP loss, but its tokens weigh {repeats.tolist()}"
        plans.append(plan)
    config = GPT2Config(vocab_size=64, n_embd=8, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = TrainingModule(GPT2LMHeadModel(config).double().eval())
    weights = list(module.parameters())
    moved = nn.utils.parameters_to_vector(weights).detach() + torch.as_tensor(move)
    nn.utils.vector_to_parameters(moved, weights)
    ntp, mixup = sum(plan.ntp_count for plan in plans), sum(plan.mixup_count for plan in plans)
    total = torch.zeros((), dtype=torch.float64)
    for batch, plan in zip(batches, plans, strict=True):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=1)
        with _HostReads() as reads:
            out = module(batch, scaled, loss=objective.loss)
        assert not reads.places, f"loss() reads values on the host, which waits for the device: {reads.places}"
        contracts.check_loss(objective, out, scaled)
        total = total + out.loss
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(total, weights, materialize_grads=True))
    return torch.cat([total.detach()[None], gradient]).numpy(), plans


def check_objective(objective: base.Objective, *, finite_differences: bool = True) -> None:
    """Check plans and loss: well formed, drawn from (seed, step, ids) alone, and equal however the batch is cut.

    The loss reads no values on the host (`item`, `tolist`, a mask as an index), which would wait for the device.

    The last point makes a run independent of ranks and micro-batches: the loss and its gradient on a small model,
    divided by the counts of the whole global batch, must not depend on the cut. The gradient is held against finite
    differences.

    finite_differences  False for a loss with detached parts, which have none
    """
    assert_is(objective, base.Objective)
    rows, counts = torch.arange(8), torch.tensor([int(example.target.sum()) for example in _DATA[:8]])
    nll = BatchNLL(rows=rows, nll_sum=counts.double() * (1.0 + rows.double() / 3), n_tokens=counts, ids=_DATA.ids[:8])
    whole, *cuts = (
        [replace(collate(units, _DATA, split=_SPLIT), batch_nll=nll) for units in cut]
        for cut in ([_UNITS], [[unit] for unit in _UNITS], [_UNITS[3:], _UNITS[:3]])
    )
    for step in range(STEPS):
        with untouched():
            value, plans = _loss(objective, whole, step)
        again = _loss(copy.deepcopy(objective), whole, step)[0]
        np.testing.assert_array_equal(again, value, "a copy gives another: keep no state, draw from sftmix.common.rng")
        for batches in cuts:
            other, message = _loss(objective, batches, step)[0], "it depends on how the batch is cut into micro-batches"
            np.testing.assert_allclose(other, value, rtol=1e-6, atol=1e-8, err_msg=message)
    if finite_differences:
        norm = float(np.linalg.norm(value[1:]))
        along = value[1:] / max(norm, 1e-30)
        ahead, behind = (_loss(objective, whole, step, way * along)[0][0] for way in (1e-5, -1e-5))
        assert math.isclose((ahead - behind) / 2e-5, norm, rel_tol=1e-5, abs_tol=1e-8), "the gradient is not the loss's"
    if Need.PAIRS in objective.needs:
        assert any(len(p.pairs) for p in plans) or plans[0].mu == 0, "it says that it mixes, but no plan has a pair"


def check_perturbation(perturbation: base.Perturbation) -> None:
    """Check that embeddings keep their shape, are differentiable and drawn for each example, whatever its batch."""
    assert_is(perturbation, base.Perturbation)
    lengths = [7, 4, 5]
    e = torch.linspace(-1, 1, 3 * 7 * 8).view(3, 7, 8).requires_grad_()
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()

    def changed(component, rows, length=7):
        names = [f"example-{row}" for row in rows]
        return component.embeddings(e[rows, :length], mask[rows, :length], ids=names, step=2, seed=SEED)

    with untouched():
        together = contracts.check_embeddings(perturbation, e, changed(perturbation, [0, 1, 2]))
    (gradient,) = torch.autograd.grad(together.sum(), e)
    assert gradient.abs().sum() > 0, "no gradient reaches the embeddings"
    for row, length in enumerate(lengths):  # a copy, which has seen none of the others
        alone = changed(copy.deepcopy(perturbation), [row], length)[0]
        torch.testing.assert_close(alone, together[row, :length], rtol=0, atol=0)


def check_optimizer(optimizer: base.Optimizer) -> None:
    """Check that the optimizer trains exactly its parameters, at its groups' rates, with a state that can be saved."""
    assert_is(optimizer, base.Optimizer)

    def trained(component, steps, rate=0.01):
        """Return the weights after so many steps, and the optimizer."""
        layer = nn.utils.skip_init(nn.Linear, 6, 4)
        nn.utils.vector_to_parameters(torch.linspace(-1, 1, 28), layer.parameters())
        built = build_optimizer(layer, TrainingOptions(learning_rate=rate), component)
        for step in range(steps):
            for group in built.param_groups:
                group["lr"] = rate
            for parameter in layer.parameters():
                parameter.grad = torch.cos(parameter.detach() * (step + 1))
            built.step()
        return nn.utils.parameters_to_vector(layer.parameters()).detach(), built

    with untouched():
        moved, built = trained(optimizer, 2)
    start, _ = trained(optimizer, 0)
    assert (moved != start).all(), "a step changed nothing"
    assert torch.equal(trained(copy.deepcopy(optimizer), 2)[0], moved), "a copy moves elsewhere: draw nothing at random"
    assert torch.equal(trained(optimizer, 2, rate=0.0)[0], start), "it moves although the rate is 0"
    for state in built.state.values():
        for name, value in state.items():
            assert isinstance(value, (torch.Tensor, int, float)), (
                f"state {name} is a {type(value).__name__}; a checkpoint holds tensors and numbers"
            )
