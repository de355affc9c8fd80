"""The check of objectives: plans and losses on a small model, however a batch is cut, and their gradients."""

import copy
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import base, contracts
from sftmix.components.component import Need
from sftmix.components.view import Taught
from sftmix.testing.shared import answer_of
from sftmix.testing.strategies import rows_in_memory
from sftmix.training.callback_state import refusing_moves
from sftmix.training.module import TrainingModule
from sftmix.training.step import normalise
from sftmix.types import Batch, BatchNLL, Split

SEED, STEPS = 7, 3
_DATA = rows_in_memory([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 1), (6, 8)])
# three pairs; row 6 with row 2 once more, which NTP counts once (weight 0); a row without a pair
_UNITS = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(5)), (Slot(6), Slot(2, 0.0)), (Slot(7),)]
_SPLIT = Split(group=np.array([0, 1, 0, 1, 0, 1, 0, -1, -1], dtype=np.int8), names=("confident", "unconfident"))


def _loss(objective: base.Objective, batches: Sequence[Batch], step: int, move: float | np.ndarray = 0.0) -> np.ndarray:
    """Return the loss of a global batch on a small GPT-2 in float64 and its gradient, in one vector.

    move  is added to the weights
    """
    plans = []
    with refusing_moves(objective):
        for batch in batches:
            plan = objective.plan(batch, step=step, total_steps=STEPS, seed=SEED)
            plans.append(contracts.check_plan(objective, plan, batch))
            assert not len(plan.pairs) or Need.PAIRS in objective.needs, "it mixes pairs: add Need.PAIRS to `needs`"
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng(devices=[]):  # the weights are drawn from torch's global state, which is watched
        torch.manual_seed(SEED)
        module = TrainingModule(transformers.GPT2LMHeadModel(config).double().eval())  # eval: no dropout
    untrained, weights = copy.deepcopy(module), list(module.parameters())
    moved = nn.utils.parameters_to_vector(weights).detach() + torch.as_tensor(move)
    nn.utils.vector_to_parameters(moved, weights)
    ntp, mixup = sum(plan.ntp_count for plan in plans), sum(plan.mixup_count for plan in plans)
    total, passes = torch.zeros((), dtype=torch.float64), Counter[int]()
    for number, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
        scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=1)
        teacher = None
        if Need.TEACHER in objective.needs:  # the weights before they are moved
            with torch.no_grad():
                teacher = Taught(untrained.hidden_states(batch), **untrained.head.copied())
        counting = module.model.get_decoder().register_forward_pre_hook(lambda *_, of=number: passes.update([of]))
        with counting:
            out = module(batch, scaled, loss=objective.loss, teacher=teacher)
        contracts.check_loss(objective, out, scaled)
        total = total + out.loss
    found = sorted({passes[number] for number in range(len(batches))})
    assert len(found) == 1, (
        f"loss() makes {' or '.join(map(str, found))} passes of the decoder in the micro-batches of a step: under FSDP "
        "all ranks join each pass, and wait until training.timeout for one that makes fewer; call view.hidden and "
        "view.states in every micro-batch, also where nothing is mixed"
    )
    message = f"loss() makes {found[0]} passes of the decoder, and {type(objective).__name__}.passes is"
    assert found[0] <= objective.passes, f"{message} {objective.passes}: `estimate` counts their time by it"
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(total, weights, materialize_grads=True))
    return torch.cat([total.detach()[None], gradient]).numpy()


def _first(objective: base.Objective) -> base.Objective:
    """Return the objective or, if it has a state to be saved, a copy in its first one."""
    return copy.deepcopy(objective) if hasattr(objective, "state_dict") else objective


def _check_state(objective: Any, batches: Sequence[Batch]) -> None:
    """Check that an objective goes on from its state as a checkpoint holds it."""
    used, resumed = copy.deepcopy(objective), copy.deepcopy(objective)
    _loss(used, batches, 0)
    resumed.load_state_dict(json.loads(json.dumps(used.state_dict())))
    message = "load_state_dict(state_dict()) gives another loss: the state lacks something, or is no JSON"
    np.testing.assert_array_equal(_loss(resumed, batches, 1), _loss(used, batches, 1), message)


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
    asked, read = Need.PROMPTS in objective.needs, nll if Need.BATCH_NLL in objective.needs else None
    whole, *cuts = (
        [replace(collate(units, _DATA, split=_SPLIT, prompts=asked), batch_nll=read) for units in cut]
        for cut in ([_UNITS], [[unit] for unit in _UNITS], [_UNITS[3:], _UNITS[:3]])
    )
    objective.begin(_DATA)
    # whole: one micro-batch; cuts: one for each unit, and two with the second half first
    try:
        values = answer_of(
            objective, lambda component: [_loss(_first(component), whole, step) for step in range(STEPS)]
        )
    except (AttributeError, TypeError) as error:
        hint = "if it reads batch.batch_nll or batch.prompt, add Need.BATCH_NLL or Need.PROMPTS to `needs`"
        raise AssertionError(f"{error}: {hint}") from error
    weighted = [replace(batch, weight=torch.linspace(0.5, 1.5, len(batch.labels))) for batch in whole]
    assert not values[0].any() or (_loss(_first(objective), weighted, 0) != values[0]).any(), (
        "the rows' weights change nothing: multiply those of the tokens by `batch.weight`, as "
        "sftmix.components.plans.ntp_plan does"
    )
    if hasattr(objective, "state_dict"):
        _check_state(objective, whole)
    for step, value in enumerate(values):
        for batches in cuts:
            other = _loss(_first(objective), batches, step)
            message = "it depends on how the batch is cut into micro-batches"
            np.testing.assert_allclose(other, value, rtol=1e-6, atol=1e-8, err_msg=message)
    if finite_differences:
        gradient = values[-1][1:]
        # along sign(gradient) the slope is the sum of |gradient|, in which nothing cancels
        ahead, behind = (
            _loss(_first(objective), whole, STEPS - 1, way * np.sign(gradient))[0] for way in (1e-6, -1e-6)
        )
        slope, measured = np.abs(gradient).sum(), (ahead - behind) / 2e-6
        assert math.isclose(measured, slope, rel_tol=1e-5, abs_tol=1e-8), (
            "the gradient is not the loss's by finite differences. If the loss detaches a factor on purpose, as DFT's "
            "does, that is so: give finite_differences=False (`components --check --finite_differences false`)"
        )
