"""Functions that an assistant may call, its calls, and their results, from the forms that rows have them in."""

import hashlib
from typing import Any

from sftmix.text.values import BadRow, Fields, checked_text, filled, parsed
from sftmix.words.shown import quoted

TOOLS = ("tools", "functions")  # the second: OpenAI's of 2023, as function_call is
"""Fields of a row that list functions."""

CALL_FIELDS = ("tool_calls", "function_calls", "function_call")
"""Fields of a turn that hold calls: lists, and a single one."""

CALL_ID = 9
"""Letters and digits of an id that we make: the templates of Mistral take no other number."""


def tools_of(row: Fields) -> tuple[dict[str, Any], ...]:
    """Return the functions of a row in OpenAI's form; () if it has none. Raises BadRow.

    They are listed there, or in JSON text, in that form or as bare {name, description, parameters}.
    """
    name, value = _only({name: row.get(name) for name in TOOLS}, "")
    # glaive_toolcall_en: '[{"name": "calculate_area", "description": ..., "parameters": {...}}]', or "[]" for none
    tools = parsed(value, name)
    if not isinstance(tools, list):
        raise BadRow(f"{name} must be a list of functions, found {quoted(tools)}")
    return tuple({"type": "function", "function": _function(tool, name, "parameters")} for tool in tools)


def calls_of(turn: Fields, content: Any, where: str, place: int) -> dict[str, Any]:
    """Return {tool_calls: ...} of a turn in OpenAI's form, with arguments as objects; {} without calls. Raises BadRow.

    content  of a turn that is a call, or several; else None
    place    the turn's place in the row; ids that the row lacks are made from it
    """
    name, value = _only({**{name: turn.get(name) for name in CALL_FIELDS}, "content": content}, f"{where}.")
    # glaive_toolcall_en, from function_call: '{"name": "calculate_area", "arguments": {"dimensions": [4]}}'
    calls = parsed(value, name)
    found = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = {"arguments": {}} | _function(call, name, "arguments")
        own = parsed(call, name).get("id") or hashlib.blake2b(f"{place} {number}".encode()).hexdigest()[:CALL_ID]
        # Nothing else, as some templates write the whole object.
        function = {"name": function["name"], "arguments": function["arguments"]}
        found.append({"id": checked_text(own, f"{name}: id"), "type": "function", "function": function})
    return {"tool_calls": found} if found else {}


def _only(fields: Fields, where: str) -> tuple[str, Any]:
    """Return the name and value of the one field that says something; an empty list if none does."""
    said = {where + name: value for name, value in fields.items() if value and filled(value)}
    if len(said) > 1:
        raise BadRow(f"{' and '.join(said)} both have values; leave one out")
    return next(iter(said.items()), (where, []))


def _function(value: Any, what: str, inner: str) -> dict[str, Any]:
    """Return the part `function` of a function or call in OpenAI's form, or a bare one; `inner` names its object."""
    outer = parsed(value, what)
    function = outer.get("function", outer) if isinstance(outer, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{what} has {quoted(outer)}; expected an object with a name and {inner}")
    if inner in function:
        # OpenAI: "arguments": "{\"location\": \"San Francisco, USA\"}"; "", null and an empty list are no arguments.
        given = function[inner] if filled(function[inner]) else {}
        function = {**function, inner: parsed(given, f"{what}: {inner}")}
        if not isinstance(function[inner], dict):
            raise BadRow(f"{what}: {inner} of {quoted(function['name'])} must be an object: {quoted(function[inner])}")
    return function


def call_answered(turn: Fields, waiting: list[dict[str, Any]] | None, where: str) -> dict[str, Any]:
    """Return the id and the name of the call that a result answers, which no longer waits; its own ones if none did.

    waiting  calls of the assistant's turn before it that have no result yet, in their order; None: it has no calls
    Raises BadRow for a result that answers none of them.
    """
    own = {key: checked_text(turn[key], f"{where}.{key}") for key in ("name", "tool_call_id") if filled(turn.get(key))}
    if waiting is None:  # hermes-function-calling-v1 has calls as text: "<tool_call>\n{...}\n</tool_call>"
        return own
    wanted = own.get("tool_call_id")
    for call in waiting:
        if wanted in (None, call["id"]):
            waiting.remove(call)
            return {"name": call["function"]["name"], "tool_call_id": call["id"], **own}
    raise BadRow(f"{where} is a result, and no call before it waits for one (tool_call_id: {quoted(wanted)})")
