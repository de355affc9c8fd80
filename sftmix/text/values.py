"""Values of rows: what is absent, what is text, what is JSON in a text, and whether a rendered text has them."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sftmix.words.errors import BadRow as BadRow
from sftmix.words.fields import listed
from sftmix.words.shown import quoted, visible

Fields = Mapping[str, Any]
"""A row, or one of its turns: the names of its fields -> their values."""

DEEPEST = 100
"""Most levels of lists and objects in a value: what is done with it later recurses into them."""

MARK = "\ufdd0"
"""The character that says of a special token's spelling that it is text, see `sftmix.text.spellings`.

Unicode keeps it for such uses inside a program. It survives a template that writes JSON, as a control character does
not.
"""


def without_null(fields: Fields) -> dict[str, Any]:
    """Return the fields that have a value: tables have null, or NaN, for those that a row or a turn lacks."""
    return {key: value for key, value in fields.items() if value is not None and value == value}  # NaN is not


def filled(value: Any) -> bool:
    """False for null and empty text, also as tables of text spell them, and for lists and objects of nothing else."""
    rest = [value]
    for item in rest:  # which grows: a row may be nested too deeply for recursion
        if isinstance(item, (list, Mapping)):
            rest += item.values() if isinstance(item, Mapping) else item
        # "[]": the tools of rows of glaive_toolcall_en that have none.
        elif visible(text := str(item)) and text.strip() not in ("null", "None", "nan", "[]", "{}"):
            return True
    return False


def field_of(row: Fields, name: str) -> Any:
    """Return the value of a field that a row must have; raise BadRow that names the field, and those that it has."""
    if name not in row:
        raise BadRow(
            f"field {name!r} is missing or null; there are {listed(row)} (data.columns gives them other names)"
        )
    return row[name]


def field_text(row: Fields, name: str) -> str:
    """Return the text of a field that a row must have; raise BadRow if it is missing, or no text."""
    return checked_text(field_of(row, name), name)


def checked_text(value: Any, what: str) -> str:
    """Return a value that is text for a model and for a file; raise BadRow that says it of `what`."""
    if not isinstance(value, str):
        raise BadRow(f"{what} must be a string, found {quoted(value)}")
    if "\0" in value or MARK in value:
        raise BadRow(f"{what} contains a NUL character, or U+FDD0, which is kept for programs")
    try:
        value.encode()  # JSON may say "\ud83d" alone, and files.py keeps bytes that are not UTF-8 as such halves
    except UnicodeEncodeError:
        raise BadRow(f"{what} contains a lone surrogate or bytes that are not UTF-8 (save the file as UTF-8)") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise ValueError for a key that it has twice, of which the last value would count."""
    if len(values := dict(pairs)) < len(pairs):  # as json.loads would not say: '{"a": 1, "a": 2}' -> {"a": 2}
        keys = [key for key, _ in pairs]
        raise ValueError(f"{quoted(max(keys, key=keys.count))} is twice in one object; write it once: {quoted(values)}")
    return values


JSON = json.JSONDecoder(object_pairs_hook=_object)
"""The reader of the JSON of rows, in their files and in texts in them."""


def parsed(value: Any, what: str) -> Any:
    """Return a value, or what a JSON text means, with texts that can be encoded. Raises BadRow.

    Keys with null are left out of objects that are not text: tables have null for those that a row lacks.
    """
    is_text = isinstance(value, str)
    try:
        pruned = _pruned(JSON.decode(value) if is_text else value, is_text, DEEPEST)
        # All of its texts in one: a NUL in them is "\u0000" there, and what only says so is "\\u0000".
        spelt = json.dumps(pruned, ensure_ascii=False, allow_nan=False).replace(r"\\", "")
        checked_text(spelt.replace(r"\u0000", "\0"), what)
    except BadRow:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow(f"{what} is {quoted(value)}, which is not JSON: {error}") from None
    return pruned


def _pruned(value: Any, nulls: bool, levels: int) -> Any:
    """Return a value, without null in its objects unless `nulls` stay. Raises ValueError if it has more levels."""
    if not levels:
        raise ValueError(f"it has more than {DEEPEST} levels")
    if isinstance(value, Mapping):
        fields = value if nulls else without_null(value)
        return {key: _pruned(inner, nulls, levels - 1) for key, inner in fields.items()}
    return [_pruned(inner, nulls, levels - 1) for inner in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------- in a rendered text


def ended(text: str, place: int, ends: set[str], ending: str) -> str:
    """Return a response through the first token that ends a turn from a place on; with `ending`, if there is none."""
    # Apriel 1.5 ends the last turn twice: 'Blue\n<|end|>\n<|end|>' -> 'Blue\n<|end|>'
    found = [text.index(end, place) + len(end) for end in ends if end in text[place:]]
    return text[: min(found)] if found else text.rstrip() + ending


def place_behind(text: str, *parts: Any) -> int:
    """Return where parts that a text has, each behind the one before it, end; -1 if it has not all of them.

    parts  texts, and values as JSON or Python spells them
    """
    place = 0
    for part in parts:
        said = str(part).strip()
        spelt = json.dumps(said if isinstance(part, str) else [part], ensure_ascii=False)[1:-1]  # True -> true
        found = [at for form in (said, spelt) if (at := text.find(form, place)) >= 0]
        if not found:
            return -1
        place = min(found) + len(said)
    return place


def holds(text: str, part: Any) -> bool:
    """True if a text has a text or value, in any spelling."""
    return str(part).strip() in text or place_behind(text, part) >= 0


def holds_calls(text: str, turn: Mapping[str, Any]) -> bool:
    """True if a text has the names in a turn's calls, and the values of their arguments."""
    return all(holds(text, part) for call in turn.get("tool_calls") or () for part in _values(call["function"]))


def left_out_of(prompt: str, bare: str, tools: Iterable[Fields], before: Iterable[Fields], place: int = 0) -> list[str]:
    """Return what a template leaves out of the prompt: functions, calls, their results, other turns.

    A turn is looked for behind the question before it, a result behind the first call: the words may be in others as
    well. Some templates have results in the order of their calls.

    bare    the prompt without the functions
    tools   the functions that the assistant may call
    before  turns of the prompt
    place   where in the prompt they begin
    """
    unwritten = prompt == bare or any(tool["function"]["name"] not in prompt for tool in tools)
    lost = {"tools_lost"} if tools and unwritten else set[str]()
    for turn in before:
        behind = prompt if turn["role"] == "system" else prompt[place:]  # Mistral: with the last turn of a user
        # SmolLM3 and Nemotron Nano v2 take the switch out of "Be brief. /no_think".
        said = place_behind(behind, *re.split("/(?:no_)?think", turn["content"]))
        calls = [_values(call["function"]) for call in turn.get("tool_calls") or ()]
        if not holds_calls(behind, turn):
            lost.add("calls_lost")
        elif calls:
            place += max(place_behind(behind, part) for part in calls[0])
        if turn["role"] != "assistant" and said < 0:
            lost.add("tools_lost" if turn["role"] == "tool" else "turn_lost")  # Falcon: the system turn
        elif turn["role"] == "user":
            place += said
    return sorted(lost)


def _values(given: Any) -> list[Any]:
    """Return the texts, numbers, true, false and null in a value."""
    if isinstance(given, (list, Mapping)):
        values = given.values() if isinstance(given, Mapping) else given
        return [inner for value in values for inner in _values(value)]
    return [given]
