"""Chat templates: how a conversation becomes text, then token ids.

Every template is a Jinja string that `tokenizer.apply_chat_template` renders. The rendered text holds all special
tokens and is tokenised with add_special_tokens=False, in training and in generation alike: both see the same ids, and
there is never a second BOS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sftmix.data.special import NUL, SpecialSpellings
from sftmix.types import Int64

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = """\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}\
{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}\
{% else %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + END + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

NAMED = {"alpaca": ALPACA, "chatml": CHATML}

_NUL_IN_JSON = r"\u0000"

_SAME_DAY = """\
{% macro strftime_now(form) %}\
{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024'}.get(form, '26 Jul 2024') }}\
{% endmacro %}"""
"""One date for templates that write the date of today: prompts must not change from day to day, nor at a resume."""


class TemplateRefusal(ValueError):
    """Error of a template that cannot render a conversation."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its chat template; made by `sftmix.data.encoders`.

    name            alpaca, chatml, the Jinja file's path, "tokenizer" for the tokenizer's own, or "text" for none
    chat_template   the Jinja source in use: export it with the model; None for plain text, the tokenizer keeps its own
    end_of_turn_id  the token that ends a response, trained; the template writes it unless `appends_end`
    spellings       the special tokens' spellings, which rows may hold as text; None if there they are these tokens, too
    appends_end     the template writes no such token: eos is put after the response
    ending          text between a response's content and the end of its turn, end-of-turn token included
    trailer         text that the template writes after that, not trained
    lead            white space that the template puts before a response's content
    block           end of the generation prompt that the template leaves out before a response with its own, such as
                    the empty thinking block; "" if there is none
    notices         sentences that the user should read
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    chat_template: str | None
    end_of_turn_id: int
    spellings: SpecialSpellings | None
    appends_end: bool = False
    ending: str = ""
    trailer: str = ""
    lead: str = ""
    block: str = ""
    notices: tuple[str, ...] = ()

    @property
    def pad_id(self) -> int:
        """The id at the end of shorter rows. Any id will do, even eos: masks go by length, so nothing reads it."""
        pad = self.tokenizer.pad_token_id
        return self.end_of_turn_id if pad is None else int(pad)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: the end of a turn, and eos."""
        eos = self.tokenizer.eos_token_id
        return (self.end_of_turn_id,) if eos in (None, self.end_of_turn_id) else (self.end_of_turn_id, int(eos))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the ids: the tokenizer's content, the template, the special tokens."""
        parts = [tokenizer_content(self.tokenizer), self.chat_template, self.end_of_turn_id, self.appends_end]
        parts += ["tokens"] if self.spellings is None else ["text", *self.spellings.unmarked]
        parts += ["block", self.block] if self.block else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def render(self, conversations: Sequence[Sequence[Mapping[str, str]]], *, prompt: bool) -> list[str]:
        """Render each conversation as text; `prompt` adds the generation prompt. Raises TemplateRefusal.

        The contents are those of `content`. A template that writes their NULs as text (`tojson`) is refused, too.
        """
        assert self.chat_template is not None, "plain text has no turns to render"
        texts = render(self.tokenizer, self.chat_template, conversations, prompt=prompt)
        for chat, text in zip(conversations, texts, strict=True):
            contents = "".join(turn["content"] for turn in chat)
            if NUL in contents and text.count(_NUL_IN_JSON) > contents.count(_NUL_IN_JSON):
                raise TemplateRefusal("it writes content as JSON, in which special tokens cannot be told from text")
        return texts

    def content(self, text: str) -> str:
        """Return what a row says, as `render` and `tokenize` take it: the special tokens in it become text."""
        return text if self.spellings is None else self.spellings.broken(text)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenise rendered texts; no token is added. Raises ConfigError if `content` cannot be encoded as text."""
        broken = [text for text in texts if NUL in text]
        if self.spellings is None or not broken:
            return self._as_they_are(texts)
        as_text = iter(self.spellings.tokenize(broken))
        others = iter(self._as_they_are([text for text in texts if NUL not in text]))
        return [next(as_text if NUL in text else others) for text in texts]

    def _as_they_are(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    def decode(self, ids: list[int] | Int64) -> str:
        """Decode token ids; special tokens and white space stay as they are."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    prompt: bool = False,
    thinking: bool | None = None,
) -> list[str]:
    """Render through the tokenizer. Raises TemplateRefusal where the template or its syntax fails.

    thinking  the template's variable enable_thinking; None: not defined
    """
    variables: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            [[dict(turn) for turn in chat] for chat in conversations],
            chat_template=on_the_same_day(template),
            add_generation_prompt=prompt,
            tokenize=False,
            **variables,
        )
    except Exception as error:  # a template may raise anything: RecursionError, OverflowError, MemoryError, ...
        raise TemplateRefusal(f"{type(error).__name__}: {error}") from error


def on_the_same_day(template: str) -> str:
    """Return the template with one date in place of today's."""
    return (_SAME_DAY if "strftime_now" in template else "") + template


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides how a tokenizer works, the same for any files that it was read from."""
    special = json.dumps(token_roles(tokenizer), sort_keys=True)
    return hashlib.sha256((_backend(tokenizer) + special).encode()).hexdigest()


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """True if both make the same ids of any text; what they pad with, which trainers choose, is in none of them."""
    roles = [token_roles(tokenizer) | {"pad_token": ""} for tokenizer in (one, other)]
    return roles[0] == roles[1] and _backend(one) == _backend(other)


def token_roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the spellings of a tokenizer's special tokens by their roles: bos_token, eos_token, ..."""
    return {role: str(token) for role, token in tokenizer.special_tokens_map.items()}


def _backend(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all of a tokenizer but the roles of its special tokens, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), repr(tokenizer)])
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer begins plain text with BOS when it adds special tokens."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("Name a colour.")["input_ids"][:1] == [bos]
