"""Values of options: plain ones, as JSON and YAML have them, and the names of fields that data.columns may have.

What notebooks hand over becomes plain once, where an option is set.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sftmix.common.shown import quoted


@dataclass
class PlainFields:
    """A group of options: whenever one is set, a number of numpy becomes Python's own, and a path text."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, plain_value(value, paths=True))


def plain_value(value: Any, *, paths: bool = False) -> Any:
    """Return numbers and text of numpy as Python's own, in lists, tuples and dictionaries, too; all else as it is.

    A container that holds nothing else is returned itself: who made it may still add to it.
    paths  paths become text, relative as they are given
    """
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:  # without an import of numpy
        return value.item()
    if type(value) in (dict, list, tuple):
        inside = [*value.items()] if type(value) is dict else value
        plain = [plain_value(inner, paths=paths) for inner in inside]
        changed = any(new is not old for new, old in zip(plain, inside, strict=True))
        return type(value)(plain) if changed else value
    return os.fspath(value) if paths and isinstance(value, os.PathLike) else value


def not_plain(value: object, key: str = "") -> Iterator[str]:
    """Yield a sentence for each part of a configuration in plain form that no file of a run could hold.

    key  the option's name, with dots; constructor arguments of a component are below its own
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from not_plain(inner, key if name == "init_args" else f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from not_plain(inner, key)
    elif isinstance(value, str) and value != value.encode(errors="replace").decode():
        yield f"{key} is {quoted(value)}, which is not UTF-8: give it another name, or set PYTHONUTF8=1 if it is"
    elif type(value) not in (bool, int, float, str, type(None)):  # YAML writes no class made from one, as np.float64
        yield (
            f"{key} is {quoted(value)}, a {type(value).__name__}; a configuration holds numbers, text, true, false, "
            "None, and lists and dictionaries of these. Give float(), int(), str() or list() of it"
        )


def as_list(value: Any) -> list[Any]:
    """Return a list of names or numbers, a list itself; a single one becomes a list of one."""
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, list) else [value]


def spelling(value: object) -> str:
    """Return the one text of a scalar, by which values of rows are compared with those of options.

    True, "TRUE" and "true" are `true`; 1, 1.0, "1.0" and "1" are `1`. Any other text is itself.
    """
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else re.sub(r"^(-?\d+)\.0+$", r"\1", text)


# ----------------------------------------------------------------------------------------- the fields of rows


FORMAT_FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "history": ("instruction", "input", "output", "history"),
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields that each format reads, beside those of ANY_FORMAT."""

ANY_FORMAT = ("system", "id", "weight", "tools", "chat_template_kwargs")
"""Fields that every format reads (text: `id` alone)."""

CALL_ROLE = "function_call"
"""The role of turns of the assistant whose content is a call, or a list of calls."""

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
    **dict.fromkeys((CALL_ROLE, "tool_call"), CALL_ROLE),
}
"""Roles in rows -> ours; data.roles adds others."""

SHOWN_FIELDS = 30
"""Most fields that a message lists."""


def column_problems(form: str, columns: Mapping[str, str | None]) -> Iterator[str]:
    """Yield a sentence if no format, or not the one that is named, has all the fields of data.columns."""
    fields = field_columns(columns)
    if len(fields) < len(columns):
        yield "data.columns names completion and response, which are the same field; leave one out"
    if not formats_with(fields, form):
        reads = "; ".join(f"{name}: {', '.join(names)}" for name, names in FORMAT_FIELDS.items())
        yield (
            f"data.columns: no format of data.format {form} has {' and '.join(columns)}; on the left stand our names "
            f"({reads}; each: {', '.join(ANY_FORMAT)}), on the right those of the rows"
        )


def field_columns(columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """Return data.columns with each field under its own name: `completion` for `response`."""
    return {"completion" if name == "response" else name: column for name, column in (columns or {}).items()}


def formats_with(fields: Iterable[str], form: str = "auto") -> list[str]:
    """List the formats that read all these fields; of the one named `form`, or of all for auto."""
    wanted = set(fields) - set(ANY_FORMAT)
    return [name for name, reads in FORMAT_FIELDS.items() if form in ("auto", name) and wanted <= set(reads)]


def listed(fields: Iterable[str]) -> str:
    """List the names of fields for a message."""
    names = [quoted(field) for field in fields]
    more = ", ..." if len(names) > SHOWN_FIELDS else ""
    return ", ".join(names[:SHOWN_FIELDS]) + more or "none"
