"""A command that trains or scores leaves no tensor in memory: else each run of a table would hold the weights of those
before it, and a run those of its reference."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from tests.fast import some_fast
from tests.tiny import SHORT

RUNS = {
    "whole": (),
    "bf16": ("--training.precision", "bf16"),
    "lora": ("--model.lora.r", "2"),
    "checkpointed": ("--training.activation_checkpointing", "true"),
    "noise": ("--perturbation", "NEFTune"),
}


def tensors() -> dict[int, torch.Size]:
    """Those of more than one number: libraries keep some constants."""
    gc.unfreeze()  # what other tests may have frozen
    gc.collect()
    # by type: an object of torch.distributed warns if it is asked for its class
    found = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    shapes = {id(one): one.shape for one in found if one.numel() > 1}
    gc.freeze()  # a run collects before each of its models
    return shapes


@contextmanager
def none_left() -> Iterator[None]:
    with suppress(ImportError):
        import bitsandbytes.functional  # noqa: F401  # PEFT imports it where it is installed; it keeps tables of numbers
    before = tensors()
    yield
    assert [shape for key, shape in tensors().items() if key not in before] == []


@pytest.mark.parametrize("name", some_fast(RUNS, every=3))
def test_a_run_leaves_no_tensor(made, tiny, name):
    with none_left():
        made("run", *tiny.options, *SHORT, *RUNS[name])


@pytest.mark.long
@pytest.mark.slow
def test_a_look_at_finished_models_leaves_no_tensor(sftmix, finished, tiny, tmp_path):
    looks = (
        ("generate", str(finished.path), "--prompts", str(tiny.eval), "--to", str(tmp_path / "answers.jsonl")),
        ("verify", str(finished.path)),
    )
    with none_left():
        for words in looks:
            done = sftmix(*words)
            assert done.code == 0, done.err
