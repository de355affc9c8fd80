"""What models show of some examples: the NLL of every response token, and the hidden state of the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sftmix.batches.rows import RowSubset
from sftmix.common.world import start_world
from sftmix.model.adapters import read_adapters
from sftmix.pipeline.models import load_for_run, scorer
from sftmix.pipeline.rows import any_packed
from sftmix.tools.report.run import RunView
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import resolve_precision, training_module
from sftmix.training.scoring import Column
from sftmix.types import UNPAIRED_NAME, Batch, Encoded, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 160
"""Most tokens of a response that are shown."""


def look(
    view: RunView, model: Path, rows: Rows, *, name: str, hidden: bool = False
) -> tuple[Sequence[np.ndarray], np.ndarray]:
    """Pass K training examples through a model of the run, the base model or an exported one, in this process alone.

    name  for the progress bar
    Returns K arrays f32[n_tokens], the NLL of each response token in nats, and f32[K, D], the input of
    the LM head at the last response token before the end of the turn; f32[0] unless `hidden` asks for it.
    """
    config, encoder = view.config, view.rows.encoder
    options = replace(config.training, parallel="ddp")  # of one rank: the model as it is
    data = RowSubset(view.rows.data.train, rows)
    path, lora, has_adapters = str(model), config.model.lora, (model / "adapter_config.json").exists()
    if has_adapters:
        path = config.model.path
    else:
        lora = lora.without_adapters()
    with start_world() as world:
        loaded, _ = load_for_run(config, world, path, encoder, options, lora)
        if has_adapters:
            read_adapters(loaded, model)
        precision, packed = resolve_precision(options.precision, world.device), any_packed(view.rows.data.train)
        module = training_module(loaded, options, precision=precision, world=world, packed=packed)
        score = scorer(options, world, encoder, name=f"report: {name}", token_nll=True)
        token_nll = score(module, data).token_nll
        last = score.columns(module, data, _last)[0] if hidden else np.zeros(0, dtype=np.float32)
    assert token_nll is not None
    return token_nll, last


def _last(module: TrainingModule, batch: Batch) -> list[Column]:
    """Return the hidden state at the last response token of each row."""
    hidden = module.read(batch, lambda hidden, head, labels: hidden)
    ends = torch.cumsum(torch.bincount(batch.slot, minlength=len(batch.rows)), dim=0) - 1
    return [hidden[ends].float().cpu().numpy()]


@dataclass(frozen=True)
class Token:
    """A response token: its text, and its NLL in nats before and after training."""

    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Response:
    """A response, its first TOKENS tokens; `left` tokens are not shown."""

    id: str
    group: str
    confidence: float
    instruction: str
    tokens: Sequence[Token]
    left: int


def response_of(view: RunView, row: int, before: np.ndarray, after: np.ndarray) -> Response:
    """Return the response of a row.

    before, after  f32[n_tokens], the NLL of its response tokens under the base model and the trained one
    """
    example = view.rows.data.train[row]
    ids = response_ids(example)
    texts = pieces(view.rows.encoder.tokenizer, ids[:TOKENS])
    tokens = [Token(*token) for token in zip(texts, before.tolist(), after.tolist(), strict=False)]
    group = view.groups[row] if view.groups else UNPAIRED_NAME
    confidence = float(view.scores.confidence[row])
    return Response(example.id, group, confidence, view.texts[row][0], tokens, len(ids) - len(texts))


def response_ids(example: Encoded) -> list[int]:
    """Return the token ids of a response that are predicted."""
    return list(example.input_ids[np.flatnonzero(example.target[1:]) + 1].tolist())


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it; joined, they are the decoded whole.

    A token alone would lose the space before its word; one that ends within a character adds nothing yet.
    """
    texts, done = [], 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[done:])
        done = len(text)
    return texts
