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
    writes_bos,
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
    name, source, _ = _choose(tokenizer, options.template)
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

    template        None (the tokenizer's own, or alpaca where it has none), "alpaca", "chatml", or the path of a Jinja
                    file
    special_tokens  what their spellings in rows become, see `DataOptions`
    Raises ConfigError for an unknown name, for a template that cannot be rendered, and if no token can end a response.
    """
    name, source, notices = _choose(tokenizer, template)
    probe = _Probe(tokenizer, name, source)
    if header := probe.header:
        notices.append(f"The template writes {header!r} before every response: it is part of the prompt, not trained.")
    if "strftime_now" in source:
        notices.append("The template writes the date: 26 July 2024 is used on every day.")
    ends = (n for n in probe.ids(probe.after) if n in probe.added or n in tokenizer.all_special_ids)
    end, ending, trailer = next(ends, None), "", probe.after
    if appends := end is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "data.template: the template writes no end-of-turn token after a response, and the tokenizer has no "
                "eos token: a model trained so would never stop. Choose another data.template or set an eos token."
            )
        end = int(tokenizer.eos_token_id)
        notices.append(f"The template writes no end-of-turn token: {tokenizer.eos_token!r} is put after responses.")
    else:
        spelling = str(tokenizer.convert_ids_to_tokens(end))
        before, _, trailer = probe.after.partition(spelling)
        ending = before + spelling
    if tokenizer.bos_token_id is not None and probe.ids(probe.full)[:2] == [tokenizer.bos_token_id] * 2:
        raise ConfigError("data.template: the template writes the BOS token twice at the beginning")
    # The end of the generation prompt that enable_thinking=true leaves out.
    thinking = probe.text(PROBE[:1], prompt=True, enable_thinking=True)
    return Encoder(
        tokenizer,
        name,
        probe.source,
        end,
        SpecialSpellings(tokenizer, [end, *probe.around_turns()]) if special_tokens == "text" else None,
        appends_end=appends,
        ending=ending,
        trailer=trailer,
        lead="" if probe.lead.strip() else probe.lead,
        block=probe.prompt[len(thinking) :] if probe.prompt.startswith(thinking) else "",
        notices=tuple(notices),
    )


def _choose(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[str, str, list[str]]:
    """Return name and source of the template, and sentences for the user.

    Ours begin with BOS if the tokenizer itself writes one, and turns end with a token that it knows.
    """
    if template is None and tokenizer.chat_template:
        try:
            return "tokenizer", tokenizer.get_chat_template(), []
        except ValueError as error:  # several, and none of them is called default
            raise ConfigError(
                f"data.template: {error}. Write the one you want to a Jinja file and name that file, or choose chatml "
                "or alpaca"
            ) from error
    notices = []
    if template is None:
        template = "alpaca"
        notices.append("The tokenizer has no chat template: using alpaca (data.template chooses another).")
    source = template_source(template)
    if template in NAMED:
        source = source.replace("END", "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() else "eos_token")
        if "eos_token" in source and tokenizer.eos_token is None:
            raise ConfigError("data.template: this tokenizer has no eos token, with which the template ends a response")
        source = ("{{ bos_token }}" if writes_bos(tokenizer) else "") + source
    return template, source, notices


def template_source(template: str) -> str:
    """Return the Jinja source of alpaca, chatml or a file; raise ConfigError if there is none."""
    if template in NAMED:
        return NAMED[template]
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.template: {template!r} is neither one of {', '.join(NAMED)} nor a readable Jinja file ({error}); "
            "null takes the tokenizer's own"
        ) from error


# ------------------------------------------------------------------------------------------- the probe


class _Probe:
    """What a template writes for a small conversation. Raises ConfigError for a template that fails.

    If it writes more before a response than its generation prompt, an empty thinking block or the whole header of a
    turn, this is put behind the prompt. Behind a prompt of its own, however short, enable_thinking=true leaves it out:
    responses with thinking of their own begin without it. A template that knows this variable writes the block itself
    where it is false; one that gives it a value at its head gets the block always.

    source  the template, with the longer prompt
    header  what was put behind the prompt, or ""
    asked   the user's turn
    prompt  that and the generation prompt
    full    the user's turn and the assistant's
    head    the part of that before the answer
    lead    the part of the head behind the prompt
    after   the part behind the answer
    added   the spellings of added tokens, but for runs of white space, which some tokenizers add for any text
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, source: str) -> None:
        self.tokenizer, self.name, self.source, self.header = tokenizer, name, source, ""
        unless = " and enable_thinking is not " + ("defined" if "enable_thinking" in source else "true")
        for condition in (unless, "", None):
            self.asked, self.prompt = self.text(PROBE[:1]), self.text(PROBE[:1], prompt=True)
            self.full = self.text(PROBE)
            self.head, answer, self.after = self.full.rpartition(PROBE[-1]["content"])
            if not answer:
                raise ConfigError("data.template: the template does not write the content of an assistant turn")
            self.lead = self.head[len(self.prompt) :] if self.full.startswith(self.prompt) else ""
            if condition is None or not self.lead.strip():
                break
            self.header = self.header or self.lead.rstrip(" ")  # a space belongs to the first token of the response
            own = condition if self.prompt != self.asked else ""
            end = "{% if add_generation_prompt" + own + " %}{{ " + json.dumps(self.header) + " }}{% endif %}"
            self.source = source.removesuffix("\n") + end
        tokens = tokenizer.added_tokens_decoder.items()
        self.added = {number: token.content for number, token in tokens if token.content.strip()}

    def text(self, turns: list[dict[str, str]], **more: Any) -> str:
        try:
            return render(self.tokenizer, self.source, [turns], **more)[0]
        except TemplateRefusal as error:
            problem = f"data.template: {self.name}: cannot render a user and an assistant turn: {error}"
            raise ConfigError(problem) from error

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def around_turns(self) -> set[int]:
        """Return the added tokens that the template writes around turns; some tokenizers do not mark them as special.

        Left out are those behind the first before a response that have a partner, as `<think>` has `</think>`:
        responses write them, too.
        """
        header = self.ids(self.head[len(self.asked) :]) if self.full.startswith(self.asked) else []
        header = [number for number in header if number in self.added]
        unclosed = [tag.replace("/", "", 1) for tag in self.added.values()]
        around = header[:1] + [n for n in header[1:] if unclosed.count(self.added[n].replace("/", "", 1)) == 1]
        texts = [self.asked, self.after]
        with suppress(ConfigError):  # many templates take no system turn
            texts.append(self.text([*SYSTEM, *PROBE[:1]]))
        return {*around, *(number for text in texts for number in self.ids(text) if number in self.added)}
