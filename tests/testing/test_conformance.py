"""The conformance checks pass what is shipped and catch what breaks its contract, each by what it breaks."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from sftmix import components, testing
from sftmix.components import Need, base
from sftmix.components.contracts import OWN_OF_STEP
from sftmix.components.listing import catalogue
from sftmix.components.objectives import NTP, SFTMix
from sftmix.components.splitters import Median
from sftmix.disk.files import read_steps
from sftmix.types import Split
from tests.components.examples import Shares
from tests.fast import some_fast

CHECKS = {
    "ConfidenceEstimator": testing.check_confidence_estimator,
    "Splitter": testing.check_splitter,
    "PairSampler": testing.check_pair_sampler,
    "Order": testing.check_order,
    "Objective": testing.check_objective,
    "Selector": testing.check_selector,
    "Schedule": testing.check_schedule,
    "Optimizer": testing.check_optimizer,
    "Perturbation": testing.check_perturbation,
    "Callback": testing.check_callback,
    "Reference": testing.check_reference,
    "RowFormat": testing.check_row_format,
    "Renderer": testing.check_renderer,
}
OPTIONS = {
    "FromCheckpoints": {"paths": ["somewhere"]},
    "FromEndpoint": {"url": "http://somewhere"},
    "FromSGLang": {"url": "http://somewhere"},
    "Longest": {"k": 3},
    "Random": {"k": 3},
    "ScoreAtLeast": {"field": "score", "threshold": 1.0},
    "WithLabel": {"labels": ["High"]},
    "Shares": {"field": "label", "shares": {"High": 0.5, "Low": 0.5}, "k": 4},
    "QualityLabel": {"high": "High", "low": "Low"},
    "Constant": {"value": 0.2},
    "Linear": {"start": 0.0, "end": 0.4},
    "Cosine": {"start": 0.4, "end": 0.1},
    "AfterFraction": {"fraction": 0.5, "value": 0.2},
}
DETACHED = {"finite_differences": False}
LABELLED = {"scores": testing.score_tables(labels=("High", "Low", "else"), confidence=False)}
MORE = {"ASFT": DETACHED, "DFT": DETACHED, "EAFT": DETACHED, "ProFit": DETACHED, "LevelPairs": {"groups": 4}}
MORE |= dict.fromkeys(("QualityLabel", "WithLabel", "Shares"), LABELLED)
OUTSIDE = {"AdamW8bit", "FromFile", "Online", "S2L", "PriFT", "Rho1"}
"""They need bitsandbytes, read a file, or have no dynamics before training; they have tests of their own."""
SHIPPED = [(name, shipped.path) for name, found in catalogue() for shipped in found if shipped.name not in OUTSIDE]
SHIPPED.append(("Selector", f"{Shares.__module__}.Shares"))


@pytest.mark.parametrize(("kind", "path"), some_fast(SHIPPED, every=3), ids=lambda word: word.rpartition(".")[2])
def test_every_shipped_component_keeps_its_contract(kind, path):
    module, _, name = path.rpartition(".")
    component = getattr(importlib.import_module(module), name)(**OPTIONS.get(name, {}))
    CHECKS[kind](component, **MORE.get(name, {}))


def test_every_base_class_has_a_check():
    assert {name for name, _ in catalogue()} == set(CHECKS)


# ------------------------------------------------------------------------------------------ what is caught


class ByFileOrder(Median):
    """The first half of the file against the second."""

    def split(self, scores, *, seed):
        half = len(scores) // 2
        group = np.full(len(scores), -1, dtype=np.int8)
        group[:half], group[-half:] = 0, 1
        group[np.isnan(scores.confidence)] = -1
        return Split(group=group, names=("first", "second"))


class PairsUnscored(Median):
    def split(self, scores, *, seed):
        found = super().split(scores, seed=seed)
        return replace(found, group=np.maximum(found.group, 0).astype(np.int8))


class SortsInPlace(components.Perplexity):
    def estimate(self, dynamics):
        dynamics.nll_sum.sort(axis=1)
        return super().estimate(dynamics)


class Certain(components.Perplexity):
    """Minus the mean entropy of the predictions."""

    def estimate(self, dynamics):
        means = [tokens.mean() if tokens.size else np.nan for tokens in dynamics.token_entropy]
        return -np.array(means, dtype=np.float64)


class Needy(Certain):
    needs = frozenset({Need.ENTROPY})


def test_a_need_is_met_and_one_that_is_not_declared_is_caught():
    testing.check_confidence_estimator(Needy())
    with pytest.raises(AssertionError, match=r"add to `needs`: .*Need\.ENTROPY for token_entropy"):
        testing.check_confidence_estimator(Certain())


class Fall(components.Perplexity):
    """How far the mean NLL falls from the first to the fifth checkpoint."""

    least_checkpoints = 5

    def estimate(self, dynamics):
        return dynamics.mean_nll[:, 0] - dynamics.mean_nll[:, 4]


def test_an_estimator_sees_as_many_checkpoints_as_it_needs():
    testing.check_confidence_estimator(Fall())
    few = Fall()
    few.least_checkpoints = 4
    with pytest.raises(IndexError, match="index 4 is out of bounds for axis 1 with size 4"):
        testing.check_confidence_estimator(few)


class Accurate(components.Perplexity):
    """The share of the tokens that were right."""

    def estimate(self, dynamics):
        return (dynamics.n_correct / np.where(dynamics.scored, dynamics.n_tokens, np.nan)[:, None]).mean(axis=1)


class Easiest(base.Order):
    """The most confident rows first."""

    def rows(self, scores, *, epoch, seed):
        return np.array(scores.ranked() + [row for row in range(len(scores)) if np.isnan(scores.confidence[row])])


@pytest.mark.parametrize(
    ("check", "component", "need"),
    [
        (testing.check_confidence_estimator, Accurate, "CORRECT for n_correct"),
        (testing.check_order, Easiest, "CONFIDENCE for confidence"),
    ],
)
def test_so_is_one_that_a_run_fills_with_a_number(check, component, need):
    with pytest.raises(AssertionError, match=rf"add to `needs`: .*Need\.{need}"):
        check(component())
    needy = component()
    needy.needs = frozenset({Need[need.partition(" ")[0]]})
    check(needy)


class Ranks(components.Perplexity):
    """Ranks in the order of the file."""

    def estimate(self, dynamics):
        found = super().estimate(dynamics)
        return np.where(np.isnan(found), np.nan, np.arange(len(found), dtype=float))


class Reversed(components.RandomPairs):
    """The less confident example first."""

    def pairs(self, split, scores, *, epoch, seed):
        return super().pairs(split, scores, epoch=epoch, seed=seed)[:, ::-1]


class Remembers(base.PairSampler):
    """A generator of its own, which goes on from epoch to epoch."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def pairs(self, split, scores, *, epoch, seed):
        columns = [self.rng.permutation(rows) for rows in (split.confident, split.unconfident)]
        return np.stack(columns, axis=1)


class Global(base.PairSampler):
    def pairs(self, split, scores, *, epoch, seed):
        return np.stack([np.random.permutation(rows) for rows in (split.confident, split.unconfident)], axis=1)


class NoPairs(base.PairSampler):
    def pairs(self, split, scores, *, epoch, seed):
        return np.empty((0, 2), dtype=np.int64)


class MeanOfMeans(NTP):
    """Each micro-batch counts the same, however many tokens it has: a mean of means."""

    def plan(self, batch, *, step, total_steps, seed):
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        weight = plan.row_weight / max(plan.ntp_count, 1)
        return replace(plan, row_weight=weight, ntp_count=1.0)


class LambdaByPlace(SFTMix):
    """A lambda per place in the micro-batch."""

    def plan(self, batch, *, step, total_steps, seed):
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        return replace(plan, lam=torch.linspace(0, 1, len(plan.lam)))


class TrainsRepeats(NTP):
    def plan(self, batch, *, step, total_steps, seed):
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        return replace(plan, row_weight=torch.ones_like(plan.row_weight))


class BatchNoise(base.Perturbation):
    """One draw for the whole batch."""

    def embeddings(self, e, mask, *, ids, step, seed):
        noise = torch.randn(e.shape, generator=torch.Generator().manual_seed(seed + step))
        return e + noise.to(e.dtype)


class Detached(base.Perturbation):
    def embeddings(self, e, mask, *, ids, step, seed):
        return e.detach() + 0 * e


class Counts(base.Schedule):
    def __init__(self):
        self.calls = 0

    def value(self, step, total_steps):
        self.calls += 1
        return 1 / self.calls


class FallsBelow(base.Schedule):
    def value(self, step, total_steps):
        return 0.5 - step / 2


class StopsQuietly(base.Callback):
    gives = frozenset()

    def on_step_end(self, state):
        return base.CallbackResult(stop=True)


class Tells(base.Callback):
    def on_epoch_end(self, state):
        return base.CallbackResult({"state": "good"})


class Reads(base.Callback):
    """Legal: reads what the log has of each step."""

    def on_step_end(self, state):
        return base.CallbackResult({"share": state.metrics["ntp"] / state.metrics["tokens_per_second"]})


class ScoresSome(base.Callback):
    """Legal: scores the rows that it names, or all, with their instructions or without."""

    def on_epoch_end(self, state):
        some = [state.score(rows, alone=alone) for rows in ([0], np.arange(5)) for alone in (False, True)]
        whole = [state.score(), state.score(None), state.score(rows=[0, 1], alone=True)]
        sizes = [len(column) for part in (*some, *whole) for column in (part.nll_sum, part.n_tokens, part.n_correct)]
        assert sizes == [1] * 6 + [5] * 6 + [2] * 9
        return base.CallbackResult({"some": float(some[0].nll_sum.sum())})


def test_a_callback_may_score_some_rows():
    testing.check_callback(ScoresSome())


def test_a_callback_may_read_what_the_loop_logs(finished):
    testing.check_callback(Reads())
    (line,) = read_steps(finished.path / "train")[:1]
    assert {name for name in line if not name.startswith("eval_")} == OWN_OF_STEP


class Shuffles(base.Reference):
    def collect(self, context):
        found = context.train_and_score([1.0])
        return found.of(list(found.ids)[::-1])


class Fractions(base.Reference):
    def collect(self, context):
        found = context.train_and_score([1.0])
        return replace(found, n_tokens=found.n_tokens.astype(float))


class NamesModel(base.Reference):
    def collect(self, context):
        return context.train_and_score([1.0], model=None)


class Widens(base.Perturbation):
    def embeddings(self, e, mask, *, ids, step, seed):
        return torch.cat([e, e], dim=1)


def slow(*case):
    """A case whose counterexample Hypothesis takes seconds to make small."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "broken", "named"),
    [
        slow("Splitter", ByFileOrder(), "order of the examples"),
        ("Splitter", PairsUnscored(), "for every example without a confidence"),
        slow("ConfidenceEstimator", SortsInPlace(), "changed in place"),
        ("ConfidenceEstimator", Ranks(), "order of the examples"),
        ("PairSampler", Reversed(), "column 0 of a pair must be the more confident"),
        slow("PairSampler", Remembers(), "keep no state"),
        slow("PairSampler", Global(), "draw from sftmix.ranks.rng"),
        ("PairSampler", NoPairs(), "no input gave a pair"),
        ("Objective", MeanOfMeans(), "cut into micro-batches"),
        ("Objective", LambdaByPlace(), "cut into micro-batches"),
        ("Objective", TrainsRepeats(), "tokens of an example that is repeated"),
        ("Perturbation", BatchNoise(), "not equal"),
        ("Perturbation", Detached(), "no gradient"),
        ("Perturbation", Widens(), "Widens returned float32"),
        ("Schedule", Counts(), "keep no state"),
        ("Schedule", FallsBelow(), r"^value\(2, 10\) is -0\.5; allowed: finite numbers from 0$"),
        ("Callback", StopsQuietly(), "STOP is not in its"),
        ("Callback", Tells(), "a mapping of names to numbers"),
        ("Reference", NamesModel(), "context.train_and_score: got an unexpected keyword argument 'model'"),
        slow("Reference", Shuffles(), "exactly context.ids"),
        slow("Reference", Fractions(), "n_tokens float64"),
    ],
    ids=lambda word: type(word).__name__ if isinstance(word, base.Component) else "",
)
def test_a_broken_component_is_caught(kind, broken, named):
    with pytest.raises(AssertionError, match=named):
        CHECKS[kind](broken)
