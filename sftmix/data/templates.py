"""Chat templates: Jinja strings that `tokenizer.apply_chat_template` renders; our own, and changes to others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = """\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}\
{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}\
{% elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}\
{% else %}{{ raise_exception('alpaca has no turns of a ' + message.role) }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + END + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

NAMED = {"alpaca": ALPACA, "chatml": CHATML}

Chats = Sequence[Sequence[Mapping[str, Any]]]
"""Conversations, of turns {role: ..., content: ...}, of which some have tool_calls, or a thought."""

_SAME_DAY = """\
{% macro strftime_now(form) %}{% set ns = namespace(day=form) %}{% for code, value in [('%Y', '2024'), ('%y', '24'), \
('%B', 'July'), ('%b', 'Jul'), ('%m', '07'), ('%d', '26'), ('%-d', '26'), ('%e', '26'), ('%A', 'Friday'), \
('%a', 'Fri'), ('%w', '5'), ('%j', '208'), ('%H', '12'), ('%I', '12'), ('%p', 'PM'), ('%M', '00'), ('%S', '00')] %}\
{% set ns.day = ns.day | replace(code, value) %}{% endfor %}{{ ns.day }}{% endmacro %}"""
"""One date for templates that write the date of today: prompts must not change from day to day, nor at a resume."""


class TemplateRefusal(ValueError):
    """Error of a template that cannot render a conversation."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversations: Chats,
    *,
    prompt: bool = False,
    listed: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    **variables: Any,
) -> list[str]:
    """Render through the tokenizer, with more variables of the template.

    prompt  with the generation prompt
    listed  contents are handed over as lists of parts
    tools   the functions that the assistant may call
    Raises TemplateRefusal if the template or its syntax fails.
    """
    if listed:
        conversations = [[{**turn, "content": _parts(turn["content"])} for turn in chat] for chat in conversations]
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            conversations,  # type: ignore[arg-type]
            tools=list(tools) or None,  # type: ignore[arg-type]
            chat_template=on_the_same_day(template),
            add_generation_prompt=prompt,
            tokenize=False,
            **variables,
        )
    except Exception as error:  # a template may raise anything: RecursionError, OverflowError, MemoryError, ...
        raise TemplateRefusal(f"{type(error).__name__}: {error}") from error


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def defaults(variables: Mapping[str, Any]) -> str:
    """Return the head of a template whose variables have these values unless they are given others."""
    lines = []
    for name, value in variables.items():
        given = "none" if value is None else json.dumps(value, ensure_ascii=False)
        lines.append(f"{{%- if {name} is not defined %}}{{%- set {name} = {given} %}}{{%- endif %}}")
    return "".join(lines)


def reads(template: str, name: str) -> bool:
    """False if a template cannot read a variable of this name: it is not written there."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def appended(template: str, header: str, unless: str = "") -> str:
    """Return a template with a generation prompt, or with more at the end of its own, but for a condition."""
    end = "{% if add_generation_prompt" + unless + " %}{{ " + json.dumps(header, ensure_ascii=False) + " }}{% endif %}"
    return template.removesuffix("\n") + end


def on_the_same_day(template: str) -> str:
    """Return the template with one date in place of today's."""
    return (_SAME_DAY if "strftime_now" in template else "") + template


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """True if both make the same ids of any text; what they pad with, which trainers choose, is in none of them."""
    first, second = ((token_roles(t) | {"pad_token": ""}, backend_text(t)) for t in (one, other))
    return first == second


def token_roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the spellings of a tokenizer's special tokens by their roles: bos_token, eos_token, ..."""
    return {role: str(token) for role, token in tokenizer.special_tokens_map.items()}


def backend_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all of a tokenizer but the roles of its special tokens, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), repr(tokenizer)])
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())


def written_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] if the tokenizer begins plain text with it when it adds special tokens, else []."""
    first = tokenizer("Name a colour.")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
