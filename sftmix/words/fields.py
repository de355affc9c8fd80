"""Words of rows: names of fields and of roles, which `data.columns` and `data.roles` may change, and of choices."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from sftmix.words.shown import quoted

TEXT = "text"
"""The format of documents: text files, and rows with a field `text` where data.format says so."""

RESERVED_ID = re.compile(r"@turn\d+$")
"""`<id>@turn<k>` names the example of the k-th assistant turn of a conversation with several."""

FORMAT_FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    TEXT: ("text",),
}
"""The fields that each format reads, besides ANY_FORMAT."""

ANY_FORMAT = ("system", "id", "weight", "tools")
"""Fields that every format reads (text: `id` alone)."""

FormatName = Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text"]
"""data.format."""
SpecialTokens = Literal["text", "tokens"]
"""data.special_tokens."""
Thoughts = Literal["train", "drop"]
"""data.thoughts."""
MultiTurn = Literal["per_turn", "whole"]
"""data.multi_turn."""
TrainedTurns = Literal["all", "last"]
"""data.trained_turns."""

CALL_ROLE = "function_call"
"""The role of turns of the assistant whose content is a call, or a list of calls."""

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),  # the second: OpenAI, since o1
    **dict.fromkeys(("user", "human"), "user"),  # human, gpt, chatgpt: ShareGPT; model: Gemma
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    # function: OpenAI of 2023; observation: LLaMA-Factory; tool_response, tool_call: ms-swift; ipython: Llama 3.1
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
    **dict.fromkeys((CALL_ROLE, "tool_call"), CALL_ROLE),
}
"""Roles in rows -> ours; data.roles adds others."""

SHOWN_FIELDS = 30
"""Most fields that a message lists."""


def fields_of(form: Any) -> Collection[str]:
    """Return the fields that a format reads: of a word of data.format, or of a row format; of auto none."""
    return FORMAT_FIELDS.get(form, ()) if isinstance(form, str) else form.fields


def column_problems(form: Any, columns: Mapping[str, str | None]) -> Iterator[str]:
    """Yield a sentence if no format, or not the chosen one, has all the fields of data.columns.

    form  a word of data.format, or a row format
    """
    fields = field_columns(columns)
    formats = FORMAT_FIELDS if form == "auto" else {str(form): fields_of(form)}
    if len(fields) < len(columns):  # two of them became one
        yield "data.columns names completion and response, which are the same field; leave one out"
    # One format must have them all: {instruction: q, completion: a} is of none.
    if not any(fields.keys() <= {*names, *ANY_FORMAT} for names in formats.values()):
        reads = "; ".join(f"{name}: {', '.join(names)}" for name, names in formats.items())
        yield (
            f"data.columns: no format that row_format or data.format chooses has {' and '.join(columns)}; on the left "
            f"are our names ({reads}; each: {', '.join(ANY_FORMAT)}), on the right those of the rows"
        )


def field_columns(columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """Return data.columns with each field under its own name: `completion` for `response`."""
    return {"completion" if name == "response" else name: column for name, column in (columns or {}).items()}


def listed(fields: Iterable[str]) -> str:
    """List the names of fields for a message."""
    names = [quoted(field) for field in fields]
    more = ", ..." if len(names) > SHOWN_FIELDS else ""
    return ", ".join(names[:SHOWN_FIELDS]) + more or "none"
