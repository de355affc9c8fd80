"""A user's module of components, each of which breaks its contract in one way (test_contracts.py)."""

import dataclasses
import os

import numpy as np
import torch

from sftmix.components import NTP, Callback, Median, Perplexity, Perturbation, RandomPairs, Selector, SFTMix
from sftmix.components.base import CallbackResult, Reference
from sftmix.components.reference import TrainedReference
from sftmix.functional import SFTLoss
from sftmix.options import ReferenceModel
from sftmix.types import Plan, TrainingDynamics

# ------------------------------------------------------------------------------------------ references


class Half(TrainedReference):
    """Has the losses of one checkpoint of two."""

    def collect(self, context):
        found = super().collect(context)
        return dataclasses.replace(found, nll_sum=found.nll_sum[:, :1])


class Never(TrainedReference):
    """Has scored the examples at no checkpoint."""

    def collect(self, context):
        found = super().collect(context)
        return dataclasses.replace(
            found,
            steps=found.steps[:0],
            nll_sum=found.nll_sum[:, :0],
            n_correct=found.n_correct[:, :0],
        )


class Impossible(TrainedReference):
    """Returns what was measured with one impossible number in it."""

    def collect(self, context):
        found = super().collect(context)
        self.spoil(found)
        return found

    def spoil(self, found: TrainingDynamics) -> None:
        raise NotImplementedError


class Spoilt(Impossible):
    def spoil(self, found):
        found.nll_sum[3, 1] = np.nan


class Gaining(Impossible):
    def spoil(self, found):
        found.nll_sum[0, 0] = -0.5


class Owing(Impossible):
    def spoil(self, found):
        found.n_tokens[2] = -1


class Perfect(Impossible):
    """Counts more correct tokens than there are."""

    def spoil(self, found):
        found.n_correct[1, 1] = found.n_tokens[1] + 1


class Twice(TrainedReference):
    """Has one example in another's place as well."""

    def collect(self, context):
        found = super().collect(context)
        return dataclasses.replace(found, ids=[found.ids[1], *found.ids[1:]])


class Wordless(TrainedReference):
    """Has fewer tokens of an example than it counts."""

    def collect(self, context):
        found = super().collect(context)
        nll = [np.zeros((len(found.steps), tokens), np.float32) for tokens in found.n_tokens]
        return dataclasses.replace(found, token_nll=[nll[0][:, 1:], *nll[1:]])


class Fewer(Wordless):
    """Has the tokens of one example less."""

    def collect(self, context):
        found = super().collect(context)
        return dataclasses.replace(found, token_nll=found.token_nll[1:])


class WithPrompts(Reference):
    """Scores the prompt together with the response."""

    needs = frozenset()

    def collect(self, context):
        def score(row):
            return [0.5] * len(row.input_ids), [True] * len(row.input_ids)

        return context.score_rows({"server": lambda tokenizer: score}, model=ReferenceModel())


class Uneven(Reference):
    """Has fewer figures of one kind than of the other."""

    needs = frozenset()

    def collect(self, context):
        def score(row):
            return [0.5] * int(row.target.sum()), [True]

        return context.score_rows({"server": lambda tokenizer: score}, model=ReferenceModel())


# ------------------------------------------------------------------------ confidence, splitters, pairs


class Endless(Perplexity):
    def estimate(self, dynamics):
        found = super().estimate(dynamics)
        found[0] = -np.inf
        return found


class Listed(Median):
    """Returns a list, not a Split."""

    def split(self, scores, *, seed):
        return [0] * len(scores)


class Floats(Median):
    def split(self, scores, *, seed):
        found = super().split(scores, seed=seed)
        return dataclasses.replace(found, group=found.group.astype(np.float64))


class Single(RandomPairs):
    """Returns one row for each pair."""

    def pairs(self, split, scores, *, epoch, seed):
        return super().pairs(split, scores, epoch=epoch, seed=seed)[:, 0]


class Selfish(RandomPairs):
    """Pairs a row with itself."""

    def pairs(self, split, scores, *, epoch, seed):
        found = super().pairs(split, scores, epoch=epoch, seed=seed)
        found[3, 1] = found[3, 0]
        return found


class SelfishLater(Selfish):
    """Pairs a row with itself in the third epoch."""

    def pairs(self, split, scores, *, epoch, seed):
        sampler = super() if epoch == 2 else RandomPairs()
        return sampler.pairs(split, scores, epoch=epoch, seed=seed)


class TakesAll(RandomPairs):
    """Pairs a row that has no group."""

    def pairs(self, split, scores, *, epoch, seed):
        found = super().pairs(split, scores, epoch=epoch, seed=seed)
        found[2, 0] = split.unpaired[0]
        return found


# ---------------------------------------------------------------- changes of what other stages read, too


class Averages(Perplexity):
    def estimate(self, dynamics):
        nll = dynamics.nll_sum
        nll /= dynamics.n_tokens[:, None]
        return super().estimate(dynamics)


class Clips(Median):
    def split(self, scores, *, seed):
        scores.n_tokens[scores.n_tokens > 4] = 4
        return super().split(scores, seed=seed)


class Sorts(RandomPairs):
    def pairs(self, split, scores, *, epoch, seed):
        scores.id.sort()
        return super().pairs(split, scores, epoch=epoch, seed=seed)


class Regroups(RandomPairs):
    def pairs(self, split, scores, *, epoch, seed):
        split.group[:] = 0
        return super().pairs(split, scores, epoch=epoch, seed=seed)


class Takes(Selector):
    def select(self, scores, *, seed):
        scores.id.sort()
        return scores.row


# --------------------------------------------------------------------------- objectives: the plan


def with_lambdas_above_1(plan: Plan) -> Plan:
    return dataclasses.replace(plan, lam=plan.lam + 1)


class AtOnce(SFTMix):
    """Breaks its contract in the first step."""

    def plan(self, batch, *, step, total_steps, seed):
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        return with_lambdas_above_1(plan)


class InTheSecondStep(SFTMix):
    """Returns a changed plan in the second step; the first is as it should be."""

    def plan(self, batch, *, step, total_steps, seed):
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        return self.changed(plan) if step == 1 else plan

    def changed(self, plan: Plan) -> object:
        raise NotImplementedError


class Beyond(InTheSecondStep):
    def changed(self, plan):
        return with_lambdas_above_1(plan)


class SecondRank(InTheSecondStep):
    """Breaks its contract on the second rank alone."""

    def changed(self, plan):
        return with_lambdas_above_1(plan) if os.environ.get("RANK") == "1" else plan


class NoNumber(InTheSecondStep):
    def changed(self, plan):
        return dataclasses.replace(plan, lam=plan.lam * float("nan"))


class Infinite(InTheSecondStep):
    def changed(self, plan):
        return dataclasses.replace(plan, row_weight=plan.row_weight / 0)


class NoPlan(InTheSecondStep):
    def changed(self, plan):
        return {"lam": plan.lam}


class FarPairs(InTheSecondStep):
    """Pairs tokens that the micro-batch does not have."""

    def changed(self, plan):
        return dataclasses.replace(plan, pairs=plan.pairs + 1000)


class Counted(InTheSecondStep):
    """Has a tensor for a count."""

    def changed(self, plan):
        return dataclasses.replace(plan, ntp_count=plan.row_weight.sum())


class Uncounted(InTheSecondStep):
    def changed(self, plan):
        return dataclasses.replace(plan, mixup_count=0.0)


class WithoutMu(InTheSecondStep):
    """Has mu in the weights alone."""

    def changed(self, plan):
        return dataclasses.replace(plan, mu=0.0)


class UncountedNTP(InTheSecondStep):
    def changed(self, plan):
        return dataclasses.replace(plan, ntp_count=0)


# --------------------------------------------------------------------------- objectives: the loss


class WrongLoss(NTP):
    """Returns its loss changed."""

    def loss(self, view, batch, plan):
        return self.changed(super().loss(view, batch, plan))

    def changed(self, out: SFTLoss) -> object:
        raise NotImplementedError


class Vector(WrongLoss):
    def changed(self, out):
        return out._replace(loss=out.loss[None])


class Graphless(WrongLoss):
    def changed(self, out):
        return out._replace(loss=out.loss.detach())


class Keeper(WrongLoss):
    """Keeps a graph at a figure that should have none."""

    def changed(self, out):
        return out._replace(nll=out.nll.clone().requires_grad_())


class Stunted(WrongLoss):
    """Has a token less in a figure."""

    def changed(self, out):
        return out._replace(nll=out.nll[1:])


class Bare(WrongLoss):
    """Returns a tensor, not an SFTLoss."""

    def changed(self, out):
        return out.loss


# -------------------------------------------------------------------------- perturbations, callbacks


class Wide(Perturbation):
    def embeddings(self, e, mask, *, ids, step, seed):
        return torch.cat([e, e], dim=1)


class Cut(Perturbation):
    """Leaves the input embeddings untrained."""

    def embeddings(self, e, mask, *, ids, step, seed):
        return e.detach()


class Says(Callback):
    """Returns a dict, not a CallbackResult."""

    def on_step_end(self, state):
        return {"stop": True}


class Stops(Callback):
    """Ends the training although it says that it gives nothing."""

    gives = frozenset()

    def on_step_end(self, state):
        return CallbackResult(stop=True)


class Evaluates(Stops):
    def on_step_end(self, state):
        return CallbackResult({"eval_nll": 1.0})
