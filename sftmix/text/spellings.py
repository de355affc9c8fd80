"""Special tokens that a row spells in its text: they are found, and become text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from sftmix.text.thoughts import TAGS
from sftmix.text.values import MARK
from sftmix.words.errors import ConfigError, TokenizerFailure
from sftmix.words.fields import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT_TAGS = frozenset([*TAGS, *TAGS.values()])
"""Spellings that are tokens in every text: rows write thoughts between them."""


class SpecialSpellings:
    """The spellings of a tokenizer's special tokens, and the way to encode them as text.

    A tokenizer finds special tokens in a text by their spelling, whoever wrote them: `<|im_end|>` in a row could end a
    turn. Here only the chat template can make them: what a row says is encoded as text.

    Before the template is rendered, MARK is put into each spelling in the content of a turn (rows that have it are
    refused when they are read). In the rendered text the spellings without it are the template's own. A copy of the
    tokenizer, the twin, spells its special tokens with MARK: these are put into the rendered text in place of the
    template's spellings, and the marks are taken out of the content. All else about the twin is the same: a text
    without such spellings gets the same ids from both.

    ids  token id of each spelling: special tokens, and those that the template writes around a turn. The tags of
         thoughts are not among them, nor are other added tokens, such as runs of spaces, nor a single character that
         as text is the same token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Sequence[int], become: SpecialTokens) -> None:
        """Collect the spellings; `written` are ids that the template writes, the end of a turn first.

        become  what they become in rows; tokens: there are none to look for
        """
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        # Mistral v0.3 has roles for <s>, </s> and <unk> alone; [INST] and 767 others are special without one.
        special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self.ids = dict[str, int]()
        for number in [*special, *written] if become == "text" else ():
            spelling = str(tokenizer.convert_ids_to_tokens(number))
            if spelling in THOUGHT_TAGS:
                continue
            as_text = list[int]()
            if len(spelling) == 1:  # only a longer one can be broken, and one that is also a piece means the same
                as_text = tokenizer(spelling, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if as_text != [number]:
                self.ids[spelling] = number
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalize = getattr(getattr(self._backend, "normalizer", None), "normalize_str", str)
        # Some tokenizers have a thousand: they are tried where one of their first characters is. A longer one is before
        # one that it begins with. A single character cannot be broken: a mark behind it says that it is text.
        first = "".join({spelling[0] for spelling in self.ids})
        spellings = "|".join(map(re.escape, sorted(self.ids, reverse=True)))
        either = f"(?=[{re.escape(first)}])(?:{spellings})" if self.ids else r"(?!)"
        # Looked ahead, so that spellings within others are broken as well: of <|x|> and |>y both in "<|x|>y".
        self._begins = re.compile(f"(?={either})(.)", re.DOTALL)
        self._whole_or_mark = re.compile(f"({either})(?!{MARK})|{MARK}")
        # "<|im_end|>" -> "<\ufdd0|im_end|>": what the twin looks for, and what only the template's tokens become.
        self._respelt = {spelling: spelling[0] + MARK + spelling[1:] for spelling in self.ids}
        # The forms in which the tokenizer looks for them in normalised text: `<|IM_END|>` in small letters.
        sought = [spelling for spelling, number in self.ids.items() if number in added and added[number].normalized]
        self._forms = {*sought, *map(self._normalize, sought)} - {""}
        self._parting = self._parting_at(written[0])

    def _parting_at(self, number: int) -> str:
        """Return the spelling of a token, if the tokenizer takes texts apart there, whatever is beside it; else ""."""
        added = self._tokenizer.added_tokens_decoder
        token = added.get(number)
        if self._backend is None or token is None or token.normalized or token.lstrip or token.rstrip:
            return ""  # Phi-3: '<|end|>' takes the white space behind it away
        spelling = token.content
        others = [other.content for place, other in added.items() if place != number]
        overlaps = any(spelling[0] in other[1:] or other.startswith(spelling) for other in others)
        return "" if token.single_word or overlaps else spelling

    def broken(self, content: str) -> str:
        """Return the content of a turn, with a mark behind the first character of each spelling in it.

        If it spells one only in another form, it gets a mark all the same: then the twin encodes it.
        """
        broken = self._begins.sub(r"\1" + MARK, content)
        if MARK not in broken and self._forms:
            normal = self._normalize(content)
            if any(form in normal for form in self._forms):
                return re.sub(r"(\S)", r"\1" + MARK, content, count=1)  # within: a template may trim the content
        return broken

    def as_text(self, value: Any) -> Any:
        """Return a value of a row, as a template and `tokenize` take it: the special tokens that it spells become text.

        All of its texts are looked at, the keys of objects among them.
        """
        if isinstance(value, str):
            return self.broken(value)
        if isinstance(value, Mapping):
            return {self.as_text(key): self.as_text(inner) for key, inner in value.items()}
        return [self.as_text(part) for part in value] if isinstance(value, (list, tuple)) else value

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts with `as_text` parts; no token is added.

        The parts of a text between ends of turns are tokenised apart, if the tokenizer itself takes texts apart there.
        The ids are the same. A part that several texts have, as the prompts of a conversation do, is tokenised once.
        Raises ConfigError for a tokenizer without a twin, TokenizerFailure if an expression in it runs away.
        """
        divided = [self._pieces(text) for text in texts]
        pieces = [*dict.fromkeys(piece for of_one in divided for piece in of_one)]
        ids = dict(zip(pieces, self._tokenized(pieces), strict=True))
        return [[number for piece in of_one for number in ids[piece]] for of_one in divided]

    def _pieces(self, text: str) -> list[str]:
        """Return the parts of a text, of which all but the first begin with the end of a turn."""
        first, *rest = text.split(self._parting) if self._parting else [text]
        return [first] * (not rest or first != "") + [self._parting + piece for piece in rest]

    def _tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts, each by itself."""
        try:
            # All texts in one call, which uses several threads; few need the twin.
            found = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids = list(found["input_ids"])
            for place, rendered in enumerate(texts):
                if MARK in rendered:
                    ids[place] = self._by_twin(rendered)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, and no Exception: 60 x against (x+x+)+y
                raise
            raise TokenizerFailure(f"model.path: its tokenizer cannot read this text: {error}") from error
        return ids

    def _by_twin(self, rendered: str) -> list[int]:
        """Tokenise a text by the twin: the special tokens, which are the template's own, are respelt; marks go."""
        # found[1] is None at a mark, which becomes "".
        text = self._whole_or_mark.sub(lambda found: self._respelt.get(found[1], ""), rendered)
        return self._twin.encode(text, add_special_tokens=False).ids

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer that finds only the special tokens that are spelt with MARK; made when a row needs it.

        They are also respelt in the model's vocabulary: there the old spelling could be put together from text, by
        Unigram, or by merges, which go as well.
        """
        problem = "it is not a fast tokenizer"
        if self._backend is not None:
            respelt, content = self._respelt, json.loads(self._backend.to_str())
            model, vocabulary = content["model"], content["model"]["vocab"]
            for token in content["added_tokens"]:
                if token["content"] in respelt:  # a normaliser may take the mark away, or find it in another form
                    token |= {"content": respelt[token["content"]], "normalized": False}
            pieces = vocabulary.items() if isinstance(vocabulary, dict) else vocabulary  # with ids; Unigram: scores
            model["vocab"] = type(vocabulary)((respelt.get(piece, piece), number) for piece, number in pieces)
            if model.get("unk_token") in respelt:
                model["unk_token"] = respelt[model["unk_token"]]
            if "merges" in model:
                # Pairs: ["<|im_end|", ">"] would put it together again.
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
