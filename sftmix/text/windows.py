"""Documents of plain text -> windows of token ids.

In a window every token is a target, except the first of each document. A document ends with eos, and begins with BOS
if the tokenizer writes one before plain text. Packed documents follow one another and are cut into windows of
exactly max_length tokens. A window names the places where its documents begin: neither attention nor targets may cross
them, or the model would learn from an unrelated text.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sftmix.components.renderer import Renderer
from sftmix.disk.cache import short_hash
from sftmix.text.examples import EncodedRow
from sftmix.text.spellings import SpecialSpellings
from sftmix.text.templates import decode, written_bos
from sftmix.types import Example, Message, RenderedTurn
from sftmix.words.errors import ConfigError
from sftmix.words.fields import TEXT, SpecialTokens


class Documents(Renderer):
    """The renderer of data.format text: each token of a document is trained, but for those that nothing predicts."""

    name = TEXT
    template = ""  # the exported tokenizer keeps its own
    cut = False

    def __init__(self, *, packing: bool = True, special_tokens: SpecialTokens = "text") -> None:
        """packing, special_tokens: see `DataOptions`."""
        self.packing = packing
        self.special_tokens = special_tokens

    def begin(self, tokenizer: Any, *, thinks: bool | None = False) -> None:
        """Take the tokenizer. Raises ConfigError for one without eos, with which a document ends."""
        if tokenizer.eos_token_id is None:
            raise ConfigError("data.format text: this tokenizer has no eos token, with which a document ends")
        super().begin(tokenizer, thinks=thinks)
        self.bos = written_bos(tokenizer)
        self.spellings = SpecialSpellings(tokenizer, self.ends, self.special_tokens)

    def answer(self, message: Message) -> list[tuple[list[int], float]]:
        """Return the ids of a document: BOS, its text in one call, and eos."""
        (ids,) = self.spellings.tokenize([self.spellings.as_text(message.content)])
        return [([*self.bos, *ids, *self.ends], 1.0)]

    def turns(self, example: Example) -> list[RenderedTurn]:
        """Return the document, which is one turn without a prompt."""
        (document,) = example.messages
        is_spelt = self.spellings.as_text(document.content) != document.content
        return [RenderedTurn([], self.answer(document), ["spelt_in_document"] if is_spelt else [])]

    def windows(
        self, examples: Iterator[tuple[Example, EncodedRow]], length: int
    ) -> Iterator[tuple[Example, EncodedRow]]:
        """Cut the documents into windows; each has the source, label and columns of its first document."""
        counts = Counter[str]()
        for document, ids, starts in cut_into_windows(((e, row.ids) for e, row in examples), length, self.packing):
            bounds = itertools.pairwise([*starts, len(ids)])  # [0, 3] of 4 ids -> (0, 3), (3, 4)
            spans = [(start + 1, end) for start, end in bounds if start + 1 < end]
            # The id is a hash of the tokens: other windows (by length, tokenizer or order of documents) have other
            # ids, so no file about them is taken for one about these.
            # The lengths keep a token from being taken for a start.
            numbers = np.array([len(ids), *ids, len(starts), *starts], dtype="<i8")
            name = short_hash(numbers.tobytes())
            suffix = f"#{counts[name]}" if counts[name] else ""
            counts[name] += 1
            text = Message(TEXT, decode(self.tokenizer, ids), True)
            window = EncodedRow([], ids=ids, spans=spans, span_weights=[1.0] * len(spans), starts=starts)
            yield replace(document, id=name + suffix, messages=(text,)), window


def cut_into_windows(
    documents: Iterable[tuple[Any, Sequence[int]]], length: int, packed: bool
) -> Iterator[tuple[Any, list[int], list[int]]]:
    """Cut the tokens of documents, which follow one another, into windows of `length`; the last may be shorter.

    documents  (document, token ids)
    packed     a window may hold several documents; else each document is cut alone, and its last window may be shorter
    Yields (first document, tokens, places where documents begin).
    """
    ids, starts = list[int](), list[int]()
    for document, tokens in documents:
        at = 0
        while at < len(tokens):
            if not ids:
                first = document
            # length 4, [1, 1, 1] and [2, 2, 2] -> [1, 1, 1, 2] with starts [0, 3], and [2, 2] with [0]
            starts.append(len(ids))
            piece = tokens[at : at + length - len(ids)]
            ids += piece
            at += len(piece)
            if len(ids) == length or not (packed or at < len(tokens)):
                yield first, ids, starts
                ids, starts = [], []
    if ids:
        yield first, ids, starts
