"""Tokens drawn from logits by random numbers that belong to a prompt and a position, whatever stands in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from sftmix.common.rng import generator


def uniforms(seed: int, keys: Sequence[tuple[str, int]], n: int) -> np.ndarray:
    """Return f64[len(keys), n] in [0, 1): the draws of each (prompt id, turn), one for each position."""
    return np.stack([generator(seed, "answer", name, turn).random(n) for name, turn in keys])


class Drawn(LogitsProcessor):
    """Leave one token of each row: the one in whose share of [0, 1) the row's random number falls.

    The shares stand in the order of the vocabulary. Greedy decoding then takes this token.
    """

    def __init__(self, draws: np.ndarray, prompt_length: int) -> None:
        self._draws = torch.from_numpy(draws)
        self._start = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return scores [B, V] in which only the drawn token is finite; input_ids [B, length so far]."""
        place = input_ids.shape[1] - self._start
        shares = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        draws = self._draws[:, place : place + 1].to(shares.device) * shares[:, -1:]
        # A number equal to a border belongs to the next token: a token with share 0 is never drawn.
        chosen = torch.searchsorted(shares, draws, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def processors(
    temperature: float, top_p: float, draws: np.ndarray | None, prompt_length: int
) -> LogitsProcessorList | None:
    """Return the processors of a batch; None for greedy decoding.

    draws  f64[B, positions] in [0, 1)
    """
    if draws is None:
        return None
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    chain.append(Drawn(draws, prompt_length))
    return chain
