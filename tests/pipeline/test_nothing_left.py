"""A command that trains or scores leaves no tensor in memory: else each run of a table would hold the weights of those
before it, and a run those of its reference."""

import gc

import pytest
import torch

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
    gc.collect()
    found = (one for one in gc.get_objects() if isinstance(one, torch.Tensor))
    return {id(one): one.shape for one in found if one.numel() > 1}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_no_tensor(made, tiny, name):
    before = tensors()
    made("run", *tiny.options, *SHORT, *RUNS[name])
    after = tensors()
    assert [shape for key, shape in after.items() if key not in before] == []


def test_a_look_at_finished_models_leaves_no_tensor(sftmix, finished, tiny, tmp_path):
    before = tensors()
    looks = (
        ("generate", str(finished.path), "--prompts", str(tiny.eval), "--to", str(tmp_path / "answers.jsonl")),
        ("verify", str(finished.path)),
    )
    for words in looks:
        done = sftmix(*words)
        assert done.code == 0, done.err
    after = tensors()
    assert [shape for key, shape in after.items() if key not in before] == []
