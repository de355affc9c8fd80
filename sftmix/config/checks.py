"""Checks of a configuration that need neither rows nor a model: one sentence per problem."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import fields

from sftmix.common.errors import ConfigError, refuse
from sftmix.common.figures import counted
from sftmix.common.plain import not_plain
from sftmix.components.base import Component, Need, Optimizer
from sftmix.components.callbacks import Evaluate
from sftmix.config.inherited import inherit
from sftmix.config.run_config import RunConfig
from sftmix.options import (
    SHARDED,
    Check,
    LoraOptions,
    TrainingOptions,
    at_least_1,
    out_of_range,
)


def validate(config: RunConfig, *, needs_out: bool = True) -> None:
    """Check every option as far as possible without rows or a model; raise ConfigError with all problems.

    `needs_out=False` is for commands that write no run directory.
    """
    found = list(not_plain(config.plain())) or list(_problems(config, needs_out))  # which looks at plain values alone
    refuse(found, "the configuration")


def _problems(config: RunConfig, needs_out: bool) -> Iterator[str]:
    """Yield the problems: missing options first, then the others in the order of the options."""
    yield from _missing(config, needs_out)
    yield from config.data.problems()
    yield from _adapters(config)
    yield from _evaluation(config)
    yield from _of_each_training(config, _training)
    yield from _of_each_training(config, lambda prefix, options: _sharded(config.optimizer, prefix, options))
    if config.resolved_pairing() is not None:
        yield from _even(config)
    yield from _needs(config)
    yield from out_of_range("checkpoint", config.checkpoint, _CHECKPOINT)


def _of_each_training(config: RunConfig, problems: Callable[[str, TrainingOptions], Iterator[str]]) -> Iterator[str]:
    """Yield the problems of the target's training, and those that only the reference's training has.

    problems  (prefix of the options, options in force) -> one sentence for each problem
    """
    yield from problems("training", config.training)
    inherited = set(problems("reference.training", config.training))
    yield from (
        p
        for p in problems("reference.training", inherit(config.training, config.reference.training))
        if p not in inherited
    )


def _training(prefix: str, options: TrainingOptions) -> Iterator[str]:
    yield from out_of_range(prefix, options, _TRAINING)
    yield from _shard_group(prefix, options)
    yield from _micro_batches(prefix, options)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


MAX_LEARNING_RATE = 1e30
"""Optimizers multiply the rate, and weights are float32, which ends at 3.4e38: beyond that torch raises in the step."""

_TRAINING: tuple[Check, ...] = (
    ("global_batch_size", at_least_1, "at least 1"),
    ("micro_batch_size", at_least_1, "at least 1, or null"),
    ("micro_batch_tokens", at_least_1, "at least 1, or null"),
    ("learning_rate", lambda v: 0 < v <= MAX_LEARNING_RATE, f"above 0, at most {MAX_LEARNING_RATE:g}"),
    ("weight_decay", lambda v: math.isfinite(v) and v >= 0, "0 or more"),
    ("betas", lambda v: all(0 <= beta < 1 for beta in v), "two numbers in [0, 1)"),
    ("eps", _positive, "above 0"),
    ("warmup_ratio", lambda v: 0 <= v <= 1, "in [0, 1]"),
    ("max_grad_norm", lambda v: math.isfinite(v) and v >= 0, "0 (no clipping) or more"),
    ("epochs", _positive, "above 0"),
    ("max_steps", at_least_1, "at least 1, or null"),
    ("shard_group_size", at_least_1, "at least 1, or null (the ranks of a node)"),
    ("length_groups", at_least_1, "at least 1, or null"),
    ("chunk_size", at_least_1, "at least 1, or null"),
    ("timeout", _positive, "above 0 (seconds)"),
)
_LORA: tuple[Check, ...] = (
    ("r", lambda v: v >= 0, "at least 1, or null or 0 (no adapters)"),
    ("lora_alpha", _positive, "above 0"),
    ("lora_dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("target_modules", lambda v: len(v) > 0, "all-linear, names of modules [q_proj, v_proj], or a regular expression"),
)
_CHECKPOINT: tuple[Check, ...] = (
    ("every", lambda v: v >= 0, "a number of steps, 0 (none) or null (chosen)"),
    ("keep", at_least_1, "at least 1: a run resumes from it"),
)


def _micro_batches(prefix: str, options: TrainingOptions) -> Iterator[str]:
    """Yield a problem for options of micro-batches that exclude each other."""
    if options.micro_batch_size is not None and options.micro_batch_tokens is not None:
        yield (
            f"{prefix}.micro_batch_size ({options.micro_batch_size}) and {prefix}.micro_batch_tokens "
            f"({options.micro_batch_tokens}) exclude each other: a micro-batch is limited by its examples or by its "
            f"tokens; set --{prefix}.micro_batch_size null, or leave micro_batch_tokens out"
        )
    if options.length_groups is not None and options.padding_free is True:
        yield (
            f"{prefix}.length_groups ({options.length_groups}) and {prefix}.padding_free true exclude each other: "
            f"without padding there are no groups; set --{prefix}.length_groups null, or leave padding_free out"
        )


def _missing(config: RunConfig, needs_out: bool) -> Iterator[str]:
    if needs_out and not config.out:
        yield "out is missing: name the run directory, --out runs/NAME"
    if not config.model.path:
        yield "model.path is missing: name a Hugging Face hub id or a directory, --model.path NAME"


def _evaluation(config: RunConfig) -> Iterator[str]:
    if _held_out(config):
        return
    if config.checkpoint.keep_best:
        yield (
            "checkpoint.keep_best is true, but there are no held-out rows, so no evaluation is the best; set "
            "data.eval or data.eval_fraction, or leave keep_best out"
        )
    for callback in config.callbacks:
        if isinstance(callback, Evaluate) and callback.every is not None:
            yield (
                f"callbacks: Evaluate(every={callback.every}) has nothing to evaluate; "
                "set data.eval or data.eval_fraction, or remove the callback"
            )


def _held_out(config: RunConfig) -> bool:
    return config.data.eval is not None or config.data.eval_fraction is not None


def _even(config: RunConfig) -> Iterator[str]:
    for name in ("global_batch_size", "micro_batch_size"):
        size = getattr(config.training, name)
        if size is not None and size >= 1 and size % 2:
            yield (
                f"training.{name} is {size}, and pairing needs an even number (pairs are never cut apart); "
                f"use {size + 1}, or --pairing null with an objective that does not mix"
            )


# -------------------------------------------------------------------------------------- what components need

_OTHER = "or another --confidence"
_REMEDIES = {
    Need.RESPONSE_ALONE: "use --reference TrainedReference with reference.response_alone true and a number or list of "
    f"reference.checkpoints, {_OTHER}",
    Need.CORRECT: f"use --reference TrainedReference with a number of reference.checkpoints, {_OTHER}",
    Need.BEFORE_TRAINING: "use --reference TrainedReference and a list of reference.checkpoints with 0 and two later "
    f"places, such as [0, 0.33, 1], {_OTHER}",
    Need.PAIRS: "pairing is null; use --pairing auto, or --objective NTP",
    Need.FIRST_SPLIT: "use --objective SFTMix with objective.ntp_on all, or --reference TrainedReference",
    Need.HELD_OUT: "set data.eval or data.eval_fraction, or remove the callback",
    Need.EVALUATIONS: "put Evaluate first: --callbacks Evaluate --callbacks+ EarlyStopping",
}


def _needs(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each thing that a component needs, and nothing in this configuration gives."""
    pairs, reference = config.resolved_pairing() is not None, config.reference
    source = _named("reference", reference)
    confident = pairs and Need.CONFIDENCE in config.splitter.needs
    online = confident and Need.TARGET_LOSSES in reference.needs
    if confident:
        yield from _missing_needs("confidence", config.confidence, reference.gives, source)
        yield from _too_few_checkpoints(config)
    if online and config.training.max_steps is None and config.training.epochs <= 1:
        yield (
            f"{source} splits each epoch by the losses of the one before, but training.epochs is "
            f"{config.training.epochs:g}; allowed: above 1"
        )
    given = {Need.BATCH_NLL, *([Need.PAIRS] if pairs else []), *([] if online else [Need.FIRST_SPLIT])}
    yield from _missing_needs("objective", config.objective, given, source if online else "this run")
    held_out = {Need.HELD_OUT} if _held_out(config) else set()
    for place, callback in enumerate(config.callbacks):
        before = [need for other in config.callbacks[:place] for need in other.gives]
        yield from _missing_needs("callbacks:", callback, {*held_out, *before}, "this run")
    others = [("callbacks:", callback, "remove the callback") for callback in config.callbacks]
    for name, component, other in [("optimizer", config.optimizer, "use --optimizer AdamW"), *others]:
        if component.package is not None and importlib.util.find_spec(component.package) is None:
            package = component.package
            yield f"{name} {type(component).__name__} needs the package {package}: pip install {package}, or {other}"


def _missing_needs(name: str, component: Component, given: Container[Need], by: str) -> Iterator[str]:
    for need in sorted(component.needs):
        if need not in given:
            yield f"{_named(name, component)} needs {need}, which {by} does not give; {_REMEDIES[need]}"


def _too_few_checkpoints(config: RunConfig) -> Iterator[str]:
    reference, needed = config.reference, config.confidence.least_checkpoints
    options = inherit(config.training, reference.training)
    most = reference.most_checkpoints(options.epochs if options.max_steps is None else None)
    if most is not None and most < needed:
        yield (
            f"confidence {type(config.confidence).__name__} needs {counted(needed, 'checkpoint')}, but "
            f"{_named('reference', reference)} has {most}; use --reference TrainedReference with more "
            f"reference.checkpoints (online: more epochs), {_OTHER}"
        )


def _named(kind: str, component: Component) -> str:
    """Name a component, with those of its options that decide what it needs or gives."""
    options = component.spec()["init_args"]
    deciding = [name for name in ("response_alone", "checkpoints", "ntp_on") if name in options]
    shown = [f"{kind}.{name} {options[name]}" for name in deciding]
    return f"{kind} {type(component).__name__}" + (f" ({', '.join(shown)})" if shown else "")


def _lora(prefix: str, lora: LoraOptions, parallel: str) -> Iterator[str]:
    """Yield the problems of one group of adapter options; `parallel` is training.parallel of their stage."""
    yield from out_of_range(prefix, lora, _LORA)
    if not lora.r:
        default = LoraOptions()
        names = [f.name for f in fields(lora) if f.name != "r" and getattr(lora, f.name) != getattr(default, f.name)]
        rank = "null" if lora.r is None else lora.r
        for name in names:
            yield (
                f"{prefix}.{name} is {getattr(lora, name)!r}, but {prefix}.r is {rank}: "
                f"without a rank there are no adapters; set --{prefix}.r 16, or leave {name} out"
            )
    elif lora.quantize is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            yield (
                f"{prefix}.quantize is {lora.quantize}, which needs the package bitsandbytes: "
                "pip install bitsandbytes, or set it to null"
            )
        if parallel in SHARDED:
            yield quantized_shards(lora, f"training.parallel {parallel}", prefix)


def quantized_shards(lora: LoraOptions, parallel: str, prefix: str = "model.lora") -> str:
    """Return the sentence that refuses QLoRA under FSDP; `parallel` names the option with its value."""
    return (
        f"{prefix}.quantize {lora.quantize} and {parallel} exclude each other: quantised weights are not "
        "sharded. Use --training.parallel ddp, or set quantize to null"
    )


def _adapters(config: RunConfig) -> Iterator[str]:
    yield from _lora("model.lora", config.model.lora, config.training.parallel)
    model, options = config.reference.model, inherit(config.training, config.reference.training)
    if model is not None and model.lora is not None:
        yield from _lora("reference.model.lora", model.lora, options.parallel)


def _sharded(optimizer: Optimizer, prefix: str, options: TrainingOptions) -> Iterator[str]:
    if options.parallel in SHARDED and Need.WHOLE_WEIGHTS in optimizer.needs:
        yield sharded_optimizer(optimizer, f"{prefix}.parallel {options.parallel}")


def sharded_optimizer(optimizer: Optimizer, parallel: str) -> str:
    """Return the sentence that refuses an optimizer under fsdp or hsdp; `parallel` names the option with its value."""
    return (
        f"optimizer {type(optimizer).__name__} and {parallel} exclude each other: it cannot update weights that ranks "
        "share. Use parallel ddp, or --optimizer AdamW"
    )


def refuse_sharded(optimizer: Optimizer, lora: LoraOptions, parallel: str) -> None:
    """Raise ConfigError for an optimizer or adapters that ranks cannot share; `parallel` names the option."""
    if Need.WHOLE_WEIGHTS in optimizer.needs:
        raise ConfigError(sharded_optimizer(optimizer, parallel))
    if lora.quantize:
        raise ConfigError(quantized_shards(lora, parallel))


def _shard_group(prefix: str, options: TrainingOptions) -> Iterator[str]:
    if options.shard_group_size is not None and options.parallel != "hsdp":
        yield (
            f"{prefix}.shard_group_size is {options.shard_group_size}, which only hsdp knows, but the "
            f"stage has parallel {options.parallel}; use --{prefix}.parallel hsdp, or set shard_group_size to null"
        )
