"""Chat templates: how a conversation becomes text, then token ids, and which token ends a turn.

Every template is a Jinja string that `tokenizer.apply_chat_template` renders; the rendered text holds all special
tokens and is tokenised with add_special_tokens=False, in training and in generation alike, so both see the same ids
and there is never a second BOS. What the template writes after a response is found by rendering a probe conversation,
not from generation tags.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from sftmix.common.errors import ConfigError
from sftmix.data.formats import TEXT
from sftmix.options import DataOptions
from sftmix.types import Int64, Message

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

_SAME_DAY = """\
{% macro strftime_now(form) %}\
{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024'}.get(form, '26 Jul 2024') }}\
{% endmacro %}"""
"""Templates that write today's date get this one: prompts must not change from one day, or one resume, to the next."""

_QUESTION = "Name a colour."
_ANSWER = "Blue"
_PROBE = ({"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER})


class TemplateRefusal(ValueError):
    """The template raised an error for a conversation."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the chat template it is used with; made by `make_encoder`.

    name            alpaca, chatml, the Jinja file's path, "tokenizer" for the tokenizer's own, or "text" for none
    chat_template   the Jinja source in use: export it with the model; None: plain text, the tokenizer keeps its own
    end_of_turn_id  the token that ends a response, trained; the template writes it unless `appends_end`
    appends_end     the template writes none: eos is put after the response
    ending          text between a response's content and the end of its turn, end-of-turn token included
    trailer         text that the template writes after that, not trained
    lead            white space that the template puts before a response's content
    notices         what a user should know, one sentence each
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    chat_template: str | None
    end_of_turn_id: int
    appends_end: bool
    ending: str
    trailer: str
    lead: str
    notices: tuple[str, ...]

    @property
    def notice(self) -> str:
        """All notices in one string, empty when there is nothing to say."""
        return " ".join(self.notices)

    @property
    def pad_id(self) -> int:
        """The id at the end of shorter rows. Any will do, even eos: masks go by length, so nobody looks at it."""
        pad = self.tokenizer.pad_token_id
        return self.end_of_turn_id if pad is None else int(pad)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which generation stops: the end of a turn, and eos."""
        eos = self.tokenizer.eos_token_id
        return (self.end_of_turn_id,) if eos in (None, self.end_of_turn_id) else (self.end_of_turn_id, int(eos))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids: the tokenizer's content, the template, the special tokens."""
        parts = [tokenizer_content(self.tokenizer), self.chat_template, self.end_of_turn_id, self.appends_end]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def render(self, conversations: Sequence[Sequence[Mapping[str, str]]], *, prompt: bool) -> list[str]:
        """Text of each conversation; `prompt` adds what comes before a response. Raises TemplateRefusal."""
        assert self.chat_template is not None, "plain text has no turns to render"
        return render(self.tokenizer, self.chat_template, conversations, prompt=prompt)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered texts, nothing added."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    def decode(self, ids: list[int] | Int64) -> str:
        """The text of token ids, special tokens and white space as they are."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def encode_prompt(self, messages: Sequence[Message | Mapping[str, str]]) -> Int64:
        """i64[length]: what generation starts from; equal to the untrained part of a training example."""
        chat = [as_dict(message) for message in messages]
        return np.asarray(self.tokenize(self.render([chat], prompt=True))[0], dtype=np.int64)


def as_dict(message: Message | Mapping[str, str]) -> dict[str, str]:
    """A turn as templates want it."""
    if isinstance(message, Message):
        return {"role": message.role, "content": message.content}
    return dict(message)


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    prompt: bool,
) -> list[str]:
    """Render through the tokenizer. Raises TemplateRefusal where the template or its syntax fails."""
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            [[dict(turn) for turn in chat] for chat in conversations],
            chat_template=(_SAME_DAY if "strftime_now" in template else "") + template,
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise TemplateRefusal(f"{type(error).__name__}: {error}") from error


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's behaviour, whatever files it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        content = backend.to_str()
    else:
        content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), repr(tokenizer)])
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256((content + special).encode()).hexdigest()


# ---------------------------------------------------------------------------------- choosing a template


def encoder_for(tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Encoder:
    """The encoder of rows under these options: with a chat template, or without one where data.format is text."""
    return text_encoder(tokenizer) if options.format == TEXT else make_encoder(tokenizer, options.template)


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The encoder of plain text: documents end with eos, there are no turns. ConfigError without an eos token."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("data.format text: this tokenizer has no eos token, with which a document ends")
    eos = int(tokenizer.eos_token_id)
    return Encoder(
        tokenizer, TEXT, None, end_of_turn_id=eos, appends_end=False, ending="", trailer="", lead="", notices=()
    )


def make_encoder(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> Encoder:
    """Choose the template, probe it, and return the encoder.

    template  None (the tokenizer's own, or alpaca where it has none), "alpaca", "chatml", or the path of a Jinja file
    Raises ConfigError for an unknown name, a template that cannot be rendered, or when no token could end a response.
    """
    name, source, notices = _choose(tokenizer, template)
    try:
        ends, source, more = _probe(tokenizer, source)
    except TemplateRefusal as error:
        raise ConfigError(f"data.template: {name}: cannot render a user and an assistant turn: {error}") from error
    return Encoder(tokenizer, name, source, notices=(*notices, *more), **ends)


def _choose(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[str, str, list[str]]:
    if template is None and tokenizer.chat_template:
        return "tokenizer", tokenizer.get_chat_template(), []
    notices = []
    if template is None:
        template = "alpaca"
        notices.append("The tokenizer has no chat template: using alpaca (data.template chooses another).")
    if template in NAMED:
        return template, _own_template(tokenizer, NAMED[template]), notices
    path = Path(template).expanduser()
    try:
        return template, path.read_text(encoding="utf-8"), notices
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.template: {template!r} is neither one of {', '.join(NAMED)} nor a readable Jinja file ({error}); "
            "null takes the tokenizer's own"
        ) from error


def _own_template(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """One of our templates: BOS where the tokenizer itself writes one, and turns that end with a token it knows."""
    source = source.replace("END", "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() else "eos_token")
    if "eos_token" in source and tokenizer.eos_token is None:
        raise ConfigError("data.template: this tokenizer has no eos token, with which this template ends a response")
    return ("{{ bos_token }}" if writes_bos(tokenizer) else "") + source


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins plain text with BOS when it adds special tokens."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer(_QUESTION)["input_ids"][:1] == [bos]


# ------------------------------------------------------------------------------------------- the probe


def _probe(tokenizer: PreTrainedTokenizerBase, source: str) -> tuple[dict[str, Any], str, list[str]]:
    """Render a small conversation to find what the template writes around a response.

    Returns the end-of-turn fields of Encoder, the template (extended when its generation prompt is not all that comes
    before the content: an empty thinking block, or the whole header of a turn), and notices.
    """
    notices = []
    before, after = _around(tokenizer, source)
    if before.strip():
        header = before.rstrip(" ")  # a space belongs to the first token of the response
        source = source.removesuffix("\n") + "{% if add_generation_prompt %}{{ " + json.dumps(header) + " }}{% endif %}"
        notices.append(f"The template writes {header!r} before every response: it is part of the prompt, not trained.")
        before, after = _around(tokenizer, source)
    if "strftime_now" in source:
        notices.append("The template writes the date: 26 July 2024 is used on every day.")
    end, ending, trailer = _ending(tokenizer, after)
    if appends := end is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "data.template: the template writes no end-of-turn token after a response, and the tokenizer has no "
                "eos token: a model trained so would never stop. Choose another data.template or set an eos token."
            )
        end = int(tokenizer.eos_token_id)
        notices.append(f"The template writes no end-of-turn token: {tokenizer.eos_token!r} is put after responses.")
    ids = tokenizer(render(tokenizer, source, [_PROBE], prompt=False), add_special_tokens=False)["input_ids"][0]
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ConfigError("data.template: the template writes the BOS token twice at the beginning")
    lead = before if not before.strip() else ""
    fields = {"end_of_turn_id": end, "appends_end": appends, "ending": ending, "trailer": trailer, "lead": lead}
    return fields, source, notices


def _around(tokenizer: PreTrainedTokenizerBase, source: str) -> tuple[str, str]:
    """Text between the generation prompt and the probe's answer, and text after the answer."""
    prompt = render(tokenizer, source, [_PROBE[:1]], prompt=True)[0]
    full = render(tokenizer, source, [_PROBE], prompt=False)[0]
    place = full.rfind(_ANSWER)
    if place < 0:
        raise ConfigError("data.template: the template does not write the content of an assistant turn")
    return full[len(prompt) : place] if full.startswith(prompt) else "", full[place + len(_ANSWER) :]


def _ending(tokenizer: PreTrainedTokenizerBase, after: str) -> tuple[int | None, str, str]:
    """(end-of-turn id, text through it, text after it) of what follows a response; id None when there is none."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
        if token in special:
            text = str(tokenizer.convert_ids_to_tokens(token))
            through = after.find(text) + len(text)
            return int(token), after[:through], after[through:]
    return None, "", after
