"""Names of the fields and of the roles of rows, which `data.columns` and `data.roles` may change."""

from collections.abc import Iterable, Iterator, Mapping

from sftmix.common.shown import quoted

FORMAT_FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "history": ("instruction", "input", "output", "history"),
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The fields that each format reads, besides ANY_FORMAT."""

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


def column_problems(
    form: object, columns: Mapping[str, str | None], formats: Mapping[str, Iterable[str]]
) -> Iterator[str]:
    """Yield a sentence if no format that data.format allows has all the fields of data.columns.

    form     data.format
    formats  the names of those formats -> the fields that each reads, besides ANY_FORMAT
    """
    fields = field_columns(columns)
    if len(fields) < len(columns):
        yield "data.columns names completion and response, which are the same field; leave one out"
    if not formats_with(fields, formats):
        reads = "; ".join(f"{name}: {', '.join(names)}" for name, names in {**FORMAT_FIELDS, **formats}.items())
        yield (
            f"data.columns: no format of data.format {form} has {' and '.join(columns)}; on the left stand our names "
            f"({reads}; each: {', '.join(ANY_FORMAT)}), on the right those of the rows"
        )


def field_columns(columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """Return data.columns with each field under its own name: `completion` for `response`."""
    return {"completion" if name == "response" else name: column for name, column in (columns or {}).items()}


def formats_with(fields: Iterable[str], formats: Mapping[str, Iterable[str]] = FORMAT_FIELDS) -> list[str]:
    """List those of the formats that read all these fields."""
    wanted = set(fields) - set(ANY_FORMAT)
    return [name for name, reads in formats.items() if wanted <= set(reads)]


def listed(fields: Iterable[str]) -> str:
    """List the names of fields for a message."""
    names = [quoted(field) for field in fields]
    more = ", ..." if len(names) > SHOWN_FIELDS else ""
    return ", ".join(names[:SHOWN_FIELDS]) + more or "none"
