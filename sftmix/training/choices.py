"""What is decided for a stage in the place of auto: the plan of its steps, compiled layers; alike on all ranks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from sftmix.options.training import SHARDED, TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.footprint import Footprint, Workload, kept_by_forward, workload_of
from sftmix.training.gpus import GPUS, gpu_named
from sftmix.training.machine import DECIDED, Machine, decided_before, machine_of
from sftmix.training.memory import free_memory, room
from sftmix.training.numbers import Count, layers_of
from sftmix.training.parallel import check_compiler, pads, prepare_layers, resolve_parallel, unwrap
from sftmix.training.plan import by_cost, imitated, parallels_of, said, shares_rows, step_plans
from sftmix.training.step import Stage, StepSetup

Say = Callable[[str], object]

COMPILING = 20.0
"""Seconds that compiling takes, which it must save."""
SAVED_BY_FLOP = 4.6e-16
SAVED_BY_PASS = 3e-3
"""Seconds that compiled layers save of each FLOP, and of each layer in a step. By them an H200's measured speeds are
those of 1.2B: 141 TFLOP/s and 275 compiled at 2,230 tokens a step, 378 and 505 at 32,768."""


def plan_wrapping(stage: Stage, precision: str, world: World, recorded: Sequence[Machine], say: Say) -> TrainingOptions:
    """Return the options of a stage with what `wrap` is given decided, on several GPUs. All ranks call it.

    The model is followed on fake tensors, by rank 0; a model that cannot be followed is sharded by fsdp. A stage that
    goes on is laid out as the machine that was recorded last had it, as in `decide`.
    """
    options = stage.options
    given = (options.parallel, options.reshard_after_forward)
    if world.device.type == "cpu" or world.size == 1 or "auto" not in given or given[0] == "ddp":
        return options
    free = -world.max(-free_memory(world.device))  # the least of all ranks
    odd = world.local_rank != world.rank % world.local_size or world.size % world.local_size
    by_node = not world.max(odd) and world.max(world.local_size) == -world.max(-world.local_size)
    parts = (stage.data, stage.order, stage.objective, stage.optimizer, _asked(options, world))
    work = Workload(stage.model, *parts, precision, world)

    def chosen() -> tuple[Any, str]:
        among = parallels_of(options, world, by_node=by_node)
        try:
            memories = imitated(stage.model, work, among)
        except Exception as error:  # models of strangers raise anything
            return (resolve_parallel(options.parallel, world), True), f"the model cannot be followed: {error}"
        held = sum(one.nbytes for one in stage.model.parameters())
        beside = {name: free - held / memory.shards - memory.teacher for name, memory in memories.items()}
        padded = not shares_rows(options, stage.attention, world.device) and len({*stage.data.lengths.tolist()}) > 1
        found, line = planned(work, memories, beside, recorded, padded=padded)
        return (found.parallel, found.reshard_after_forward), line

    (parallel, reshard), line = world.from_main(chosen)
    say(f"weights are laid out for {line}")
    return replace(options, parallel=parallel, reshard_after_forward=reshard if parallel in SHARDED else "auto")


def decide(setup: StepSetup, recorded: Sequence[Machine], say: Say) -> None:
    """Put a decision in the place of each auto of the stage, and prepare its layers so. All ranks call it.

    A stage that goes on, on the machine that was recorded last, has what was decided there: on a GPU while it fits. On
    a CPU layers are neither recomputed nor compiled. How ranks share the weights, and whether examples share a row, was
    decided with the module; it is written down here. Says what was decided.

    recorded  the machines that made the steps so far
    """
    stage, world = setup.stage, setup.world
    options, kind = _asked(stage.options, world), world.device.type
    laid_out: dict[str, Any] = {
        "padding_free": unwrap(setup.module).padding_free,
        "parallel": resolve_parallel(options.parallel, world),
        "reshard_after_forward": options.reshard_after_forward is not False,
    }
    if laid_out["parallel"] not in SHARDED:
        laid_out["reduce_each_micro_batch"] = False
    options = replace(options, **laid_out)
    auto = [name for name in DECIDED if getattr(options, name) == "auto"]
    had = world.share(decided_before(recorded, machine_of(world, options)))
    if ("micro_batch_tokens" in auto and not had) or (kind != "cpu" and auto not in ([], ["compile"])):
        work, free, parallel = workload_of(setup)._replace(options=options), room(setup), laid_out["parallel"]
        memories, padded = {parallel: Footprint(work)}, pads(setup.module, stage.data.lengths)
        options, line = world.share(planned(work, memories, {parallel: free}, recorded, padded=padded))
        if kind != "cpu":
            say(f"steps are {line}")
        if "micro_batch_tokens" in auto and not had:
            say(f"training.micro_batch_tokens auto is {options.micro_batch_tokens}")
    else:
        options = replace(options, **had)
    options = replace(options, compile=_compiles(setup, options.compile, say))
    layers: dict[str, Any] = {
        "activation_checkpointing": options.activation_checkpointing is True,
        "reduce_each_micro_batch": options.reduce_each_micro_batch is True,
    }
    setup.stage = replace(stage, options=replace(options, **layers))
    prepare_layers(unwrap(setup.module).model, setup.stage.options)


def planned(
    work: Workload,
    memories: Mapping[str, Footprint],
    free: Mapping[str, float],
    recorded: Sequence[Machine],
    *,
    padded: bool,
) -> tuple[TrainingOptions, str]:
    """Return the options with a plan, and a line that says which.

    It is the plan that was recorded on this machine if it fits, and else the cheapest. Arguments as those of `plans`.
    """
    line = ""
    machine = machine_of(work.world, work.options)
    name = gpu_named(str(machine.get("device"))) if work.precision == "bf16" else None  # the peaks are bf16's
    gpu = GPUS[name] if name else None
    if had := decided_before(recorded, machine):
        options = replace(work.options, **had)
        among: dict[str, Footprint] = {name: one for name, one in memories.items() if name == options.parallel}
        kept = step_plans(among, work._replace(options=options), free, padded=padded, gpu=gpu)
        if any(plan.need <= plan.free for plan in kept):  # also with less room than it was made for
            return options, f"as recorded: {kept[0]}"
        line = "not as recorded, for which there is too little memory now: "
    found = step_plans(memories, work, free, padded=padded, gpu=gpu)
    return by_cost(found)[0].decided(work.options), line + said(found)


def _asked(options: TrainingOptions, world: World) -> TrainingOptions:
    """Return the options with auto for the tokens of a micro-batch, if null means it on the device."""
    return replace(options, micro_batch_tokens=options.limits(world.device.type)[1])


def _compiles(setup: StepSetup, asked: bool | str, say: Say) -> bool:
    """Return True to compile the layers: as asked, or (auto) on CUDA for enough work, if they become one graph."""
    if asked != "auto":  # or the machine that was recorded last has decided
        return bool(asked)
    saved = saved_by_compiling(setup)
    if setup.world.device.type != "cuda" or saved <= COMPILING:
        return False
    problem = compile_problem(setup)
    why = problem or f"it saves about {saved:.0f} s and takes {COMPILING:.0f}"
    name = type(unwrap(setup.module).model).__name__
    say(f"layers of {name} are {'not ' if problem else ''}compiled (training.compile auto): {why}")
    return not problem


def saved_by_compiling(setup: StepSetup) -> float:
    """Return the seconds of the stage that compiled layers save on a GPU, in one pass a step."""
    layers, steps = len(layers_of(unwrap(setup.module).model)), setup.stage.order.total_steps
    return SAVED_BY_FLOP * flops_of(setup) + SAVED_BY_PASS * layers * steps


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


def compiled(options: TrainingOptions, say: Say) -> dict[str, float]:
    """Return, and say, the seconds for which torch has compiled in this process; nothing without compiled layers."""
    if not options.compile:
        return {}
    from torch._dynamo.utils import calculate_time_spent  # takes a second to import

    seconds = calculate_time_spent().get("total_wall_time", 0.0)
    say(f"torch has compiled for {seconds:.1f} s in this process")
    return {"compile_seconds": seconds}
