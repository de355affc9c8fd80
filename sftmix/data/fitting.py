"""What a chat template writes around a response, found by rendering small conversations, without generation tags.

One rule is behind all of it: what is trained is what the model will be asked to write after the prompt that it is
served with. If a template's generation prompt is not how its own rendering goes on (it opens or closes a thought that
the rendering lacks), the difference is measured here, and `sftmix.data.responses` puts the response behind the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from sftmix.common.errors import ConfigError
from sftmix.data.templates import TemplateRefusal, appended, defaults, render
from sftmix.data.thoughts import around_empty, closed_by, closing_of, closing_tag, opened_by, without_closing
from sftmix.data.trial import AND_NOW, CALL, PROBE, TOOLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = (turn["content"] for turn in PROBE)
THOUGHT = "Sky"
FUNCTION, ARGUMENT = "find_colour", "noon"

KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn by which templates take its thought, in the order in which they are tried."""

OPENING = "<think>\n"
INLINE = OPENING + "{thought}\n</think>\n\n"
"""A thought in front of the answer, for templates that know no thoughts and write the content as it is."""

_SWITCHES = re.compile(r"(?<![\w.'\"])(\w*(?:think|reason)\w*)(?![\w'\"(])")
_COMPARED = r"\b{name} +(?:==|!=|in|not in) +([^%}}]+)"
_GENERATION = re.compile(r"{%-?\s*generation\b")
_PIECE = re.compile(r"(?=<|\[|\s)")


class Lead(NamedTuple):
    """What stands in front of the first text of a response: of its answer, or of its thought.

    own     between the beginning of the prompt and the first text, as the template has it; None: it has none such
    served  between the whole prompt and the first text, as it is trained
    """

    own: str | None
    served: str


@dataclass(frozen=True)
class Shape:
    """What a template writes around a response.

    source     the template, with the defaults and the generation prompt that the exported one has
    listed     it takes contents as lists of parts
    key        the key of a turn by which it takes a thought; "": within the content; None: it leaves thoughts out
    opened     tag at the end of the generation prompt that opens a thought, or ""
    surplus    end of that prompt which no response is rendered behind; None: it is rendered behind none of it
    plain      in front of an answer without a thought
    thinking   in front of a thought
    closing    between the thought and the answer
    ending     from the answer through the token that ends the turn
    end        that token
    text_arguments  the arguments of a call are given as JSON text; None: the template writes no calls
    call_end   the token behind a call, or that of other turns
    notices    sentences that the user should read
    """

    source: str
    listed: bool
    key: str | None
    opened: str
    surplus: str | None
    plain: Lead
    thinking: Lead
    closing: str
    ending: str
    end: str
    text_arguments: bool | None
    call_end: str
    notices: tuple[str, ...]


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
        return begins and not _before(self.plain[len(self.prompt) :], ANSWER).strip()


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
        tagged = bool(_GENERATION.search(source))
        asked = self(PROBE[:1], source=source, **more)
        prompt = self(PROBE[:1], source=source, prompt=True, **more)
        plain = behind_head(prompt, self(PROBE, source=source, **more), QUESTION)
        for key in (*KEYS, ""):
            turn = {**PROBE[-1], key: THOUGHT} if key else {**PROBE[-1]}
            if not key:
                turn["content"] = INLINE.format(thought=THOUGHT) + ANSWER
            with suppress(ConfigError):
                text = behind_head(prompt, self([*PROBE[:1], turn], source=source, **more), QUESTION)
                head, *rest = text.split(THOUGHT)
                empty = not key and around_empty(head[len(_common(head, asked)) :])
                if len(rest) == 1 and ANSWER in rest[0] and not empty:
                    return View(asked, prompt, plain, text, key, tagged)
        return View(asked, prompt, plain, None, None, tagged)


def fitted(tokenizer: PreTrainedTokenizerBase, name: str, source: str, *, thinks: bool) -> Shape:
    """Find what a template writes around a response.

    The exported template has the generation prompt of the rows, which think or do not. It is the first of these that
    renders such responses behind its prompt: the template itself, or the template with one of its own variables set
    (enable_thinking). A template without any generation prompt gets what it writes before a response.

    thinks  some response of the rows has a thought
    Raises ConfigError for a template that cannot be rendered, or that has no end of a turn.
    """
    renderer = Renderer(tokenizer, name, source)
    names = dict.fromkeys(_SWITCHES.findall(source)) if thinks or not _GENERATION.search(source) else ()
    notices = list[str]()
    view = renderer.view(source)
    if ANSWER not in view.plain:
        raise ConfigError("data.template: the template does not write the content of an assistant turn")
    for variable, value in [] if view.fits(thinks) else _values(source, names, thinks):
        with suppress(ConfigError):
            changed = defaults({variable: value}) + source
            if renderer.view(changed).fits(thinks):
                source = changed
                notices.append(f"The template is used and exported with {variable} {json.dumps(value)}.")
                break
    view = renderer.view(source)
    text_arguments, call = _call(renderer, source)
    if header := _header(view, thinks, call):
        unless = " and enable_thinking is not true" if view.prompt != view.asked else ""
        source = appended(source, header, unless)
        view = renderer.view(source)
        notices.append(f"The template writes {header!r} before every response: it is part of the prompt, not trained.")
    opened, surplus, plain, thinking, closing = _leads(view)
    ending, end, call_end = _ends(renderer, source, view, plain.served + thinking.served + closing, call, notices)
    return Shape(
        source=source,
        listed=renderer.listed,
        key=view.key,
        opened=opened,
        surplus=surplus,
        plain=plain,
        thinking=thinking,
        closing=closing,
        ending=ending,
        end=end,
        text_arguments=text_arguments,
        call_end=call_end,
        notices=tuple(notices),
    )


def _values(source: str, names: Iterable[str], thinks: bool) -> Iterator[tuple[str, Any]]:
    """Yield values of the variables that may switch thinking: true or false, and the words they are compared with."""
    for name in names:
        yield name, thinks
        compared = " ".join(re.findall(_COMPARED.format(name=re.escape(name)), source))
        for value in dict.fromkeys(re.findall(r"['\"](\w+)['\"]", compared)):
            yield name, value


def _before(text: str, marker: str) -> str:
    return text.rpartition(marker)[0]


def _common(one: str, other: str) -> str:
    """Return the characters that both texts begin with."""
    return commonprefix([one, other])  # noqa: RUF071  # of characters, as is meant


def _header(view: View, thinks: bool, call: str) -> str:
    """Return what is written before every response and belongs to the prompt; a space belongs to the response.

    That is all that a template without a generation prompt writes there; of others, an empty thought, if the rows have
    none, unless generation tags say that it is the response's.

    call  what the template writes for a call, or ""
    """
    if not view.plain.startswith(view.prompt) or view.fits(thinks):
        return ""
    header = _before(view.plain[len(view.prompt) :], ANSWER)
    if view.prompt != view.asked:
        return header.rstrip(" ") if not thinks and not view.tagged and around_empty(header) else ""
    for other in (view.thinking[len(view.asked) :] if thinks and view.thinking else "", call):
        if other and not other.startswith(header):  # a tag that is begun only is not common
            header = re.sub(r"[<\[][^<>\[\]]*$", "", _common(header, other))
    return header.rstrip(" ") if header.strip() else ""


def _leads(view: View) -> tuple[str, str | None, Lead, Lead, str]:
    """Return the end of the prompt, its surplus, what stands before an answer and a thought, and between the two."""
    base = _base(view)
    opened = opened_by(view.prompt)
    surplus = None if base is None else view.prompt[len(base) :]
    own = None if base is None else _before(view.plain[len(base) :], ANSWER)
    lead = own or ""
    closes = bool(opened) and closing_tag(opened.strip()) in lead
    thinking = None
    if view.thinking is not None:
        thinking, served, closing = _thinking(view, base)
    elif not opened and (halves := around_empty(lead)):
        served, closing = halves
    else:
        served = "" if opened else OPENING
        closing = lead if closes else closing_of(opened or OPENING) + lead
    plain = closing if opened and (surplus or not closes) else lead
    if surplus and closed_by(surplus):
        plain = without_closing(plain)
    return opened, surplus, Lead(own, plain), Lead(thinking, served), closing


def _thinking(view: View, base: str | None) -> tuple[str | None, str, str]:
    """Return what stands before a thought that the template writes, in its own rendering and behind the prompt; and
    between the thought and the answer.
    """
    head, _, rest = (view.thinking or "").partition(THOUGHT)
    opened = opened_by(view.prompt)
    own = head[len(base) :] if base is not None and head.startswith(base) else None
    served = head[len(view.prompt) :] if head.startswith(view.prompt) else ""
    if own is not None and not opened:
        served = own
    if opened and opened.strip() in served:  # the prompt has it already
        served = ""
    return own, served, _before(rest, ANSWER)


def _base(view: View) -> str | None:
    """Return as much of the prompt as a plain response is rendered behind; None if it is less than the question."""
    if view.plain.startswith(view.prompt):
        return view.prompt
    places = [found.start() for found in _PIECE.finditer(view.prompt)]
    starts = [view.prompt[:place] for place in places if view.plain.startswith(view.prompt[:place])]
    longest = max(starts, key=len, default="")
    return longest if len(longest) >= len(_common(view.asked, view.plain)) > 0 else None


def behind_head(prompt: str, closed: str, content: str) -> str:
    """Return the rendering of a conversation with the beginning of its prompt, through the last turn there.

    A template may write another system turn, or another date, with a generation prompt than without.
    """
    content = content.strip()
    place = prompt.rfind(content)
    if not content or place < 0 or closed.startswith(prompt[:place]):
        return closed
    rest = closed.split(content)[prompt.count(content) :]
    return prompt[:place] + content.join(["", *rest]) if rest else closed


def _call(renderer: Renderer, source: str) -> tuple[bool | None, str]:
    """Return whether a call's arguments are given as text, and what the template writes from the call on.

    (None, "") if the template writes no calls, or leaves out the list of functions.
    """
    for as_text in (False, True):
        with suppress(ConfigError):
            asked = renderer(PROBE[:1], source=source, tools=TOOLS, prompt=True)
            call = renderer([*PROBE[:1], called(CALL, as_text)], source=source, tools=TOOLS)
            rest = call[len(_common(asked, call)) :]
            if FUNCTION in asked and FUNCTION in rest and ARGUMENT in rest and "{'" not in rest:
                return as_text, rest
    return None, ""


def called(turn: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    """Return a turn whose calls have their arguments as text, or as objects."""
    calls = []
    for call in turn["tool_calls"]:
        function = dict(call["function"])
        if as_text:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**turn, "tool_calls": calls}


# --------------------------------------------------------------------------------------------- ends of turns


def _ends(
    renderer: Renderer,
    source: str,
    view: View,
    within: str,
    call: str,
    notices: list[str],
) -> tuple[str, str, str]:
    """Return the text from an answer through the end of its turn, the token there, and the token behind a call.

    What ends a turn does not occur inside one: not between the prompt and the answer, nor in a call. eos is taken
    before any other token, if the template writes it behind every answer, and put there if it writes none.

    within  what stands in front of an answer
    call    what the template writes from a call on
    """
    tokenizer = renderer.tokenizer
    after = view.plain.rpartition(ANSWER)[2]
    between = after
    with suppress(ConfigError):  # in the middle of a conversation
        between = renderer([*PROBE, AND_NOW], source=source).rpartition(ANSWER)[2].rpartition(AND_NOW["content"])[0]
    *begun, ended = call.rpartition(ARGUMENT)
    calls = list(_marks(tokenizer, ended))
    inside = set(_marks(tokenizer, within + begun[0]))
    always = _common(after, between)
    eos = tokenizer.eos_token
    ends = [mark for mark in _marks(tokenizer, after) if mark not in inside]
    ends = [eos] if eos in ends and eos in _marks(tokenizer, always) else ends
    if ends:
        ending = _through(after, ends[0])
    elif between != after:
        header = _common(between[::-1], _before(view.asked, PROBE[0]["content"])[::-1])[::-1]  # of a next turn
        ends = [mark for mark in _marks(tokenizer, between.removesuffix(header)) if mark not in inside]
        if ends:
            ending = _through(between, ends[0])
            notices.append(f"The template writes {ends[0]!r} only before a next turn: it is put after every response.")
    if not ends:
        if eos is None:
            raise ConfigError(
                "data.template: the template writes no end-of-turn token after a response, and the tokenizer has no "
                "eos token: a model trained so would never stop. Choose another data.template or set an eos token."
            )
        notices.append(f"The template writes no end-of-turn token: {eos!r} is put after responses.")
        ends = [eos]
        ending = eos
    special = {str(tokenizer.convert_ids_to_tokens(number)) for number in tokenizer.all_special_ids}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    last = calls[-1] if calls and ends[0] not in calls and calls[-1] in special - inside else ends[0]
    return ending, ends[0], last


def _marks(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[str]:
    """Yield the special and the added tokens of a text, but for white space, which some tokenizers add for any text."""
    added = tokenizer.added_tokens_decoder
    for number in tokenizer(text, add_special_tokens=False)["input_ids"]:
        spelling = str(tokenizer.convert_ids_to_tokens(number))
        if number in tokenizer.all_special_ids or (number in added and spelling.strip()):
            yield spelling


def _through(text: str, mark: str) -> str:
    return text[: text.index(mark) + len(mark)]
