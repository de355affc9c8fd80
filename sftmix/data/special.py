"""Special tokens that a row spells in its text: `<|im_end|>` in a response must not end the turn.

A tokenizer finds special tokens in a text by their spelling, whoever wrote them. So a row could end a turn, begin one
of another role, or end a document. Here only the chat template can: what a row says is encoded as text.

Before the template is rendered, a NUL is put into each spelling in the content of a turn (rows with a NUL are refused
where they are read). In the rendered text the spellings without NUL are the template's own. A copy of the tokenizer,
the twin, spells its special tokens with a NUL: these are put into the rendered text in place of the template's
spellings, and the NULs are taken out of the content. All else about the twin is the same: a text without such spellings
gets the same ids from both.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from sftmix.common.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUL = "\0"


class SpecialSpellings:
    """The spellings of a tokenizer's special tokens, and the way to encode them as text.

    ids       token id of each spelling: special tokens, and those that the template writes around a turn. Other added
              tokens, such as `<think>` or runs of spaces, are not among them, nor is a single character that as text is
              the same token.
    unmarked  those of them, in order, that the tokenizer itself does not call special
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Iterable[int]) -> None:
        """Collect the spellings; `written` are ids that the template writes, the end of a turn among them."""

        def spelt(numbers: Iterable[int]) -> dict[str, int]:
            return {str(tokenizer.convert_ids_to_tokens(number)): number for number in numbers}

        special = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
        marked = spelt([*special, *tokenizer.all_special_ids])
        as_text = {"add_special_tokens": False, "split_special_tokens": True}
        self.ids = {
            spelling: number
            for spelling, number in (marked | spelt(written)).items()
            if len(spelling) > 1 or tokenizer(spelling, **as_text)["input_ids"] != [number]
        }
        self.unmarked = sorted(self.ids.keys() - marked.keys())
        self._tokenizer = tokenizer
        self._forms = _normal_forms(tokenizer, self.ids)
        either = _either(self.ids)
        self._begins = re.compile(f"(?=(?:{either}))(.)", re.DOTALL)
        self._whole = re.compile(f"({either})")

    def broken(self, content: str) -> str:
        """Return the content of a turn, with a NUL behind the first character of each spelling in it.

        If it spells one only in another form, it gets a NUL all the same: then the twin encodes it.
        """
        broken = self._begins.sub(r"\1" + NUL, content)
        if NUL not in broken and self._in_other_forms(content):
            return re.sub(r"(\S)", r"\1" + NUL, content, count=1)  # within: a template may trim the content
        return broken

    def _in_other_forms(self, content: str) -> bool:
        """True if the tokenizer's normaliser makes a spelling of a text: `<|IM_END|>` in small letters."""
        if not self._forms:
            return False
        normal = self._tokenizer.backend_tokenizer.normalizer.normalize_str(content)
        return any(form in normal for form in self._forms)

    def tokenize(self, rendered: Sequence[str]) -> list[list[int]]:
        """Tokenise rendered texts with `broken` content. Raises ConfigError for a tokenizer that has no twin."""
        texts = []
        for text in rendered:
            pieces = [piece.replace(NUL, "") for piece in self._whole.split(text)]
            pieces[1::2] = map(_twin_spelling, pieces[1::2])  # the template's own special tokens
            texts.append("".join(pieces))
        return [encoded.ids for encoded in self._twin.encode_batch(texts, add_special_tokens=False)]

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer that finds only the special tokens that are spelt with NUL; made when a row needs it."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise self._refusal("it is not a fast tokenizer")
        twin = Tokenizer.from_str(json.dumps(_respelt(json.loads(backend.to_str()), self.ids)))
        for spelling, number in self.ids.items():
            if twin.encode(_twin_spelling(spelling), add_special_tokens=False).ids != [number]:
                raise self._refusal(f"its token {spelling!r} cannot be told from text")
        return twin

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            "data.special_tokens is text, but this tokenizer cannot encode the spelling of a special token as text: "
            f"{reason}. Take these spellings out of the rows, or set data.special_tokens to tokens if you trust them"
        )


def _normal_forms(tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]) -> set[str]:
    """Return the forms in which the tokenizer looks for the spellings in normalised text: of normalised tokens only."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return set()
    added = tokenizer.added_tokens_decoder
    spelt = [spelling for spelling, number in ids.items() if number in added and added[number].normalized]
    return {form for spelling in spelt for form in (spelling, normalizer.normalize_str(spelling)) if form}


def _twin_spelling(spelling: str) -> str:
    """Return the twin's spelling of a special token."""
    return spelling[0] + NUL + spelling[1:]


def _either(spellings: Iterable[str]) -> str:
    """Return a regular expression for any of the spellings, the longest at a place.

    They are grouped by their first two characters: some tokenizers have a thousand, which begin with the same one.
    A single character cannot be broken: a NUL behind it says that it is text.
    """
    ordered = sorted(spellings, reverse=True)  # a longer spelling before one that it begins with
    groups = itertools.groupby(ordered, key=lambda spelling: spelling[:2])
    return (
        "|".join(
            f"{re.escape(start)}(?:{'|'.join(re.escape(s[2:]) for s in group)})"
            + (f"(?!{NUL})" if len(start) == 1 else "")
            for start, group in groups
        )
        or r"(?!)"
    )


def _respelt(content: dict[str, Any], spellings: Iterable[str]) -> dict[str, Any]:
    """Return the content of a tokenizer.json with the twin's spellings, in the model's vocabulary, too.

    There the old spelling could be put together from text: by Unigram, or by merges, which go as well.
    """
    twin = {spelling: _twin_spelling(spelling) for spelling in spellings}
    model, vocabulary = content["model"], content["model"].get("vocab")
    for token in content["added_tokens"]:
        if token["content"] in twin:  # a normaliser may take the NUL away, or find the token in another form
            token |= {"content": twin[token["content"]], "normalized": False}
    if isinstance(vocabulary, dict):
        model["vocab"] = {twin.get(piece, piece): number for piece, number in vocabulary.items()}
    elif vocabulary is not None:
        model["vocab"] = [[twin.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in twin:
        model["unk_token"] = twin[model["unk_token"]]
    pairs = ((merge.split(" ") if isinstance(merge, str) else merge, merge) for merge in model.get("merges") or ())
    if "merges" in model:
        model["merges"] = [merge for pair, merge in pairs if twin.keys().isdisjoint([*pair, "".join(pair)])]
    return content
