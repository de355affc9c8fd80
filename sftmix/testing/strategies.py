"""Hypothesis strategies for the inputs of components, and rows in memory."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from sftmix.types import Encoded, Int64, Scores, TrainingDynamics


class RowsInMemory(list[Encoded]):
    """Tokenised rows, as the loop sees them, in a list."""

    @property
    def lengths(self) -> Int64:
        return np.array([len(example.input_ids) for example in self])

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self]


def rows_in_memory(lengths: Sequence[tuple[int, int]], *, vocabulary: int = 61) -> RowsInMemory:
    """Return one row of random tokens per (prompt tokens, response tokens); ids example-0, example-1, ..."""
    rng, rows = np.random.default_rng(0), RowsInMemory()
    for row, (prompt, response) in enumerate(lengths):
        target = np.arange(prompt + response) >= prompt
        rows.append(Encoded(row, f"example-{row}", rng.integers(3, vocabulary, len(target)), target))
    return rows


@st.composite
def training_dynamics(draw: st.DrawFn, *, checkpoints: int = 3) -> TrainingDynamics:
    """Draw dynamics of 2 to 24 examples at so many checkpoints from 0, some alike, some not scored (n_tokens 0)."""
    size = draw(st.integers(2, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_tokens = rng.integers(0, 41, size) * (rng.random(size) > draw(st.sampled_from([0.0, 0.2])))
    n_tokens[0] += 1  # one example at least is scored
    # Rounded: ties.
    mean_nll = np.round(rng.gamma(2.0, 1.0, size=(2, size, checkpoints)), draw(st.sampled_from([0, 6])))
    nll = (mean_nll + 0.5) * n_tokens[:, None]
    whole, alone = (
        [(mean[:, None] + 0.5).repeat(n, 1) for mean, n in zip(of, n_tokens, strict=True)] for of in mean_nll
    )
    entropy, margin = ([rng.gamma(2.0, 1.0, (checkpoints, n)).astype(np.float32) for n in n_tokens] for _ in range(2))
    return TrainingDynamics(
        ids=[f"id-{number}" for number in rng.permutation(size)],
        steps=np.arange(checkpoints),
        nll_sum=nll[0],
        n_tokens=n_tokens,
        n_correct=rng.integers(0, n_tokens[:, None] + 1, size=(size, checkpoints)),
        alone_nll_sum=nll[1],
        token_nll=whole,
        alone_token_nll=alone,
        token_entropy=entropy,
        token_margin=margin,
        states=rng.normal(size=(size, 4)).astype(np.float16),
        texts=_texts(rng, size),
    )


def _texts(rng: np.random.Generator, size: int) -> list[tuple[str, str]]:
    return [(f"Question {number % 7}.", f"Answer {number}.") for number in rng.permutation(size)]


@st.composite
def score_tables(
    draw: st.DrawFn, *, max_size: int = 30, labels: Sequence[str] | None = None, confidence: bool = True
) -> Scores:
    """Draw tables of 4 to max_size examples, with ties and (if `confidence`) some examples that were not scored.

    labels  the labels to draw from; None: no labels
    """
    size = draw(st.integers(4, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = -np.round(rng.gamma(2.0, 3.0, size), draw(st.sampled_from([0, 6])))  # rounded: ties
    values[rng.random(size) < (draw(st.sampled_from([0.0, 0.1])) if confidence else 1.0)] = np.nan
    return Scores(
        id=[f"id-{number}" for number in rng.permutation(size)],
        row=np.arange(size),
        confidence=values,
        variability=rng.gamma(1.0, 1.0, size) - values,  # NaN where the confidence is
        n_tokens=rng.integers(1, 41, size),
        label=None if labels is None else rng.choice(labels, size).tolist(),
        columns={"score": np.round(rng.random(size) * 5, 1).tolist()},
        texts=_texts(rng, size),
        states=rng.normal(size=(size, 4)).astype(np.float16),
    )
