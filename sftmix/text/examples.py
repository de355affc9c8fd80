"""A conversation -> its training examples, and what of it is left out."""

from collections.abc import Iterator
from dataclasses import replace

from sftmix.text.thoughts import answers
from sftmix.types import Example, Message
from sftmix.words.fields import TEXT
from sftmix.words.shown import visible


def _says(turn: Message) -> bool:
    return bool(visible(turn.content)) if turn.role == TEXT else answers(turn)


def has_response(row: Example) -> bool:
    """Return True if a trained turn has an answer or a call, or if a document has a text."""
    return any(turn.trained and _says(turn) for turn in row.messages)


def left_out(row: Example) -> list[str]:
    """Return the reasons to count of turns that are not trained: each empty response or document, a last question."""
    empty = [turn for turn in row.messages if turn.trained and not _says(turn)]
    reasons = ["empty_document" if turn.role == TEXT else "empty_response" for turn in empty]
    return reasons + ["unanswered"] * (row.messages[-1].role in ("user", "tool"))


def examples_of(row: Example, *, whole: bool) -> Iterator[Example]:
    """Make the examples of a conversation with a response; one without an answer or a call is not trained.

    whole  one example, up to its last trained turn, as those behind it teach nothing; else each trained turn is one,
           with the conversation up to it
    """
    places = [place for place, message in enumerate(row.messages) if message.trained and answers(message)]
    several = sum(message.trained for message in row.messages) > 1
    for trained in [places] if whole else [[place] for place in places]:
        last = trained[-1]
        messages = tuple(replace(m, trained=i in trained) for i, m in enumerate(row.messages[: last + 1]))
        # Those that are not trained count as well: @turn1 is the second answer of the conversation.
        number = sum(message.role == "assistant" for message in row.messages[:last])
        turn = f"@turn{number}" if several and not whole else ""
        yield replace(row, id=row.id + turn, messages=messages)
