"""The encoder: a tokenizer with a chat template, and what it is known to write around a response.

The rendered text holds all special tokens and is tokenised with add_special_tokens=False, in training and in generation
alike: both see the same ids, and there is never a second BOS. Special tokens that a row spells in its text become text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sftmix.common.files import sha256_json
from sftmix.data.layout import TemplateLayout
from sftmix.data.probe import with_arguments
from sftmix.data.spellings import SpecialSpellings
from sftmix.data.templates import Chats, TemplateRefusal, backend_text, render, token_roles
from sftmix.data.thoughts import INLINE, divided
from sftmix.data.values import MARK
from sftmix.options import Thoughts
from sftmix.types import Int64, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK_IN_ESCAPES = r"\ufdd0"
"""How Python writes a mark in a list or an object, and JSON that is ASCII alone."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its chat template; made by `sftmix.data.encoders`.

    name            alpaca, chatml, the Jinja file's path, "tokenizer" for the tokenizer's own, or "text" for none
    end_of_turn_id  the token that ends a response, trained
    spellings       the special tokens' spellings, which rows may hold as text; None: there they are tokens as well
    layout          what the template writes around a response; None for plain text
    thoughts        what becomes of thoughts, see `DataOptions`
    notices         sentences that the user should read
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    end_of_turn_id: int
    spellings: SpecialSpellings | None
    layout: TemplateLayout | None = None
    thoughts: Thoughts = "train"
    notices: tuple[str, ...] = field(default=(), compare=False)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source in use: export it with the model; None for plain text, the tokenizer keeps its own."""
        return None if self.layout is None else self.layout.source

    @property
    def pad_id(self) -> int:
        """The id at the end of shorter rows. Any id will do, even eos: masks go by length, so nothing reads it."""
        pad = self.tokenizer.pad_token_id
        return self.end_of_turn_id if pad is None else int(pad)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the id that ends a response, and the one that ends a call, if it is another."""
        ends = () if self.layout is None else (self.tokenizer.convert_tokens_to_ids(self.layout.call_end),)
        return tuple(dict.fromkeys((self.end_of_turn_id, *ends)))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: the ends of a turn, and eos."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys((*self.end_ids, *([] if eos is None else [eos]))))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the ids: the tokenizer's content, the template, the special tokens."""
        roles = json.dumps(token_roles(self.tokenizer), sort_keys=True)
        content = hashlib.sha256((backend_text(self.tokenizer) + roles).encode()).hexdigest()
        special = "tokens" if self.spellings is None else "text"
        return sha256_json([content, self.chat_template, self.end_of_turn_id, self.thoughts, special])[:32]

    # ------------------------------------------------------------------------------------------- conversations

    def turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return turns as the template takes them."""
        return [self.turn(message) for message in messages]

    def turn(self, message: Message, *, inline: bool = False) -> dict[str, Any]:
        """Return a turn as the template takes it: its thought by its key, its special tokens as text.

        inline  for a template that knows no thoughts: a thought from a field is put into the content
        """
        assert self.layout is not None
        turn: dict[str, Any] = {"role": message.role, "content": message.content, **message.more}
        if turn.get("tool_calls"):
            turn = with_arguments(turn, self.layout.text_arguments)
        if message.role == "assistant":
            thought, answer = self.divided(message)
            key = self.layout.key
            if thought and key:
                turn["content"] = answer
                turn[key] = thought
            elif self.thoughts == "drop" or (not thought and key != ""):
                turn["content"] = answer  # an empty thought before it is the template's business
            elif inline and message.thought and key == "":
                turn["content"] = INLINE.format(thought=thought) + answer
        return {key: value if key == "role" else self.as_text(value) for key, value in turn.items()}

    def divided(self, message: Message) -> tuple[str, str]:
        """Return the thought of an assistant turn and its answer; "" if it has none, or thoughts are dropped."""
        thought, answer = (message.thought, message.content) if message.thought else divided(message.content)
        return ("" if self.thoughts == "drop" else thought), answer

    def as_text(self, value: Any) -> Any:
        """Return a value of a row, as `render` and `tokenize` take it: the special tokens that it spells become text.

        All of its texts are looked at, the keys of objects among them.
        """
        if isinstance(value, str):
            return value if self.spellings is None else self.spellings.broken(value)
        if isinstance(value, Mapping):
            return {self.as_text(key): self.as_text(inner) for key, inner in value.items()}
        return [self.as_text(part) for part in value] if isinstance(value, (list, tuple)) else value

    def render(
        self, conversations: Chats, *, prompt: bool, tools: Sequence[Mapping[str, Any]] = (), **variables: Any
    ) -> list[str]:
        """Render each conversation; `prompt` adds the generation prompt.

        conversations  of turns as `turns` makes them
        tools          the functions that the assistant may call
        variables      values of the template's variables, in which special tokens are text as well
        Raises TemplateRefusal, also for a template that writes the mark of a special token in escapes.
        """
        assert self.layout is not None, "plain text has no turns to render"
        variables = {name: self.as_text(value) for name, value in variables.items()}
        more = {"listed": self.layout.listed, "tools": tools, "prompt": prompt, **variables}
        texts = render(self.tokenizer, self.layout.source, conversations, **more)
        for chat, text in zip(conversations, texts, strict=True):
            given = json.dumps([chat, tools, variables], ensure_ascii=False) if MARK_IN_ESCAPES in text else ""
            if text.count(MARK_IN_ESCAPES) > given.count(MARK_IN_ESCAPES):
                raise TemplateRefusal("it writes a row in escapes, in which special tokens cannot be told from text")
        return texts

    def prompt(
        self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), **variables: Any
    ) -> list[int]:
        """Return the ids that generation starts from.

        turns      [{role: ..., content: ..., and thought, tool_calls, tool_call_id, name}, ...], the last one of a user
                   or a tool
        variables  values of the template's variables
        """
        keys = ("role", "content", "thought")
        messages = [
            Message(**{key: turn[key] for key in keys if key in turn}, more={k: turn[k] for k in turn if k not in keys})
            for turn in turns
        ]
        tools = self.as_text(tools)
        return self.tokenize(self.render([self.turns(messages)], prompt=True, tools=tools, **variables))[0]

    # -------------------------------------------------------------------------------------------------- tokens

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenise rendered texts; no token is added. Raises ConfigError if `as_text` cannot be encoded."""
        as_text = dict[str, list[int]]()
        if self.spellings is not None and (broken := [text for text in texts if MARK in text]):
            as_text = dict(zip(broken, self.spellings.tokenize(broken), strict=True))
        others = ["" if text in as_text else text for text in texts]
        encoded = self.tokenizer(others, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [as_text.get(text, ids) for text, ids in zip(texts, encoded["input_ids"], strict=True)]

    def decode(self, ids: list[int] | Int64) -> str:
        """Decode token ids; special tokens and white space stay as they are."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
