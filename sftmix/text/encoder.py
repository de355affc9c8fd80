"""The encoder: a tokenizer, the renderer of conversations, and what both are known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sftmix.components.component import Component, code_of, files_of
from sftmix.components.renderer import Renderer
from sftmix.disk.hashes import sha256_file, sha256_json
from sftmix.disk.places import place_of
from sftmix.options.data import DataOptions
from sftmix.text.chat_template import ChatTemplate
from sftmix.text.templates import backend_text, decode, token_roles
from sftmix.text.windows import Documents
from sftmix.types import Int64, Message
from sftmix.words.errors import ConfigError
from sftmix.words.fields import TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def identity(form: Component | str) -> Any:
    """Return what a format or renderer is known by: its word, or its class with options, source and hashes of files."""
    if isinstance(form, str):
        return form
    return [form.spec(), code_of(form), {name: sha256_file(place_of(name)) for name in files_of(form)}]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and the renderer of rows, which has begun with it."""

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer

    @property
    def name(self) -> str:
        """alpaca, chatml, the Jinja file's path, "tokenizer" for the tokenizer's own, a class's name, or "text"."""
        return getattr(self.renderer, "name", type(self.renderer).__name__)

    @property
    def notices(self) -> Sequence[str]:
        """Sentences that the user should read."""
        return getattr(self.renderer, "notices", ())

    @property
    def chat_template(self) -> str:
        """The Jinja source in use: export it with the model; "" for plain text, the tokenizer keeps its own."""
        return self.renderer.template

    @property
    def pad_id(self) -> int:
        """The id at the end of shorter rows. Any id will do, even eos: masks go by length, so nothing reads it."""
        pad = self.tokenizer.pad_token_id
        return self.end_of_turn_id if pad is None else int(pad)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the id that ends a response, and the one that ends a call, if it is another."""
        return self.renderer.ends

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends a response, trained."""
        return self.end_ids[0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: the ends of a turn, and eos."""
        eos = self.tokenizer.eos_token_id
        # Llama 3: <|eot_id|> ends a turn, but a model tuned from the base may still write its eos, <|end_of_text|>.
        return tuple(dict.fromkeys((*self.end_ids, *([] if eos is None else [eos]))))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the ids: the tokenizer's content, the template, the special tokens."""
        roles = json.dumps(token_roles(self.tokenizer), sort_keys=True)
        content = hashlib.sha256((backend_text(self.tokenizer) + roles).encode()).hexdigest()
        known = identity(self.renderer)
        if type(self.renderer) is ChatTemplate:  # whose options say how the template was found
            known = [self.renderer.thoughts, self.renderer.special_tokens]
        return sha256_json([content, self.chat_template, self.end_of_turn_id, known])[:32]

    def prompt(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids that generation starts from.

        turns  [{role: ..., content: ..., and thought, tool_calls, tool_call_id, name}, ...], the last one of a user
               or a tool
        """
        keys = ("role", "content", "thought")
        messages = [
            Message(**{key: turn[key] for key in keys if key in turn}, more={k: turn[k] for k in turn if k not in keys})
            for turn in turns
        ]
        return self.renderer.prompt(messages, tools)

    def decode(self, ids: list[int] | Int64) -> str:
        """Decode token ids; special tokens and white space stay as they are."""
        return decode(self.tokenizer, ids)


def encoder_for(
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    renderer: Renderer | None = None,
    *,
    thinks: bool | None = False,
) -> Encoder:
    """Make the encoder of rows under these options.

    Raises ConfigError for a template that cannot be used, for a renderer of the other kind of rows, and for a tokenizer
    that reads no text.

    renderer  None: windows if data.format is text, else the chat template that the options choose
    thinks    some response of the rows has a thought; None: the template is taken as it is
    """
    is_text = options.format == TEXT
    if renderer is not None and isinstance(renderer, Documents) != is_text:
        raise ConfigError(
            f"renderer {renderer} and data.format {options.format} exclude each other: set renderer to null (those of "
            "plain text are `sftmix.text.windows.Documents` and its subclasses)"
        )
    try:
        tokenizer("Name a colour.")
    except Exception as error:  # model_max_length: "x" of tokenizer_config.json
        raise ConfigError(f"model.path: its tokenizer reads no text: {type(error).__name__}: {error}") from error
    default = (
        Documents(packing=options.packing is not False, special_tokens=options.special_tokens)
        if is_text
        else ChatTemplate(
            template=options.template,
            template_options=options.template_options,
            special_tokens=options.special_tokens,
            thoughts=options.thoughts,
        )
    )
    renderer = copy(renderer or default)  # `begin` keeps a tokenizer in it; a reference has its own
    if getattr(tokenizer, "split_special_tokens", False) and not is_text:
        raise ConfigError(
            "model.path: its tokenizer_config.json has split_special_tokens: true, by which the tokens of a chat "
            "template are taken apart as well: remove the line; rows have none (data.special_tokens)"
        )
    renderer.begin(tokenizer, thinks=thinks)
    return Encoder(tokenizer, renderer)
