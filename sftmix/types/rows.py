"""Rows: as text, and as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sftmix.types.arrays import Bool, Float32, Int64


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `trained` marks an assistant turn that carries loss.

    A window of plain text is one trained message of the role text.

    weight   multiplies the loss of the turn's tokens
    thought  what the assistant thought before the content, from a field of its own; "" if the row has none there
    more     the turn's other keys, as a chat template takes them: tool_calls, tool_call_id, name
    parts    (text, weight) of parts of the content with weights of their own, which make up the whole content; or none
    """

    role: str
    content: str
    trained: bool = False
    weight: float = 1.0
    thought: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a conversation with at least one trained assistant turn.

    id       the row's own `id`, or a hash of its canonical content (`#k` for the k-th duplicate)
    source   `file:line`, `file:line[index]` or `file[index]`, for messages to people
    label    the quality or group label of the row, if it has one
    columns  the row's other scalar fields, kept for selectors and splitters
    tools    the functions that the assistant may call, in OpenAI's form, for the chat template
    """

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    label: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


class RenderedTurn(NamedTuple):
    """A trained turn of a conversation as token ids.

    prompt   in front of it: what generation starts from
    parts    of the turn, end of turn included: the ids of each, and the weight of their loss (0: not trained)
    reasons  keys of `sftmix.data.report.REASONS` to count
    """

    prompt: list[int]
    parts: list[tuple[list[int], float]]
    reasons: Sequence[str] = ()

    @property
    def ids(self) -> list[int]:
        """All of them, from the beginning through the end of the turn."""
        return [*self.prompt, *(token for ids, _ in self.parts for token in ids)]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised example.

    row         int, place in the training set, 0..N-1 in file order
    input_ids   i64[length]
    target      bool[length], True if the token is a response token (end-of-turn token included): the token
                itself, unshifted; the position that predicts it is the one before it
    truncated   the response was cut at max_length, so it has no end-of-turn token
    starts      None, or i64[S], where each of the documents packed into this example begins (the first at 0): tokens of
                different documents must not attend to each other, and positions count from each start
    weight      None (all 1), or f32[length], the rows' own weights of the response tokens
    """

    row: int
    id: str
    input_ids: Int64
    target: Bool
    truncated: bool = False
    starts: Int64 | None = None
    weight: Float32 | None = None
