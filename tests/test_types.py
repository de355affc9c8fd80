"""The records that travel between the stages."""

import dataclasses

import numpy as np
import pytest

from sftmix.types import UNPAIRED, Scores, Split, TrainingDynamics


def test_a_split_gives_the_rows_of_its_groups_in_file_order():
    split = Split(group=np.asarray([2, 0, UNPAIRED, 1, 0, 2], dtype=np.int8), names=("high", "middle", "low"))
    assert split.confident.tolist() == [1, 4]
    assert split.rows(1).tolist() == [3]
    assert split.unconfident.tolist() == [0, 5]
    assert split.unpaired.tolist() == [2]
    assert split.rows(0).dtype == np.int64
    together = np.concatenate([split.rows(g) for g in (UNPAIRED, 0, 1, 2)])
    assert sorted(together.tolist()) == list(range(6))


def test_an_example_without_a_scored_token_is_not_scored():
    nothing = np.zeros((3, 1))
    dynamics = TrainingDynamics(
        ids=["a", "b", "c"],
        steps=np.asarray([1]),
        nll_sum=nothing,
        n_tokens=np.asarray([1, 0, 7]),
        n_correct=nothing.astype(np.int64),
    )
    assert dynamics.scored.tolist() == [True, False, True]


def test_scores_have_a_length_and_cannot_be_changed():
    column = np.zeros(4)
    scores = Scores(
        id=list("abcd"), row=np.arange(4), confidence=column, variability=column, n_tokens=np.ones(4, dtype=np.int64)
    )
    assert len(scores) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.label = ["x"] * 4
