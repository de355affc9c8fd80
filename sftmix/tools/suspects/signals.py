"""Signals of wrong rows: each gives every row a number, larger if the row is more suspicious (`sftmix suspects`)."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from typing import Any, ClassVar

import numpy as np

from sftmix.components import confidence
from sftmix.components.component import Component
from sftmix.tools.suspects.rows import SuspectRows
from sftmix.types import Float64, Rows
from sftmix.words.errors import ConfigError

AT_ONCE = 1000
"""Rows that are compared with all others at once."""
PRIOR = 4
NEAREST = 5
"""Other rows with which the own one is compared."""


class Signal(Component, ABC):
    """A measure of how likely each row is wrong.

    limit     a row above it stands out, and comes before all that do not; inf: none does
    relative  the limit is above the median of the row's group; false for a count of faults, which most rows may have
    """

    limit: ClassVar[float] = math.inf
    relative: ClassVar[bool] = True

    @abstractmethod
    def score(self, rows: SuspectRows) -> Float64:
        """Return f64[N], larger if a row is more suspicious; NaN if that cannot be said."""


def cosines(one: Any, other: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yield, for AT_ONCE rows at a time, the place of the first, the cosines with others [AT_ONCE, N] and the own."""
    from sklearn.metrics.pairwise import linear_kernel

    for start in range(0, one.shape[0], AT_ONCE):
        block = linear_kernel(one[start : start + AT_ONCE], other, dense_output=True)
        pair = block.diagonal(start).copy()  # row k of the block is row start + k
        np.fill_diagonal(block[:, start:], -np.inf)  # the own one is never the nearest other
        yield start, block, pair


class Mismatch(Signal):
    """The response fits other prompts better than its own, and the prompt other responses, by their embeddings.

    The mean cosine with the five nearest of the other rows, both ways, minus twice the cosine of the row's own two.
    """

    def score(self, rows: SuspectRows) -> Float64:
        k, total = min(NEAREST, len(rows.prompts) - 1), np.zeros(len(rows.prompts))
        # Prompts among responses, then responses among prompts.
        for one, other in (rows.vectors, rows.vectors[::-1]):
            for start, block, pair in cosines(one, other):
                nearest = np.partition(block, -k)[:, -k:].mean(1, dtype=np.float64)
                total[start : start + AT_ONCE] += nearest - pair
        return total


class Echo(Signal):
    """The response repeats the prompt and says little else: the share of the runs of three words that both have.

    The smaller of the two shares, the response's and the prompt's, counts if it is above 0.8: a text that was to be
    corrected comes back without its instruction.
    """

    limit = 0.8
    relative = False

    def score(self, rows: SuspectRows) -> Float64:
        shares = []
        for texts in zip(rows.prompts, rows.responses, strict=True):
            words = [re.findall(r"\w+", text.lower()) for text in texts]
            # "He go to school" -> (he, go, to), (go, to, school).
            asked, said = [list(zip(each, each[1:], each[2:], strict=False)) for each in words]
            # "Correct this: He go to the big school ..." and only "He go ...": 1.0 of the response, 0.85 of the prompt.
            shares.append(min(_share(said, {*asked}), _share(asked, {*said})))
        return np.maximum(shares, 0.8)  # so usual rows are all 0.8


def _share(runs: Sequence[tuple[str, ...]], known: Set[tuple[str, ...]]) -> float:
    return sum(run in known for run in runs) / max(1, len(runs))


class EndOfTurn(Signal):
    """NLL of the last response token, the mean over the checkpoints in training: high if a response was cut off."""

    limit = 12.0

    def score(self, rows: SuspectRows) -> Float64:
        dynamics = rows.dynamics_with("token_nll")
        steps, losses = dynamics.steps, dynamics.token_nll
        at = steps > 0 if steps.any() else steps == 0  # step 0 is the model before training
        return np.array([nll[at, -1].mean() if nll.shape[1] else np.nan for nll in losses], np.float64)


class HardTokens(Signal):
    """Mean NLL of the hardest fifth of the response tokens at the last checkpoint: high if words were exchanged.

    The last token ends the turn, and is left to EndOfTurn. Each mean also counts PRIOR tokens with the median of all
    rows, so that a few tokens do not decide.
    """

    limit = 3.0

    def score(self, rows: SuspectRows) -> Float64:
        # With a usual mean of 5.5, one token of 6 counts as (6 + 4 * 5.5) / (1 + 4) = 5.6.
        words = [nll[-1, :-1].astype(np.float64) for nll in rows.dynamics_with("token_nll").token_nll]
        hard = [np.sort(nll)[-max(1, len(nll) // 5) :] for nll in words]
        total, size = np.array([(part.sum(), len(part)) for part in hard]).T
        if not size.any():  # all responses are the end of their turn alone
            return np.full(len(size), np.nan)
        usual = np.median(total[size > 0] / size[size > 0])
        return np.where(size > 0, (total + PRIOR * usual) / (size + PRIOR), np.nan)


class Information(Signal):
    """The prompt says little about the response: minus their pointwise mutual information under the last checkpoint.

    log p(response) - log p(response | prompt) in nats, with sums over the response tokens. No training is needed.
    """

    def score(self, rows: SuspectRows) -> Float64:
        dynamics = rows.dynamics_with("alone_nll_sum")
        alone = dynamics.alone_nll_sum[:, -1]
        return np.where(alone > 0, dynamics.nll_sum[:, -1] - alone, np.nan)  # a row that was not scored has sums of 0


class Perplexity(Signal):
    """Perplexity of the response, the mean over the checkpoints: minus the confidence of the paper.

    It finds wrong answers among rows of one kind (`--by label`) that the reference can learn.
    """

    def score(self, rows: SuspectRows) -> Float64:
        if rows.dynamics is None:
            raise ConfigError("--signals Perplexity needs the losses of a model: a run with a reference, or --model")
        return -confidence.Perplexity().estimate(rows.dynamics)


def best_fits(rows: SuspectRows) -> Rows:
    """Return i64[N], the other row whose response is nearest to each prompt: with it Mismatch compares."""
    return np.concatenate([block.argmax(1) for _, block, _ in cosines(*rows.vectors)])


def percentiles(scores: Float64, groups: Sequence[str]) -> Float64:
    """Return the share of the rows of its own group that each row is above, equal ones half; NaN stays lowest."""
    import pandas as pd

    # 1, 5, nan, 2 -> 0.375, 0.875, 0.125, 0.625.
    grouped = pd.Series(scores).groupby(np.array(groups))
    return ((grouped.rank(na_option="top") - 0.5) / grouped.transform("size")).to_numpy()


def ranked(rows: SuspectRows, kinds: Sequence[type[Signal]], groups: Sequence[str]) -> tuple[Any, Any]:
    """Return two tables with a column for each signal: the rows' percentiles, and what of them counts.

    The percentile by the first signal counts, and with 1 more each by which a row stands out.
    """
    import pandas as pd

    scores = pd.DataFrame({kind.__name__: kind().score(rows) for kind in kinds})
    percentile = scores.apply(percentiles, groups=groups)
    usual = scores.groupby(np.array(groups)).transform("median") * [kind.relative for kind in kinds]
    stands_out = scores - usual > [kind.limit for kind in kinds]  # a NaN does not
    first = scores.columns == scores.columns[0]
    # A row at 0.9 by HardTokens that stands out there counts 1.9 in its column, else 0; only the first always counts.
    return percentile, (percentile + stands_out).where(stands_out | first, 0.0)
