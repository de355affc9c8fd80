"""Small conversations as a chat template renders them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from sftmix.common.errors import ConfigError
from sftmix.data.templates import TemplateRefusal, render
from sftmix.data.thoughts import THOUGHT_FIELDS, around_empty, closed_by, opened_by
from sftmix.data.trial import PROBE, TOOLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = (turn["content"] for turn in PROBE)
THOUGHT = "Sky"
FUNCTION, ARGUMENT = "find_colour", "noon"

OPENING = "<think>\n"
INLINE = OPENING + "{thought}\n</think>\n\n"
"""A thought in front of the answer, for templates that know no thoughts and write the content as it is."""

GENERATION = re.compile(r"{%-?\s*generation\b")
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[<\[]?[^<\[\s]+|[<\[]")
"""Text between white space; a tag begins one."""


class View(NamedTuple):
    """Small conversations as a template renders them: the question, the prompt, and two responses to it.

    thinking  the response with a thought; None: the template leaves it out
    key       how the thought was given
    tagged    the template has generation tags
    """

    asked: str
    prompt: str
    plain: str
    thinking: str | None
    key: str | None
    tagged: bool

    def fits(self, thinks: bool) -> bool:
        """True if responses are rendered behind the prompt, with no more than white space between, or thinking."""
        if self.prompt == self.asked:
            return False
        opened = bool(opened_by(self.prompt))
        if thinks:
            begins = (self.thinking or "").startswith(self.prompt)
            return opened or (begins and not closed_by(self.prompt))
        begins = self.plain.startswith(self.prompt) and not opened
        return begins and not before(self.plain[len(self.prompt) :], ANSWER).strip()


class Renderer:
    """A template that renders small conversations; errors name it.

    name  what the user calls the template
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, source: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.listed = False
        self.tools: Sequence[Mapping[str, Any]] = ()
        for listed, tools in ((False, ()), (True, ()), (False, TOOLS)):  # some templates need parts, or functions
            with suppress(TemplateRefusal):
                if ANSWER in render(tokenizer, source, [PROBE], listed=listed, tools=tools)[0]:
                    self.listed = listed
                    self.tools = tools
                    break

    def __call__(self, turns: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """Render turns; more variables may be given, and prompt, tools, source. Raises ConfigError."""
        options = {"tools": self.tools, **more}
        source = options.pop("source", self.source)
        try:
            return render(self.tokenizer, source, [turns], listed=self.listed, **options)[0]
        except TemplateRefusal as error:
            problem = f"data.template: {self.name}: cannot render a user and an assistant turn: {error}"
            raise ConfigError(problem) from error

    def view(self, source: str, **more: Any) -> View:
        """Render the conversations of a View by a source."""
        tagged = bool(GENERATION.search(source))
        asked = self(PROBE[:1], source=source, **more)
        prompt = self(PROBE[:1], source=source, prompt=True, **more)
        plain = behind_head(prompt, self(PROBE, source=source, **more), QUESTION)
        for key in (*THOUGHT_FIELDS, ""):
            turn = {**PROBE[-1], key: THOUGHT} if key else {**PROBE[-1]}
            if not key:
                turn["content"] = INLINE.format(thought=THOUGHT) + ANSWER
            with suppress(ConfigError):
                text = behind_head(prompt, self([*PROBE[:1], turn], source=source, **more), QUESTION)
                head, *rest = text.split(THOUGHT)
                empty = not key and around_empty(head[len(common_start(head, asked)) :])
                if len(rest) == 1 and ANSWER in rest[0] and not empty:
                    return View(asked, prompt, plain, text, key, tagged)
        return View(asked, prompt, plain, None, None, tagged)


def before(text: str, marker: str) -> str:
    return text.rpartition(marker)[0]


def common_start(one: str, other: str) -> str:
    """Return the characters that both texts begin with."""
    return commonprefix([one, other])  # noqa: RUF071  # of characters, as is meant


def behind_head(prompt: str, closed: str, content: str) -> str:
    """Return the rendering of a conversation with the beginning of its prompt, through the last turn there.

    A template may write another system turn, or another date, with a generation prompt than without. It may also write
    other white space around the header of a response: the header is in the prompt all the same, and is not trained.
    """
    if closed.startswith(prompt):
        return closed
    content = content.strip()
    place = prompt.rfind(content) if content else -1
    if place >= 0 and not closed.startswith(prompt[:place]):
        rest = closed.split(content)[prompt.count(content) :]
        closed = prompt[:place] + content.join(["", *rest]) if rest else closed
    return _spaced_as(prompt, closed)


def _spaced_as(prompt: str, closed: str) -> str:
    """Return a rendering with the white space of its prompt, as far as both have the same words."""
    # Llama 4 with tools as JSON: the prompt has '<|eot|><|header_start|>', the rendering '<|eot|>    <|header_start|>'.
    place = end = 0
    for word in _WORD.finditer(prompt):
        begin = end + len(_SPACE.match(closed, end)[0])  # type: ignore[index]
        if not closed.startswith(word[0], begin):
            break
        place, end = word.end(), begin + len(word[0])
    if closed.startswith(prompt[:place]):
        return closed
    return prompt[:place] + _SPACE.match(prompt, place)[0] + closed[end:].lstrip()  # type: ignore[index]
