"""What a rendered text holds of a row, and where: a template may have left it out, or spelt it in another way."""

import json
from collections.abc import Mapping
from typing import Any


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
        found = max(text.find(form, place) for form in (said, spelt))
        if found < 0:
            return -1
        place = found + len(said)
    return place


def holds(text: str, part: Any) -> bool:
    """True if a text has a text or value, in any spelling."""
    return place_behind(text, part) >= 0


def holds_calls(text: str, turn: Mapping[str, Any]) -> bool:
    """True if a text has the names in a turn's calls, and the values of their arguments."""
    return all(holds(text, part) for call in turn.get("tool_calls") or () for part in _values(call["function"]))


def _values(given: Any) -> list[Any]:
    """Return the texts, numbers, true, false and null in a value."""
    if isinstance(given, (list, Mapping)):
        values = given.values() if isinstance(given, Mapping) else given
        return [inner for value in values for inner in _values(value)]
    return [given]
