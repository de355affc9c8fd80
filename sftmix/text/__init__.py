"""A row and a tokenizer -> conversation, token ids, and a mask of the response tokens.

`encode` goes the whole way for one row, with numpy and transformers alone; `RowEncoder` does it for many. `sftmix.data`
goes the same way for files of rows, and stores what it finds. Nothing here needs torch.
"""

import sys
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, get_args

from sftmix.components.component import require, require_one_of
from sftmix.components.renderer import Renderer
from sftmix.components.row_format import RowFormat
from sftmix.text.chat_template import ChatTemplate
from sftmix.text.examples import EncodedRow, examples_of, has_response, left_out
from sftmix.text.formats import Columns, Converter
from sftmix.text.mask import encode_each
from sftmix.text.thoughts import thinks
from sftmix.words.errors import BadRow, refuse
from sftmix.words.fields import TEXT, FormatName, MultiTurn, TrainedTurns, column_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BadRow", "ChatTemplate", "EncodedRow", "Renderer", "RowEncoder", "RowFormat", "encode"]

FORMAT_WORDS = tuple(word for word in get_args(FormatName) if word != TEXT)
"""The words of data.format for rows of conversations."""


class RowEncoder:
    """Rows of conversations, one at a time -> their training examples: the ids and masks that a run stores of them.

    unread  names of fields that were not read -> the number of rows that have them
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        format: FormatName = "auto",
        row_format: RowFormat | None = None,
        columns: Mapping[str, str | None] | None = None,
        roles: Mapping[str, str] | None = None,
        trained_turns: TrainedTurns = "all",
        multi_turn: MultiTurn = "per_turn",
        max_length: int | None = None,
        rows_think: bool | None = None,
        renderer: Renderer | None = None,
        **template: Any,
    ) -> None:
        """Check the options, which are those of `DataOptions` by their names, but for these:

        row_format  reads the rows, if it is given, in place of a format
        max_length  None: no example is cut
        rows_think  some row of the data set has a thought: then each prompt is the one for thinking, as in a run on
                    it; None: each row is asked for itself, as if it were the whole data set
        template    options of `ChatTemplate`, which renders if there is no renderer: template, thoughts, ...
        Raises ConfigError for a value that is not allowed.
        """
        require(format in FORMAT_WORDS, "data.format", format, ", ".join(FORMAT_WORDS))
        require(row_format is None or format == "auto", "data.format", format, "auto beside a row_format")
        require_one_of("data.trained_turns", trained_turns, TrainedTurns)
        require_one_of("data.multi_turn", multi_turn, MultiTurn)
        require(max_length is None or max_length >= 2, "data.max_length", max_length, "at least 2, or None")
        require(renderer is None or not template, "renderer", renderer, f"None beside {', '.join(template)}")
        dropout = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None)
        allowed = "None or 0, so that a text has the same ids each time"
        require(not dropout, "tokenizer.backend_tokenizer.model.dropout", dropout, allowed)
        form = row_format or format
        refuse([*column_problems(form, columns or {})], "the options of the rows")
        self._converter = Converter(Columns(columns), form, roles, None, trained_turns == "last")
        self._whole = multi_turn == "whole"
        self._max_length = max_length or sys.maxsize
        self._rows_think = rows_think
        self.unread = self._converter.unread
        self._tokenizer = tokenizer
        self._given = renderer or ChatTemplate(**template)
        self._begun = dict[bool, Renderer]()

    def __call__(self, row: Mapping[str, Any]) -> list[EncodedRow]:
        """Return the examples of a row, in the order of its turns; behind them, without ids, what is not trained.

        Raises BadRow, which says why, for a row that a run would call bad.
        """
        example = self._converter.example(self._converter.columns.renamed(row))
        found = list[EncodedRow]()
        if has_response(example):
            think = thinks(example) if self._rows_think is None else self._rows_think
            examples = [*examples_of(example, whole=self._whole)]
            found += [encoded for _, encoded in encode_each(self._renderer(think), examples, self._max_length)]
        return found + [EncodedRow([reason]) for reason in left_out(example)]

    def _renderer(self, think: bool) -> Renderer:
        """Return the renderer that has begun for rows that think or do not; of each there is one."""
        if think not in self._begun:
            renderer = copy(self._given)
            renderer.begin(self._tokenizer, thinks=think)
            self._begun[think] = renderer
        return self._begun[think]


def encode(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", **options: Any) -> list[EncodedRow]:
    """Turn a row, as a line of JSON has it, into token ids with the spans that are trained, as a run trains on them.

    row      a conversation in any format that data.format knows, or in one of your own
    options  those of `RowEncoder`; with many rows, make one of these once
    Returns one EncodedRow for each example: with multi_turn per_turn, for each trained turn. If it has no ids, its
    reasons say what is left out. Raises BadRow for a row that cannot be read, ConfigError for options.
    """
    return RowEncoder(tokenizer, **options)(row)
