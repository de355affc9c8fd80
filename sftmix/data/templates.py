"""Chat templates: how a conversation becomes text, then token ids, and which token ends a turn.

Every template is a Jinja string that `tokenizer.apply_chat_template` renders. The rendered text holds all special
tokens and is tokenised with add_special_tokens=False, in training and in generation alike: both see the same ids, and
there is never a second BOS. A small conversation, the probe, is rendered to find the text that the template writes
after a response; generation tags are not needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.common.errors import ConfigError
from sftmix.data.formats import TEXT
from sftmix.data.special import NUL, SpecialSpellings
from sftmix.data.store import cache_root, get_or_build, key_of
from sftmix.data.trial import trouble_with
from sftmix.options import DataOptions, SpecialTokens
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

_SAME_DAY = """\
{% macro strftime_now(form) %}\
{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024'}.get(form, '26 Jul 2024') }}\
{% endmacro %}"""
"""One date for templates that write the date of today: prompts must not change from day to day, nor at a resume."""

_QUESTION = "Name a colour."
_ANSWER = "Blue"
_PROBE = ({"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER})


class TemplateRefusal(ValueError):
    """Error of a template that cannot render a conversation."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its chat template; made by `make_encoder`.

    name            alpaca, chatml, the Jinja file's path, "tokenizer" for the tokenizer's own, or "text" for none
    chat_template   the Jinja source in use: export it with the model; None for plain text, the tokenizer keeps its own
    end_of_turn_id  the token that ends a response, trained; the template writes it unless `appends_end`
    appends_end     the template writes no such token: eos is put after the response
    ending          text between a response's content and the end of its turn, end-of-turn token included
    trailer         text that the template writes after that, not trained
    lead            white space that the template puts before a response's content
    notices         sentences that the user should read
    spellings       the special tokens' spellings, which rows may hold as text; None if there they are these tokens, too
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
    spellings: SpecialSpellings | None

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
        parts.append("tokens" if self.spellings is None else "text")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def render(self, conversations: Sequence[Sequence[Mapping[str, str]]], *, prompt: bool) -> list[str]:
        """Render each conversation as text; `prompt` adds the generation prompt. Raises TemplateRefusal.

        The contents are those of `content`.
        """
        assert self.chat_template is not None, "plain text has no turns to render"
        return render(self.tokenizer, self.chat_template, conversations, prompt=prompt)

    def content(self, text: str) -> str:
        """Return what a row says, as `render` and `tokenize` take it: the special tokens in it become text."""
        return text if self.spellings is None else self.spellings.broken(text)

    def special_in(self, contents: Iterable[str]) -> list[str]:
        """Return the spellings of special tokens that `content` makes text in any of these, in alphabetical order."""
        return [] if self.spellings is None else sorted(set().union(*map(self.spellings.found, contents)))

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokenise rendered texts; no token is added. Raises ConfigError if `content` cannot be encoded as text."""
        broken = [] if self.spellings is None else [text for text in texts if NUL in text]
        if self.spellings is None or not broken:
            return self._as_they_are(texts)
        others = iter(self._as_they_are([text for text in texts if NUL not in text]))
        as_text = iter(self.spellings.tokenize(broken))
        return [next(as_text if NUL in text else others) for text in texts]

    def tokenize_content(self, text: str) -> tuple[list[int], list[int]]:
        """Tokenise one text of a row; return the ids and the character at which each begins."""
        if self.spellings is not None and self.spellings.found(text):
            return self.spellings.tokenize_content(text)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]

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
    prompt: bool,
) -> list[str]:
    """Render through the tokenizer. Raises TemplateRefusal where the template or its syntax fails."""
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            [[dict(turn) for turn in chat] for chat in conversations],
            chat_template=_on_the_same_day(template),
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except Exception as error:  # a template may raise anything: RecursionError, OverflowError, MemoryError, ...
        raise TemplateRefusal(f"{type(error).__name__}: {error}") from error


def _on_the_same_day(template: str) -> str:
    return (_SAME_DAY if "strftime_now" in template else "") + template


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides how a tokenizer works, the same for any files that it was read from."""
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
    """Make the encoder of rows under these options: without a chat template if data.format is text, else with one.

    A template that is not ours is first tried out in a process of its own, once for each cache.
    """
    if options.format == TEXT:
        return text_encoder(tokenizer, options.special_tokens)
    name, source, _ = _choose(tokenizer, options.template)
    if name not in NAMED:
        _try_out(tokenizer, name, source, cache_root(options.cache_dir))
    return make_encoder(tokenizer, options.template, options.special_tokens)


def _try_out(tokenizer: PreTrainedTokenizerBase, name: str, source: str, cache: Path) -> None:
    """Raise ConfigError for a template that takes too long, or too much memory; the cache knows those that do not."""
    variables = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}

    def build(directory: Path) -> dict[str, Any]:
        if trouble := trouble_with(_on_the_same_day(source), variables):
            raise ConfigError(f"data.template: {name}: {trouble}. It is not used; choose another, such as chatml")
        return {}

    get_or_build(cache, "template-" + key_of(source, variables, version("transformers"), version("jinja2")), build)


def text_encoder(tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens = "text") -> Encoder:
    """Make the encoder of plain text: a document ends with eos. Raises ConfigError if there is no eos token."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("data.format text: this tokenizer has no eos token, with which a document ends")
    eos = int(tokenizer.eos_token_id)
    spellings = _spellings(tokenizer, eos, special_tokens)
    ends: dict[str, Any] = {"end_of_turn_id": eos, "appends_end": False, "ending": "", "trailer": "", "lead": ""}
    return Encoder(tokenizer, TEXT, None, notices=(), spellings=spellings, **ends)


def _spellings(tokenizer: PreTrainedTokenizerBase, end: int, special_tokens: SpecialTokens) -> SpecialSpellings | None:
    return SpecialSpellings(tokenizer, end) if special_tokens == "text" else None


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None, special_tokens: SpecialTokens = "text"
) -> Encoder:
    """Choose the template, probe it, and return the encoder.

    template        None (the tokenizer's own, or alpaca where it has none), "alpaca", "chatml", or the path of a Jinja
                    file
    special_tokens  what their spellings in rows become, see `DataOptions`
    Raises ConfigError for an unknown name, for a template that cannot be rendered, and if no token can end a response.
    """
    name, source, notices = _choose(tokenizer, template)
    try:
        ends, source, more = _probe(tokenizer, source)
    except TemplateRefusal as error:
        raise ConfigError(f"data.template: {name}: cannot render a user and an assistant turn: {error}") from error
    spellings = _spellings(tokenizer, ends["end_of_turn_id"], special_tokens)
    return Encoder(tokenizer, name, source, notices=(*notices, *more), spellings=spellings, **ends)


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
    """Adapt one of our templates: BOS if the tokenizer itself writes one, and turns that end with a token it knows."""
    source = source.replace("END", "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() else "eos_token")
    if "eos_token" in source and tokenizer.eos_token is None:
        raise ConfigError("data.template: this tokenizer has no eos token, with which this template ends a response")
    return ("{{ bos_token }}" if writes_bos(tokenizer) else "") + source


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer begins plain text with BOS when it adds special tokens."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer(_QUESTION)["input_ids"][:1] == [bos]


# ------------------------------------------------------------------------------------------- the probe


def _probe(tokenizer: PreTrainedTokenizerBase, source: str) -> tuple[dict[str, Any], str, list[str]]:
    """Render a small conversation to find the text that the template writes around a response.

    Returns the end-of-turn fields of Encoder, the template, and notices. The template gets a longer generation prompt
    if it writes more than that before a response: an empty thinking block, or the whole header of a turn.
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
    """Find the text between the generation prompt and the probe's answer, and the text after the answer."""
    prompt = render(tokenizer, source, [_PROBE[:1]], prompt=True)[0]
    full = render(tokenizer, source, [_PROBE], prompt=False)[0]
    place = full.rfind(_ANSWER)
    if place < 0:
        raise ConfigError("data.template: the template does not write the content of an assistant turn")
    return full[len(prompt) : place] if full.startswith(prompt) else "", full[place + len(_ANSWER) :]


def _ending(tokenizer: PreTrainedTokenizerBase, after: str) -> tuple[int | None, str, str]:
    """Cut the text after a response into (end-of-turn id, text through it, text after it); id None if it has none."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
        if token in special:
            text = str(tokenizer.convert_ids_to_tokens(token))
            through = after.find(text) + len(text)
            return int(token), after[:through], after[through:]
    return None, "", after
