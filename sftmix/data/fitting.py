"""What a chat template writes around a response, found by rendering small conversations, without generation tags.

One rule is behind all of it: what is trained is what the model will be asked to write after the prompt that it is
served with. If a template's generation prompt is not how its own rendering goes on (it opens or closes a thought that
the rendering lacks), the difference is measured here, and `sftmix.data.responses` puts the response behind the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sftmix.common.errors import ConfigError
from sftmix.data.endings import ends_of
from sftmix.data.rendering import (
    ANSWER,
    ARGUMENT,
    FUNCTION,
    GENERATION,
    OPENING,
    THOUGHT,
    Renderer,
    View,
    before,
    common_start,
)
from sftmix.data.templates import appended, defaults
from sftmix.data.thoughts import around_empty, closed_by, closing_of, closing_tag, opened_by, without_closing
from sftmix.data.trial import CALL, PROBE, TOOLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SWITCHES = re.compile(r"(?<![\w.'\"])(\w*(?:think|reason)\w*)(?![\w'\"(])")
_COMPARED = r"\b{name} +(?:==|!=|in|not in) +([^%}}]+)"
_PIECE = re.compile(r"(?=<|\[|\s)")


class Lead(NamedTuple):
    """What is in front of the first text of a response, which is its answer or its thought.

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
    call_end   the token behind a call, or else `end`
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


def fitted(tokenizer: PreTrainedTokenizerBase, name: str, source: str, *, thinks: bool | None) -> Shape:
    """Find what a template writes around a response.

    The exported template has the generation prompt of the rows, which think or do not. It is the first of these that
    renders such responses behind its prompt: the template itself, or the template with one of its own variables set
    (enable_thinking). A template without any generation prompt gets what it writes before a response.

    thinks  some response of the rows has a thought; None: the template is taken as it is
    Raises ConfigError for a template that cannot be rendered, or that has no end of a turn.
    """
    renderer = Renderer(tokenizer, name, source)
    names = dict.fromkeys(_SWITCHES.findall(source)) if thinks or not GENERATION.search(source) else ()
    notices = list[str]()
    view = renderer.view(source)
    if ANSWER not in view.plain:
        raise ConfigError("data.template: the template does not write the content of an assistant turn")
    for variable, value in [] if thinks is None or view.fits(thinks) else _values(source, names, thinks):
        with suppress(ConfigError):
            changed = defaults({variable: value}) + source
            if renderer.view(changed).fits(bool(thinks)):
                source = changed
                notices.append(f"The template is used and exported with {variable} {json.dumps(value)}.")
                break
    view = renderer.view(source)
    text_arguments, call = _call(renderer, source)
    if thinks is not None and (header := _header(view, thinks, call)):
        unless = " and enable_thinking is not true" if view.prompt != view.asked else ""
        source = appended(source, header, unless)
        view = renderer.view(source)
        notices.append(f"The template writes {header!r} before every response: it is part of the prompt, not trained.")
    opened, surplus, plain, thinking, closing = _leads(view)
    ending, end, call_end = ends_of(renderer, source, view, plain.served + thinking.served + closing, call, notices)
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


def _header(view: View, thinks: bool, call: str) -> str:
    """Return what is written before every response and belongs to the prompt; a space belongs to the response.

    For a template without a generation prompt, that is all it writes there; for others, an empty thought, if the rows
    have none, unless generation tags say that it is the response's.

    call  what the template writes for a call, or ""
    """
    if not view.plain.startswith(view.prompt) or view.fits(thinks):
        return ""
    header = before(view.plain[len(view.prompt) :], ANSWER)
    if view.prompt != view.asked:
        return header.rstrip(" ") if not thinks and not view.tagged and around_empty(header) else ""
    for other in (view.thinking[len(view.asked) :] if thinks and view.thinking else "", call):
        if other and not other.startswith(header):  # a tag that is begun only is not common
            header = re.sub(r"[<\[][^<>\[\]]*$", "", common_start(header, other))
    return header.rstrip(" ") if header.strip() else ""


def _leads(view: View) -> tuple[str, str | None, Lead, Lead, str]:
    """Return the end of the prompt, its surplus, what is before an answer and a thought, and between the two."""
    base = _base(view)
    opened = opened_by(view.prompt)
    surplus = None if base is None else view.prompt[len(base) :]
    own = None if base is None else before(view.plain[len(base) :], ANSWER)
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
    """Return what is before a thought that the template writes, in its own rendering and behind the prompt; and
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
    return own, served, before(rest, ANSWER)


def _base(view: View) -> str | None:
    """Return as much of the prompt as a plain response is rendered behind; None if it is less than the question."""
    if view.plain.startswith(view.prompt):
        return view.prompt
    places = [found.start() for found in _PIECE.finditer(view.prompt)]
    starts = [view.prompt[:place] for place in places if view.plain.startswith(view.prompt[:place])]
    longest = max(starts, key=len, default="")
    return longest if len(longest) >= len(common_start(view.asked, view.plain)) > 0 else None


def _call(renderer: Renderer, source: str) -> tuple[bool | None, str]:
    """Return whether a call's arguments are given as text, and what the template writes from the call on.

    (None, "") if the template writes no calls, or leaves out the list of functions.
    """
    for as_text in (False, True):
        with suppress(ConfigError):
            asked = renderer(PROBE[:1], source=source, tools=TOOLS, prompt=True)
            call = renderer([*PROBE[:1], called(CALL, as_text)], source=source, tools=TOOLS)
            rest = call[len(common_start(asked, call)) :]
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
