"""Responses token by token: where a model is unsure, and which tokens Mixup mixes with which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sftmix.batches.collate import collate
from sftmix.batches.order import TrainingOrder, one_split
from sftmix.components.base import Need
from sftmix.tools.report.ends import both_ends
from sftmix.tools.report.look import Look
from sftmix.tools.report.run import RunView
from sftmix.types import UNPAIRED_NAME, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 4
"""Responses from each end, and of the largest variability, that are shown token by token."""
PAIRS = 3
TOKENS = 160
"""Most tokens of a response that are shown."""
DARKEST = 6.0
"""NLL in nats at which a token is darkest: a probability of 1 in 400."""


@dataclass(frozen=True)
class Token:
    """A response token: its text, and its NLL in nats before and after training."""

    text: str
    before: float
    after: float

    @property
    def shades(self) -> tuple[float, float]:
        """Return darkness before and after, from 0 to 1."""
        return min(self.before / DARKEST, 1.0), min(self.after / DARKEST, 1.0)


@dataclass(frozen=True)
class Response:
    """A response, its first TOKENS tokens; `left` tokens are not shown."""

    id: str
    group: str
    confidence: float
    instruction: str
    tokens: Sequence[Token]
    left: int


@dataclass(frozen=True)
class MixedPair:
    """Two responses of a pair of the first epoch, and lambda, the share of the first, of each aligned token pair."""

    first: Response
    second: Response
    lam: Sequence[float]

    @property
    def depth(self) -> int:
        return len(self.lam)

    @property
    def columns(self) -> list[tuple[Token | None, Token | None, float | None]]:
        """Return (token of the first, of the second, lambda) for each place of the longer response."""
        sides = self.first.tokens, self.second.tokens
        padded = [[*side, *[None] * (max(map(len, sides)) - len(side))] for side in sides]
        lam = [*self.lam, *[None] * len(padded[0])]
        return list(zip(*padded, lam, strict=False))


def chosen_rows(view: RunView) -> dict[str, Rows]:
    """Return name -> rows of the responses that are shown: both ends, and of the others the most changed."""
    low, high = both_ends(view.by_confidence, SHOWN)
    found = {"least confident": low, "most confident": high[::-1]}
    moved = view.scores.variability[view.by_confidence]
    taken = {*low.tolist(), *high.tolist()}
    ranked = view.by_confidence[np.argsort(-np.nan_to_num(moved, posinf=0.0), kind="stable")]
    changed = [row for row in ranked.tolist() if row not in taken][:SHOWN]
    if changed and np.nanmax(moved) > 0:
        found["most changed of the others, over the checkpoints"] = np.asarray(changed, dtype=np.int64)
    return found


@dataclass(frozen=True)
class PlannedPair:
    """Two rows that the training mixed, and lambda of each of their aligned token pairs."""

    rows: tuple[int, int]
    lam: Sequence[float]


def planned_pairs(view: RunView) -> list[PlannedPair]:
    """Return the first pairs of the first step, as the training planned them; none if it mixed nothing then.

    A single run, whose first epoch mixes nothing, and objectives that must see the losses of the batch have none, nor
    have a user's own classes, which are not imported.
    """
    config, pairing = view.config, view.config.resolved_pairing()
    if (
        pairing is None
        or view.split is None
        or Need.TARGET_LOSSES in config.reference.needs
        or Need.BATCH_NLL in config.objective.needs
    ):
        return []
    if not all(type(part).__module__.startswith("sftmix.") for part in (pairing, config.objective, config.reference)):
        return []
    data = view.rows.data.train
    pairs = one_split(view.split, view.scores, pairing, config.seed)
    order = TrainingOrder(len(data), pairs.pairs_of, options=config.training, seed=config.seed)
    found = []
    for unit in [unit for unit in order.batch(0) if len(unit) == 2][:PAIRS]:
        batch = collate([unit], data, split=view.split, pad_id=view.rows.encoder.pad_id)
        plan = config.objective.plan(batch, step=0, total_steps=order.total_steps, seed=config.seed)
        if len(plan.lam):
            found.append(PlannedPair((unit[0].row, unit[1].row), plan.lam.tolist()))
    return found


class Responses:
    """Responses by row, with the NLL of their tokens before and after training."""

    def __init__(self, view: RunView, before: Look, after: Look) -> None:
        self._view = view
        self._before = dict(zip(before.rows.tolist(), before.token_nll, strict=True))
        self._after = dict(zip(after.rows.tolist(), after.token_nll, strict=True))

    def of(self, row: int) -> Response:
        """Return the response of a row that both models have seen."""
        view = self._view
        example = view.rows.data.train[row]
        ids = example.input_ids[np.flatnonzero(example.target[1:]) + 1].tolist()
        shown = ids[:TOKENS]
        texts = pieces(view.rows.encoder.tokenizer, shown)
        nll = zip(texts, self._before[row].tolist(), self._after[row].tolist(), strict=False)
        name = view.groups[row] if view.groups else UNPAIRED_NAME
        confidence = float(view.scores.confidence[row])
        instruction = view.texts[row][0]
        return Response(
            example.id, name, confidence, instruction, [Token(*token) for token in nll], len(ids) - len(shown)
        )

    def pair(self, planned: PlannedPair) -> MixedPair:
        first, second = (self.of(row) for row in planned.rows)
        return MixedPair(first, second, planned.lam)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it; joined, they are the decoded whole.

    A token alone would lose the space before its word; one that ends within a character adds nothing yet.
    """
    found, done = [], 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or end == len(ids)
        found.append(text[done:] if whole else "")
        done = len(text) if whole else done
    return found


def all_rows(chosen: Mapping[str, Rows], planned: Sequence[PlannedPair]) -> Rows:
    """Return all rows that are shown token by token, each once."""
    rows = [row for found in chosen.values() for row in found.tolist()]
    return np.asarray(list(dict.fromkeys([*rows, *(row for pair in planned for row in pair.rows)])), dtype=np.int64)
