"""A row format: an interview, whose turns stand in one text."""

from collections.abc import Mapping
from typing import Any

from sftmix.components import RowFormat
from sftmix.types import Message
from sftmix.words.errors import BadRow


class Interview(RowFormat):
    """Questions and answers in turn, one on each line of the field `interview`."""

    fields = ("interview",)

    def __init__(self, *, question: str = "Q: ", answer: str = "A: "):
        """question: before each question.
        answer: before each answer."""
        self.roles = {question: "user", answer: "assistant"}

    def read(self, row: Mapping[str, Any], *, roles: Mapping[str, str]) -> list[Message]:
        turns = []
        for line in str(row.get("interview", "")).splitlines():
            mark = next((mark for mark in self.roles if line.startswith(mark)), None)
            if mark is None:
                raise BadRow(f"line {line!r} of the interview begins with none of {list(self.roles)}")
            turns.append(Message(self.roles[mark], line.removeprefix(mark), self.roles[mark] == "assistant"))
        if not turns:
            raise BadRow("there is no interview")
        return turns
