"""What makes a stage that does not fit need less: options are changed one at a time and the run is estimated again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sftmix.batches.deal import micro_batch_limit
from sftmix.common.errors import ConfigError
from sftmix.components.optimizers import AdamW, AdamW8bit
from sftmix.config import RunConfig
from sftmix.estimate.machine import Machine
from sftmix.estimate.result import Estimate, Remedy, StageEstimate

WORTH = 0.99
"""A remedy leaves at most this share of the peak."""
RANK = 16
"""Of the adapters that are tried."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A configuration on a machine, and the options that lead to it from the one that does not fit."""

    options: str
    config: RunConfig
    machine: Machine

    def training(self, **options: Any) -> Setting:
        words = {name: "null" if value is None else str(value).lower() for name, value in options.items()}
        named = " ".join(f"--training.{name} {word}" for name, word in words.items())
        return replace(
            self, options=named, config=replace(self.config, training=replace(self.config.training, **options))
        )

    def lora(self, **options: Any) -> Setting:
        model = self.config.model
        named = " ".join(f"--model.lora.{name} {value}" for name, value in options.items())
        changed = replace(model, lora=replace(model.lora, **options))
        return replace(self, options=named, config=replace(self.config, model=changed))


def remedies(
    found: Estimate, config: RunConfig, again: Callable[[RunConfig, Machine], Estimate]
) -> dict[str, list[Remedy]]:
    """Of each stage that does not fit: what lowers its peak, each the least change with which it fits, or the best.

    again  the estimate of a changed configuration or machine
    """
    given = Setting("", config, found.machine)
    tried = {stage.work.name: list[Remedy]() for stage in found.too_large}
    for way in WAYS if tried else ():
        peaks = list(_peaks(way(given, found), tried, again))
        for stage in found.too_large:
            own = [Remedy(options, peak[stage.work.name]) for options, peak in peaks]
            fitting = [one for one in own if one.peak <= (found.machine.memory or 0)]
            best = fitting[:1] or sorted(own, key=lambda one: one.peak)[:1]
            tried[stage.work.name] += [one for one in best if one.peak <= WORTH * stage.memory.peak]
    return tried


def _peaks(
    settings: Iterator[Setting], names: Mapping[str, Any], again: Callable[[RunConfig, Machine], Estimate]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Options and the peak of each stage, up to the first setting with which all stages fit."""
    for setting in settings:
        try:
            estimate = again(setting.config, setting.machine)
        except ConfigError:  # what a run would refuse helps nobody
            continue
        yield setting.options, {s.work.name: s.memory.peak for s in estimate.stages if s.work.name in names}
        if not estimate.too_large:
            return


# ---------------------------------------------------------------------------- ways, each from less to more


def _more_gpus(given: Setting, found: Estimate) -> Iterator[Setting]:
    for times in (2, 4, 8):
        machine = replace(given.machine, count=times * given.machine.count)
        yield replace(given, options=f"--gpus {machine.count}", machine=machine)


def _sharing(given: Setting, found: Estimate) -> Iterator[Setting]:
    if any(stage.layout.shards < given.machine.count for stage in found.too_large):
        grouped = given.config.training.shard_group_size is not None  # which a run refuses beside fsdp
        yield given.training(parallel="fsdp", **({"shard_group_size": None} if grouped else {}))


def _smaller_micro_batch(given: Setting, found: Estimate) -> Iterator[Setting]:
    name, limit = _micro_batch(given)
    least = 256 if name == "micro_batch_tokens" else 1 if given.config.resolved_pairing() is None else 2
    while limit // 2 >= least:
        limit = limit // 2 // least * least
        yield given.training(**{name: limit})


def _larger_micro_batch(given: Setting, found: Estimate) -> Iterator[Setting]:
    """One instead of several in a step: then FSDP never holds the whole gradient."""
    name, limit = _micro_batch(given)
    if _most_micro_batches(found) > 1:
        yield given.training(**{name: limit * _most_micro_batches(found)})


def _smaller_batch(given: Setting, found: Estimate) -> Iterator[Setting]:
    """One micro-batch in a step that is so much smaller."""
    size = given.config.training.global_batch_size // _most_micro_batches(found) // 2 * 2
    if _most_micro_batches(found) > 1 and size:
        setting = given.training(global_batch_size=size)
        yield replace(setting, options=f"{setting.options} (one micro-batch a step; it changes what is trained)")


def _checkpointing(given: Setting, found: Estimate) -> Iterator[Setting]:
    if not given.config.training.activation_checkpointing:
        yield given.training(activation_checkpointing=True)


def _adapters(given: Setting, found: Estimate) -> Iterator[Setting]:
    lora = given.config.model.lora
    if not lora.r:
        yield given.lora(r=RANK)
    elif lora.quantize is None:
        yield given.lora(quantize="4bit")


def _small_state(given: Setting, found: Estimate) -> Iterator[Setting]:
    if type(given.config.optimizer) is AdamW:
        yield replace(given, options="--optimizer AdamW8bit", config=replace(given.config, optimizer=AdamW8bit()))


def _micro_batch(given: Setting) -> tuple[str, int]:
    """The option that limits a micro-batch, and its value."""
    limit = micro_batch_limit(given.config.training)
    if limit is not None:
        return "micro_batch_size", limit
    return "micro_batch_tokens", given.config.training.micro_batch_tokens or 0


def _most_micro_batches(found: Estimate) -> int:
    """Of a step, on average, in a stage that does not fit."""
    return max((math.ceil(s.work.batches.micro_batches) for s in found.too_large if s.work.batches), default=1)


WAYS: tuple[Callable[[Setting, Estimate], Iterator[Setting]], ...] = (
    _smaller_micro_batch,
    _larger_micro_batch,
    _checkpointing,
    _sharing,
    _more_gpus,
    _small_state,
    _smaller_batch,
    _adapters,
)


def whole_gradient(stage: StageEstimate) -> float:
    """Bytes that each rank holds of a gradient that ranks share, because a step has several micro-batches; else 0."""
    batches = stage.work.batches
    held = batches is not None and batches.largest.accumulated and stage.layout.is_sharded
    return 4.0 * stage.trained if held else 0.0
