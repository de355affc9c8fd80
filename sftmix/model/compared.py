"""A model that is probed: the ids it is asked with, its state meanwhile, and how far two of its answers are apart."""

import math
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from sftmix.words.errors import ConfigError

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far rounding may move probes, relative to the greatest number; each probe sets its own for half precision."""


def apart(ours: Tensor, theirs: Tensor, precision: torch.dtype | None = None) -> str:
    """Return by how much two computations of the same numbers differ, if rounding does not explain it; else nothing.

    precision  of the computations, if it is not the dtype of the numbers
    """
    difference = float((ours - theirs).abs().max())
    limit = ROUNDING.get(precision or theirs.dtype, 3e-2) * float(theirs.abs().max())
    return "" if difference <= limit else f"by up to {difference:.3g} (allowed: {limit:.3g})"


def probe_ids(model: PreTrainedModel, *shape: int) -> Tensor:
    """Return ids of this shape, spread over the vocabulary, on the device of the model."""
    # 7919 is prime: ids do not repeat within a vocabulary
    return (torch.arange(math.prod(shape), device=model.device) * 7919 % n_embeddings(model)).view(shape)


def longest_window(model: PreTrainedModel) -> int:
    """Return the length of the longest window of tokens that attention compresses into one; 0 without any."""
    return max(getattr(model.get_decoder().config, "compress_rates", {"": 0}).values())  # DeepSeek-V4: 128


@contextmanager
def probing(model: PreTrainedModel, problem: str, remedy: str = "") -> Iterator[None]:
    """Let a model run in eval mode and without gradients; ConfigError, `problem: error. remedy`, if it fails."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # which say nothing of the model
        raise
    except Exception as error:  # models of strangers raise anything
        raise ConfigError(f"model.path: {problem}: {error}. {remedy}") from error
    finally:
        model.train(training)


@cache
def say_once(line: str) -> None:
    """Print a line to stderr, on rank 0 and once in a process."""
    if not (dist.is_initialized() and dist.get_rank()):
        print(line, file=sys.stderr, flush=True)


def some(names: Collection[str], what: str = "weights") -> str:
    """Return how many these are, and some of them."""
    return f"{len(names)} {what} ({', '.join(sorted(names)[:3])}, ...)"


def n_embeddings(model: Any) -> int:
    """Return the number of token ids that have an embedding."""
    return model.get_input_embeddings().weight.shape[0]
