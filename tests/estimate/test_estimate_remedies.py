"""What is said where a stage does not fit: each option that is named lowers the peak to what another estimate says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sftmix.components.optimizers import AdamW8bit
from sftmix.components.splitters import RandomSplit
from sftmix.config import RunConfig
from sftmix.estimate import GPUS, Estimate, estimate, make_machine
from sftmix.estimate.text import described
from sftmix.options import LoraOptions, ModelOptions, TrainingOptions
from tests.estimate.configs import TRAINING, config


@pytest.fixture(autouse=True)
def nothing_fits(monkeypatch) -> None:
    monkeypatch.setitem(GPUS, "H100", GPUS["H100"]._replace(gigabytes=1e-6))


def made(tiny, **training: Any) -> RunConfig:
    return config(tiny, splitter=RandomSplit(), training=replace(TRAINING, **training))


def found(given: RunConfig, gpus: int = 1) -> Estimate:
    return estimate(given, make_machine("H100", gpus, mfu=0.4, tflops=None))


def peak(given: RunConfig, gpus: int = 1) -> float:
    return found(given, gpus).stages[0].memory.peak


def named(given: RunConfig, gpus: int = 1) -> dict[str, float]:
    """Option and value -> peak of the target's training."""
    return {one.options: one.peak for one in found(given, gpus).remedies["train"]}


def test_sharing_over_all_is_named_with_what_it_excludes(tiny):
    """A run refuses the size of groups beside fsdp, so whoever takes the advice is told of both."""
    told = named(made(tiny, parallel="hsdp", shard_group_size=1), 4)
    assert told["--training.parallel fsdp --training.shard_group_size null"] == peak(made(tiny, parallel="fsdp"), 4)
    assert "--training.parallel fsdp" in named(made(tiny, parallel="ddp"), 4)


def test_each_leads_to_the_peak_that_is_said(tiny):
    given = made(tiny)
    told = named(given)
    smaller = (peak(made(tiny, micro_batch_size=2)), peak(made(tiny, activation_checkpointing=True)))
    adapted = replace(given, model=replace(given.model, lora=LoraOptions(r=16)))
    expected = {
        "--training.micro_batch_size 2": smaller[0],
        "--training.activation_checkpointing true": smaller[1],
        "--gpus 8": peak(given, 8),
        "--optimizer AdamW8bit": peak_8bit(given),
        "--training.global_batch_size 4 (one micro-batch a step; it changes what is trained)": peak(
            made(tiny, global_batch_size=4)
        ),
        "--model.lora.r 16": peak(adapted),
    }
    assert told == {name: size for name, size in expected.items() if size <= 0.99 * peak(given)}
    assert len(told) >= 4


def peak_8bit(given: RunConfig) -> float:
    """What `estimate` refuses where bitsandbytes is missing: AdamW with the state of AdamW8bit."""
    optimizer = type("Small", (type(given.optimizer),), {"state_bytes": AdamW8bit.state_bytes})()
    return peak(replace(given, optimizer=optimizer))


def test_what_is_on_or_does_not_help_is_not_offered(tiny):
    on = named(made(tiny, activation_checkpointing=True))
    assert on
    assert not any("checkpointing" in name for name in on)
    smallest = named(made(tiny, micro_batch_size=2))
    assert not any("micro_batch_size" in name for name in smallest)
    adapted = replace(made(tiny), model=ModelOptions(path=str(tiny.model), lora=LoraOptions(r=16)))
    assert not any("lora.r" in name for name in named(adapted))
    shared = named(made(tiny, parallel="fsdp"), 2)
    assert not any(
        "AdamW8bit" in name or "parallel" in name for name in shared
    )  # which FSDP does not have; which it is
    assert "--training.parallel fsdp" in named(made(tiny, parallel="ddp"), 2)


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_optimizer_s_step_is_not_lowered_by_smaller_micro_batches(tiny):
    """Of a model so wide that weights, state and gradients are the peak."""
    heads = {"head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 16}
    rewrite(tiny.model / "config.json", hidden_size=1024, intermediate_size=2048, **heads)
    given = made(tiny, activation_checkpointing=True)
    stage = found(given).stages[0]
    assert (stage.memory.activations, stage.memory.loss) == (0, 0)
    told = named(given)
    assert not any("micro_batch" in name or "global_batch" in name for name in told)
    assert "--optimizer AdamW8bit" in told


def test_fsdp_s_whole_gradient_is_explained_and_avoided(tiny):
    """Two micro-batches of four in a step of sixteen on two ranks."""
    given = made(tiny, parallel="fsdp", global_batch_size=16)
    text = described(found(given, 2))
    assert re.search("Each GPU holds the whole gradient, .*, between the micro-batches of a step under FSDP", text)
    told = named(given, 2)
    smaller = next(name for name in told if "global_batch_size" in name)
    assert smaller == "--training.global_batch_size 8 (one micro-batch a step; it changes what is trained)"
    assert told[smaller] == peak(made(tiny, parallel="fsdp", global_batch_size=8), 2) < peak(given, 2)
    assert "whole gradient" not in described(found(made(tiny, parallel="fsdp"), 2))
    assert "whole gradient" not in described(found(made(tiny), 1))


def test_a_token_budget_is_lowered_as_one(tiny):
    given = replace(
        made(tiny), training=TrainingOptions(global_batch_size=8, micro_batch_tokens=1024, precision="fp32")
    )
    told = [name for name in named(given) if "micro_batch" in name]
    assert told in (["--training.micro_batch_tokens 256"], ["--training.micro_batch_tokens 512"])


def test_the_least_change_that_fits_is_named(tiny, monkeypatch):
    """Of two, four and eight GPUs the first that has room."""
    given = made(tiny)
    room = (peak(given, 4) + peak(given, 2)) / 2
    monkeypatch.setitem(GPUS, "H100", GPUS["H100"]._replace(gigabytes=room / 1e9))
    assert "--gpus 4" in named(given)
    text = described(found(given))
    assert re.search(r"  --gpus 4: .* MiB, which fits", text)
    assert re.search(r"  --training.activation_checkpointing true: [^,]* MiB$", text, re.M)


def test_each_stage_is_told_the_least_change_for_itself(tiny, monkeypatch):
    """With two GPUs the base model fits, of many layers, the training with none of those that are tried."""
    rewrite(tiny.model / "config.json", num_hidden_layers=12, layer_types=None)
    given = made(tiny)
    one, two = (found(given, gpus).stages[-1].memory.peak for gpus in (1, 2))
    monkeypatch.setitem(GPUS, "H100", GPUS["H100"]._replace(gigabytes=(one + two) / 2 / 1e9))
    remedies = found(given).remedies
    assert [remedy.options for remedy in remedies["base"]] == ["--gpus 2"]
    assert "--gpus 8" in [remedy.options for remedy in remedies["train"]]


def test_what_does_not_fit_is_said_in_text_and_json(finished, sftmix):
    words = ["estimate", *finished.tiny.options, "--gpus", "1"]
    assert "warning: train needs" in sftmix(*words).out
    train = json.loads(sftmix(*words, "--json").out)["stages"]["train"]
    assert train["fits"] is False
    assert all(size < train["memory_bytes"]["peak"] for size in train["remedies"].values())
    cpu = json.loads(sftmix(*words, "--gpu", "cpu", "--json").out)["stages"]["train"]
    assert (cpu["fits"], cpu["remedies"]) == (None, {})
