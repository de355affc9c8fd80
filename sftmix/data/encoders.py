"""The encoder of a tokenizer: which chat template is used, whether it is safe, and what is special around its turns."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sftmix.common.errors import ConfigError
from sftmix.common.files import read_text
from sftmix.common.places import place_of
from sftmix.data.calls import NOT_OPTIONS
from sftmix.data.encoder import Encoder
from sftmix.data.formats import TEXT
from sftmix.data.layout import layout_of
from sftmix.data.spellings import SpecialSpellings
from sftmix.data.store import get_or_build, key_of
from sftmix.data.templates import NAMED, TemplateRefusal, defaults, on_the_same_day, reads, token_roles, written_bos
from sftmix.data.trial import LETTERS, trouble_with
from sftmix.options import DataOptions, SpecialTokens, Thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encoder_for(tokenizer: PreTrainedTokenizerBase, options: DataOptions, *, thinks: bool | None = False) -> Encoder:
    """Make the encoder of rows under these options: without a chat template if data.format is text, else with one.

    A template that is not ours is first tried out in a process of its own, once for each cache. Raises ConfigError for
    one that takes too long, or too much memory.

    thinks  some response of the rows has a thought; None: the template is taken as it is
    """
    if options.format == TEXT:
        return text_encoder(tokenizer, options.special_tokens)
    name, source = _choose(tokenizer, options.template)
    variables = token_roles(tokenizer)
    if len(source) > LETTERS:
        raise ConfigError(
            f"data.template: {name}: it has {len(source):,} characters; at most {LETTERS:,} are tried out"
        )

    def build(directory: Path) -> dict[str, Any]:
        if trouble := trouble_with(on_the_same_day(source), variables):
            raise ConfigError(f"data.template: {name}: {trouble}. It is not used; choose another, such as chatml")
        return {}

    if name not in NAMED:
        key = key_of(source, variables, version("transformers"), version("jinja2"))
        get_or_build(options.cache_dir, f"template-{key}", build)
    return make_encoder(
        tokenizer,
        options.template,
        options.special_tokens,
        thoughts=options.thoughts,
        thinks=thinks,
        variables=options.template_options or {},
    )


def text_encoder(tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens = "text") -> Encoder:
    """Make the encoder of plain text: a document ends with eos. Raises ConfigError if there is no eos token."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("data.format text: this tokenizer has no eos token, with which a document ends")
    eos = int(tokenizer.eos_token_id)
    spellings = SpecialSpellings(tokenizer, [eos]) if special_tokens == "text" else None
    return Encoder(tokenizer, TEXT, eos, spellings)


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    special_tokens: SpecialTokens = "text",
    *,
    thoughts: Thoughts = "train",
    thinks: bool | None = False,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> Encoder:
    """Choose the template, find what it writes around a response (`sftmix.data.layout`), and return the encoder.

    template        None (the tokenizer's own, or alpaca if it has none), "alpaca", "chatml", or the path of a Jinja
                    file
    special_tokens  what their spellings in rows become, see `DataOptions`
    thoughts        what becomes of thoughts, see `DataOptions`
    thinks          some response has a thought: the generation prompt is then the one for thinking; None: it stays
    variables       values of the template's variables, also in the exported template
    Raises ConfigError for an unknown name, for a template that cannot be rendered, and if no token can end a response.
    """
    name, source = _choose(tokenizer, template)
    notices = list[str]()
    if template is None and name == "alpaca":
        notices.append("The tokenizer has no chat template: using alpaca (data.template chooses another).")
    if "strftime_now" in source:
        notices.append("The template writes the date: 26 July 2024 is used on every day.")
    given = NOT_OPTIONS | token_roles(tokenizer).keys()
    if unread := [key for key in variables if key in given or not reads(source, key)]:
        raise ConfigError(
            f"data.template_options names {', '.join(unread)}, which the template ({name}) does not read as a variable "
            "of its own; correct the name, or leave it out"
        )
    try:
        layout = layout_of(tokenizer, defaults(variables) + source, thinks=thinks and thoughts != "drop")
    except TemplateRefusal as error:
        raise ConfigError(f"data.template: {name}: cannot render a user and an assistant turn: {error}") from error
    ids: Any = tokenizer.convert_tokens_to_ids([layout.end, *layout.around])
    spellings = None
    if special_tokens == "text":
        spellings = SpecialSpellings(tokenizer, ids)
    return Encoder(tokenizer, name, ids[0], spellings, layout, thoughts, (*notices, *layout.notices))


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
        return read_text(place_of(template))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.template: {template!r} is neither one of {', '.join(NAMED)} nor a readable Jinja file ({error}); "
            "null takes the tokenizer's own"
        ) from error
