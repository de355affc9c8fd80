"""Chat templates: how a conversation becomes text, then token ids.

Every template is a Jinja string that `tokenizer.apply_chat_template` renders. The rendered text holds all special
tokens and is tokenised with add_special_tokens=False, in training and in generation alike: both see the same ids, and
there is never a second BOS. Special tokens that a row spells in its text become text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from sftmix.common.errors import ConfigError
from sftmix.common.files import sha256_json
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

Chats = Sequence[Sequence[Mapping[str, str]]]
"""Conversations, of turns {role: ..., content: ...}."""

NUL, NUL_IN_JSON = "\0", r"\u0000"

_SAME_DAY = """\
{% macro strftime_now(form) %}\
{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024'}.get(form, '26 Jul 2024') }}\
{% endmacro %}"""
"""One date for templates that write the date of today: prompts must not change from day to day, nor at a resume."""


class TemplateRefusal(ValueError):
    """Error of a template that cannot render a conversation."""


# --------------------------------------------------------------------- special tokens that a row spells


class SpecialSpellings:
    """The spellings of a tokenizer's special tokens, and the way to encode them as text.

    A tokenizer finds special tokens in a text by their spelling, whoever wrote them: `<|im_end|>` in a row could end a
    turn. Here only the chat template can make them: what a row says is encoded as text.

    Before the template is rendered, a NUL is put into each spelling in the content of a turn (rows with a NUL are
    refused where they are read). In the rendered text the spellings without NUL are the template's own. A copy of the
    tokenizer, the twin, spells its special tokens with a NUL: these are put into the rendered text in place of the
    template's spellings, and the NULs are taken out of the content. All else about the twin is the same: a text without
    such spellings gets the same ids from both.

    ids       token id of each spelling: special tokens, and those that the template writes around a turn. Other added
              tokens, such as `<think>` or runs of spaces, are not among them, nor is a single character that as text is
              the same token.
    unmarked  those of them, in order, that the tokenizer itself does not call special
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Iterable[int]) -> None:
        """Collect the spellings; `written` are ids that the template writes, the end of a turn among them."""
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self.ids = dict[str, int]()
        for number in [*special, *written]:
            spelling, as_text = str(tokenizer.convert_ids_to_tokens(number)), []
            if len(spelling) == 1:
                as_text = tokenizer(spelling, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if as_text != [number]:
                self.ids[spelling] = number
        self.unmarked = sorted(spelling for spelling, number in self.ids.items() if number not in special)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalize = getattr(getattr(self._backend, "normalizer", None), "normalize_str", str)
        # Grouped by their first two characters: some tokenizers have a thousand, which begin with the same one. A
        # longer one stands before one that it begins with. A single character cannot be broken: a NUL behind it says
        # that it is text.
        groups = []
        for start, group in itertools.groupby(sorted(self.ids, reverse=True), key=lambda spelling: spelling[:2]):
            ends = "|".join(re.escape(spelling[2:]) for spelling in group)
            groups.append(f"{re.escape(start)}(?:{ends})")
        either = "|".join(groups) or r"(?!)"
        self._begins = re.compile(f"(?=(?:{either}))(.)", re.DOTALL)
        self._whole_or_nul = re.compile(f"({either})(?!{NUL})|{NUL}")
        self._respelt = {spelling: spelling[0] + NUL + spelling[1:] for spelling in self.ids}
        # The forms in which the tokenizer looks for them in normalised text: `<|IM_END|>` in small letters.
        sought = [spelling for spelling, number in self.ids.items() if number in added and added[number].normalized]
        self._forms = {*sought, *map(self._normalize, sought)} - {""}

    def broken(self, content: str) -> str:
        """Return the content of a turn, with a NUL behind the first character of each spelling in it.

        If it spells one only in another form, it gets a NUL all the same: then the twin encodes it.
        """
        broken = self._begins.sub(r"\1" + NUL, content)
        if NUL not in broken and self._forms:
            normal = self._normalize(content)
            if any(form in normal for form in self._forms):
                return re.sub(r"(\S)", r"\1" + NUL, content, count=1)  # within: a template may trim the content
        return broken

    def tokenize(self, rendered: Sequence[str]) -> list[list[int]]:
        """Tokenise rendered texts with `broken` content. Raises ConfigError for a tokenizer that has no twin."""

        # The special tokens, which are the template's own, are respelt; the NULs of the content go.
        texts = [self._whole_or_nul.sub(lambda found: self._respelt.get(found[1], ""), text) for text in rendered]
        return [encoded.ids for encoded in self._twin.encode_batch(texts, add_special_tokens=False)]

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer that finds only the special tokens that are spelt with NUL; made when a row needs it.

        They are respelt in the model's vocabulary, too: there the old spelling could be put together from text, by
        Unigram, or by merges, which go as well.
        """
        problem = "it is not a fast tokenizer"
        if self._backend is not None:
            respelt, content = self._respelt, json.loads(self._backend.to_str())
            model, vocabulary = content["model"], content["model"]["vocab"]
            for token in content["added_tokens"]:
                if token["content"] in respelt:  # a normaliser may take the NUL away, or find it in another form
                    token |= {"content": respelt[token["content"]], "normalized": False}
            pieces = vocabulary.items() if isinstance(vocabulary, dict) else vocabulary  # with their ids or scores
            model["vocab"] = type(vocabulary)((respelt.get(piece, piece), number) for piece, number in pieces)
            if model.get("unk_token") in respelt:
                model["unk_token"] = respelt[model["unk_token"]]
            if "merges" in model:
                model["merges"] = [m for m in model["merges"] if respelt.keys().isdisjoint([*m, "".join(m)])]
            twin = Tokenizer.from_str(json.dumps(content))
            for spelling, number in self.ids.items():
                if twin.encode(respelt[spelling], add_special_tokens=False).ids != [number]:
                    problem = f"its token {spelling!r} cannot be told from text"
                    break
            else:
                return twin
        raise ConfigError(
            "data.special_tokens is text, but this tokenizer cannot encode the spelling of a special token as text: "
            f"{problem}. Take these spellings out of the rows, or set data.special_tokens to tokens if you trust them"
        )


# -------------------------------------------------------------------------------------------- the encoder


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
        end, eos = self.end_of_turn_id, self.tokenizer.eos_token_id
        return (end,) if eos in (None, end) else (end, eos)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the ids: the tokenizer's content, the template, the special tokens."""
        roles = json.dumps(token_roles(self.tokenizer), sort_keys=True)
        content = hashlib.sha256((_backend(self.tokenizer) + roles).encode()).hexdigest()
        parts = [content, self.chat_template, self.end_of_turn_id, self.appends_end]
        parts += ["tokens"] if self.spellings is None else ["text", *self.spellings.unmarked]
        parts += ["block", self.block] if self.block else []
        return sha256_json(parts)[:32]

    def render(self, conversations: Chats, *, prompt: bool) -> list[str]:
        """Render each conversation, of turns with `content`; `prompt` adds the generation prompt.

        Raises TemplateRefusal, also for a template that writes a NUL of the content as text (`tojson`).
        """
        assert self.chat_template is not None, "plain text has no turns to render"
        texts = render(self.tokenizer, self.chat_template, conversations, prompt=prompt)
        for chat, text in zip(conversations, texts, strict=True):
            contents = "".join(turn["content"] for turn in chat)
            if NUL in contents and text.count(NUL_IN_JSON) > contents.count(NUL_IN_JSON):
                raise TemplateRefusal("it writes content as JSON, in which special tokens cannot be told from text")
        return texts

    def content(self, text: str) -> str:
        """Return what a row says, as `render` and `tokenize` take it: the special tokens in it become text."""
        return text if self.spellings is None else self.spellings.broken(text)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenise rendered texts; no token is added. Raises ConfigError if `content` cannot be encoded as text."""
        as_text = dict[str, list[int]]()
        if self.spellings is not None and (broken := [text for text in texts if NUL in text]):
            as_text = dict(zip(broken, self.spellings.tokenize(broken), strict=True))
        others = ["" if text in as_text else text for text in texts]
        encoded = self.tokenizer(others, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [as_text.get(text, ids) for text, ids in zip(texts, encoded["input_ids"], strict=True)]

    def decode(self, ids: list[int] | Int64) -> str:
        """Decode token ids; special tokens and white space stay as they are."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversations: Chats,
    *,
    prompt: bool = False,
    **variables: Any,
) -> list[str]:
    """Render through the tokenizer, with more variables of the template.

    Raises TemplateRefusal where the template or its syntax fails.
    """
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            conversations,  # type: ignore[arg-type]
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


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """True if both make the same ids of any text; what they pad with, which trainers choose, is in none of them."""
    first, second = ((token_roles(t) | {"pad_token": ""}, _backend(t)) for t in (one, other))
    return first == second


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


def written_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] if the tokenizer begins plain text with it when it adds special tokens, else []."""
    first = tokenizer("Name a colour.")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
