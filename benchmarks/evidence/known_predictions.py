"""The five predictions of the plan of known truth, next to what came.

Prediction 1 also gives a reason (families whose rule the model does not learn), which has no figure and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.evidence.contrasts import in_brackets
from benchmarks.evidence.known_tests import FOUND_WELL, TO_NTP, TO_RANDOM, contrast_at

Tests = Mapping[str, Any]
NO_FIGURE = ("-", "not to be told: no seed has a figure")


def prediction_rows(tests: Tests, finished: Sequence[int]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (number, what was predicted, what came, result); a prediction of an unfinished table stays open.

    tests     the content of contrasts.json
    finished  shares of the finished tables
    """
    for each in PREDICTIONS:
        done = set(each.shares) <= set(finished)
        yield (str(each.number), each.predicted, *(each.came(tests) if done else ("-", "not yet")))


@dataclass(frozen=True)
class Prediction:
    """A part of a prediction.

    shares  those of the tables that it needs
    came    the tests -> what came, and the result in words
    """

    number: int
    predicted: str
    shares: Sequence[int]
    came: Callable[[Tests], tuple[str, str]]


def _means(number: int, predicted: str, means: Sequence[Sequence[Any]], held: Callable[..., bool]) -> Prediction:
    """Return a prediction of means, which needs no test.

    means  the keys of each in contrasts.json: figure, contrast if it has one, share, and the name of an AUC
    held   the means -> True if it is as predicted
    """

    def came(tests: Tests) -> tuple[str, str]:
        found = [_mean(tests, keys) for keys in means]
        if None in found:
            return NO_FIGURE
        form = ".4f" if means[0][0] == "auc" else "+.4f"
        return ", ".join(f"{each:{form}}" for each in found), "as predicted" if held(*found) else "not as predicted"

    shares = [next(key for key in keys if isinstance(key, int)) for keys in means]
    return Prediction(number, predicted, shares, came)


def _mean(tests: Tests, keys: Sequence[Any]) -> float | None:
    found: Any = tests
    for key in keys:
        found = found.get(str(key), {})
    return found.get("mean")


def _rising(*means: float) -> bool:
    return all(low < high for low, high in pairwise(means))


def _equal(number: int, figure: str, contrast: str, share: int, words: str) -> Prediction:
    """Return a prediction that two arms are equal; one that is neither equal nor different is undecided."""

    def came(tests: Tests) -> tuple[str, str]:
        found = contrast_at(tests, figure, contrast, share)
        if found is None:
            return NO_FIGURE
        failed = "not as predicted" if found.different else "undecided"
        return in_brackets(found.interval), "as predicted" if found.equal else failed

    return Prediction(number, f"{words} equal at {share}%", [share], came)


def _auc(share: int, name: str = "deterministic") -> tuple[str, int, str]:
    return ("auc", share, name)


PREDICTIONS = (
    *(_means(1, f"AUC above {FOUND_WELL} at {k}%", [_auc(k)], lambda mean: mean > FOUND_WELL) for k in (10, 20)),
    _means(1, "AUC lower at 40% than at 10%", [_auc(40), _auc(10)], _rising),
    *(
        _means(2, f"AUC lower among all rows than among deterministic ones at {k}%", [_auc(k, "all"), _auc(k)], _rising)
        for k in (10, 20, 40)
    ),
    *(
        _means(3, f"gap, SFTMix − NTP: 0 to +0.1 at {k}%", [("gap", TO_NTP, k)], lambda mean: 0 <= mean <= 0.1)
        for k in (10, 20, 40)
    ),
    _means(3, "gap, SFTMix − NTP: rises from 10 over 20 to 40%", [("gap", TO_NTP, k) for k in (10, 20, 40)], _rising),
    *(_equal(4, "gap", TO_RANDOM, k, "gap of SFTMix and RandomSplit") for k in (10, 20, 40)),
    *(_equal(5, "exact", TO_NTP, k, "exact match of SFTMix and NTP") for k in (0, 10)),
)
