"""The options of adapters: what is refused, how they reach the reference, and that they survive YAML."""

import importlib.util
import re
from dataclasses import replace

import pytest
import torch

from sftmix.components.reference import FromFile, TrainedReference
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.options import DataOptions, LoraOptions, ModelOptions, ReferenceModel, ReferenceTraining, TrainingOptions
from sftmix.options.reference import reference_lora
from sftmix.pipeline.loaded import load_for_run
from sftmix.ranks.world import World
from sftmix.words.errors import ConfigError


def with_lora(lora: LoraOptions, **more) -> RunConfig:
    return RunConfig(out="o", model=ModelOptions(path="m", lora=lora), data=DataOptions(train="t"), **more)


IDLE = {"lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
IDLE |= {"use_dora": True, "use_rslora": True, "bias": "all", "init_lora_weights": "gaussian", "quantize": "4bit"}


@pytest.mark.parametrize("name", IDLE)
def test_an_option_without_a_rank_is_refused(name):
    idle = LoraOptions(**{name: IDLE[name]})
    with pytest.raises(ConfigError, match=rf"model\.lora\.{name} is .*, but model\.lora\.r is null: .*--model\.lo"):
        validate(with_lora(idle))
    own = TrainedReference(model=ReferenceModel(lora=replace(idle, r=0)))
    with pytest.raises(ConfigError, match=rf"reference\.model\.lora\.{name} is .*, but reference\.model\.lora\.r is 0"):
        validate(with_lora(LoraOptions(r=8), reference=own))


@pytest.mark.parametrize(
    ("name", "value"), [("r", -1), ("lora_alpha", 0), ("lora_dropout", 1.0), ("target_modules", [])]
)
def test_a_value_out_of_its_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"model\.lora\.{name} is {re.escape(str(value))}; allowed: "):
        validate(with_lora(LoraOptions(**{"r": 8, name: value})))


def test_quantising_needs_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model\.lora\.quantize is 4bit, which needs the package bitsandbytes"):
        validate(with_lora(LoraOptions(r=8, quantize="4bit")))


def test_quantised_shards_are_refused(monkeypatch):
    """T22: also where only the reference would be."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    quantised = LoraOptions(r=8, quantize="4bit")
    fsdp = TrainingOptions(parallel="fsdp")
    validate(with_lora(quantised, training=TrainingOptions(parallel="ddp")))
    with pytest.raises(ConfigError, match=r"model\.lora\.quantize 4bit and training\.parallel fsdp exclude each other"):
        validate(with_lora(quantised, training=fsdp))
    for training in (None, ReferenceTraining(parallel="fsdp")):
        own = TrainedReference(model=ReferenceModel(lora=quantised), training=training)
        with pytest.raises(
            ConfigError,
            match=r"(?s)reference\.model\.lora\.quantize 4bit and reference\.training\.parallel fsdp.*"
            r"Use --reference\.training\.parallel ddp",
        ):
            validate(with_lora(LoraOptions(), reference=own, training=fsdp))


def test_quantised_shards_that_auto_resolves_to_are_refused():
    """Several ranks on GPUs: only there is auto fsdp, so it is known no earlier than when the model is loaded."""
    gpus = World(size=2, device=torch.device("cuda", 0))
    lora = LoraOptions(r=8, quantize="4bit")
    with pytest.raises(
        ConfigError, match=r"quantize 4bit and training\.parallel auto \(here fsdp\) exclude each other"
    ):
        load_for_run(with_lora(lora), gpus)


def test_the_reference_inherits_from_the_same_base_model_only():
    target, own = ModelOptions(path="m", lora=LoraOptions(r=8)), LoraOptions(r=2)
    assert reference_lora(target, None).r == 8
    assert reference_lora(target, ReferenceModel()).r == 8
    assert reference_lora(target, ReferenceModel(path="other")).r is None
    assert reference_lora(target, ReferenceModel(path="other", lora=own)).r == 2
    assert reference_lora(target, ReferenceModel(lora=LoraOptions(r=0))).r == 0
    assert reference_lora(target, getattr(FromFile(path="f"), "model", None)).r == 8
