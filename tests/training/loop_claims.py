"""Three steps, what they must be by formulas on one example at a time, and claims about a stage trained on them
(test_loop.py)."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftmix.batches.order import Slot, Unit
from sftmix.disk.tables import read_dynamics
from sftmix.ranks.rng import generator
from tests.toy import metrics_of, toy_model, toy_rows
from tests.training.test_step import naive

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3), (1, 4), (6, 2)])
# A repeat in the first epoch, which mixes without NTP; at its end, a batch that leaves a rank of two without work.
BATCHES: list[list[Unit]] = [
    [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(2, 0.0)), (Slot(5),)],
    [(Slot(6), Slot(7))],
    [(Slot(8),)],
]
MU, ALPHA, SEED = 0.75, 0.5, 11


def drawn(step: int) -> dict[tuple[str, str], list[float]]:
    """Lambdas of the pairs of a step, as their legend says: float32, keyed by seed, step and the two ids."""
    found = {}
    for a, b in ((u[0].row, u[1].row) for u in BATCHES[step] if len(u) == 2):
        ids = (DATA[a].id, DATA[b].id)
        lam = float(np.float32(generator(SEED, "lambda", step, *ids).beta(ALPHA, ALPHA)))
        found[ids] = [lam] * 99
    return found


@dataclass(frozen=True)
class Expected:
    """What a step must be, by formulas on one example at a time."""

    gradients: dict[str, torch.Tensor]
    loss: float
    ntp: float
    """The mean NLL of the tokens that have NTP loss."""
    tokens: int
    ntp_tokens: int
    mixup_tokens: int

    @property
    def counts(self) -> dict[str, int]:
        return {"tokens": self.tokens, "ntp_tokens": self.ntp_tokens, "mixup_tokens": self.mixup_tokens}

    @property
    def losses(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "ntp": self.ntp,
            "ntp_loss": self.ntp,
            "mixup": (self.loss - self.ntp) / MU if self.mixup_tokens else 0,
            "mu_effective": MU * self.ntp_tokens / self.mixup_tokens if self.mixup_tokens else 0,
            "grad_norm": float(torch.stack([gradient.norm() for gradient in self.gradients.values()]).norm()),
        }


def response_tokens(row: int) -> int:
    return int(DATA[row].target.sum())


@cache
def own_losses() -> list[float]:
    """The mean NLL of each row by itself."""
    return [naive(toy_model(), DATA, [(Slot(row),)], {}, mu=0, mixup_mean="own")[0] for row in range(len(DATA))]


@cache
def expected_step(step: int) -> Expected:
    units = BATCHES[step]
    loss, gradients = naive(toy_model(), DATA, units, drawn(step), mu=MU, mixup_mean="own")
    slots = [slot for unit in units for slot in unit]
    trained = {slot.row: response_tokens(slot.row) for slot in slots if slot.ntp_weight}
    pairs = [unit for unit in units if len(unit) == 2]
    return Expected(
        gradients=gradients,
        loss=loss,
        ntp=sum(own_losses()[row] * n for row, n in trained.items()) / sum(trained.values()),
        tokens=sum(len(DATA[slot.row].input_ids) for slot in slots),
        ntp_tokens=sum(trained.values()),
        mixup_tokens=sum(min(response_tokens(slot.row) for slot in pair) for pair in pairs),
    )


def expected_steps() -> list[Expected]:
    return [expected_step(step) for step in range(len(BATCHES))]


@dataclass(frozen=True)
class Trained:
    """What training on BATCHES left on one rank."""

    directory: Path
    gradients: list[dict[str, torch.Tensor]]
    """Of each step."""
    figures: dict[str, Any]
    collectives: Counter[str]


def gradients_are_those_of_the_formula(trained: Trained) -> None:
    for gradients, expected in zip(trained.gradients, expected_steps(), strict=True):
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-10)


def ddp_sums_the_gradients_once_a_step(trained: Trained, starts: int) -> None:
    """And once at each start, for the order of its buckets; all else that it sums is small."""
    words = [(key.split(), times) for key, times in trained.collectives.items()]
    summed = sum(int(size) * times for (name, size), times in words if name == "all_reduce" and int(size) > 9)
    assert summed == (len(BATCHES) + starts) * sum(p.numel() for p in toy_model().parameters())


def each_step_is_logged_once(trained: Trained) -> None:
    assert [line["step"] for line in metrics_of(trained.directory)] == [1, 2, 3]


def all_steps_are_of_the_first_epoch(trained: Trained) -> None:
    assert [line["epoch"] for line in metrics_of(trained.directory)] == [0, 0, 0]


def tokens_of_a_step_are_counted(trained: Trained) -> None:
    for line, expected in zip(metrics_of(trained.directory), expected_steps(), strict=True):
        assert {name: line[name] for name in expected.counts} == expected.counts


def losses_of_a_step_are_those_of_the_formula(trained: Trained) -> None:
    for line, expected in zip(metrics_of(trained.directory), expected_steps(), strict=True):
        found = {name: line[name] for name in expected.losses}
        assert found == pytest.approx(expected.losses, rel=1e-6, abs=1e-12)


def tokens_of_the_stage_are_those_of_its_steps(trained: Trained) -> None:
    for name in ("tokens", "ntp_tokens", "mixup_tokens"):
        assert trained.figures[name] == sum(step.counts[name] for step in expected_steps()), name


def mu_of_the_stage_is_that_of_its_steps_with_mixup(trained: Trained) -> None:
    mixing = [step for step in expected_steps() if step.mixup_tokens]
    expected = MU * sum(step.ntp_tokens for step in mixing) / sum(step.mixup_tokens for step in mixing)
    assert trained.figures["mu_effective"] == pytest.approx(expected, rel=1e-12)


def online_losses_have_every_token(trained: Trained) -> None:
    kept = read_dynamics(trained.directory / "online" / "epoch-000.parquet").of(DATA.ids)
    assert kept.n_tokens.tolist() == [response_tokens(row) for row in range(len(DATA))]


def online_losses_are_those_of_each_row_by_itself(trained: Trained) -> None:
    kept = read_dynamics(trained.directory / "online" / "epoch-000.parquet").of(DATA.ids)
    expected = [nll * response_tokens(row) for row, nll in enumerate(own_losses())]
    np.testing.assert_allclose(kept.nll_sum[:, 0], expected, rtol=1e-9)


CLAIMS_OF_FILES = [
    each_step_is_logged_once,
    all_steps_are_of_the_first_epoch,
    tokens_of_a_step_are_counted,
    losses_of_a_step_are_those_of_the_formula,
    tokens_of_the_stage_are_those_of_its_steps,
    mu_of_the_stage_is_that_of_its_steps_with_mixup,
    online_losses_have_every_token,
    online_losses_are_those_of_each_row_by_itself,
]
"""About what only the main rank writes or sums up."""
