"""What a chat template writes around a response, found by rendering small conversations, without generation tags.

What the template writes behind its own generation prompt is the response, and what it does not write there is put
together (`sftmix.data.responses`). Found here is what that takes: a variable that brings the prompt in line with the
responses, the prompt of a template that has none, the key of a thought, and the end of a turn.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftmix.common.errors import ConfigError
from sftmix.data.probe import (
    ANSWER,
    ARGUMENT,
    FUNCTION,
    QUESTION,
    THOUGHT,
    TemplateProbe,
    common_start,
    text_after,
    text_before,
    written_behind,
)
from sftmix.data.templates import TemplateRefusal, appended, defaults
from sftmix.data.thoughts import (
    OPENING,
    closed_by,
    closing_at_head,
    closing_of,
    opened_by,
)
from sftmix.data.trial import AND_NOW, PROBE, SYSTEM, TOOLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"{%-?\s*generation\b")
_SWITCHES = re.compile(r"(?<![\w.'\"])(\w*(?:think|reason)\w*)(?![\w'\"(])")
_COMPARED = r"\b{name} +(?:==|!=|in|not in) +([^%}}]+)"


@dataclass(frozen=True)
class TemplateLayout:
    """What a template writes around a response.

    source          the template, with the defaults and the generation prompt that the exported one has
    listed          it takes contents as lists of parts
    key             the key of a turn by which it takes a thought; "": within the content; None: it leaves thoughts out
    opens           its generation prompt opens a thought
    thought_tag     opens a thought that we write, with the white space behind it
    closing         closes it, with the white space around
    answer_lead     what is between the prompt and an answer without a thought
    ending          from the answer through the token that ends the turn
    end             that token
    call_end        the token behind a call, or else `end`
    text_arguments  the arguments of a call are given as JSON text
    around          the added tokens that it writes around turns
    notices         sentences that the user should read
    """

    source: str
    listed: bool
    key: str | None
    opens: bool
    thought_tag: str
    closing: str
    answer_lead: str
    ending: str
    end: str
    call_end: str
    text_arguments: bool
    around: frozenset[str]
    notices: tuple[str, ...]


def layout_of(tokenizer: PreTrainedTokenizerBase, source: str, *, thinks: bool | None) -> TemplateLayout:
    """Find what a template writes around a response.

    The exported template has the generation prompt of the rows, which think or do not. It is the first of these that
    renders such responses behind its prompt: the template itself, or the template with one of its own variables set
    (enable_thinking). A template without any generation prompt gets what it writes before a response.

    thinks  some response of the rows has a thought; None: the template is taken as it is
    Raises TemplateRefusal for a template that cannot be rendered, ConfigError for one that has no end of a turn, or
    whose prompt closes the thought that rows have.
    """
    notices = list[str]()
    probe = TemplateProbe(tokenizer, source)
    if ANSWER not in probe.plain:
        raise ConfigError("data.template: the template does not write the content of an assistant turn")
    if (bos := tokenizer.bos_token) and probe.plain.startswith(2 * bos):
        raise ConfigError("data.template: the template writes the BOS token twice at the beginning")
    if thinks is not None:
        probe = _switched(probe, thinks, notices)
    call = probe.call(as_text=False) or probe.call(as_text=True)
    text_arguments = bool(call) and not probe.call(as_text=False)
    if FUNCTION not in probe.tried(*PROBE[:1], tools=TOOLS):  # Command A for RAG: then no row has calls
        call = ""
    if thinks is not None and (header := _header(probe, thinks, call)):
        unless = " and enable_thinking is not true" if probe.prompt != probe.asked else ""
        probe = TemplateProbe(tokenizer, appended(probe.source, header, unless))
        notices.append(f"The template writes {header!r} before every response: it is part of the prompt, not trained.")
    if thinks and closed_by(probe.prompt):
        raise ConfigError(
            "data.template: the generation prompt closes the thought that responses of the rows have: leave thoughts "
            "out (data.thoughts drop), or choose a template (or data.template_options) whose prompt does not end so"
        )
    thinking = written_behind(probe.prompt, probe.thinking, QUESTION, "", thinks=True) or ""
    tag, closing = _thought_tags(probe, thinking)
    lead = text_before(written_behind(probe.prompt, probe.plain, QUESTION, closing, thinks=False) or "", ANSWER)
    ending, end, call_end = _ending(probe, lead + text_before(thinking, ANSWER), call, notices)
    return TemplateLayout(
        source=probe.source,
        listed=probe.listed,
        key=probe.key,
        opens=bool(opened_by(probe.prompt)),
        thought_tag=tag,
        closing=closing,
        answer_lead=lead,
        ending=ending,
        end=end,
        call_end=call_end,
        text_arguments=text_arguments,
        around=_around_turns(probe, lead),
        notices=tuple(notices),
    )


def _thought_tags(probe: TemplateProbe, thinking: str) -> tuple[str, str]:
    """Return what opens and what closes a thought that we write, with the white space around.

    thinking  what the template writes behind the prompt for a thought and an answer
    """
    plain = written_behind(probe.prompt, probe.plain, QUESTION, "", thinks=False) or ""
    begun, _, rest = thinking.partition(THOUGHT)  # Qwen3: '<think>\n' and '\n</think>\n\nBlue'
    empty = closing_at_head(plain).partition("</")[0].replace("\n\n", "\n")  # Kimi-K2-Thinking: '<think></think>'
    tag = opened_by(probe.prompt) or opened_by(empty) or opened_by(begun) or OPENING
    return tag, (closing_at_head(rest) if probe.key else "") or closing_of(tag)


def _switched(probe: TemplateProbe, thinks: bool, notices: list[str]) -> TemplateProbe:
    """Return the template with a variable that may switch thinking, if its own prompt does not fit the rows.

    Tried are true or false, and the words that the template compares the variable with.
    """
    source = probe.source
    tagged = not thinks and GENERATION.search(source)
    for name in () if tagged or probe.fits(thinks) else dict.fromkeys(_SWITCHES.findall(source)):
        compared = " ".join(re.findall(_COMPARED.format(name=re.escape(name)), source))
        for value in dict.fromkeys([thinks, *re.findall(r"['\"](\w+)['\"]", compared)]):
            with suppress(TemplateRefusal):
                changed = TemplateProbe(probe.tokenizer, defaults({name: value}) + source)
                if changed.fits(thinks):
                    notices.append(f"The template is used and exported with {name} {json.dumps(value)}.")
                    return changed
    return probe


def _header(probe: TemplateProbe, thinks: bool, call: str) -> str:
    """Return what is written before every response and belongs to the prompt; a space belongs to the response.

    For a template without a generation prompt, that is all it writes there; for others, an empty thought, if the rows
    have none, unless generation tags say that it is the response's.

    call  what the template writes for a call, or ""
    """
    header = text_before(text_after(probe.prompt, probe.plain, QUESTION) or "", ANSWER)
    if probe.fits(thinks):
        return ""
    if probe.prompt != probe.asked:  # Qwen3-Instruct of xinference: '<think>\n\n</think>\n\n'
        kept = thinks or opened_by(probe.prompt) or GENERATION.search(probe.source)
        return header.rstrip(" ") if closing_at_head(header) and not kept else ""
    # Alpaca: '### Response:\n'; Command A: '<|CHATBOT_TOKEN|>', then '<|START_RESPONSE|>' or '<|START_ACTION|>'
    for other in (text_after(probe.prompt, probe.thinking, QUESTION) if thinks else "", call):
        if other and not other.startswith(header):  # a tag that is begun only is not common
            header = re.sub(r"[<\[][^<>\[\]]*$", "", common_start(header, other))
    return header.rstrip(" ") if header.strip() else ""


def _ending(probe: TemplateProbe, within: str, call: str, notices: list[str]) -> tuple[str, str, str]:
    """Return the text from an answer through the end of its turn, the token there, and the token behind a call.

    What ends a turn does not occur inside one: not between the prompt and the answer, nor in a call. eos is taken
    before any other token, if the template writes it behind every answer, and put there if it writes none.

    within  what is in front of an answer
    call    what the template writes from a call on
    """
    eos = probe.tokenizer.eos_token
    begun, _, ended = call.rpartition(ARGUMENT)
    inside = probe.marks(within + begun)
    after = probe.plain.rpartition(ANSWER)[2]
    ends = [mark for mark in probe.marks(after) if mark not in inside]
    between = text_before(probe.tried(*PROBE, AND_NOW).rpartition(ANSWER)[2], AND_NOW["content"]) or after
    if eos in ends and eos in probe.marks(common_start(after, between)):
        ends = [eos]
    elif not ends:  # ChatML of vLLM: '<|im_end|>\n' is written only before a next turn, '<|im_start|>user\n'
        header = common_start(between[::-1], text_before(probe.asked, QUESTION)[::-1])[::-1]
        after = between.removesuffix(header)
        ends = [mark for mark in probe.marks(after) if mark not in inside]
        if ends:
            notices.append(f"The template writes {ends[0]!r} only before a next turn: it is put after every response.")
    if not ends:
        if eos is None:
            raise ConfigError(
                "data.template: the template writes no end-of-turn token after a response, and the tokenizer has no "
                "eos token: a model trained so would never stop. Choose another data.template or set an eos token."
            )
        notices.append(f"The template writes no end-of-turn token: {eos!r} is put after responses.")
        ends, after = [eos], eos
    # Gemma 4 ends an answer with '<turn|>', and a call with '<|tool_response>'.
    special = [token.content for token in probe.tokenizer.added_tokens_decoder.values() if token.special]
    ends_call = [mark for mark in probe.marks(ended) if mark == ends[0] or (mark in special and mark not in inside)]
    call_end = ends[0] if ends[0] in ends_call else [*ends[:1], *ends_call][-1]
    return _through(after, ends[0]), ends[0], call_end


def _around_turns(probe: TemplateProbe, lead: str) -> frozenset[str]:
    """Return the added tokens that the template writes around turns; some tokenizers do not mark them as special.

    Left out are those behind the first before a response that have a partner, as `<tool_call>` has `</tool_call>`:
    responses also write them.

    lead  what is between the prompt and an answer
    """
    tags = [token.content.replace("/", "", 1) for token in probe.tokenizer.added_tokens_decoder.values()]
    header = probe.prompt.removeprefix(probe.asked) + lead if probe.prompt.startswith(probe.asked) else ""
    alone = [mark for n, mark in enumerate(probe.marks(header)) if not n or tags.count(mark.replace("/", "", 1)) == 1]
    elsewhere = probe.asked + probe.tried(*SYSTEM, *PROBE[:1]) + probe.plain.rpartition(ANSWER)[2]
    return frozenset(alone + probe.marks(elsewhere))


def _through(text: str, mark: str) -> str:
    return text[: text.index(mark) + len(mark)]
