"""Confounds against what is known of rows made for it."""

import numpy as np
import pytest

from sftmix.components import ConfidenceEstimator, Median, Quantile
from sftmix.components.confidence import LEAST
from sftmix.disk.files import read_json
from sftmix.measure.confounds import confounds, describe_split, labelled, tied_at_the_cut
from sftmix.types import Scores, Split
from tests.tiny import SHORT


def scores_of(confidence, label=None) -> Scores:
    n = len(confidence)
    return Scores(
        id=[str(k) for k in range(n)], row=np.arange(n), confidence=np.asarray(confidence, float),
        variability=np.zeros(n), n_tokens=np.arange(n) + 1, label=label,
    )  # fmt: skip


def test_labels_are_told_most_frequent_first_and_unscored_rows_left_out():
    labels = ["Low", "High", None, "High", "High", "Low", "Mid", "High"]
    confidence = [-1.0, -2, -3, -4, np.nan, -6, -7, -np.inf]
    found = labelled(scores_of(confidence, labels))
    assert {name: values.tolist() for name, values in found.items()} == {"High": [-2, -4], "Low": [-1, -6], "Mid": [-7]}
    assert list(found) == ["High", "Low", "Mid"]
    assert labelled(scores_of(confidence)) == {}


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [
        ([np.nan, -3.0, -2.0, -np.inf, -1.0], 1.0),  # unscored and infinite ones have no rank
        ([-1.0, -2.0, -2.0, -4.0], -0.9486832981),  # ties share the mean of their ranks
        ([np.nan, np.nan], None),
        ([1.0, 1.0], None),
        ([1.0], None),
    ],
)
def test_the_rank_correlation_with_length(confidence, expected):
    found = confounds(scores_of(confidence), Split(np.zeros(len(confidence)), "a"))
    assert found["spearman_confidence_length"] == (expected and pytest.approx(expected))


def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 37), rng.integers(1, 8, 23)
    wins = np.sign(a[:, None] - b) / 2 + 0.5
    scores = scores_of(np.zeros(60))
    scores.n_tokens[:] = [*a, *b]
    splits = (Split(np.repeat([0, 1], [37, 23]), names) for names in ("ab", "abc"))
    assert [confounds(scores, split)["auc_length_confident"] for split in splits] == [
        pytest.approx(wins.mean(), rel=1e-14),
        None,
    ]


# ------------------------------------------------------------------------------------------- a run


def test_labels_stand_beside_the_split(tmp_path):
    scores = scores_of([*-np.arange(1.0, 9), LEAST, np.nan], [*["High", "Low"] * 4, None, None])
    told = describe_split(tmp_path, scores, Median().split(scores, seed=0))
    assert read_json(tmp_path / "split" / "confounds.json") == told["confounds"]
    assert told["confidence"]["confident"]["labels"] == {"High": 0.5, "Low": 0.5}
    assert told["confidence"]["unconfident"]["labels"] == {"Low": 0.5, "High": 0.25}  # a row without one is no "None"
    assert told["confidence"]["unconfident"]["confidence_mean"] == -7  # without LEAST, which is no confidence
    found = told["confounds"]["labels"]
    assert found["High"] == {"examples": 4, "confidence_mean": -4, "confidence_std": pytest.approx(5**0.5)}


@pytest.mark.parametrize(
    ("confidence", "splitter", "tied"),
    [
        ([0.0] * 5 + [-1.0, -2.0, -3.0], Median(), 5 / 8),
        ([0.0, 0.0, -1.0, -1.0, -1.0, -2.0, np.nan], Quantile(levels=3), 3 / 7),
        ([0.0, -1.0, -1.0, -2.0, -2.0, -3.0], Quantile(levels=2), 0),  # the ties are not at the cut
        ([-np.inf] * 4, Median(), 1),
    ],
)
def test_ties_at_the_cut_are_counted(confidence, splitter, tied):
    scores = scores_of(confidence)
    assert tied_at_the_cut(scores, splitter.split(scores, seed=0)) == tied


class Coarse(ConfidenceEstimator):
    """One confidence for all."""

    def estimate(self, dynamics):
        return np.zeros(len(dynamics.ids))


def test_the_summary_tells_of_ties(tiny, tmp_path, sftmix):
    words = [*tiny.options, *SHORT, "--confidence", f"{__name__}.Coarse", "--out", str(tmp_path / "run")]
    done = sftmix("split", *words)
    (remark,) = read_json(tmp_path / "run" / "summary.json")["remarks"]
    assert remark.startswith("100% of the examples have the same confidence")
    assert f"note: {remark}" in done.out
