"""Too little memory is said before the first step, by what a forward really keeps."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sftmix.batches.order import Slot, Unit
from sftmix.common.errors import ConfigError
from sftmix.common.world import World
from sftmix.components import AdamW
from sftmix.training import memory
from sftmix.training.loop import train
from sftmix.training.module import TrainingModule
from sftmix.training.step import StepSetup
from tests.toy import toy_model, toy_rows, toy_stage

GPU = World(device=torch.device("cuda", 0))
DATA = toy_rows([(3, 5), (7, 2), (20, 12), (4, 4)])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_row_keeps_is_measured(precision):
    """A batch of k such rows keeps k times as much, beside what does not depend on the rows."""
    model = toy_model(dtype=torch.float32)
    module = TrainingModule(model).train()
    constant, per_row = memory.saved_by_forward(module, DATA, precision)
    assert module.training
    for rows in (2, 5):
        sizes = {}

        def note(saved, sizes=sizes):
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        ids = torch.from_numpy(DATA[2].input_ids).long().repeat(rows, 1)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), saved_tensors_hooks(note, lambda x: x):
            out = model.get_decoder()(input_ids=ids, use_cache=False)
        for parameter in model.parameters():
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        assert sum(sizes.values()) == pytest.approx(constant + rows * per_row, rel=0.1)
        del out


@pytest.fixture
def stage(tmp_path):
    """Three steps of four rows in micro-batches of two."""
    units = [[(Slot(row),) for row in range(4)]] * 3
    return toy_stage(tmp_path, units, model=toy_model(dtype=torch.float32), data=DATA)


def free(monkeypatch, number: float) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: number)


def test_what_does_not_fit_at_all_is_refused_before_the_first_step(stage, monkeypatch):
    state = sum(3 * one.nbytes for one in stage.model.parameters())  # the gradient, and two moments of AdamW
    free(monkeypatch, state - 1)
    with pytest.raises(ConfigError, match="lora"):
        train(stage, World())
    assert not (stage.directory / "metrics.jsonl").exists()


@pytest.mark.parametrize(("fused", "each"), [(False, 4), (True, 3)])
def test_on_a_gpu_an_update_that_is_not_fused_has_a_copy_of_the_second_moments(stage, monkeypatch, fused, each):
    """The check asks the device and not a tensor, so it is a GPU's in name."""
    setup = StepSetup(replace(stage, optimizer=AdamW(fused=fused)), TrainingModule(stage.model), None, "fp32", GPU)  # type: ignore[arg-type]
    needed = sum(each * one.nbytes for one in stage.model.parameters())
    free(monkeypatch, needed - 1)
    with pytest.raises(ConfigError, match=r"optimizer\.fused true"):
        memory.check_memory(setup)
    free(monkeypatch, needed)
    memory.check_memory(setup, lambda line: None)


def test_the_gradients_of_ddp_are_there_before_the_first_step(stage, monkeypatch):
    module = TrainingModule(stage.model)
    stage = replace(stage, options=replace(stage.options, activation_checkpointing=True))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", TrainingModule)
    free(monkeypatch, sum(2 * one.nbytes for one in stage.model.parameters()))
    memory.check_memory(StepSetup(stage, module, None, "fp32", World()), lambda line: None)  # type: ignore[arg-type]


def test_activations_that_are_recomputed_are_not_told_as_if_they_were_kept(stage, monkeypatch, capsys):
    stage = replace(stage, options=replace(stage.options, activation_checkpointing=True))
    free(monkeypatch, sum(3 * one.nbytes for one in stage.model.parameters()))
    train(stage, World())
    assert "as long as" not in capsys.readouterr().out


def test_the_micro_batch_that_fits_is_named_before_the_first_step(stage, monkeypatch, capsys):
    state = sum(3 * one.nbytes for one in stage.model.parameters())
    constant, per_row = memory.saved_by_forward(TrainingModule(stage.model), DATA, "fp32")
    for rows, remedy in ((1.5, "--training.micro_batch_size 1"), (0.5, "--training.activation_checkpointing true")):
        free(monkeypatch, state + constant + rows * per_row)
        train(replace(stage, directory=stage.directory / str(rows)), World())
        line, *_ = capsys.readouterr().out.splitlines()
        assert line.startswith("train: 2 rows as long as the longest one")
        assert line.endswith(remedy)
    usual = replace(stage, directory=stage.directory / "usual", options=replace(stage.options, micro_batch_size=None))
    free(monkeypatch, state + constant + 3.5 * per_row)
    train(usual, World())
    line, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith("train: 4 rows as long as the longest one")  # all of a step, of the 8 that may be
    assert line.endswith("--training.micro_batch_size 3")
    free(monkeypatch, state + constant + 2 * per_row)
    train(replace(stage, directory=stage.directory / "2"), World())
    assert "as long as" not in capsys.readouterr().out


class OneOfThree(World):
    """The rank with the least memory."""

    def max(self, value):
        return value


PAIRS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3))]


@pytest.mark.parametrize(("units", "rows"), [([(Slot(row),) for row in range(4)], 2), (PAIRS, 2), (PAIRS * 2, 4)])
def test_a_rank_has_its_part_of_a_step(tmp_path, monkeypatch, units, rows):
    usual = toy_stage(tmp_path, [units], options={"micro_batch_size": None}, data=DATA)
    setup = StepSetup(usual, TrainingModule(usual.model), None, "fp32", OneOfThree(size=3))  # type: ignore[arg-type]
    free(monkeypatch, sum(3 * one.nbytes for one in usual.model.parameters()))
    said: list[str] = []
    memory.check_memory(setup, said.append)
    assert said[0].startswith(f"train: {rows} rows as long as the longest one")


def test_free_memory_is_that_of_the_system_and_of_the_group(tmp_path, monkeypatch):
    everything = memory.free_memory(torch.device("cpu"))
    assert 0 < everything < 2**50
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 150\nactive_file 400\nshmem 50\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 2550  # pages of files are given back, shared memory is not
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > 3000


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch):
    """The figures of a GPU of 80, of which a stage has left 60 to torch."""
    for name, number in (("mem_get_info", (15, 80)), ("memory_reserved", 60), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    assert memory.free_memory(torch.device("cuda", 0)) == 65


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_that_is_gone_takes_nothing_of_a_gpu():
    gpu = torch.device("cuda", 0)
    torch.zeros(1, device=gpu)
    before = memory.free_memory(gpu)
    held = torch.zeros(2**28, device=gpu)
    assert before - memory.free_memory(gpu) >= held.nbytes
    del held
    assert before - memory.free_memory(gpu) < 2**26
