"""Questions, and the options of an answer, for the commands that make some; their help needs no library."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.disk.texts import text_of
from sftmix.tools.runs.models import Dtype, Functions
from sftmix.words.errors import ConfigError
from sftmix.words.shown import quoted


@dataclass
class Question:
    """A conversation that a model continues.

    id           the row's own id, or a hash of its content (`#k` for the k-th question of this id)
    messages     turns {role: ..., content: ..., and thought, tool_calls, tool_call_id, name}, the last one of the user
                 or a function's result
    reference    the answer that the row has; None if it has none
    follow_ups   turns of the user that come after the model's own answers, one after the other
    temperature  of its answers, if the option does not say; 0 is greedy
    row          the row that it was read from; None: held-out rows of a run
    tools        the functions that the assistant may call, in OpenAI's form
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    reference: str | None = None
    follow_ups: tuple[str, ...] = ()
    temperature: float = 0.0
    row: Any = None
    tools: Functions = ()

    def as_dict(self) -> dict[str, Any]:
        """Return what makes the question this one, in types that JSON can write."""
        rest = {"follow_ups": self.follow_ups, "tools": self.tools}
        more = {name: list(value) if isinstance(value, tuple) else value for name, value in rest.items() if value}
        return {"id": self.id, "messages": list(self.messages), "reference": self.reference, **more}


@dataclass(kw_only=True)
class Sampling:
    """How models answer; ConfigError for an option that is out of its range. `system` may be the name of a file."""

    batch_size = 1  # of `chat`, which has no such option
    max_new_tokens: int = 512
    """N: most tokens of an answer [%(default)s]"""
    temperature: float | None = None
    """X: 0 takes the likeliest token [0]"""
    top_p: float = 1.0
    """X: draw from the likeliest tokens with this share of the probability [%(default)s]"""
    seed: int = 42
    """N: seed of the draws [%(default)s]"""
    dtype: Dtype = "auto"
    """of the weights; auto: as stored [%(default)s]"""
    system: str | None = None
    """TEXT|FILE: system turn before conversations that have none, or the file that holds it"""

    def __post_init__(self) -> None:
        if (
            min(self.max_new_tokens, self.batch_size) < 1
            or not 0 < self.top_p <= 1
            or not 0 <= (self.temperature or 0) <= 10
        ):
            raise ConfigError(
                "allowed are --max_new_tokens and --batch_size from 1, --temperature from 0 (greedy) to 10, --top_p "
                "above 0, up to 1"
            )
        if self.system and os.path.isfile(self.system):
            self.system = text_of(Path(self.system), "--system").strip()
        # A misspelt file: prompt.txt, runs/system. A text: "Be kind.", "Answer yes/no.", "Hi".
        elif self.system and re.fullmatch(r"\S*[/\\]\S*|\S+\.\w{1,5}", self.system):
            raise ConfigError(
                f"--system {quoted(self.system)}: there is no such file; name one that is there, or write a text with "
                "a blank in it"
            )


@dataclass(kw_only=True)
class AnswerOptions(Sampling):
    """How models answer many questions: batch_size changes no token where sums do not depend on it."""

    batch_size: int = 16
    """N: prompts that are answered at once [%(default)s]"""
