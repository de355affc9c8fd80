"""The training options of a reference: its own, and the run's where it sets none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

from sftmix.options import ReferenceTraining, TrainingOptions


def _any(value: Any) -> bool:
    return True


SET_ASIDE: tuple[tuple[str, Callable[[Any], bool], str, Callable[[Any], bool], Any], ...] = (
    ("epochs", _any, "max_steps", _any, None),  # of both, max_steps decides
    ("micro_batch_size", _any, "micro_batch_tokens", _any, None),
    ("micro_batch_tokens", _any, "micro_batch_size", _any, None),
    ("length_groups", _any, "padding_free", lambda v: v is True, "auto"),
    ("padding_free", lambda v: v is True, "length_groups", _any, None),
    ("parallel", lambda v: v != "hsdp", "shard_group_size", _any, None),
)
"""Options that exclude each other: with an own value such as this, an inherited one such as that is set aside, and its
default takes its place. A reference cannot do so itself, since its null inherits."""


def inherit(training: TrainingOptions, own: ReferenceTraining | None) -> TrainingOptions:
    """Return the run's training options, replaced by those of the reference; of two that exclude each other its own."""
    names = {f.name for f in fields(TrainingOptions)}
    given = {k: v for k, v in asdict(own).items() if k in names and v is not None} if own else {}
    aside = {
        other: default
        for name, excludes, other, excluded, default in SET_ASIDE
        if name in given and excludes(given[name]) and excluded(getattr(training, other))
    }
    return replace(training, **aside | given)
