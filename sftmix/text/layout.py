"""What a chat template writes around a response, read from what it writes of small conversations.

What the template writes behind its own generation prompt is the response, and what it does not write there is put
together (`sftmix.text.chat_template`). No template is known by its name. What is compared, for each part of the layout:

template               prompt and answer, or prompt and thought; also with one of the template's own variables set
key                    a thought in each of the fields for thoughts, and in the content
opening                the prompt and the rendering of a thought
thought_tag, closing   the rendering of a thought; the prompts behind a question and behind a function's result
answer_lead            the prompt and the rendering of an answer
end, ending            the rendering of an answer, as the last turn and with a question behind it
call_end               the rendering of a call, and whether it has arguments as an object or as text
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sftmix.text.probes import AND_NOW, ANSWERED, ASKED, CALL, RESULT, SYSTEM, TOOLS, with_text_arguments
from sftmix.text.templates import LETTERS, Template, common_start, defaults
from sftmix.text.thoughts import (
    INLINE,
    OPENING,
    THOUGHT_FIELDS,
    closed_by,
    closing_at_head,
    closing_of,
    opened_by,
    text_after,
    text_before,
    without_thought_tags,
    written_behind,
)
from sftmix.words.errors import ConfigError, TemplateRefusal
from sftmix.words.shown import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = ASKED["content"], ANSWERED["content"]
THOUGHT = "Sky"
FUNCTION, ARGUMENT = "find_colour", "noon"

_MARK = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")  # '<|message|>', '[/INST]'
_GENERATION = re.compile(r"{%-?\s*generation\b")  # {%- generation %}, which transformers makes its masks of
# enable_thinking (Qwen3), thinking (DeepSeek-V3.1); neither fields of a turn nor keys in quotes.
_SWITCHES = re.compile(r"(?<![\w.'\"])(\w*(?:think|reason)\w*)(?![\w'\"(])")


# ------------------------------------------------------------------------------------------------- the trial


class Trial(NamedTuple):
    """What a template writes of a question and its answer.

    more      fields that the assistant's turns must have: a thought, if the template takes no turn without; else none
    asked     the question
    prompt    the question, and the generation prompt
    answered  the question, and an answer with `more`
    key       the key of a turn by which the template takes a thought; "": within the content; None: it leaves them out
    thinking  the question, and the answer with THOUGHT; "" if it leaves thoughts out
    """

    template: Template
    more: Mapping[str, str]
    asked: str
    prompt: str
    answered: str
    key: str | None
    thinking: str

    def fits(self, thinks: bool) -> bool:
        """True if the rendering goes on behind the prompt: an answer, with only white space between, or a thought that
        is still open or not begun."""
        behind = text_after(self.prompt, self.thinking if thinks else self.answered, QUESTION)
        opened = opened_by(self.prompt)
        if self.prompt == self.asked or (behind is None and not opened):
            return False  # the first: '[/INST]' of Mistral ends the question
        if thinks:
            return bool(opened) or not closed_by(self.prompt)  # DeepSeek-V3.1: '</think>', unless `thinking` is set
        # Qwen3, as published: '<think>\n\n</think>\n\n' is between; DeepSeek-V3.1: nothing.
        return not opened and not text_before(behind or "", ANSWER).strip()


def tried_out(tokenizer: PreTrainedTokenizerBase, source: str, thinks: bool | None) -> Trial:
    """Render a question and its answer. Raises TemplateRefusal for a template that cannot.

    thinks  False: a template that takes no answer without a thought is refused
    """
    thought: dict[str, str] = {} if thinks is False else dict.fromkeys(THOUGHT_FIELDS, THOUGHT)
    ways = [(Template(tokenizer, source, listed), more) for more in ({}, thought) for listed in (False, True)]
    fitting = (way for way in ways if ANSWER in way[0].tried(ASKED, {**ANSWERED, **way[1]}))
    template, more = next(fitting, ways[1])  # SmolVLM takes only lists
    key, thinking = _key_of(template)
    return Trial(
        template=template,
        more=more,
        asked=template.rendered(ASKED),
        prompt=template.rendered(ASKED, prompt=True),
        answered=template.rendered(ASKED, {**ANSWERED, **more}),
        key=key,
        thinking=thinking,
    )


def _key_of(template: Template) -> tuple[str | None, str]:
    """Return the key by which a template takes a thought, and what it writes of one; None, "" if it leaves them out."""
    said: list[dict[str, Any]] = [ANSWERED, {**CALL, "content": ANSWER}]  # Gemma 4 writes thoughts only beside calls
    ways = [(key, {**turn, key: THOUGHT}) for turn in said for key in THOUGHT_FIELDS]
    for key, turn in [*ways, ("", {**ANSWERED, "content": INLINE.format(thought=THOUGHT) + ANSWER})]:
        text = template.tried(ASKED, turn, tools=TOOLS if "tool_calls" in turn else ())
        if ANSWER in text.partition(THOUGHT)[2]:
            return key, text
    return None, ""


# ------------------------------------------------------------------------------------------------ the layout


@dataclass(frozen=True)
class Layout:
    """What a template writes around a response.

    template        the template in use, which renders; its source has the defaults of the exported one
    key             the key of a turn by which it takes a thought; "": within the content; None: it leaves thoughts out
    prompt          a question with the generation prompt
    opening         words that are no known tag, with which its prompts open a thought; "" for none
    thought_tag     what opens a thought that we write, with the white space behind it
    closing         what closes a thought, with the white space around
    answer_lead     what is between the prompt and an answer without a thought
    end             the token that ends a turn
    ending          the text from an answer through the token that ends its turn
    call_end        the token behind a call, or else `end`
    text_arguments  a call's arguments are given as JSON text
    around          the added tokens that it writes around turns; some tokenizers do not mark them as special
    notices         sentences that the user should read
    """

    template: Template
    key: str | None
    prompt: str
    opening: str
    thought_tag: str
    closing: str
    answer_lead: str
    end: str
    ending: str
    call_end: str
    text_arguments: bool
    around: frozenset[str]
    notices: tuple[str, ...] = ()

    def begun(self, prompt: str, thought: str) -> str:
        """Return what we put between a prompt and the answer.

        Not every prompt opens a thought if most do: after a function's result some templates write none.
        """
        opened = opened_by(prompt, self.opening)
        # DeepSeek-R1 opens none behind a function's result: its lead, '\n</think>\n\n', has nothing to close there.
        as_most = bool(opened) == bool(opened_by(self.prompt, self.opening))
        lead = self.answer_lead if as_most else self.closing if opened else ""
        if not thought:
            return lead
        # Kimi-K2-Thinking: '<think></think>' is in front of an answer without one
        tag = "" if opened else lead.removeprefix(closing_at_head(lead)) + self.thought_tag
        return tag + thought + self.closing


def layout_from(trial: Trial) -> Layout:
    """Read a layout from a trial. Raises ConfigError if there is neither an end of a turn nor an eos token."""
    template, prompt, key = trial.template, trial.prompt, trial.key
    opening = _opening_of(trial)
    thinking = written_behind(prompt, trial.thinking, QUESTION, "", thinks=True, opening=opening) or ""
    begun, _, behind = thinking.partition(THOUGHT)  # Qwen3: '<think>\n' and '\n</think>\n\nBlue'
    later = opened_by(template.tried(ASKED, {**CALL, **trial.more}, RESULT, tools=TOOLS, prompt=True))
    if key == "" and later.strip() not in ("", OPENING.strip()):
        key, begun, behind = None, later, ""  # Gemma 4 of unsloth: '<|channel>thought\n' is only behind a result
    tag = opened_by(prompt, opening) or opened_by(begun) or OPENING
    closing = text_before(behind, ANSWER) if opening else closing_at_head(behind) or closing_of(tag)
    # Mistral v0.3: ' '; gpt-oss: '<|channel|>final<|message|>'; Qwen3 beside rows that think: its empty block.
    answer = written_behind(prompt, trial.answered, QUESTION, closing, thinks=False, opening=opening) or ""
    lead = "" if trial.more else text_before(answer, ANSWER)
    tail = trial.answered.rpartition(ANSWER)[2]  # ChatML: '<|im_end|>\n'
    call, text_arguments = _call_of(template, trial.more)
    # Solar Open: '<|end|>' is also behind the thought
    inside = template.marks(lead + text_before(thinking, ANSWER) + text_before(call, ARGUMENT))
    end, notices = _end_of(trial, tail, inside)
    before, mark, _ = tail.partition(end)  # Nemotron Nano v2: '\n<SPECIAL_12>\n' -> '\n', '<SPECIAL_12>'
    return Layout(
        template=template,
        key=key,
        prompt=prompt,
        opening=opening,
        thought_tag=tag,
        closing=closing,
        answer_lead=lead,
        end=end,
        ending=before + mark if mark else end,
        call_end=_call_end(template, call, end),
        text_arguments=text_arguments,
        around=frozenset(template.marks(prompt + lead + tail + template.tried(SYSTEM, ASKED))),
        notices=notices,
    )


def _opening_of(trial: Trial) -> str:
    """Return the words with which a prompt opens a thought, if the rendering has the thought in their place."""
    # Apriel 1.6: 'Here are my reasoning steps:\n', and behind the thought '\n[BEGIN FINAL RESPONSE]\n'
    same = common_start(trial.prompt, trial.thinking)
    words = trial.prompt.removeprefix(same)
    if QUESTION not in same or not trial.thinking.startswith(same + THOUGHT) or not words.strip():
        return ""
    return words if without_thought_tags(trial.prompt) == trial.prompt else ""


def _end_of(trial: Trial, tail: str, inside: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the token that ends a turn, and notices: the first token behind an answer that is not inside a turn.

    eos is taken before any other, if the template writes it behind every answer (Command R7B), or if there is none.
    """
    template, eos = trial.template, trial.template.tokenizer.eos_token
    ends = [mark for mark in template.marks(tail) if mark not in inside]
    between = template.tried(ASKED, {**ANSWERED, **trial.more}, AND_NOW).rpartition(ANSWER)[2] or tail
    # An eos that is only behind the last turn ends a conversation: in one that goes on (`between`) it is not there.
    if eos in ends and eos in template.marks(common_start(tail, between)):
        return str(eos), ()
    if ends:
        return ends[0], ()  # Llama 3 with eos '<|end_of_text|>', of the base model: '<|eot_id|>'
    if eos is None:
        raise ConfigError(
            "data.template: the template writes no end-of-turn token after a response, and the tokenizer has no "
            "eos token: a model trained so would never stop. Choose another data.template or set an eos token."
        )
    # GLM-4.6: the next '<|user|>' ends an answer.
    return str(eos), (f"The template writes no end-of-turn token: {eos!r} is put after responses.",)


def _call_of(template: Template, more: Mapping[str, str]) -> tuple[str, bool]:
    """Return what is written from a call on, "" if it is not, or not as JSON; True for arguments as JSON text."""
    asked = template.tried(ASKED, tools=TOOLS, prompt=True)
    for as_text, call in enumerate([{**CALL, **more}, {**with_text_arguments(CALL), **more}]):
        rendered = template.tried(ASKED, call, tools=TOOLS)
        written = rendered[len(common_start(asked, rendered)) :]
        if FUNCTION in written and ARGUMENT in written and "{'" not in written:  # Phi-4-mini: {'when': 'noon'}
            return written, bool(as_text)
    return "", False


def _call_end(template: Template, call: str, end: str) -> str:
    """Return the token behind a call, or else `end`: Gemma 4 ends answers with <turn|>, calls with <|tool_response>."""
    # Only special ones: '</tool_call>', with which GLM-4.6 ends a call, is an added token, and ends no turn.
    special = [token.content for token in template.tokenizer.added_tokens_decoder.values() if token.special]
    within = template.marks(text_before(call, ARGUMENT))
    ends = [mark for mark in template.marks(call.rpartition(ARGUMENT)[2]) if mark in special and mark not in within]
    return end if end in ends or not ends else ends[-1]


def layout_of(tokenizer: PreTrainedTokenizerBase, source: str, *, thinks: bool | None) -> Layout:
    """Find what a template writes around a response.

    The exported template has the generation prompt of the rows, which think or do not. It is the first of these that
    renders such responses behind its prompt: the template itself, or the template with one of its own variables set
    (enable_thinking).

    thinks  some response of the rows has a thought; None: the template is taken as it is
    Raises TemplateRefusal for a template that cannot be rendered, ConfigError for one that has no end of a turn, or
    whose prompt closes the thought that rows have.
    """
    if len(source) > LETTERS:
        raise ConfigError(f"data.template: the template has {len(source):,} characters; allowed: at most {LETTERS:,}")
    trial = tried_out(tokenizer, source, thinks)
    switch = ""
    if ANSWER not in trial.answered or "{'type'" in trial.answered:  # it prints the list itself
        raise ConfigError("data.template: the template does not write the content of an assistant turn")
    if QUESTION not in trial.prompt:
        raise ConfigError("data.template: the template does not write the content of a user turn")
    if (bos := tokenizer.bos_token) and trial.answered.startswith(2 * bos):
        raise ConfigError("data.template: the template writes the BOS token twice at the beginning")
    tagged = not thinks and _GENERATION.search(source)  # TRL's Qwen3 marks the empty block as trained, so it stays
    if thinks is not None and not tagged and not trial.fits(thinks):
        fitting = (way for way in _switched(trial, thinks) if way[0].fits(thinks))
        trial, switch = next(fitting, (trial, ""))
    if thinks and closed_by(trial.prompt):  # Command R7B: '<|START_THINKING|><|END_THINKING|>'
        raise ConfigError(
            "data.template: the generation prompt closes the thought that responses of the rows have: leave thoughts "
            "out (data.thoughts drop), or choose a template (or data.template_options) whose prompt does not end so"
        )
    layout = layout_from(trial)
    _refuse_alike(trial, layout.answer_lead)
    notices = [switch] if switch else []
    if trial.prompt == trial.asked and layout.answer_lead.strip() and not layout.opening:
        notices.append(
            f"The template has no generation prompt: {quoted(layout.answer_lead)} is trained before each answer, since "
            "the model has to write it. With another template, such as data.template chatml, the prompt has it."
        )
    return replace(layout, notices=(*notices, *layout.notices))


def _refuse_alike(trial: Trial, lead: str) -> None:
    """Raise ConfigError if the words in front of a user's turn are also in front of the answer, behind the prompt."""
    # Recipes of RL: 'A conversation between User and Assistant. ... User: ' is written before each message of any role.
    said = lead.removeprefix(closing_at_head(lead)).strip()
    if re.search(r"\w", _MARK.sub("", said)) and text_before(trial.asked, QUESTION).strip().endswith(said):
        raise ConfigError(
            f"data.template: the template writes {quoted(said)} in front of a user's turn, and of the assistant's as "
            "well, behind its prompt: it would be trained as part of each answer. Choose another data.template, "
            "such as chatml"
        )


def _switched(trial: Trial, thinks: bool) -> Iterator[tuple[Trial, str]]:
    """Yield the trial of the template with each of the variables that may switch thinking, and the notice of it."""
    tokenizer, source, _ = trial.template
    for name in dict.fromkeys(_SWITCHES.findall(source)):
        with suppress(TemplateRefusal):
            notice = f"The template is used and exported with {name} {json.dumps(thinks)}."
            yield tried_out(tokenizer, defaults({name: thinks}) + source, thinks), notice
