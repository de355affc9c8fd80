"""Checks of a configuration that need neither rows nor a model: one sentence per problem."""

import importlib.util
import math
from collections.abc import Container, Iterator
from dataclasses import fields

from sftmix.components.base import Objective, Optimizer, PairSampler
from sftmix.components.callbacks import Evaluate
from sftmix.components.component import KEPT, Component, Need, all_parts, missing_package, to_builtin
from sftmix.config.merge import merge
from sftmix.config.run_config import RunConfig
from sftmix.config.wants import Wants, reads_scores
from sftmix.options.data import DataOptions
from sftmix.options.model import LoraOptions
from sftmix.options.ranges import Check, at_least_1, out_of_range
from sftmix.options.reference import inherit, reference_lora
from sftmix.options.training import OF_SHARDS, SHARDED, TrainingOptions
from sftmix.words.differing import differing
from sftmix.words.errors import refuse
from sftmix.words.fields import column_problems
from sftmix.words.given import spelling
from sftmix.words.shown import counted


def validate(config: RunConfig, *, needs_out: bool = True) -> None:
    """Check every option as far as possible without rows or a model; raise ConfigError with all problems.

    `needs_out=False` is for commands that write no run directory.
    """
    refuse(problems_of(config, needs_out=needs_out), "the configuration")


def problems_of(config: RunConfig, *, needs_out: bool) -> list[str]:
    """Return the problems that `validate` refuses."""
    stored = config.as_dict()
    problems = [
        f"{key} is {given!r}, which a file of the run gives back as {read!r}; give a value of the option's type"
        for key, given, read in differing(stored, to_builtin(merge({}, stored)))
    ]
    return problems or list(_problems(config, needs_out))  # 0 < '3' would raise there


def _problems(config: RunConfig, needs_out: bool) -> Iterator[str]:
    """Yield the problems: missing options first."""
    if needs_out and not config.out:
        yield "out is missing: name the run directory, --out runs/NAME"
    if not config.model.path:
        yield "model.path is missing: name a Hugging Face hub id or a directory, --model.path NAME"
    yield from config.data.problems()
    yield from _of_rows(config)
    reference, optimizer = config.reference, config.optimizer
    own = [*_training("", config.training, optimizer, config.model.lora), *_lora("model.lora", config.model.lora)]
    yield from own
    # inherited options are not in it: only what the reference has itself can exclude each other
    both = reference.training and (reference.training.epochs, reference.training.max_steps)
    if both and None not in both:
        yield (
            "reference.training.epochs {:g} and reference.training.max_steps {} exclude each other: a training ends "
            "after its epochs or after its steps; set one of them to null".format(*both)
        )
    training, lora = inherit(config.training, reference.training), reference_lora(config.model, reference.model)
    for problem in (*_training("reference.", training, optimizer, lora), *_lora("reference.model.lora", lora)):
        if problem.replace("reference.", "") not in own:  # of an inherited option, as training.eps is 0.0
            yield problem
    yield from _needs(config)
    yield from out_of_range("checkpoint", config.checkpoint, _CHECKPOINT)
    every, seconds = config.checkpoint.every, config.checkpoint.every_seconds
    if every is not None and seconds is not None:
        yield (
            f"checkpoint.every ({every}) and checkpoint.every_seconds ({seconds:g}) exclude each other: their "
            "distance is one of steps or one of time; set --checkpoint.every null, or leave every_seconds out"
        )


_OF_FORMATS = ("format",)
_OF_RENDERERS = ("template", "template_options", "thoughts", "special_tokens", "packing")


def _of_rows(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each option of the rows that says nothing beside a class that reads or renders them."""
    data = config.data
    yield from column_problems(config.row_format or data.format, data.columns or {})
    for part, names in ((config.row_format, _OF_FORMATS), (config.renderer, _OF_RENDERERS)):
        for name in names:
            value = getattr(data, name)
            if part and value != getattr(DataOptions, name):  # the class has the default
                yield f"{part.option} {part} and data.{name} ({value}) exclude each other: leave one out"
    given = config.reference._init_args
    template = given.get("template") or getattr(given.get("model"), "template", None)
    if config.renderer and template is not None:
        yield (
            f"renderer {config.renderer} and reference.template or reference.model.template ({template}) exclude each "
            "other: leave one out"
        )


# ------------------------------------------------------------------------------------------------ options


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


MAX_LEARNING_RATE = 1e30
"""Optimizers multiply the rate, and weights are float32, which ends at 3.4e38: beyond that torch raises in the step."""

_COUNTS = ("micro_batch_size", "max_steps", "shard_group_size", "length_groups", "chunk_size")
_TRAINING: tuple[Check, ...] = (
    ("global_batch_size", at_least_1, "at least 1"),
    *((name, at_least_1, "at least 1, or null") for name in _COUNTS),
    ("micro_batch_tokens", lambda v: v == "auto" or v >= 1, "at least 1, auto or null"),
    ("learning_rate", lambda v: 0 < v <= MAX_LEARNING_RATE, f"above 0, at most {MAX_LEARNING_RATE:g}"),
    ("weight_decay", _not_negative, "0 or more"),
    ("betas", lambda v: all(0 <= beta < 1 for beta in v), "two numbers in [0, 1)"),
    ("eps", _positive, "above 0"),
    ("warmup_ratio", lambda v: 0 <= v <= 1, "in [0, 1]"),
    ("max_grad_norm", _not_negative, "0 (no clipping) or more"),
    ("epochs", _positive, "above 0"),
    ("timeout", _positive, "above 0 (seconds)"),
)
_LORA = (
    ("r", lambda v: v >= 0, "at least 1, or null or 0 (no adapters)"),
    ("lora_alpha", _positive, "above 0"),
    ("lora_dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("target_modules", lambda v: len(v) > 0, "all-linear, names of modules [q_proj, v_proj], or a regular expression"),
)
_CHECKPOINT = (
    ("every", lambda v: v >= 0, "a number of steps, 0 (none) or null (chosen)"),
    ("every_seconds", _positive, "above 0, or null"),
    ("keep", at_least_1, "at least 1: a run resumes from it"),
)


def _training(of: str, options: TrainingOptions, optimizer: Optimizer, lora: LoraOptions) -> Iterator[str]:
    """Yield the problems of one group of training options, by themselves, with the optimizer and with adapters.

    of  "reference." for the reference's options
    """
    yield from out_of_range(f"{of}training", options, _TRAINING)
    if options.micro_batch_size is not None and options.micro_batch_tokens is not None:
        yield (
            f"{of}training.micro_batch_size ({options.micro_batch_size}) and {of}training.micro_batch_tokens "
            f"({options.micro_batch_tokens}) exclude each other: a micro-batch is limited by its examples or by its "
            f"tokens; set --{of}training.micro_batch_size null, or leave micro_batch_tokens out"
        )
    if options.length_groups is not None and options.padding_free is True:
        yield (
            f"{of}training.length_groups ({options.length_groups}) and {of}training.padding_free true exclude each "
            f"other: without padding there are no groups; set --{of}training.length_groups null, or leave padding_free "
            "out"
        )
    for name, of_any, having in OF_SHARDS:
        value = getattr(options, name)
        if value not in of_any and options.parallel not in having:
            yield (
                f"{of}training.{name} is {spelling(value)}, an option of {' and '.join(having)}, but the stage has "
                f"parallel {options.parallel}; use --{of}training.parallel {having[0]}, or leave {name} out"
            )
    if options.parallel in SHARDED:
        yield from _sharded(optimizer, lora, f"{of}training.parallel {options.parallel}", of)


def _lora(prefix: str, lora: LoraOptions) -> Iterator[str]:
    """Yield the problems of one group of adapter options."""
    yield from out_of_range(prefix, lora, _LORA)
    for option in fields(lora):
        name, value = option.name, getattr(lora, option.name)
        if not lora.r and name != "r" and value != option.default:
            yield (
                f"{prefix}.{name} is {value!r}, but {prefix}.r is {'null' if lora.r is None else lora.r}: "
                f"without a rank there are no adapters; set --{prefix}.r 16, or leave {name} out"
            )
    # looked up and not imported: options are checked before anything heavy is loaded
    if lora.r and lora.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        yield (
            f"{prefix}.quantize is {lora.quantize}, which needs the package bitsandbytes: "
            "pip install bitsandbytes, or set it to null"
        )


def refuse_sharded(optimizer: Optimizer, lora: LoraOptions, parallel: str) -> None:
    """Raise ConfigError for an optimizer or adapters that ranks cannot share; `parallel` names the option."""
    refuse(list(_sharded(optimizer, lora, parallel)), "the configuration")


def _sharded(optimizer: Optimizer, lora: LoraOptions, parallel: str, of: str = "") -> Iterator[str]:
    if Need.WHOLE_WEIGHTS in optimizer.needs:
        yield (
            f"optimizer {optimizer} and {parallel} exclude each other: it cannot update weights that "
            f"ranks share. Use --{of}training.parallel ddp, or --optimizer AdamW"
        )
    if lora.r and lora.quantize:
        yield (
            f"{of}model.lora.quantize {lora.quantize} and {parallel} exclude each other: quantised weights are not "
            f"sharded. Use --{of}training.parallel ddp, or set quantize to null"
        )


# -------------------------------------------------------------------------------------- what components need

_OTHER, _ROWS = "or another --confidence", "set data.eval or data.eval_fraction"
_SCORED = "use --splitter Median or Quantile, and a --reference that trains or scores models, as TrainedReference"
_REMEDIES = {
    **dict.fromkeys(KEPT, f"{_SCORED} with a number or list of reference.checkpoints"),
    Need.CONFIDENCE: "use --splitter Median or Quantile, or another --pairing",
    Need.RESPONSE_ALONE: "use --reference TrainedReference with reference.response_alone true and a number or list of "
    f"reference.checkpoints, or FromCheckpoints or FromEndpoint with reference.response_alone true, {_OTHER}",
    Need.CORRECT: f"use --reference TrainedReference with a number of reference.checkpoints, {_OTHER}",
    Need.BEFORE_TRAINING: "use --reference TrainedReference and a list of reference.checkpoints with 0 and two later "
    f"places, such as [0, 0.33, 1], {_OTHER}",
    Need.PAIRS: "pairing is null; use --pairing auto, or --objective NTP",
    Need.FIRST_SPLIT: "use --objective SFTMix with objective.ntp_on all, or --reference TrainedReference",
    Need.HELD_OUT: f"{_ROWS}, or remove the callback",
    Need.TOKEN_NLL: f"set reference.token_nll true, which the references that score have, {_OTHER}",
    Need.MIXED_HEAD_INPUTS: "leave the callback out, or use --objective SFTMix",
    Need.STATES: "set --training.activation_checkpointing false, or change the embeddings (layer 0)",
    Need.EVALUATIONS: "put Evaluate first: --callbacks Evaluate --callbacks+ EarlyStopping",
}


def _needs(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each thing that a component needs, and nothing in this configuration gives."""
    pairs = config.resolved_pairing()
    online = Wants(config).single_run
    if pairs is not None:
        yield from _of_pairing(config, pairs)
    yield from _of_scores(config)
    for part in all_parts(vars(config)):
        if problem := missing_package(part):
            yield f"{part.option} {part} {problem}, or choose another".lstrip()  # a Schedule has no option
    # the step gives BATCH_NLL, PROMPTS and TEACHER to any objective, and auto recomputes nothing if one needs STATES
    available = {
        Need.BATCH_NLL,
        Need.PROMPTS,
        Need.TEACHER,
        *([] if config.training.activation_checkpointing is True else [Need.STATES]),
    }
    available |= {*([] if pairs is None else [Need.PAIRS]), *([] if online else [Need.FIRST_SPLIT])}
    by = f"reference {config.reference}" if online else "this run"
    yield from _missing("objective", config.objective, available, by)
    yield from _of_inner(config.objective)
    # Sharded ranks do not give whole weights, which is another message.
    yield from _missing("optimizer", config.optimizer, {Need.WHOLE_WEIGHTS}, "this run")
    yield from _of_held_out_rows(config)


def _of_inner(objective: Objective) -> Iterator[str]:
    """Yield what an objective does not pass on of another one among its options."""
    for inner in (part for part in all_parts(objective) if isinstance(part, Objective)):
        if lacking := inner.needs - objective.needs:
            needs = ", ".join(sorted(lacking))
            yield f"objective {objective} holds {inner}, which needs {needs}: add to `needs` of {objective}"
        if Need.TEACHER in inner.needs and inner.teacher_decay != objective.teacher_decay:
            yield f"objective {objective} holds {inner}: set its teacher_decay to {inner.teacher_decay}, as {inner} has"


def _of_held_out_rows(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each evaluation without rows, and for each thing that a callback lacks."""
    held_out = config.data.eval is not None or config.data.eval_fraction is not None
    if config.checkpoint.keep_best and not held_out:
        yield f"checkpoint.keep_best is true, but there are no held-out rows to evaluate; {_ROWS}, or leave it out"
    available = {*config.objective.gives, *([Need.HELD_OUT] if held_out else [])}
    for callback in config.callbacks:
        if isinstance(callback, Evaluate) and callback.every is not None and not held_out:
            yield f"callbacks: Evaluate(every={callback.every}) has nothing to evaluate; {_ROWS}, or remove it"
        yield from _missing("callbacks:", callback, available, "this run")
        available |= callback.gives  # to the callbacks behind it


def _of_pairing(config: RunConfig, pairing: PairSampler) -> Iterator[str]:
    """Yield a problem for each thing that pairs lack: a confidence, its dynamics, and an even number of examples."""
    reference, training, wants = config.reference, config.training, Wants(config)
    available = _of_table(config) if wants.by_confidence else {Need.TEXTS}
    by = f"reference {reference}" if wants.by_confidence else f"splitter {config.splitter}"
    yield from _missing("splitter", config.splitter, {*available, Need.CONFIDENCE}, by)
    yield from _missing("pairing", pairing, available, by)
    if config.order is not None:
        yield (
            f"order {config.order} and pairing {pairing} exclude each other: an epoch with pairs has their order; "
            "use --pairing null with an objective that does not mix, or leave order out"
        )
    for name in ("global_batch_size", "micro_batch_size"):
        size = getattr(training, name)
        if size is not None and size >= 1 and size % 2:  # below 1 it is out of range, which is said before
            yield (
                f"training.{name} is {size}, and pairing needs an even number (pairs are never cut apart); "
                f"use {size + 1}, or --pairing null with an objective that does not mix"
            )
    within = getattr(pairing, "global_batch_size", training.global_batch_size)
    if within != training.global_batch_size:
        yield (
            f"pairing.global_batch_size is {within}, and training.global_batch_size "
            f"{training.global_batch_size}: partners are drawn within the global batches of the run; use equal numbers"
        )


def _of_table(config: RunConfig) -> set[Need]:
    """Return what the table of scores holds once there is a confidence."""
    states = {Need.MEAN_STATES} & config.reference.gives if Wants(config).by_dynamics else set()
    return {Need.TEXTS, Need.CONFIDENCE, *states}


def _of_scores(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each thing that order, selector and confidence lack of what a reference scores."""
    reference, training, wants = config.reference, config.training, Wants(config)
    late = [part for part in (config.order, config.selector) if part and reads_scores(part)]
    online = Need.TARGET_LOSSES in reference.needs and wants.by_dynamics
    available = {Need.TEXTS} if online else _of_table(config)
    for part in late:
        yield from _missing(part.option, part, available, f"reference {reference}")
    if wants.by_dynamics and (late or (wants.pairs and wants.by_confidence)):
        yield from confidence_problems(config)
        least, options = config.confidence.least_checkpoints, inherit(training, reference.training)
        most = reference.most_checkpoints(options.epochs if options.max_steps is None else None)
        if most is not None and most < least:
            yield (
                f"confidence {config.confidence} needs {counted(least, 'checkpoint')}, but reference "
                f"{reference} has {most}; use --reference TrainedReference with more "
                f"reference.checkpoints (online: more epochs), {_OTHER}"
            )


def confidence_problems(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each thing that the confidence needs, and the reference does not give."""
    gives = {Need.TEXTS, *config.reference.gives, *([Need.TOKEN_NLL] if config.reference.token_nll else [])}
    yield from _missing("confidence", config.confidence, gives, f"reference {config.reference}")


def _missing(name: str, component: Component, available: Container[Need], by: str) -> Iterator[str]:
    for need in sorted(component.needs):  # a set of texts has another order in each process
        if need not in available:
            remedy = _REMEDIES.get(need, "nothing can give it, so take it out of `needs`")
            yield f"{name} {component} needs {need}, which {by} does not give; {remedy}"
