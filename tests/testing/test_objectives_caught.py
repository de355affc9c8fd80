"""Objectives that a run would compute wrongly, each caught by the check of objectives, in words."""

from dataclasses import replace

import pytest

from sftmix import components, testing
from sftmix.components.objectives import NTP, SFTMix
from sftmix.components.plans import ntp_plan


class Mean(NTP):
    """The mean over the micro-batch in place of sums over the global one."""

    def loss(self, view, batch, plan):
        out = super().loss(view, batch, plan)
        return out._replace(loss=out.nll.numel() * out.loss)


class Halved(NTP):
    """A loss whose gradient is another one's."""

    def loss(self, view, batch, plan):
        out = super().loss(view, batch, plan)
        return out._replace(loss=0.5 * out.loss + 0.5 * out.loss.detach())


class SkipsItsPass(components.EmbeddingMixup):
    """No second pass where nothing is mixed."""

    def loss(self, view, batch, plan):
        if not len(plan.pairs):
            return view.sft_loss(batch, plan)
        return super().loss(view, batch, plan)


class UncountedPass(components.EmbeddingMixup):
    """A second pass that is not counted."""

    passes = 1


class Forgot(NTP):
    """What it reads, and does not say that it needs."""

    def __init__(self, *, of: str):
        self.of = of

    def plan(self, batch, **at):
        if self.of == "batch_nll":
            return ntp_plan(batch, batch.ntp_weight * batch.batch_nll.nll_sum.sum().float())
        if self.of == "weight":
            return super().plan(replace(batch, weight=None), **at)
        return SFTMix().plan(batch, **at)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Forgot(of="pairs"), r"it mixes pairs: add Need\.PAIRS to `needs`"),
        (Forgot(of="batch_nll"), r"if it reads batch\.batch_nll or batch\.prompt, add Need\.BATCH_NLL"),
        (Forgot(of="weight"), r"the rows' weights change nothing: .* by `batch\.weight`"),
        (UncountedPass(), r"makes 2 passes of the decoder, and UncountedPass\.passes is 1: `estimate`"),
        (SkipsItsPass(), "makes 1 or 2 passes of the decoder"),
        (Mean(), "depends on how the batch is cut"),
        (Halved(), r"is not the loss's.*finite_differences=False.*--finite_differences false"),
    ],
)
def test_a_loss_that_no_run_could_use_is_caught(objective, words):
    with pytest.raises(AssertionError, match=words):
        testing.check_objective(objective)
