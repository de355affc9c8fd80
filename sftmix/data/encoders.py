"""The encoder of a tokenizer: which chat template is used, whether it is safe, and which token ends a turn.

A small conversation, the probe, is rendered to find the text that the template writes around a response; generation
tags are not needed.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import place_of
from sftmix.data.formats import TEXT
from sftmix.data.store import get_or_build, key_of
from sftmix.data.templates import (
    NAMED,
    Encoder,
    SpecialSpellings,
    TemplateRefusal,
    on_the_same_day,
    render,
    token_roles,
    written_bos,
)
from sftmix.data.trial import PROBE, SYSTEM, trouble_with
from sftmix.options import DataOptions, SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encoder_for(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Encoder:
    """Make the encoder of rows under these options: without a chat template if data.format is text, else with one.

    A template that is not ours is first tried out in a process of its own, once for each cache. Raises ConfigError for
    one that takes too long, or too much memory.
    """
    if options.format == TEXT:
        return text_encoder(tokenizer, options.special_tokens)
    name, source = _choose(tokenizer, options.template)
    variables = token_roles(tokenizer)

    def build(directory: Path) -> dict[str, Any]:
        if trouble := trouble_with(on_the_same_day(source), variables):
            raise ConfigError(f"data.template: {name}: {trouble}. It is not used; choose another, such as chatml")
        return {}

    if name not in NAMED:
        key = key_of(source, variables, version("transformers"), version("jinja2"))
        get_or_build(options.cache_dir, f"template-{key}", build)
    return make_encoder(tokenizer, options.template, options.special_tokens)


def text_encoder(tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens = "text") -> Encoder:
    """Make the encoder of plain text: a document ends with eos. Raises ConfigError if there is no eos token."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("data.format text: this tokenizer has no eos token, with which a document ends")
    eos = int(tokenizer.eos_token_id)
    spellings = SpecialSpellings(tokenizer, [eos]) if special_tokens == "text" else None
    return Encoder(tokenizer, TEXT, None, eos, spellings)


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None, special_tokens: SpecialTokens = "text"
) -> Encoder:
    """Choose the template, render a small conversation to find what it writes around a response; return the encoder.

    If it writes more before a response than its generation prompt, an empty thinking block or the whole header of a
    turn, this is put behind the prompt. Behind a prompt of its own, however short, enable_thinking=true leaves it out:
    responses with thinking of their own begin without it. A template that knows this variable writes the block itself
    where it is false; one that gives it a value at its head gets the block always.

    template        None (the tokenizer's own, or alpaca where it has none), "alpaca", "chatml", or the path of a Jinja
                    file
    special_tokens  what their spellings in rows become, see `DataOptions`
    Raises ConfigError for an unknown name, for a template that cannot be rendered, and if no token can end a response.
    """
    name, source = _choose(tokenizer, template)
    notices = list[str]()
    if template is None and name == "alpaca":
        notices.append("The tokenizer has no chat template: using alpaca (data.template chooses another).")

    def text(turns: list[dict[str, str]], **more: bool) -> str:
        try:
            return render(tokenizer, source, [turns], **more)[0]
        except TemplateRefusal as error:
            problem = f"data.template: {name}: cannot render a user and an assistant turn: {error}"
            raise ConfigError(problem) from error

    added, original = "", source.removesuffix("\n")  # what is put behind the prompt, and the template before
    # asked: the question; prompt: with the generation prompt; full: the whole; head, after: what stands around the
    # answer; lead: what is written before it behind the prompt. The first round leaves the addition out where thinking
    # is enabled; if that does not help, the second always writes it; the third only looks.
    thinks = " and enable_thinking is not " + ("defined" if "enable_thinking" in source else "true")
    for condition in (thinks, "", None):
        asked, prompt, full = text(PROBE[:1]), text(PROBE[:1], prompt=True), text(PROBE)
        head, answer, after = full.rpartition(PROBE[-1]["content"])
        if not answer:
            raise ConfigError("data.template: the template does not write the content of an assistant turn")
        lead = head[len(prompt) :] if full.startswith(prompt) else ""
        if condition is None or not lead.strip():
            break
        added = added or lead.rstrip(" ")  # a space belongs to the first token of the response
        own = condition if prompt != asked else ""
        end = "{% if add_generation_prompt" + own + " %}{{ " + json.dumps(added) + " }}{% endif %}"
        source = original + end
    if added:
        notices.append(f"The template writes {added!r} before every response: it is part of the prompt, not trained.")
    if "strftime_now" in source:
        notices.append("The template writes the date: 26 July 2024 is used on every day.")
    if _ids(tokenizer, full)[:2] == [tokenizer.bos_token_id] * 2:
        raise ConfigError("data.template: the template writes the BOS token twice at the beginning")
    stop, ending, trailer = _end_of_turn(tokenizer, after, notices)
    spellings = None
    if special_tokens == "text":
        texts = [asked, after]
        with suppress(TemplateRefusal):  # many templates take no system turn
            texts += render(tokenizer, source, [[*SYSTEM, *PROBE[:1]]])
        header = head[len(asked) :] if full.startswith(asked) else ""
        spellings = SpecialSpellings(tokenizer, [stop, *_around_turns(tokenizer, header, texts)])
    # The end of the generation prompt that enable_thinking=true leaves out.
    thinking = text(PROBE[:1], prompt=True, enable_thinking=True)
    return Encoder(
        tokenizer,
        name,
        source,
        stop,
        spellings,
        appends_end=not ending,
        ending=ending,
        trailer=trailer,
        lead="" if lead.strip() else lead,
        block=prompt[len(thinking) :] if prompt.startswith(thinking) else "",
        notices=tuple(notices),
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, after: str, notices: list[str]) -> tuple[int, str, str]:
    """Return the token that ends a response, the text up to its end, and the text behind it.

    The text up to its end is "" if the template writes no such token, and eos is put there.

    after  what the template writes behind a response
    """
    added = _added(tokenizer)
    for end in _ids(tokenizer, after):
        if end in added or end in tokenizer.all_special_ids:
            spelling = str(tokenizer.convert_ids_to_tokens(end))
            before, _, trailer = after.partition(spelling)
            return end, before + spelling, trailer
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "data.template: the template writes no end-of-turn token after a response, and the tokenizer has no eos "
            "token: a model trained so would never stop. Choose another data.template or set an eos token."
        )
    notices.append(f"The template writes no end-of-turn token: {tokenizer.eos_token!r} is put after responses.")
    return int(tokenizer.eos_token_id), "", after


def _around_turns(tokenizer: PreTrainedTokenizerBase, header: str, texts: list[str]) -> set[int]:
    """Return the added tokens that the template writes around turns; some tokenizers do not mark them as special.

    Left out are those behind the first before a response that have a partner, as `<think>` has `</think>`: responses
    write them, too.

    header  what the template writes before a response
    texts   what it writes elsewhere
    """
    added = _added(tokenizer)
    unclosed = [tag.replace("/", "", 1) for tag in added.values()]
    before = [number for number in _ids(tokenizer, header) if number in added]
    around = before[:1] + [n for n in before[1:] if unclosed.count(added[n].replace("/", "", 1)) == 1]
    return {*around, *(number for text in texts for number in _ids(tokenizer, text) if number in added)}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the spellings of added tokens, but for runs of white space, which some tokenizers add for any text."""
    tokens = tokenizer.added_tokens_decoder.items()
    return {number: token.content for number, token in tokens if token.content.strip()}


def _choose(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[str, str]:
    """Return name and source of the template.

    Ours begin with BOS if the tokenizer itself writes one, and turns end with a token that it knows.
    """
    if template is None and tokenizer.chat_template:
        try:
            return "tokenizer", tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them is called default
            raise ConfigError(
                f"data.template: {error}. Write the one you want to a Jinja file and name that file, or choose chatml "
                "or alpaca"
            ) from error
    name = "alpaca" if template is None else template
    source = template_source(name)
    if name in NAMED:
        source = source.replace("END", "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() else "eos_token")
        if "eos_token" in source and tokenizer.eos_token is None:
            raise ConfigError("data.template: this tokenizer has no eos token, with which the template ends a response")
        source = ("{{ bos_token }}" if written_bos(tokenizer) else "") + source
    return name, source


def template_source(template: str) -> str:
    """Return the Jinja source of alpaca, chatml or a file; raise ConfigError if there is none."""
    if template in NAMED:
        return NAMED[template]
    try:
        return place_of(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.template: {template!r} is neither one of {', '.join(NAMED)} nor a readable Jinja file ({error}); "
            "null takes the tokenizer's own"
        ) from error
