"""Checks of a configuration that need neither rows nor a model: one sentence per problem."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import fields

from sftmix.common.errors import ConfigError, refuse
from sftmix.common.figures import counted
from sftmix.common.plain import not_plain
from sftmix.components.base import Optimizer, Reference, plain
from sftmix.components.callbacks import EarlyStopping, Evaluate
from sftmix.config.run_config import RunConfig
from sftmix.options import (
    SHARDED,
    Check,
    LoraOptions,
    ReferenceModel,
    ReferenceTraining,
    TrainingOptions,
    at_least_1,
    inherit,
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
    pairs = config.resolved_pairing() is not None
    yield from _missing(config, needs_out)
    yield from config.data.problems()
    yield from _adapters(config)
    yield from _evaluation(config)
    yield from _of_each_training(config, _training)
    yield from _optimizer(config)
    yield from _pairs(config, pairs)
    yield from _reference(config, pairs)
    yield from out_of_range("checkpoint", config.checkpoint, _CHECKPOINT)


def _of_reference(config: RunConfig) -> TrainingOptions:
    """Return the options that the reference is trained with: its own, and the run's where it sets none."""
    own = getattr(config.reference, "training", None)
    return inherit(config.training, own if isinstance(own, ReferenceTraining) else None)


def _of_each_training(config: RunConfig, problems: Callable[[str, TrainingOptions], Iterator[str]]) -> Iterator[str]:
    """Yield the problems of the target's training, and those that only the reference's training has.

    problems  (prefix of the options, options in force) -> one sentence for each problem
    """
    yield from problems("training", config.training)
    inherited = set(problems("reference.training", config.training))
    yield from (p for p in problems("reference.training", _of_reference(config)) if p not in inherited)


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
    yield from _early_stopping(config)
    for callback in config.callbacks:
        if callback.package is not None and importlib.util.find_spec(callback.package) is None:
            yield (
                f"callbacks: {type(callback).__name__} needs the package {callback.package}: "
                f"pip install {callback.package}, or remove the callback"
            )
    if config.data.eval is None and config.data.eval_fraction is None:
        if config.checkpoint.keep_best:
            yield (
                "checkpoint.keep_best is true, but there are no held-out rows, so no evaluation is the best; set "
                "data.eval or data.eval_fraction, or leave keep_best out"
            )
        for callback in config.callbacks:
            if callback.needs_held_out:
                yield (
                    f"callbacks: {type(callback).__name__} needs held-out rows; set data.eval or data.eval_fraction, "
                    "or remove the callback"
                )
            if isinstance(callback, Evaluate) and callback.every is not None:
                yield (
                    f"callbacks: Evaluate(every={callback.every}) has nothing to evaluate; "
                    "set data.eval or data.eval_fraction, or remove the callback"
                )


def _early_stopping(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each EarlyStopping with no callback before it that could evaluate."""
    for place, callback in enumerate(config.callbacks):
        before = config.callbacks[:place]
        if isinstance(callback, EarlyStopping) and not any(other.evaluates for other in before):
            names = ", ".join(type(other).__name__ for other in before)
            yield (
                "callbacks: EarlyStopping decides on the evaluations of the callbacks before it, and there are none"
                f"{f' (before it: {names})' if names else ''}; "
                "put Evaluate first: --callbacks Evaluate --callbacks+ EarlyStopping"
            )


def _pairs(config: RunConfig, pairs: bool) -> Iterator[str]:
    if config.objective.mixes and not pairs:
        yield (
            f"objective {type(config.objective).__name__} mixes pairs, but pairing is null; "
            "use --pairing auto, or --objective NTP"
        )
    if pairs:
        for name in ("global_batch_size", "micro_batch_size"):
            size = getattr(config.training, name)
            if size is not None and size >= 1 and size % 2:
                yield (
                    f"training.{name} is {size}, and pairing needs an even number (pairs are never cut apart); "
                    f"use {size + 1}, or --pairing null with an objective that does not mix"
                )


def _reference(config: RunConfig, pairs: bool) -> Iterator[str]:
    if pairs and config.splitter.needs_confidence:
        yield from _confidence(config)
        if config.reference.single_run:
            yield from _single_run(config)


def _confidence(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each part of the dynamics that the confidence needs and the reference lacks."""
    reference, confidence = config.reference, f"confidence {type(config.confidence).__name__}"
    if config.confidence.needs_response_alone and not reference.gives_response_alone:
        yield (
            f"{confidence} compares each response with and without its instruction, but "
            f"{_as_set(reference, 'response_alone', 'checkpoints')} does not score responses alone; use --reference "
            "TrainedReference with reference.response_alone true and a number or list of reference.checkpoints, or "
            "another --confidence"
        )
    if config.confidence.needs_correct and not reference.gives_correct:
        yield (
            f"{confidence} needs the number of correct tokens, which the online losses of "
            f"{_as_set(reference, 'checkpoints')} do not have; use --reference TrainedReference with a number of "
            "reference.checkpoints, or another --confidence"
        )
    if config.confidence.needs_before_training and not reference.gives_before_training:
        yield (
            f"{confidence} compares with the perplexity before training, but "
            f"{_as_set(reference, 'checkpoints')} does not score there; use --reference TrainedReference and a list of "
            "reference.checkpoints with 0 and two later places, such as [0, 0.33, 1], or another --confidence"
        )
    most, needed = reference.most_checkpoints(_reference_epochs(config)), config.confidence.needs_checkpoints
    if most is not None and most < needed:
        yield (
            f"{confidence} needs {counted(needed, 'checkpoint')}, but {_as_set(reference, 'checkpoints')} has "
            f"{most}; use --reference TrainedReference with more reference.checkpoints (online: more epochs), or "
            "another --confidence"
        )


def _as_set(reference: Reference, *options: str) -> str:
    """Name the reference with those of the options that it has."""
    found = [f"reference.{name} {plain(getattr(reference, name))}" for name in options if hasattr(reference, name)]
    return f"reference {type(reference).__name__}" + (f" ({', '.join(found)})" if found else "")


def _reference_epochs(config: RunConfig) -> float | None:
    """Return the epochs that the reference is trained; None if its length is given in steps."""
    options = _of_reference(config)
    return options.epochs if options.max_steps is None else None


def _single_run(config: RunConfig) -> Iterator[str]:
    """Yield the problems of a run whose first epoch has neither pairs nor groups."""
    name, objective, training = type(config.reference).__name__, config.objective, config.training
    if training.max_steps is None and training.epochs <= 1:
        yield (
            f"reference {name} splits each epoch by the losses of the one before, but training.epochs is "
            f"{training.epochs:g}; allowed: above 1"
        )
    if getattr(objective, "ntp_on", "all") != "all":
        yield (
            f"reference {name} has no split in the first epoch, so objective.ntp_on must be all, not "
            f"{objective.ntp_on!r}"  # type: ignore[attr-defined]
        )
    if not objective.trains_unpaired:
        yield (
            f"reference {name} has no pairs in the first epoch, in which objective {type(objective).__name__} would "
            "train nothing; use --objective SFTMix, or --reference TrainedReference"
        )


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
    model = getattr(config.reference, "model", None)
    if isinstance(model, ReferenceModel) and model.lora is not None:
        yield from _lora("reference.model.lora", model.lora, _of_reference(config).parallel)


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.package is not None and importlib.util.find_spec(optimizer.package) is None:
        yield (
            f"optimizer {type(optimizer).__name__} needs the package {optimizer.package}: "
            f"pip install {optimizer.package}, or use --optimizer AdamW"
        )
    yield from _of_each_training(config, lambda prefix, options: _sharded(optimizer, prefix, options))


def _sharded(optimizer: Optimizer, prefix: str, options: TrainingOptions) -> Iterator[str]:
    if options.parallel in SHARDED and not optimizer.shards:
        yield sharded_optimizer(optimizer, f"{prefix}.parallel {options.parallel}")


def sharded_optimizer(optimizer: Optimizer, parallel: str) -> str:
    """Return the sentence that refuses an optimizer under fsdp or hsdp; `parallel` names the option with its value."""
    return (
        f"optimizer {type(optimizer).__name__} and {parallel} exclude each other: it cannot update weights that ranks "
        "share. Use parallel ddp, or --optimizer AdamW"
    )


def refuse_sharded(optimizer: Optimizer, lora: LoraOptions, parallel: str) -> None:
    """Raise ConfigError for an optimizer or adapters that ranks cannot share; `parallel` names the option."""
    if not optimizer.shards:
        raise ConfigError(sharded_optimizer(optimizer, parallel))
    if lora.quantize:
        raise ConfigError(quantized_shards(lora, parallel))


def _shard_group(prefix: str, options: TrainingOptions) -> Iterator[str]:
    if options.shard_group_size is not None and options.parallel != "hsdp":
        yield (
            f"{prefix}.shard_group_size is {options.shard_group_size}, which only hsdp knows, but the "
            f"stage has parallel {options.parallel}; use --{prefix}.parallel hsdp, or set shard_group_size to null"
        )
