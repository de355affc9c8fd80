"""What a reference says of the examples, and the table and the groups that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sftmix.types.arrays import Bool, Float32, Float64, Int64, Rows
from sftmix.types.rows import Encoded


@dataclass(frozen=True)
class RowLosses:
    """The losses of one model on every row of a data set.

    nll_sum    f64[N], nats
    n_tokens   i64[N]
    n_correct  i64[N]
    kept       what else was asked for: `token_nll`, `entropy` and `margin`, N arrays f32[n_tokens] each, and `states`,
               N arrays f16[D]; of held-out rows `brier_sum`, f64[N]
    """

    nll_sum: Float64
    n_tokens: Int64
    n_correct: Int64
    kept: Mapping[str, Any] = field(default_factory=dict)


RowScorer = Callable[[Encoded], tuple[Float64, Bool]]
"""A row -> the NLL (nats) of each of its response tokens, f64[n], and whether it is the argmax, bool[n]."""

OF_TOKENS = ("token_nll", "alone_token_nll", "token_entropy", "token_margin")
"""Fields of TrainingDynamics with a number for each token of a response."""
NOT_COUNTED = -1
"""Marker in place of a number of correct tokens: they were not counted."""


@dataclass(frozen=True)
class TrainingDynamics:
    """The losses of the reference model on every example at each of its C checkpoints.

    ids        N example ids
    steps      i64[C], optimizer step of each checkpoint (0 = before training)
    nll_sum    f64[N, C], sum of -log p over the response tokens, nats
    n_tokens   i64[N], response tokens scored (0: this reference could not score the example)
    n_correct  i64[N, C], response tokens that are the argmax; NOT_COUNTED for online losses
    token_nll  None, or for every example an f32[C, n_tokens] array; rounded to float16 (5e-4 of the value) if read from
               a file, so its sum may differ from nll_sum
    alone_nll_sum  None, or f64[N, C], the same sum for the response without its instruction (what IFD divides by)
    alone_token_nll  None, or its parts by token, as token_nll
    token_entropy  None, or the entropy of the prediction of each token, nats, as token_nll
    token_margin   None, or by how much the likeliest logit there is above the second, as token_nll
    states     None, or f16[N, D], the mean input of the LM head over the response tokens, at the last checkpoint
    texts      None, or what is asked and answered in each row; no file has them
    """

    ids: Sequence[str]
    steps: Int64
    nll_sum: Float64
    n_tokens: Int64
    n_correct: Int64
    token_nll: Sequence[Float32] | None = None
    alone_nll_sum: Float64 | None = None
    alone_token_nll: Sequence[Float32] | None = None
    token_entropy: Sequence[Float32] | None = None
    token_margin: Sequence[Float32] | None = None
    states: npt.NDArray[np.float16] | None = None
    texts: Sequence[tuple[str, str]] | None = None

    @property
    def scored(self) -> Bool:
        """bool[N], True if at least one response token of the example is within the reference's length."""
        return self.n_tokens > 0

    @property
    def mean_nll(self) -> Float64:
        """f64[N, C], nats per response token; NaN if the example was not scored."""
        return self.nll_sum / np.where(self.scored, self.n_tokens, np.nan)[:, None]  # by 0 numpy would warn

    def of(self, ids: Sequence[str]) -> TrainingDynamics:
        """Return the dynamics of exactly these `ids`, in their order; an unknown id gets n_tokens 0."""
        place = {example_id: index for index, example_id in enumerate(self.ids)}
        return self._of_rows(ids, np.asarray([place.get(example_id, -1) for example_id in ids], dtype=np.int64))

    def scoring_only(self, mask: Bool) -> TrainingDynamics:
        """Return the dynamics with n_tokens 0, and no numbers, for the examples outside the mask, bool[N]."""
        return self._of_rows(self.ids, np.where(mask, np.arange(len(mask)), -1))

    def _of_rows(self, ids: Sequence[str], rows: Int64) -> TrainingDynamics:
        """Return the dynamics of these rows, which get these ids; row -1 has n_tokens 0, and no numbers."""
        columns = dict[str, Any]()
        for name in ("nll_sum", "n_tokens", "n_correct", "alone_nll_sum", "states"):
            if (numbers := getattr(self, name)) is not None:
                none = np.zeros_like(numbers, shape=(1, *numbers.shape[1:]))
                columns[name] = np.concatenate([numbers, none])[rows]  # row -1 is the one behind them, of zeros
        for name in OF_TOKENS:
            if (tokens := getattr(self, name)) is not None:
                columns[name] = [tokens[row] if row >= 0 else tokens[row][:, :0] for row in rows]
        if self.texts is not None:
            columns["texts"] = [self.texts[row] if row >= 0 else ("", "") for row in rows.tolist()]
        return replace(self, ids=list(ids), **columns)


@dataclass(frozen=True)
class Scores:
    """The one table that splitters, pair samplers and selectors see; all columns have length N.

    id           example ids
    row          i64[N], 0..N-1
    confidence   f64[N], higher is more confident; NaN if the example could not be scored
    variability  f64[N], standard deviation of the perplexity over the checkpoints
    n_tokens     i64[N], response tokens under the target's tokenizer
    label        None, or N labels
    columns      any user column by name
    texts        None, or what is asked and answered in each row, read when it is asked for
    states       None, or f16[N, D], those of the dynamics (Need.MEAN_STATES)
    """

    id: Sequence[str]
    row: Rows
    confidence: Float64
    variability: Float64
    n_tokens: Int64
    label: Sequence[str | None] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    texts: Sequence[tuple[str, str]] | None = None
    states: npt.NDArray[np.float16] | None = None

    def __len__(self) -> int:
        return len(self.row)

    def take(self, rows: Rows) -> Scores:
        """Return the table of some rows, in their order, whose own numbers are 0..K-1."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(
            self,
            id=[self.id[row] for row in rows],
            row=np.arange(len(rows), dtype=np.int64),
            confidence=self.confidence[rows],
            variability=self.variability[rows],
            n_tokens=self.n_tokens[rows],
            label=None if self.label is None else [self.label[row] for row in rows],
            columns=columns,
            texts=None if self.texts is None else _Taken(self.texts, rows),
            states=None if self.states is None else self.states[rows],
        )

    def ranked(self) -> list[int]:
        """Return the rows with a confidence, most confident first, equal ones by id."""
        scored = np.flatnonzero(~np.isnan(self.confidence)).tolist()
        return sorted(scored, key=lambda row: (-self.confidence[row], self.id[row]))


class _Taken(Sequence[tuple[str, str]]):
    """Some texts of a sequence, each read when it is asked for."""

    def __init__(self, texts: Sequence[tuple[str, str]], rows: Rows) -> None:
        self._texts, self._rows = texts, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return self._texts[int(self._rows[row])]


UNPAIRED = -1
"""Marker in place of a group: the example gets NTP, no Mixup."""
UNPAIRED_NAME = "unpaired"
"""What such examples are called in files and pages."""
MOST_GROUPS = 128
"""Most groups of a split, whose numbers are int8, from 0."""


@dataclass(frozen=True)
class Split:
    """The group of every example.

    group  i8[N], index into `names`, or UNPAIRED (-1)
    names  names of the groups, most confident first, at most MOST_GROUPS, each once
    """

    group: npt.NDArray[np.int8]
    names: tuple[str, ...]

    def rows(self, group: int) -> Rows:
        """Return the rows of one group, in file order."""
        return np.flatnonzero(self.group == group).astype(np.int64)

    @property
    def confident(self) -> Rows:
        """Rows of the first group."""
        return self.rows(0)

    @property
    def unconfident(self) -> Rows:
        """Rows of the last group."""
        return self.rows(len(self.names) - 1)

    @property
    def unpaired(self) -> Rows:
        """Rows of no group."""
        return self.rows(UNPAIRED)

    @property
    def labels(self) -> list[str]:
        """Name of the group of each of the N examples, or `unpaired`."""
        names = (*self.names, UNPAIRED_NAME)  # UNPAIRED, which is -1, is the last
        return [names[group] for group in self.group.tolist()]
