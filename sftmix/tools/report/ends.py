"""Both ends of the confidence: a two-dimensional map of hidden states (t-SNE), and the topics of the instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sftmix.types import Float64, Rows

N_TOPICS, WORDS = 8, 4
TOPIC_ROWS = 2000
"""Most instructions of each end whose topics are sought."""


def both_ends(by_confidence: Rows, size: int) -> tuple[Rows, Rows]:
    """Return the `size` least and the `size` most confident rows; at most half of all, so that no row is in both.

    by_confidence  rows, least confident first
    """
    size = min(size, len(by_confidence) // 2)
    return by_confidence[:size], by_confidence[len(by_confidence) - size :]


def tsne(hidden: np.ndarray) -> Float64 | None:
    """Return f64[K, 2], t-SNE (van der Maaten and Hinton, 2008) of f32[K, D]; None for fewer than ten points.

    It starts from the first two principal components and has a fixed seed, so that a page can be made again.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(hidden) < 10:
        return None
    if min(hidden.shape) > 50:
        hidden = PCA(50, random_state=0).fit_transform(hidden)
    made = TSNE(perplexity=min(30.0, (len(hidden) - 1) / 3), init="pca", random_state=0, n_jobs=1)
    return made.fit_transform(hidden.astype(np.float32)).astype(np.float64)


@dataclass(frozen=True)
class Topic:
    """A topic of the instructions: its most typical words, and its share of the instructions at each end."""

    words: str
    unconfident: float
    confident: float


def topics(unconfident: Sequence[str], confident: Sequence[str]) -> list[Topic]:
    """Return topics of the instructions of both ends, those of the confident end first; none where words do not repeat.

    Each instruction counts for one topic, or for none (`fit_topics`).
    """
    fitted = fit_topics([*unconfident, *confident])
    if fitted is None:
        return []
    low, high = fitted.of_fitted[: len(unconfident)], fitted.of_fitted[len(unconfident) :]
    found = [Topic(name, float((low == t).mean()), float((high == t).mean())) for t, name in enumerate(fitted.words)]
    return sorted(found, key=lambda topic: topic.unconfident - topic.confident)


@dataclass(frozen=True)
class FittedTopics:
    """Topics of N texts, which can be asked for the topics of other texts.

    words      the most typical words of each of the K topics, joined by commas
    of_fitted  i64[N], topic of each text that they were fitted to, -1 for none
    of         texts -> i64[M], topic of each of M other texts, -1 for none
    """

    words: Sequence[str]
    of_fitted: Rows
    of: Callable[[Sequence[str]], Rows]


def fit_topics(texts: Sequence[str]) -> FittedTopics | None:
    """Return up to eight topics of the texts, the same ones for the same texts; None where words do not repeat.

    Non-negative matrix factorisation of TF-IDF weights; a text has the topic that it has most of, and one with no word
    of any topic has none.
    """
    from sklearn.decomposition import NMF
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(stop_words="english", min_df=3, max_df=0.5, token_pattern=r"(?u)\b[^\W\d_]{3,}\b")
    try:
        weights = vectors.fit_transform(texts)
    except ValueError:  # no word is left
        return None
    count = min(N_TOPICS, *weights.shape)
    if count < 2:
        return None
    model = NMF(count, init="nndsvda", random_state=0, max_iter=400, tol=1e-3)
    shares = model.fit_transform(weights)
    names = vectors.get_feature_names_out()
    words = [", ".join(names[k] for k in np.argsort(-row)[:WORDS]) for row in model.components_]
    return FittedTopics(words, _largest(shares), lambda others: _largest(model.transform(vectors.transform(others))))


def _largest(shares: Float64) -> Rows:
    """Return i64[N], the place of the largest of f64[N, K] shares, -1 where all are 0."""
    return np.where(shares.max(axis=1) > 0, shares.argmax(axis=1), -1)
