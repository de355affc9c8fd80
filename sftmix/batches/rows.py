"""Data sets as batching reads them: tokenised rows, some of them, or their responses alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.types import Encoded, Int64, Rows


class TokenisedRows(Protocol):
    """A data set as batching needs it: number of rows, tokens and id of each row, and rows."""

    @property
    def lengths(self) -> Int64: ...
    @property
    def ids(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class RowSubset:
    """Some rows of a data set, in the given order, as a data set."""

    data: TokenisedRows
    rows: Rows

    @property
    def lengths(self) -> Int64:
        return self.data.lengths[self.rows]

    @property
    def ids(self) -> list[str]:
        return [self.data.ids[row] for row in self.rows.tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Encoded:
        return self.data[int(self.rows[row])]


class ResponsesAlone:
    """The same rows, each cut down to the first token of its sequence and its response tokens.

    The first token (BOS, or the first of the chat template) has to stay: a model predicts no token that has none before
    it. So the response keeps its number of tokens.
    """

    def __init__(self, rows: TokenisedRows) -> None:
        self._rows = rows

    @property
    def lengths(self) -> Int64:
        return np.array([len(self[row].input_ids) for row in range(len(self))], dtype=np.int64)

    @property
    def ids(self) -> Sequence[str]:
        return self._rows.ids

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Encoded:
        whole = self._rows[row]
        if whole.starts is not None:
            raise ConfigError("plain text has no instructions, so there are no responses to score alone")
        kept = np.concatenate([[0], np.flatnonzero(whole.target[1:]) + 1])
        return replace(whole, input_ids=whole.input_ids[kept], target=np.arange(len(kept)) > 0, weight=None)
