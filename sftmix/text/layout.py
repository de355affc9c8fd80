"""What a chat template writes around a response, found by rendering small conversations, without generation tags.

What the template writes behind its own generation prompt is the response, and what it does not write there is put
together (`sftmix.text.chat_template`). Found here is what that takes: a variable that brings the prompt in line with
the responses, the key of a thought, and the end of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from sftmix.text.templates import Chat, defaults, on_the_same_day, token_roles
from sftmix.text.thoughts import (
    INLINE,
    OPENING,
    THOUGHT_FIELDS,
    closed_by,
    closing_at_head,
    closing_of,
    opened_by,
    without_thought_tags,
)
from sftmix.text.trial import AND_NOW, CALL, PROBE, SYSTEM, TOOLS, as_parts
from sftmix.words.errors import ConfigError, TemplateRefusal
from sftmix.words.shown import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = (turn["content"] for turn in PROBE)
THOUGHT = "Sky"
FUNCTION, ARGUMENT = "find_colour", "noon"
PLACE = "place5b71cfb5"
"""Letters that no row has."""

_GENERATION = re.compile(r"{%-?\s*generation\b")  # {%- generation %}, which transformers makes its masks of
_WORD = re.compile(r"[<\[]?[^<\[\s]+|[<\[]")  # "[/INST] <|im_start|>assistant\n" -> [/INST], <|im_start|>assistant
"""Text between white space; a tag begins one."""
# enable_thinking (Qwen3), thinking (DeepSeek-V3.1); neither fields of a turn nor keys in quotes.
_SWITCHES = re.compile(r"(?<![\w.'\"])(\w*(?:think|reason)\w*)(?![\w'\"(])")


# ---------------------------------------------------------------------------------------- behind the prompt


def text_before(text: str, marker: str) -> str:
    """Return what is in front of the last marker in a text; "" without one."""
    return text.rpartition(marker)[0]


def common_start(one: Any, other: Any) -> Any:
    """Return what two texts, or two lists of ids, both begin with."""
    return commonprefix([one, other])  # noqa: RUF071  # of characters, as is meant


def text_after(prompt: str, rendered: str, question: str) -> str | None:
    """Return a rendering behind a prompt, which may have another head and other white space around its header.

    question  the last turn of the prompt, or its end, which is nowhere else in the two
    """
    if rendered.startswith(prompt):
        return rendered[len(prompt) :]
    # Mistral v0.3: the system turn is written with the last turn of a user, and only if no answer follows it.
    header = prompt.rpartition(question)[2]
    turns = rendered.partition(question)[2]
    # DeepSeek-V3.1 of vLLM: the prompt has '\n  <|Assistant|>', the rendering '\n  <|Assistant|>    </think>'.
    spaced = r"\s*".join(map(re.escape, ["", *_WORD.findall(header), ""]))
    found = re.match(f"{re.escape(header)}|{spaced}", turns) if turns else None
    return turns[found.end() :] if found else None


def placed(chat: Chat) -> list[Mapping[str, Any]]:
    """Return a conversation with PLACE behind its last turn: if that says "a", so may the template's own words."""
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + PLACE}]


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
        return None  # Apriel 1.6: 'Here are my reasoning steps:\n' is in the prompt alone
    if rest.startswith(tags):
        rest = rest.removeprefix(tags)  # Nemotron 3 Nano: '<think>\n' is in both
    elif thinks:  # axolotl's Qwen3: the prompt ends with '<think>\n\n', the rendering has '<think>\nSky' there
        rest = rest.removeprefix(opened.strip()).lstrip() if opened else rest  # else '<think></think>' of GLM-4.6
    else:  # Qwen3, exported: the prompt ends with '<think>\n\n</think>\n\n', the rendering has 'Blue' there
        rest = rest.removeprefix(closing_at_head(rest).rstrip())
    if thinks:  # Nemotron Nano v2 writes the tag of its prompt, '<think>\n', once more
        return rest.removeprefix(opened)
    # DeepSeek-R1: the prompt ends with '<think>\n', the rendering has 'Blue' there
    return closing + rest if opened and not closing_at_head(rest) else rest


# ------------------------------------------------------------------------------------------------ the layout


class TemplateLayout:
    """What a template writes around a response.

    source    the template, with the defaults that the exported one has
    listed    it takes contents as lists of parts
    key       the key of a turn by which it takes a thought; "": within the content; None: it leaves thoughts out
    asked, prompt, plain, thinking  a question as it renders it, with its prompt, with an answer, with a thought or ""
    notices   sentences that the user should read
    Raises TemplateRefusal for a template that cannot render a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.notices = list[str]()
        self.listed = False
        self.listed = ANSWER not in self.tried(*PROBE)  # SmolVLM
        self.asked = self.rendered(*PROBE[:1])
        self.prompt = self.rendered(*PROBE[:1], prompt=True)
        self.plain = self.rendered(*PROBE)
        self.key: str | None = None
        self.thinking = ""
        said: list[dict[str, Any]] = [
            PROBE[1],
            {**CALL, "content": ANSWER},
        ]  # Gemma 4 writes thoughts beside calls alone
        ways = [(key, {**turn, key: THOUGHT}) for turn in said for key in THOUGHT_FIELDS]
        for key, turn in [*ways, ("", {**PROBE[1], "content": INLINE.format(thought=THOUGHT) + ANSWER})]:
            text = self.tried(PROBE[0], turn, tools=TOOLS if "tool_calls" in turn else ())
            if ANSWER in text.partition(THOUGHT)[2]:
                self.key, self.thinking = key, text
                break

    def rendered(self, *turns: Mapping[str, Any], prompt: bool = False, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Render turns as transformers does. Raises TemplateRefusal if the template or its syntax fails.

        prompt  with the generation prompt
        tools   the functions that the assistant may call
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{**turn, "content": as_parts(turn["content"])} for turn in turns] if self.listed else turns
        # Not []: Mistral v0.3 would write '[AVAILABLE_TOOLS] [[/AVAILABLE_TOOLS]'.
        given: Any = {"conversations": [chat], "tools": list(tools) or None, **token_roles(self.tokenizer)}
        template = on_the_same_day(self.source)
        try:
            texts = render_jinja_template(chat_template=template, add_generation_prompt=prompt, **given)[0]
        except Exception as error:  # a template may raise anything: RecursionError, OverflowError, MemoryError, ...
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from error
        return str(texts[0])

    def tried(self, *turns: Mapping[str, Any], **more: Any) -> str:
        """Render turns; "" if the template refuses them."""
        with suppress(TemplateRefusal):
            return self.rendered(*turns, **more)
        return ""

    def fits(self, thinks: bool) -> bool:
        """True if the rendering goes on behind the prompt: an answer, with white space alone between, or a thought that
        is still open or not begun."""
        behind = text_after(self.prompt, self.thinking if thinks else self.plain, QUESTION)
        opened = opened_by(self.prompt)
        if self.prompt == self.asked or (behind is None and not opened):
            return False  # the first: '[/INST]' of Mistral ends the question
        if thinks:
            return bool(opened) or not closed_by(self.prompt)  # DeepSeek-V3.1: '</think>', unless `thinking` is set
        # Qwen3, as published: '<think>\n\n</think>\n\n' is between; DeepSeek-V3.1: nothing.
        return not opened and not text_before(behind or "", ANSWER).strip()

    def marks(self, text: str) -> list[str]:
        """Return the added tokens of a text, but for white space, which some tokenizers add for any text."""
        added = self.tokenizer.added_tokens_decoder
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # Gemma has "\n\n" and other runs of newlines among them.
        return [added[number].content for number in ids if number in added and added[number].content.strip()]

    # ----------------------------------------------------------------------------------------------- thoughts

    @cached_property
    def _thinking_behind(self) -> str:
        return written_behind(self.prompt, self.thinking, QUESTION, "", thinks=True) or ""

    @cached_property
    def thought_tag(self) -> str:
        """What opens a thought that we write, with the white space behind it."""
        begun = text_before(self._thinking_behind, THOUGHT)  # Qwen3: '<think>\n' and '\n</think>\n\nBlue'
        return opened_by(self.prompt) or opened_by(begun) or OPENING

    @cached_property
    def closing(self) -> str:
        """What closes a thought, with the white space around."""
        behind = closing_at_head(self._thinking_behind.partition(THOUGHT)[2])
        return behind or closing_of(self.thought_tag)

    # ---------------------------------------------------------------------------------------- around an answer

    @cached_property
    def answer_lead(self) -> str:
        """What is between the prompt and an answer without a thought."""
        # Mistral v0.3: ' '; gpt-oss: '<|channel|>final<|message|>'; Qwen3 beside rows that think: its empty block.
        return text_before(written_behind(self.prompt, self.plain, QUESTION, self.closing, thinks=False) or "", ANSWER)

    @cached_property
    def _tail(self) -> str:
        return self.plain.rpartition(ANSWER)[2]  # ChatML: '<|im_end|>\n'

    @cached_property
    def end(self) -> str:
        """The token that ends a turn: the first behind an answer that is not inside one; eos if there is none.

        eos is taken before any other, if the template writes it behind every answer (Command R7B). Raises ConfigError
        if there is no eos either.
        """
        inside = self.marks(  # Solar Open: '<|end|>' is also behind the thought
            self.answer_lead + text_before(self._thinking_behind, ANSWER) + text_before(self.call[0], ARGUMENT)
        )
        ends = [mark for mark in self.marks(self._tail) if mark not in inside]
        eos = self.tokenizer.eos_token
        between = self.tried(*PROBE, AND_NOW).rpartition(ANSWER)[2] or self._tail
        # An eos behind the last turn alone ends a conversation: in one that goes on (`between`) it is not there.
        if eos in ends and eos in self.marks(common_start(self._tail, between)):
            return str(eos)
        if ends:
            return ends[0]  # Llama 3 with eos '<|end_of_text|>', of the base model: '<|eot_id|>'
        if eos is None:
            raise ConfigError(
                "data.template: the template writes no end-of-turn token after a response, and the tokenizer has no "
                "eos token: a model trained so would never stop. Choose another data.template or set an eos token."
            )
        # GLM-4.6: the next '<|user|>' ends an answer.
        self.notices.append(f"The template writes no end-of-turn token: {eos!r} is put after responses.")
        return str(eos)

    @cached_property
    def ending(self) -> str:
        """The text from an answer through the token that ends its turn."""
        before, mark, _ = self._tail.partition(self.end)  # Nemotron Nano v2: '\n<SPECIAL_12>\n' -> '\n', '<SPECIAL_12>'
        return before + mark if mark else self.end

    @cached_property
    def around(self) -> frozenset[str]:
        """The added tokens that it writes around turns; some tokenizers do not mark them as special."""
        return frozenset(self.marks(self.prompt + self.answer_lead + self._tail + self.tried(*SYSTEM, *PROBE[:1])))

    # ---------------------------------------------------------------------------------------------- calls

    @cached_property
    def call(self) -> tuple[str, bool]:
        """What is written from a call on, "" if it is not, or not as JSON; True if it takes arguments as JSON text."""
        asked = self.tried(*PROBE[:1], tools=TOOLS, prompt=True)
        for as_text, call in enumerate([CALL, with_text_arguments(CALL)]):
            rendered = self.tried(*PROBE[:1], call, tools=TOOLS)
            written = rendered[len(common_start(asked, rendered)) :]
            if FUNCTION in written and ARGUMENT in written and "{'" not in written:  # Phi-4-mini: {'when': 'noon'}
                return written, bool(as_text)
        return "", False

    @cached_property
    def call_end(self) -> str:
        """The token behind a call, or else `end`: Gemma 4 ends an answer with '<turn|>', a call '<|tool_response>'."""
        call = self.call[0]
        # Special ones alone: '</tool_call>', with which GLM-4.6 ends a call, is an added token, and ends no turn.
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        within = self.marks(text_before(call, ARGUMENT))
        ends = [mark for mark in self.marks(call.rpartition(ARGUMENT)[2]) if mark in special and mark not in within]
        return self.end if self.end in ends or not ends else ends[-1]


def with_text_arguments(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn whose calls have their arguments as JSON text."""
    calls = []
    for call in turn["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}


def layout_of(tokenizer: PreTrainedTokenizerBase, source: str, *, thinks: bool | None) -> TemplateLayout:
    """Find what a template writes around a response.

    The exported template has the generation prompt of the rows, which think or do not. It is the first of these that
    renders such responses behind its prompt: the template itself, or the template with one of its own variables set
    (enable_thinking).

    thinks  some response of the rows has a thought; None: the template is taken as it is
    Raises TemplateRefusal for a template that cannot be rendered, ConfigError for one that has no end of a turn, or
    whose prompt closes the thought that rows have.
    """
    layout = TemplateLayout(tokenizer, source)
    if ANSWER not in layout.plain or "{'type'" in layout.plain:  # it prints the list itself
        raise ConfigError("data.template: the template does not write the content of an assistant turn")
    if (bos := tokenizer.bos_token) and layout.plain.startswith(2 * bos):
        raise ConfigError("data.template: the template writes the BOS token twice at the beginning")
    tagged = not thinks and _GENERATION.search(source)  # TRL's Qwen3 marks the empty block as trained, so it stays
    if thinks is not None and not tagged and not layout.fits(thinks):
        layout = next((one for one in _switched(layout, thinks) if one.fits(thinks)), layout)
    if thinks and closed_by(layout.prompt):  # Command R7B: '<|START_THINKING|><|END_THINKING|>'
        raise ConfigError(
            "data.template: the generation prompt closes the thought that responses of the rows have: leave thoughts "
            "out (data.thoughts drop), or choose a template (or data.template_options) whose prompt does not end so"
        )
    if layout.prompt == layout.asked and layout.answer_lead.strip():
        layout.notices.append(
            f"The template has no generation prompt: {quoted(layout.answer_lead)} is trained before each answer, since "
            "the model has to write it. With another template, such as data.template chatml, the prompt has it."
        )
    return layout


def _switched(layout: TemplateLayout, thinks: bool) -> Iterator[TemplateLayout]:
    """Yield the template with each of the variables that may switch thinking."""
    for name in dict.fromkeys(_SWITCHES.findall(layout.source)):
        with suppress(TemplateRefusal):
            switched = TemplateLayout(layout.tokenizer, defaults({name: thinks}) + layout.source)
            switched.notices.append(f"The template is used and exported with {name} {json.dumps(thinks)}.")
            yield switched
