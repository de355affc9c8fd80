"""What auto means for a stage: micro-batches, recomputed and compiled layers. Decided once, alike on all ranks."""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from sftmix.components.component import Need
from sftmix.options.training import DEFAULT_MICRO_BATCH, TrainingOptions
from sftmix.training.footprint import (
    Count,
    Footprint,
    Workload,
    kept_by_forward,
    layers_of,
    layout_of,
    slots_of,
    workload_of,
)
from sftmix.training.machine import DECIDED, Machine, decided_before, machine_of
from sftmix.training.memory import room
from sftmix.training.parallel import PADDED_TOKENS, check_compiler, pads, prepare_layers, resolve_parallel, unwrap
from sftmix.training.step import StepSetup

USABLE = 0.9
"""Share of the free memory for which micro-batches are made: kernels have workspaces, and free memory has gaps."""

WORTH_COMPILING = 5e16
"""FLOPs of each rank, two minutes of an H100, from which layers are compiled: that takes 13 s for 16 layers."""


def decide(setup: StepSetup, recorded: Sequence[Machine], say: Callable[[str], object]) -> None:
    """Put a decision in the place of each auto of the stage, and prepare its layers so. All ranks call it.

    A stage that goes on, on the machine that was recorded last, has what was decided there. On a CPU layers are neither
    recomputed nor compiled. Whether examples share a row was decided with the module; it is written down here. Says
    what was decided, and what length groups cost a GPU.

    recorded  the machines that made the steps so far
    """
    stage, world, options = setup.stage, setup.world, setup.stage.options
    kind = world.device.type
    if options.limits(kind)[1] == "auto":  # as null is on a GPU
        options = replace(options, micro_batch_tokens="auto")
    laid_out: dict[str, Any] = {
        "padding_free": unwrap(setup.module).padding_free,
        "parallel": resolve_parallel(options.parallel, world),
    }
    machine = machine_of(world, replace(options, **laid_out))
    options = replace(options, **world.share(decided_before(recorded, machine)))
    auto = [name for name in DECIDED if getattr(options, name) == "auto"]
    if "micro_batch_tokens" in auto or (kind != "cpu" and "activation_checkpointing" in auto):
        work = workload_of(setup)
        options = world.share(settled(work, Footprint(work), room(setup)))  # those of rank 0
        if "micro_batch_tokens" in auto:
            say(f"training.micro_batch_tokens auto is {options.micro_batch_tokens}")
        if "activation_checkpointing" in auto and options.activation_checkpointing:
            say("layers are computed again in the backward: the micro-batch does not fit without that")
    options = replace(options, compile=_compiles(setup, options.compile, say))
    if kind != "cpu" and (options.length_groups or 1) > 1:
        say(
            f"training.length_groups {options.length_groups}: each micro-batch is up to so many passes, which cost a "
            "GPU more than the padding of short rows (steps of Alpaca's lengths took 3.6 times as long in 4 groups as "
            "padded, on an H200); leave it out, or set training.padding_free true"
        )
    options = replace(options, **laid_out, activation_checkpointing=options.activation_checkpointing is True)
    setup.stage = replace(stage, options=options)
    prepare_layers(unwrap(setup.module).model, options)


def settled(work: Workload, memory: Footprint, free: float) -> TrainingOptions:
    """Return the options of the stage with what `free` bytes decide in the place of auto.

    On a GPU activations are recomputed if the micro-batch that is asked for, or a pair, does not fit without that; not
    if the objective changes states of layers. A micro-batch has as many token slots as fit: at least those of a pair of
    the longest rows, at most those of a rank's part of a global batch of such rows, and at most PADDED_TOKENS of padded
    ones.
    """
    kind, options = work.world.device.type, work.options
    recompute, tokens = options.activation_checkpointing, options.micro_batch_tokens

    def fitting(most: int, recompute: bool) -> int:
        layout = layout_of(replace(options, activation_checkpointing=recompute), several=True)
        return memory.slots(USABLE * free, most=most, layout=layout)

    if recompute == "auto":
        asked = slots_of(work, options.micro_batch_size or 1)
        recompute = kind != "cpu" and Need.STATES not in work.objective.needs
        recompute = recompute and fitting(asked, False) < asked
    if options.limits(kind)[1] == "auto":
        most = slots_of(work, DEFAULT_MICRO_BATCH if math.isinf(free) else sys.maxsize)
        tokens = max(fitting(most, recompute is True), slots_of(work, 1))
        if pads(work.module, work.data.lengths):
            tokens = min(tokens, PADDED_TOKENS)
    return replace(options, activation_checkpointing=recompute, micro_batch_tokens=tokens)


def _compiles(setup: StepSetup, asked: bool | str, say: Callable[[str], object]) -> bool:
    """Return True if layers are to be compiled: as asked, or (auto) on CUDA for enough work, if they become one graph.

    Says what speaks against it, also where it was asked for: what breaks a graph runs as it is.
    """
    auto = asked == "auto"
    if not asked or asked != setup.stage.options.compile:  # the machine that was recorded last has decided
        return bool(asked)
    if auto and (setup.world.device.type != "cuda" or flops_of(setup) <= WORTH_COMPILING):
        return False
    problem = compile_problem(setup)
    compiled = not (auto and problem)
    if problem or auto:
        why = problem or f"{flops_of(setup):.1e} FLOPs of training on each GPU"
        say(
            f"layers of {type(unwrap(setup.module).model).__name__} are {'' if compiled else 'not '}compiled "
            f"(training.compile {asked}): {why}"
        )
    return compiled


def flops_of(setup: StepSetup) -> float:
    """Return the FLOPs of the stage on each rank: 4 for each number of the decoder and token, and 2 if it is trained.

    Embeddings, which are not multiplied with, count for the head, which is as large.
    """
    stage, numbers = setup.stage, Count(unwrap(setup.module).model.get_decoder().parameters())
    tokens = float(stage.data.lengths.mean()) * stage.options.global_batch_size * stage.order.total_steps
    return (4 * numbers.all + 2 * numbers.trained) * tokens / setup.world.size


def compile_problem(setup: StepSetup) -> str | None:
    """Return, on every rank, what speaks against compiled layers on any of them: no compiler, a graph break; or None.

    The first and the last layer are traced, without code being made, with what a forward of the longest row gives them.
    """
    model = unwrap(setup.module).model
    layers = layers_of(model)
    problems = [] if layers else [f"{type(model).__name__} names no decoder layers"]

    def trace(layer: nn.Module, args: Any, kwargs: Any) -> None:
        # No error leaves the forward: FSDP does not survive that, and other ranks would wait in a collective.
        try:
            check_compiler(setup.world.device)
            with torch.compiler.set_stance("default"):
                torch.compile(layer.forward, backend="eager", fullgraph=True, dynamic=True)(*args, **kwargs)
        except Exception as error:  # torch's compiler raises anything; ours, if there is none
            reason = str(error).strip().partition("\n")[0]
            problems.append(f"{type(layer).__name__} does not become one graph ({reason})")

    with ExitStack() as hooks:
        for layer in {*layers[:1], *layers[-1:]}:  # a set: a single layer is traced once
            hooks.enter_context(layer.register_forward_pre_hook(trace, with_kwargs=True))
        kept_by_forward(workload_of(setup), int(setup.stage.data.lengths.max()), nullcontext())
    return next(chain.from_iterable(setup.world.gather(problems)), None)


def compiled(options: TrainingOptions, say: Callable[[str], object]) -> dict[str, float]:
    """Return, and say, the seconds for which torch has compiled in this process; nothing without compiled layers."""
    if not options.compile:
        return {}
    from torch._dynamo.utils import calculate_time_spent  # takes a second to import

    seconds = calculate_time_spent().get("total_wall_time", 0.0)
    say(f"torch has compiled for {seconds:.1f} s in this process")
    return {"compile_seconds": seconds}
