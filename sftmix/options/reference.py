"""The reference model: its training inherits the target's options."""

import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from sftmix.disk.places import is_outside, place_of
from sftmix.options.model import LoraOptions, ModelOptions
from sftmix.options.training import OF_SHARDS, StageTraining, TrainingOptions
from sftmix.words.given import OptionFields


@dataclass(kw_only=True)
class ReferenceModel(OptionFields):
    """Another reference model (section 5.1: a weaker one), with its own tokenizer, template and length."""

    path: str = ""
    """Hub id or directory; empty: the target's own base model."""
    template: str | None = None
    """As data.template, for the reference's tokenizer. null: the run's template if that is the target's tokenizer
    (padding aside); else the tokenizer's own, or alpaca if it has none."""
    max_length: int | None = None
    """As data.max_length, for the reference. null: the run's length, or the model's context if that is shorter, if it
    has the target's tokenizer; else the smaller of 2048 and the model's context."""
    lora: LoraOptions | None = None
    """Adapters of the reference. null: the target's (model.lora) if reference.model.path is empty, else none; r 0
    trains all weights."""

    def files(self) -> list[str]:
        """Return the path, if there is one, and the file of the template, if that is one and not a template's name."""
        template = os.path.expanduser(self.template or "")
        is_file = template and not is_outside(template) and os.path.isfile(place_of(template))
        return [*filter(None, [self.path]), *([template] if is_file else [])]


_Class = TypeVar("_Class", bound=type)


def _null_inherits(cls: _Class) -> _Class:
    """Give a class the options of StageTraining, each of which may be null, and is by default."""
    options = fields(StageTraining)
    # types, since options/training.py has no `from __future__ import annotations`, which would make texts of them
    hints = {option.name: option.type | None for option in options}  # type: ignore[operator]
    cls.__annotations__ = hints | cls.__annotations__  # read by @dataclass, which runs after this
    for option in options:
        setattr(cls, option.name, None)
    return cls


@dataclass(kw_only=True)
@_null_inherits
class ReferenceTraining(StageTraining):
    """Training options of the reference; null inherits the same option of `training`.

    An option that excludes an inherited one, or with which that says nothing, replaces it: see `inherit`.
    """

    chunk_size: int | None = None
    """Token rows of logits alive at once in the loss."""
    seed: int | None = None
    """Seed of the reference's order; null: the run's seed (with random streams of its own)."""


INSTEAD_OF = {"epochs": "max_steps", "micro_batch_size": "micro_batch_tokens", "micro_batch_tokens": "micro_batch_size"}
"""Options of the reference, each with the one that it then does not inherit."""


def reference_lora(target: ModelOptions, reference: object) -> LoraOptions:
    """Return the adapters of a reference model: its own, or the target's if both have the same base model, or none."""
    if not isinstance(reference, ReferenceModel):  # null: the target's base model
        return target.lora
    if reference.lora:
        return reference.lora
    return LoraOptions() if reference.path else target.lora


def inherit(training: TrainingOptions, reference: ReferenceTraining | None) -> TrainingOptions:
    """Return the run's training options, replaced by those that the reference sets itself.

    If two options exclude each other and the reference sets one, the other is not inherited: a reference cannot
    put it aside itself, since its null inherits.
    """
    own = asdict(reference or ReferenceTraining())
    chosen = {name: value for name, value in own.items() if value is not None and name != "seed"}
    aside: dict[str, Any] = {other: None for name, other in INSTEAD_OF.items() if name in chosen}
    if "length_groups" in chosen and training.padding_free is True:
        aside["padding_free"] = "auto"
    if chosen.get("padding_free") is True:
        aside["length_groups"] = None
    # ddp of the reference puts fsdp's options aside; a reference without a choice keeps them all, as each is of hsdp
    aside |= {name: of_any[0] for name, of_any, of in OF_SHARDS if chosen.get("parallel", "hsdp") not in of}
    return replace(training, **aside | chosen)
