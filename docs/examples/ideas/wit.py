"""Weighted instruction tuning (arXiv 2507.07817): prompts are trained as well; `--objective wit.WIT`."""

from typing import Any

from sftmix.components import NTP, Need
from sftmix.components.component import require
from sftmix.components.plans import with_prompts
from sftmix.types import Batch, Plan


class WIT(NTP):
    """Tokens of prompts have a weight as well, and the sum is divided by the number of all tokens; left out: weights of
    the response other than 1."""

    needs = frozenset({Need.PROMPTS})

    def __init__(self, *, prompt: float = 0.2):
        """prompt: weight of a prompt's token, above 0."""
        require(prompt > 0, "objective.prompt", prompt, "a number above 0")
        self.prompt = prompt

    def plan(self, batch: Batch, **at: Any) -> Plan:
        return with_prompts(super().plan(batch, **at), batch, self.prompt, divided_by="tokens")
