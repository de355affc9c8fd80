"""Small conversations, of which a template's layout is read (`sftmix.text.layout`)."""

import json
from collections.abc import Mapping
from typing import Any

SYSTEM = {"role": "system", "content": "Be short."}
ASKED = {"role": "user", "content": "Name a colour."}
ANSWERED = {"role": "assistant", "content": "Blue"}
AND_NOW = {"role": "user", "content": "And now?"}
"""A system turn, a question, its answer, and a second question."""
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00000", "type": "function", "function": {"name": "find_colour", "arguments": {"when": "noon"}}}
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_colour",
            "description": "Find a colour.",
            "parameters": {
                "type": "object",
                "properties": {"when": {"type": "string", "description": "The time of day."}},
                "required": ["when"],
            },
        },
    }
]
RESULT = {"role": "tool", "name": "find_colour", "tool_call_id": "call00000", "content": "Red"}
"""A call of a function, the list of functions that has it, and what the function returns."""


def with_text_arguments(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn whose calls have their arguments as JSON text."""
    calls = []
    for call in turn["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}
