"""Sums over the steps of a stage, and mu_effective of all of them together."""

from __future__ import annotations

import pytest

from sftmix.training.log import Totals
from sftmix.training.step import StepResult


def step(mu: float, mean: str, ntp: float, mixup: float, *, norm: float = 1.0) -> StepResult:
    figures = {"loss": 1.0, "ntp": 1.0, "mixup": 1.0, "learning_rate": 0.1, "ntp_tokens": 7, "mixup_tokens": 3}
    counts = {"ntp_count": ntp, "mixup_count": mixup, "mu": mu, "mixup_mean": mean, "grad_norm": norm}
    return StepResult(**figures, **counts, batches=[], plans=[], nll=[])  # type: ignore[arg-type]


def test_mu_effective_is_of_the_steps_that_mixed_with_the_mean_of_mu_over_what_was_mixed():
    totals = Totals()
    for done in (step(0.0, "own", 90, 0), step(0.2, "own", 40, 10), step(0.5, "own", 60, 40, norm=float("nan"))):
        totals.add(done, tokens=11, examples=2, seconds=0.5)
    mean = (0.2 * 10 + 0.5 * 40) / 50
    assert totals.figures()["mu_effective"] == pytest.approx(mean * 100 / 50, rel=1e-15)
    assert (totals.tokens, totals.examples, totals.ntp_tokens, totals.mixup_tokens) == (33, 6, 21, 9)
    assert totals.skipped == 1
    assert totals.elapsed == 1.5


def test_under_ntp_it_is_the_mean_of_mu():
    totals = Totals()
    for done in (step(0.2, "ntp", 40, 10), step(0.5, "ntp", 60, 40)):
        totals.add(done, tokens=11, examples=2, seconds=0.5)
    assert totals.figures()["mu_effective"] == pytest.approx((0.2 * 10 + 0.5 * 40) / 50, rel=1e-15)


def test_without_mixup_it_is_zero():
    assert Totals().figures()["mu_effective"] == 0


def test_the_updates_are_the_steps_that_were_counted_and_not_skipped():
    totals, nan = Totals(), float("nan")
    for done in (step(0, "own", 0, 0), step(0, "own", 9, 0), step(1, "own", 0, 2), step(1, "ntp", 0, 2)):
        totals.add(done, tokens=11, examples=2, seconds=0.5)
    totals.add(step(0, "own", 9, 0, norm=nan), tokens=11, examples=2, seconds=0.5)
    assert (totals.updates, totals.skipped) == (2, 1)
