"""A rehearsal of the components that follow the reference, before its training takes hours."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from sftmix.batches.collate import collate
from sftmix.batches.order import epoch_units
from sftmix.common.errors import ContractError, SFTMixError
from sftmix.common.rng import generator
from sftmix.components.base import Component, ConfidenceEstimator, Need, Objective, PairSampler, Splitter
from sftmix.components.confidence import variability
from sftmix.components.contracts import (
    check_confidence,
    check_pairs,
    check_plan,
    check_split,
)
from sftmix.components.splitters import TooFewExamples
from sftmix.pipeline.context import RunContext
from sftmix.pipeline.rows import RunRows
from sftmix.types import Batch, BatchNLL, TrainingDynamics

UNITS = 4
"""Pairs or single examples in the micro-batch of the rehearsal."""
WRONG_CALLS = (TypeError, AttributeError, NameError)
"""Errors of code that would fail on any figures."""
Parts = tuple[ConfidenceEstimator, Splitter, PairSampler | None, Objective]
"""The components that follow the reference."""


def rehearse(run: RunContext, rows: RunRows, stages: set[str]) -> None:
    """Ask each component of `stages` once for its answer on the run's rows, with losses that are made up.

    Raises what holds for all losses: the ConfigError of a contract that is broken, TooFewExamples, and the errors of
    WRONG_CALLS. What else a component raises, as that no example is confident enough, may come of the made-up losses: a
    line tells of it.
    """
    try:
        parts = copy.deepcopy((run.config.confidence, run.config.splitter, run.pairing, run.config.objective))
    except Exception:  # what cannot be copied may keep something of each call, so it is not asked twice
        return
    try:
        _ask(parts, rows, stages, run.config.seed, token_nll=run.config.reference.token_nll)
    except _Doubtful as error:
        run.say(
            f"note: tried out before the reference is trained, on losses that are made up, {error}\n"
            "      If it says so of the real ones, too, the run will end there."
        )


class _Doubtful(Exception):
    """What a component said of made-up losses, and may not say of real ones."""


@contextmanager
def _asking(component: Component) -> Iterator[None]:
    """Raise _Doubtful with the component's name in place of its errors, except those that hold for all losses."""
    try:
        yield
    except (ContractError, TooFewExamples, *WRONG_CALLS):
        raise
    except Exception as error:
        said = str(error) if isinstance(error, SFTMixError) else f"{type(error).__name__}: {error}"
        raise _Doubtful(f"{type(component).__name__} says: {said}") from error


def _ask(parts: Parts, rows: RunRows, stages: set[str], seed: int, *, token_nll: bool) -> None:
    estimator, splitter, pairing, objective = parts
    dynamics = made_up(rows.data.train.ids, rows.data.train.n_targets, token_nll=token_nll)
    with _asking(estimator):
        confidence = check_confidence(estimator, estimator.estimate(dynamics), dynamics)
    if "split" not in stages:
        return
    scores = replace(rows.table(), confidence=confidence, variability=variability(dynamics))
    with _asking(splitter):
        split = check_split(splitter, splitter.split(scores, seed=seed), scores)
    if "train" not in stages or pairing is None:
        return
    with _asking(pairing):
        pairs = check_pairs(pairing, pairing.pairs(split, scores, epoch=0, seed=seed), split, scores)
    units = epoch_units(len(scores), pairs, epoch=0, seed=seed)[:UNITS]
    batch = collate(units, rows.data.train, split=split)
    if Need.BATCH_NLL in objective.needs:
        batch = replace(batch, batch_nll=_batch_nll(batch, dynamics))
    with _asking(objective):
        check_plan(objective, objective.plan(batch, step=0, total_steps=2, seed=seed), batch)


def made_up(ids: Sequence[str], n_tokens: np.ndarray, *, token_nll: bool) -> TrainingDynamics:
    """Return dynamics at three checkpoints, the first before training: an NLL per token that falls, never alike."""
    rng, size = generator(0, "rehearsal"), len(ids)
    mean_nll = rng.lognormal(0.5, 0.5, (size, 1)) * np.array([1.0, 0.8, 0.7])
    nll_sum = mean_nll * n_tokens[:, None]
    return TrainingDynamics(
        ids=list(ids),
        steps=np.arange(3, dtype=np.int64),
        nll_sum=nll_sum,
        n_tokens=n_tokens,
        n_correct=np.floor(n_tokens[:, None] * np.exp(-mean_nll)).astype(np.int64),
        token_nll=[np.tile(m[:, None], (1, int(n))).astype(np.float32) for m, n in zip(mean_nll, n_tokens, strict=True)]
        if token_nll
        else None,
        alone_nll_sum=nll_sum * rng.uniform(1.0, 1.5, (size, 1)),
    )


def _batch_nll(batch: Batch, dynamics: TrainingDynamics) -> BatchNLL:
    import torch

    rows = torch.unique(batch.rows)
    index = rows.numpy()
    nll, counts = torch.from_numpy(dynamics.nll_sum[index, -1]), torch.from_numpy(dynamics.n_tokens[index])
    return BatchNLL(rows=rows, nll_sum=nll, n_tokens=counts)
