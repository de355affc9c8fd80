"""What a template writes behind a prompt: of rows, and of the small conversations by which a template is understood."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from sftmix.data.templates import TemplateRefusal, render
from sftmix.data.thoughts import (
    INLINE,
    THOUGHT_FIELDS,
    closed_by,
    closing_at_head,
    opened_by,
    without_thought_tags,
)
from sftmix.data.trial import CALL, PROBE, TOOLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = (turn["content"] for turn in PROBE)
THOUGHT = "Sky"
FUNCTION, ARGUMENT = "find_colour", "noon"

_WORD = re.compile(r"[<\[]?[^<\[\s]+|[<\[]")
"""Text between white space; a tag begins one."""


def text_before(text: str, marker: str) -> str:
    """Return what is in front of the last marker in a text; "" without one."""
    return text.rpartition(marker)[0]


def common_start(one: str, other: str) -> str:
    """Return the characters that both texts begin with."""
    return commonprefix([one, other])  # noqa: RUF071  # of characters, as is meant


def with_arguments(turn: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    """Return a turn whose calls have their arguments as JSON text, or as objects."""
    calls = [{**call, "function": dict(call["function"])} for call in turn["tool_calls"]]
    for call in calls if as_text else ():
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**turn, "tool_calls": calls}


# ---------------------------------------------------------------------------------------- behind the prompt


def written_behind(prompt: str, rendered: str, question: str, closing: str, *, thinks: bool) -> str | None:
    """Return what a rendered conversation has behind its prompt; None if it does not go on from there.

    A prompt that ends with the tags of a thought may stand for what the rendering lacks, or has in another form.

    question  the content of the last turn in the prompt
    closing   what closes a thought that the prompt opens and the response lacks
    thinks    the response has a thought
    """
    opened = opened_by(prompt)
    if not opened and (rest := text_after(prompt, rendered, question)) is not None:
        return rest
    before = without_thought_tags(prompt)
    tags = prompt.removeprefix(before)
    rest = text_after(before, rendered, question)
    if rest is None:
        return None
    if rest.startswith(tags):
        rest = rest.removeprefix(tags)
    elif thinks:
        rest = rest.removeprefix(opened.strip()).lstrip() if opened else rest
    else:  # Qwen3, exported: the prompt ends with '<think>\n\n</think>\n\n', the rendering has 'Blue' there
        rest = rest.removeprefix(closing_at_head(rest).rstrip())
    if thinks:  # Nemotron Nano v2 writes the tag of its prompt, '<think>\n', once more
        return rest.removeprefix(opened)
    # DeepSeek-R1: the prompt ends with '<think>\n', the rendering has 'Blue' there
    return closing + rest if opened and not closing_at_head(rest) else rest


def text_after(prompt: str, rendered: str, question: str) -> str | None:
    """Return a rendering behind a prompt, which may have another head and other white space around its header."""
    if rendered.startswith(prompt):
        return rendered[len(prompt) :]
    question = question.strip()
    if not question:
        return None
    # Mistral v0.3: the system turn is written with the last turn of a user, and only if no answer follows it.
    header = prompt.rpartition(question)[2]
    turns = question.join(rendered.split(question)[prompt.count(question) :])
    # Llama 4 with tools as JSON: the prompt has '<|eot|><|header_start|>', the rendering '<|eot|>    <|header_start|>'.
    spaced = r"\s*".join(map(re.escape, ["", *_WORD.findall(header), ""]))
    found = re.match(f"{re.escape(header)}|{spaced}", turns) if turns else None
    return turns[found.end() :] if found else None


# ------------------------------------------------------------------------------------------------ probes


class TemplateProbe:
    """Small conversations as a template renders them: a question, with its prompt, with an answer, with a thought.

    listed    contents are given as lists of parts
    key       how the thought was given; None: the template leaves it out
    thinking  the conversation with it, or ""
    Raises TemplateRefusal for a template that cannot render a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.tokenizer = tokenizer
        self.source = source
        # Some templates need parts, or functions: Llama 3.2 Vision, functionary.
        for self.listed, self.tools in ((False, []), (True, []), (False, TOOLS), (False, [])):
            if ANSWER in self.tried(*PROBE):
                break
        self.asked = self.rendered(*PROBE[:1])
        self.prompt = self.rendered(*PROBE[:1], prompt=True)
        self.plain = self.rendered(*PROBE)
        self.key: str | None = None
        self.thinking = ""
        for key, text in self._thinking():
            if text.count(THOUGHT) == 1 and ANSWER in text.partition(THOUGHT)[2]:
                self.key, self.thinking = key, text
                break

    def rendered(self, *turns: Mapping[str, Any], **more: Any) -> str:
        """Render turns; prompt and tools may be given. Raises TemplateRefusal."""
        options = {"tools": self.tools, **more}
        return render(self.tokenizer, self.source, [turns], listed=self.listed, **options)[0]

    def tried(self, *turns: Mapping[str, Any], **more: Any) -> str:
        """Render turns; "" if the template refuses them."""
        with suppress(TemplateRefusal):
            return self.rendered(*turns, **more)
        return ""

    def _thinking(self) -> Iterator[tuple[str, str]]:
        """Yield the ways in which the template takes a thought, and what it writes then."""
        for key in THOUGHT_FIELDS:
            yield key, self.tried(PROBE[0], {**PROBE[1], key: THOUGHT})
        for key in THOUGHT_FIELDS:  # Gemma 4 writes thoughts beside calls alone
            yield key, self.tried(PROBE[0], {**CALL, "content": ANSWER, key: THOUGHT}, tools=TOOLS)
        yield "", self.tried(PROBE[0], {**PROBE[1], "content": INLINE.format(thought=THOUGHT) + ANSWER})

    def fits(self, thinks: bool) -> bool:
        """True if responses are rendered behind the prompt, with no more than white space between, or thinking."""
        behind = text_after(self.prompt, self.thinking if thinks else self.plain, QUESTION)
        opened = opened_by(self.prompt)
        if self.prompt == self.asked or (behind is None and not opened):
            return False
        if thinks:
            return bool(opened) or not closed_by(self.prompt)
        return not opened and not text_before(behind or "", ANSWER).strip()

    def call(self, as_text: bool) -> str:
        """Return what is written from a call on; "" if the template does not write it, or not as JSON.

        as_text  its arguments are given as JSON text
        """
        asked = self.tried(*PROBE[:1], tools=TOOLS, prompt=True)
        rendered = self.tried(*PROBE[:1], with_arguments(CALL, as_text), tools=TOOLS)
        written = rendered[len(common_start(asked, rendered)) :]
        return written if FUNCTION in written and ARGUMENT in written and "{'" not in written else ""

    def marks(self, text: str) -> list[str]:
        """Return the added tokens of a text, but for white space, which some tokenizers add for any text."""
        added = self.tokenizer.added_tokens_decoder
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [added[number].content for number in ids if number in added and added[number].content.strip()]
