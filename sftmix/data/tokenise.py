"""Examples -> rows of token ids to store, by the renderer of the encoder."""

import bisect
import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence

from sftmix.components.renderer import Renderer
from sftmix.data.report import Case, DataReport
from sftmix.data.store import in_parts, stored
from sftmix.disk.cache import Record
from sftmix.text.examples import EncodedRow
from sftmix.text.mask import encode_each
from sftmix.text.thoughts import thinks
from sftmix.types import Example
from sftmix.words.errors import ContractError, TemplateRefusal


def tokenise(
    examples: Iterable[Example], renderer: Renderer, max_length: int, report: DataReport, *, splits: bool
) -> Iterator[Record]:
    """Tokenise examples in their order; yield the rows to store, and add what is to be said to the report.

    splits  True: a conversation that must be split is replaced by its turns. False: it has no row, as no reference is
            asked for the ids of its turns
    """

    def encoded() -> Iterator[tuple[Example, EncodedRow]]:
        for part in in_parts(examples, lambda example: sum(len(turn.content) for turn in example.messages)):
            for example, found in encode_each(
                renderer, part, max_length if renderer.cut else sys.maxsize, splits=splits
            ):
                for reason in found.reasons:
                    report.add(reason, case_of(example, found.detail))
                if found.ids:
                    yield example, found

    for example, found in renderer.windows(encoded(), max_length):
        if len(found.ids) > max_length:
            raise ContractError(
                f"renderer {renderer}: windows returned {len(found.ids)} ids for {example.id}; allowed: at most "
                f"{max_length} (data.max_length)"
            )
        if not found.spans:
            report.add("no_target", case_of(example))
            continue
        row = {
            **stored(example),
            "input_ids": found.ids,
            "spans": list(itertools.chain(*found.spans)),  # [(3, 7), (9, 12)] -> [3, 7, 9, 12]
            "n_targets": sum(end - start for start, end in found.spans),
            "truncated": "truncated" in found.reasons,
            "starts": found.starts or None,
        }
        if set(found.span_weights) != {1.0}:  # null for the others: most data sets have none
            report.add("weighted", case_of(example))
            row["weights"] = found.span_weights
        yield row


def case_of(example: Example, detail: str = "") -> Case:
    """Return an example, by its id and its place, for the report."""
    return Case(example.source, example.id, detail)


MANY = 16
"""Turns of a conversation from which on those without room are looked for before they are tokenised."""


def with_room(renderer: Renderer, examples: Sequence[Example], max_length: int) -> int:
    """Return how many of the examples of a conversation may have a response within max_length; those behind have none.

    Each turn's prompt holds the turns before it, so tokenising them all takes the square of their number: 400 turns,
    of which the first 22 have room, take the time of 9,000. The first prompt without room is found by halving. Those
    behind it have none either if the last one begins with the same ids. Templates may leave out earlier thoughts: of
    conversations with thoughts all turns are tokenised, and so are those of which the template leaves out a turn.
    """
    if len(examples) < MANY or thinks(examples[-1]):
        return len(examples)

    def head(place: int) -> list[int]:
        """Return the first max_length ids of a prompt."""
        *before, _ = examples[place].messages
        return renderer.prompt(before, examples[place].tools)[:max_length]

    with contextlib.suppress(TemplateRefusal):
        last = head(-1)
        if len(last) == max_length:
            first = bisect.bisect_left(range(len(examples)), max_length, key=lambda place: len(head(place)))
            if head(first) == last:
                return first
    return len(examples)
