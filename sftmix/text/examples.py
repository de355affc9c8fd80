"""A row -> its training examples, as text and as token ids, and what of it is left out."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from sftmix.text.thoughts import answers
from sftmix.types import Example, Message
from sftmix.words.fields import TEXT
from sftmix.words.shown import visible

NOT_TRAINED = -100
"""The label that losses of transformers and TRL leave out."""


class EncodedRow(NamedTuple):
    """A training example of a row, or the reasons why there is none.

    reasons       keys of `sftmix.data.report.REASONS`: what was left out, cut, or put together
    detail        the error of a template that refuses the conversation; else ""
    ids           the token ids, at most max_length; empty if it cannot be trained on
    spans         (start, stop) of each trained text in them, end-of-turn token included, in order
    span_weights  the weight of the tokens of each span
    starts        if a renderer made a window of it: where each example in the window begins, the first at 0; else ()
    """

    reasons: list[str]
    detail: str = ""
    ids: Sequence[int] = ()
    spans: Sequence[tuple[int, int]] = ()
    span_weights: Sequence[float] = ()
    starts: Sequence[int] = ()

    @property
    def labels(self) -> list[int]:
        """One for each id, not shifted, as transformers takes them: the id if it is trained, else -100."""
        labels = [NOT_TRAINED] * len(self.ids)
        for start, stop in self.spans:
            labels[start:stop] = self.ids[start:stop]
        return labels

    @property
    def weights(self) -> list[float] | None:
        """One for each id, 0 if it is not trained; None if all trained tokens have the weight 1."""
        if set(self.span_weights) <= {1.0}:
            return None
        weights = [0.0] * len(self.ids)
        for (start, stop), weight in zip(self.spans, self.span_weights, strict=True):
            weights[start:stop] = [weight] * (stop - start)
        return weights


def _says(turn: Message) -> bool:
    return bool(visible(turn.content)) if turn.role == TEXT else answers(turn)


def has_response(row: Example) -> bool:
    """Return True if a trained turn has an answer or a call, or if a document has a text."""
    return any(turn.trained and _says(turn) for turn in row.messages)


def left_out(row: Example) -> list[str]:
    """Return the reasons to count of turns that are not trained: each empty response or document, a last question."""
    reasons = [
        "empty_document" if turn.role == TEXT else "empty_response"
        for turn in row.messages
        if turn.trained and not _says(turn)
    ]
    return reasons + ["unanswered"] * (row.messages[-1].role in ("user", "tool"))


def examples_of(row: Example, *, whole: bool) -> Iterator[Example]:
    """Make the examples of a row with a response; a turn without an answer or a call is not trained.

    whole  one example, up to its last trained turn, as those behind it teach nothing; else each trained turn is one,
           with the conversation up to it
    """
    places = [place for place, message in enumerate(row.messages) if message.trained and _says(message)]
    several = sum(message.trained for message in row.messages) > 1
    asked = [replace(message, trained=False) for message in row.messages]
    for trained in [places] if whole else [[place] for place in places]:
        last = trained[-1]
        messages = asked[: last + 1]
        for place in trained:
            messages[place] = row.messages[place]
        # Those that are not trained count as well: @turn1 is the second answer of the conversation.
        number = sum(message.role == "assistant" for message in row.messages[:last])
        turn = f"@turn{number}" if several and not whole else ""
        yield replace(row, id=row.id + turn, messages=tuple(messages))


def question_and_response(one: Example) -> tuple[str, str]:
    """Return the last turn of the user, the question that was answered, and the response."""
    question = next((turn.content for turn in one.messages[::-1] if turn.role == "user"), "")
    return question, "\n".join(turn.content for turn in one.messages if turn.trained)
