"""What auto means for the layers of a stage: recomputed, compiled. Decided once, alike on all ranks, and recorded."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sftmix.common.errors import ConfigError
from sftmix.options import TrainingOptions
from sftmix.training.footprint import Numbers, kept_by_forward, layers_of, memory_of
from sftmix.training.gpus import GPUS, MFU, gpu_named
from sftmix.training.machine import Machine, chosen_before, machine_of
from sftmix.training.memory import room, settled
from sftmix.training.parallel import autocast, check_compiler, prepare_layers, unwrap
from sftmix.training.step import StepSetup

WORTH_COMPILING = 120
"""Seconds of training, as `estimate` counts them, from which layers are compiled: that takes 13 s for 16 layers."""


def choose(setup: StepSetup, recorded: Sequence[Machine], say: Callable[[str], object]) -> TrainingOptions:
    """Return the options of a stage with a choice in the place of auto, and prepare its layers so. All ranks call it.

    A stage that goes on, on the machine that was recorded last, has what was chosen there. On a CPU both are off.
    """
    world, on_gpu = setup.world, setup.world.device.type != "cpu"
    before = world.share(chosen_before(recorded, machine_of(world, setup.stage.options)))
    options = replace(setup.stage.options, **before)
    if options.activation_checkpointing == "auto":
        free = room(setup) if on_gpu else math.inf
        recompute = free < math.inf and settled(setup, memory_of(setup), free).activation_checkpointing is True
        options = replace(options, activation_checkpointing=world.max(recompute) > 0)
        if options.activation_checkpointing:
            say("layers are computed again in the backward: the micro-batch does not fit without that")
    if options.compile == "auto":
        seconds = seconds_of(setup) if world.device.type == "cuda" else 0.0
        problem = compile_problem(setup) if seconds > WORTH_COMPILING else ""
        options = replace(options, compile=problem is None)
        if problem != "":
            how = f"not compiled: {problem}" if problem else f"compiled, for {seconds / 60:.0f} minutes of training"
            say(f"layers are {how} (training.compile auto)")
    prepare_layers(unwrap(setup.module).model, options)
    return options


def seconds_of(setup: StepSetup) -> float:
    """Return what the stage takes by FLOPs alone: 4 for each number and token, and 2 if it is trained.

    A GPU that is not known counts as the slowest that is.
    """
    stage, world, numbers = setup.stage, setup.world, Numbers(unwrap(setup.module).model)
    head = numbers.head.numel()
    tokens = float(stage.data.lengths.mean()) * stage.options.global_batch_size * stage.order.total_steps
    flops = 4 * (numbers.layers.all + head) + 2 * (numbers.layers.trained + head * numbers.head_trains)
    name = gpu_named(torch.cuda.get_device_name(world.device))
    peak = GPUS[name][0] if name else min(peak for peak, *_ in GPUS.values())
    return flops * tokens / (peak * 1e12 * MFU * world.size)


def compile_problem(setup: StepSetup) -> str | None:
    """Return, on every rank, what speaks against compiled layers on any of them: no compiler, a graph break; or None.

    The first and the last layer are traced, without code being made, with what a forward of the longest row gives them.
    """
    module, taken = setup.module, dict[nn.Module, Any]()
    model, longest = unwrap(module).model, int(setup.stage.data.lengths.max())
    layers = layers_of(model)
    device = next(model.parameters()).device

    def take(layer: nn.Module, args: Any, kwargs: Any) -> None:
        taken[layer] = args, kwargs

    hooks = [layer.register_forward_pre_hook(take, with_kwargs=True) for layer in [*layers[:1], *layers[1:][-1:]]]
    kept_by_forward(setup, longest, nullcontext())
    for hook in hooks:
        hook.remove()
    problem = None if taken else f"{type(model).__name__} names no decoder layers"
    for layer, (args, kwargs) in taken.items():
        if isinstance(layer, FSDPModule):
            layer.unshard()
        # No rank leaves the others in a collective: what fails here is a message.
        try:
            check_compiler(device)
            with autocast(module, setup.precision, device):
                torch.compile(layer.forward, backend="eager", fullgraph=True, dynamic=True)(*args, **kwargs)
        except ConfigError as error:
            problem = str(error)
        except Exception as error:  # torch's compiler raises anything
            problem = f"{type(layer).__name__} does not become one graph ({str(error).strip().partition(chr(10))[0]})"
        if isinstance(layer, FSDPModule):
            layer.reshard()
    return next(filter(None, setup.world.gather(problem)), None)


def compiled(options: TrainingOptions, say: Callable[[str], object]) -> dict[str, float]:
    """Return, and say, the seconds for which torch has compiled in this process; nothing without compiled layers."""
    if not options.compile:
        return {}
    from torch._dynamo.utils import calculate_time_spent  # takes a second to import

    seconds = calculate_time_spent().get("total_wall_time", 0.0)
    say(f"torch has compiled for {seconds:.1f} s in this process")
    return {"compile_seconds": seconds}
