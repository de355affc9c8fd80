"""What auto means: recomputed and compiled layers, decided once, alike on all ranks, and kept when a stage goes on."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from sftmix.batches.order import Slot
from sftmix.components import NTP, AdamW
from sftmix.components.others.places import ManifoldMixup
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training import choices
from sftmix.training.choices import COMPILING, compile_problem, decide, flops_of, saved_by_compiling
from sftmix.training.footprint import Footprint, StepLayout, workload_of
from sftmix.training.loop import train
from sftmix.training.machine import decided_before, machine_of
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import training_module
from sftmix.training.plan import USABLE
from sftmix.training.step import StepSetup
from tests.forked import on_ranks
from tests.toy import FixedOrder, toy_model, toy_rows, toy_stage

DATA = toy_rows([(3, 5), (7, 2), (20, 12), (4, 4)])
PAIRS = [(Slot(0), Slot(1)), (Slot(2), Slot(3))]
GPU = World(device=torch.device("cuda", 0))
AUTO = {"activation_checkpointing": "auto", "compile": "auto"}
OFF = {"activation_checkpointing": False, "compile": False}
LAID_OUT = {"padding_free": False, "parallel": "none", "reshard_after_forward": True, "reduce_each_micro_batch": False}

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


def silent(text: str) -> None: ...


def chosen(setup: StepSetup, recorded: Sequence[Any] = (), say: Callable[[str], object] = silent) -> TrainingOptions:
    """The options after `decide`, on a copy of the setup."""
    setup = replace(setup)
    decide(setup, recorded, say)
    return setup.stage.options


@pytest.fixture
def stage(tmp_path):
    options = {"micro_batch_size": None}
    return toy_stage(tmp_path, [PAIRS] * 3, model=toy_model(dtype=torch.float32), data=DATA, options=options)


def setup_of(stage, world: World | None = None) -> StepSetup:
    return StepSetup(stage, TrainingModule(stage.model), None, "fp32", world or World())  # type: ignore[arg-type]


def test_on_a_cpu_both_are_off_and_recorded(stage, capsys):
    """Also where the micro-batch does not fit."""
    assert (stage.options.activation_checkpointing, stage.options.compile) == ("auto", "auto")
    result = train(stage, World())
    (machine,) = result.figures["machines"]
    assert machine == {"after": 0, **machine_of(World(), replace(stage.options, **OFF, **LAID_OUT))}
    assert "layers" not in capsys.readouterr().out


def on_a_gpu(monkeypatch, room: float, flops: float = 0.0) -> None:
    """A GPU in name, with so much room: the module is on the CPU."""
    monkeypatch.setattr(choices, "machine_of", lambda world, options: {"gpu": "one", **vars(options)})
    monkeypatch.setattr(choices, "room", lambda setup: room)
    monkeypatch.setattr(choices, "flops_of", lambda setup: flops)


@pytest.mark.parametrize(("asked", "rows"), [(None, 2), (4, 4)])
def test_activations_are_recomputed_if_what_is_asked_for_does_not_fit_without(stage, monkeypatch, asked, rows):
    """A pair of the longest rows, or the micro-batch that has a size."""
    stage = replace(stage, options=replace(stage.options, micro_batch_size=asked))
    setup, slots = setup_of(stage, GPU), rows * int(DATA.lengths.max())
    memory = Footprint(workload_of(setup))
    layout = StepLayout(rows < 4, False, reshard_after_forward=True, reduce_each_micro_batch=False)
    needed = memory.optimizer + sum(memory.peak(slots, layout))
    said: list[str] = []
    for more, recomputed in ((1, False), (-1, True)):
        on_a_gpu(monkeypatch, needed / USABLE + more)
        assert chosen(setup, say=said.append).activation_checkpointing is recomputed
        blocks = [part for part in stage.model.modules() if hasattr(part, "gradient_checkpointing")]
        assert any(part.gradient_checkpointing for part in blocks) is recomputed
    first = f"steps are none, several_micro_batches {str(rows < 4).lower()}, activation_checkpointing "
    assert [line.startswith(first) for line in said if "steps are" in line] == [True, True]
    kept = replace(stage, options=replace(stage.options, activation_checkpointing=False))
    assert chosen(setup_of(kept, GPU)).activation_checkpointing is False


def test_an_objective_that_changes_states_is_not_recomputed(stage, monkeypatch):
    on_a_gpu(monkeypatch, 1.0)
    setup = setup_of(replace(stage, objective=ManifoldMixup(layers=[1])), GPU)
    assert chosen(setup).activation_checkpointing is False


def test_what_the_machine_recorded_last_had_is_kept_on_it_alone():
    machine: dict[str, Any] = machine_of(World(), TrainingOptions(micro_batch_tokens="auto", **LAID_OUT))
    assert {name: machine[name] for name in AUTO} == AUTO
    had = {"activation_checkpointing": True, "compile": False, "micro_batch_tokens": 4096}
    then = {"after": 0, **machine, **had}
    assert decided_before([then], machine) == had
    assert decided_before([then, {**then, **OFF, "after": 7}], machine) == {**had, **OFF}
    assert decided_before([then], {**machine, "compile": True}) == {}
    assert decided_before([then], {**machine, "device": "another"}) == {}
    assert decided_before([], machine) == {}


def test_a_stage_goes_on_with_what_was_chosen(stage, monkeypatch):
    """While it fits, also with less room than it was made for; it is said if it does not."""
    said: list[str] = []
    setup, memory = setup_of(stage, GPU), Footprint(workload_of(setup_of(stage, GPU)))
    on_a_gpu(monkeypatch, 1e15)
    before = choices.machine_of(GPU, replace(stage.options, **LAID_OUT))
    recorded = [{"after": 0, **before, **OFF, "micro_batch_tokens": 64}]
    layout = StepLayout(True, False, reshard_after_forward=True, reduce_each_micro_batch=False)
    needed = memory.optimizer + sum(memory.peak(64, layout))
    for room, kept in ((1e15, True), (needed, True), (needed - 1, False)):
        on_a_gpu(monkeypatch, room)
        options = chosen(setup, recorded, said.append)
        assert (options.micro_batch_tokens == 64, options.activation_checkpointing is False) == (kept, kept)
    assert [line.partition(":")[0] for line in said] == [
        *["steps are as recorded"] * 2,
        "steps are not as recorded, for which there is too little memory now",
    ]
    on_a_gpu(monkeypatch, 1e15)
    assert chosen(setup).micro_batch_tokens == 4 * DATA.lengths.max()


def test_what_is_asked_for_is_not_measured(stage, monkeypatch):
    on_a_gpu(monkeypatch, 1.0)
    monkeypatch.setattr(choices, "Footprint", lambda work: 1 // 0)
    asked = replace(stage.options, micro_batch_size=2, activation_checkpointing=True)
    options = chosen(setup_of(replace(stage, options=asked), GPU))
    assert options == replace(asked, **LAID_OUT, compile=False)


def test_flops_are_those_of_each_rank(stage):
    """Of a tied head, whose numbers are the embeddings'."""
    numbers = sum(p.numel() for p in stage.model.transformer.parameters())
    tokens = DATA.lengths.mean() * stage.options.global_batch_size * 3
    ranks = World(size=4, device=GPU.device)
    assert flops_of(setup_of(stage, ranks)) == pytest.approx(6 * numbers * tokens / 4)
    stage.model.requires_grad_(False)
    assert flops_of(setup_of(stage, ranks)) == pytest.approx(4 * numbers * tokens / 4)


def test_a_graph_break_is_named_and_short_stages_are_not_compiled(stage, monkeypatch):
    """Layers are traced alone: no code is made, and nothing but the model's own layers decides."""
    said: list[str] = []
    setup, last = setup_of(stage, GPU), stage.model.transformer.h[-1]
    forward = last.forward

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    monkeypatch.setattr(choices, "check_compiler", lambda device: None)
    monkeypatch.setattr(choices, "prepare_layers", lambda model, options: None)
    for flops, layer, compiled in ((4.2e16, forward, False), (4.5e16, forward, True), (4.5e16, broken, False)):
        on_a_gpu(monkeypatch, float("inf"), flops)
        monkeypatch.setattr(last, "forward", layer)
        assert chosen(setup, say=said.append).compile is compiled
    said = [line for line in said if "compile" in line]
    assert len(said) == 2
    of_auto = "layers of GPT2LMHeadModel are {}compiled (training.compile auto): "
    assert said[0] == of_auto.format("") + "it saves about 21 s and takes 20"
    assert said[1].startswith(of_auto.format("not ") + "GPT2Block does not become one graph")
    assert all(parameter.grad is None for parameter in stage.model.parameters())


@pytest.mark.parametrize(("tokens", "eager", "compiled"), [(2230, 141e12, 275e12), (32_768, 378e12, 505e12)])
def test_layers_are_compiled_from_where_measured_speeds_pay_for_it(stage, monkeypatch, tokens, eager, compiled):
    """Of 1.2B in 16 layers on an H200, at both lengths: 6e15 FLOPs of rows of Alpaca, 3e16 of 2,048 tokens."""
    worth = COMPILING / (1 / eager - 1 / compiled)
    steps = worth / (6 * 1.24e9 * tokens)
    monkeypatch.setattr(choices, "flops_of", lambda setup: worth)
    monkeypatch.setattr(choices, "layers_of", lambda model: [None] * 16)
    given = SimpleNamespace(total_steps=steps)
    setup = setup_of(replace(stage, order=given))
    assert saved_by_compiling(setup) == pytest.approx(COMPILING, rel=0.07)


def test_an_error_of_the_forward_leaves_no_hook(stage, monkeypatch):
    monkeypatch.setattr(choices, "kept_by_forward", lambda *given: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        compile_problem(setup_of(stage))
    assert not [module for module in stage.model.modules() if module._forward_pre_hooks]


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
def test_the_seconds_of_compiling_are_said_and_in_the_figures(stage, monkeypatch, capsys, compile):
    """Without compiled layers there are none, also if something else was compiled in this process."""
    monkeypatch.setattr("torch._dynamo.utils.calculate_time_spent", lambda: {"total_wall_time": 12.345, "other": 1.0})
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    result = train(replace(stage, options=replace(stage.options, compile=compile)), World())
    assert result.figures.get("compile_seconds") == (12.345 if compile else None)
    said = [line for line in capsys.readouterr().out.splitlines() if "compiled" in line]
    assert said == [f"{stage.name}: torch has compiled for 12.3 s in this process"] * compile


def test_torch_counts_the_seconds_of_what_it_compiles():
    """Under the name that is read."""
    options, seconds = TrainingOptions(compile=True), []
    for number in (2, 3):
        torch.compile(lambda x, number=number: x**number, backend="aot_eager")(torch.ones(1))
        seconds.append(choices.compiled(options, silent)["compile_seconds"])
    assert 0 < seconds[0] < seconds[1]


def raise_here(*args: object, **kwargs: object) -> None:
    raise RuntimeError("the compiler fails on this rank alone")


def raise_on_the_second_rank(world: World) -> None:
    """All ranks have its message, and step on together, for which FSDP's weights must be sharded again."""
    for parallel in ("ddp", "fsdp"):
        model = toy_model(dtype=torch.float32)
        options = TrainingOptions(parallel=parallel, padding_free=False)
        module = training_module(model, options, precision="fp32", world=world, trains=True)
        given = {"data": DATA, "order": FixedOrder([PAIRS]), "objective": NTP(), "optimizer": AdamW()}
        stage = SimpleNamespace(**given, options=options)
        setup = StepSetup(stage, module, None, "fp32", world)  # type: ignore[arg-type]
        with patch("torch.compile", raise_here) if world.rank else nullcontext():
            problem = compile_problem(setup)
        assert problem is not None
        assert "fails on this rank alone" in problem
        assert world.gather(problem) == [problem] * 2
        assert compile_problem(setup) is None


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_that_raises_in_the_probe_leaves_no_other_behind():
    on_ranks(raise_on_the_second_rank)
