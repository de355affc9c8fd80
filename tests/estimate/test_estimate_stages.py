"""What `estimate` says, against the real model, the real stages and torch's own count of FLOPs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sftmix.common.errors import ConfigError
from sftmix.components.optimizers import AdamW
from sftmix.components.reference import FromFile, Online, TrainedReference
from sftmix.estimate import estimate, make_machine
from sftmix.estimate.cost import forward_flops, training_flops
from sftmix.estimate.model import FakeModel
from sftmix.estimate.work import Tokens
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, ReferenceModel
from tests.estimate.configs import config
from tests.tiny import metrics

CPU = make_machine("cpu", 1, mfu=0.5, tflops=0.1)
NO_LORA = LoraOptions()


@pytest.fixture(scope="module")
def model(finished) -> str:
    return str(finished.tiny.model)


# ------------------------------------------------------------------------------------------------ model


def test_numbers_are_those_of_the_real_model(model):
    real = load_model(model)
    fake = FakeModel(model, None, NO_LORA)
    assert fake.numbers == fake.trained == sum(p.numel() for p in real.parameters())
    assert fake.is_tied
    assert fake.head_shape == tuple(real.get_output_embeddings().weight.shape)
    matrices = [p for layer in real.model.layers for p in layer.parameters() if p.dim() == 2]
    assert fake.per_token() == sum(p.numel() for p in matrices)
    adapted = FakeModel(model, None, LoraOptions(r=4, target_modules=["q_proj"]))
    q = real.model.layers[0].self_attn.q_proj.weight
    assert adapted.trained == 2 * 4 * sum(q.shape)
    assert adapted.numbers == fake.numbers + adapted.trained
    assert not adapted.head_is_trained


def test_flops_are_those_that_torch_counts(model):
    """torch counts whole attention matrices, of which a causal mask needs half; so the squares count twice here."""
    fake, real, length = FakeModel(model, "sdpa", NO_LORA), load_model(model, attention="eager").eval(), 24
    ids = torch.ones(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        loss = real(input_ids=ids).logits.sum()
    tokens = Tokens(length, length, 2 * length**2)
    assert forward_flops(fake, tokens) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert training_flops(fake, tokens, recompute=False) == both


def test_a_base_that_is_only_read_is_in_4_bits_as_under_adapters(model):
    adapted = FakeModel(model, None, LoraOptions(r=4, quantize="4bit"))
    read = FakeModel(model, None, LoraOptions(quantize="4bit"))
    assert read.stored_bytes == adapted.stored_bytes - 4 * adapted.trained < 4 * read.numbers


# --------------------------------------------------------------------------------------------- stages


def test_stages_steps_and_tokens_are_those_of_the_run(finished):
    found = estimate(config(finished.tiny, with_baseline=True, reference=TrainedReference(checkpoints=2)), CPU)
    assert [stage.work.name for stage in found.stages] == ["reference", "train", "baseline", "base"]
    reference, train, baseline, base = found.stages
    for stage in (reference, train, baseline):
        done = metrics(finished.path, stage.work.name)
        assert stage.work.steps == len(done)
        assert stage.work.trained.all == sum(line["tokens"] for line in done) == 3 * found.tokens
    assert reference.work.read.all == 2 * found.tokens
    assert train.flops == baseline.flops
    assert (base.work.steps, base.work.trained.all, base.memory.optimizer) == (0, 0, 0)
    assert 0 < base.flops < train.flops - train.training_flops  # as the arms, without an evaluation of each epoch
    whole = reference.flops + 2 * train.flops + base.flops
    assert found.hours == pytest.approx(whole / (0.1e12 * 0.5) / 3600)
    assert found.times_plain == pytest.approx(whole / train.training_flops)


@pytest.mark.parametrize(
    ("reference", "stages", "passes"),
    [
        (TrainedReference(checkpoints="online"), ["reference", "train", "base"], 0),
        (TrainedReference(checkpoints=[0, 0.5, 1]), ["reference", "train", "base"], 3),
        (Online(), ["train", "base"], None),
    ],
)
def test_the_reference_says_what_it_will_do(finished, reference, stages, passes):
    found = estimate(config(finished.tiny, reference=reference), CPU)
    assert [stage.work.name for stage in found.stages] == stages
    if passes is not None:
        assert found.stages[0].work.read.all == passes * found.tokens


def test_a_file_costs_nothing_and_another_model_is_its_own(finished, tmp_path):
    ready = finished.path / "confidence" / "dynamics.parquet"
    found = estimate(config(finished.tiny, reference=FromFile(path=str(ready))), CPU)
    assert [stage.work.name for stage in found.stages] == ["train", "base"]
    model = ReferenceModel(path=str(finished.tiny.model), lora=LoraOptions(r=4))
    found = estimate(config(finished.tiny, reference=TrainedReference(model=model)), CPU)
    reference, train, _ = found.stages
    assert reference.trained < train.trained
    assert reference.training_flops < train.training_flops
    assert reference.memory.optimizer < train.memory.optimizer


# -------------------------------------------------------------------------------------------- command


def test_the_command_prints_a_table_or_json(finished, sftmix):
    words = ["estimate", *finished.tiny.options, "--gpu", "cpu"]
    done = sftmix(*words)
    assert done.code == 0
    assert "| reference |" in done.out
    assert "Hours need the peak of the device: --tflops." in done.out
    done = sftmix(*words, "--tflops", "0.1", "--json")
    found = json.loads(done.out)
    assert found["device_hours"] > 0
    assert found["machine"]["count"] == 1
    memory = found["stages"]["train"]["memory_bytes"]
    assert memory["peak"] == sum(v for k, v in memory.items() if k != "peak")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "H1000"}, "gpu is 'H1000'; there are B200"),
        ({"count": 0}, "gpus is 0"),
        ({"mfu": 1.5}, "mfu is 1.5"),
        ({"tflops": 0.0}, "tflops is 0.0"),
        ({"per_node": 0}, "gpus_per_node is 0"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(values, message):
    given = {"name": "H100", "count": 1, "mfu": 0.4, "tflops": None} | values
    with pytest.raises(ConfigError, match=message):
        make_machine(given.pop("name"), given.pop("count"), **given)


def test_an_optimizer_that_does_not_shard_is_refused_as_by_a_run(finished, sftmix, monkeypatch):
    monkeypatch.setattr(AdamW, "shards", False)
    words = ["estimate", *finished.tiny.options]
    assert sftmix(*words, "--gpus", "1").code == 0
    done = sftmix(*words, "--gpus", "8")
    assert done.code == 2
    assert "optimizer AdamW and training.parallel auto (here fsdp) exclude each other" in done.err


def test_hsdp_takes_the_size_of_a_node(finished, sftmix):
    words = ["estimate", *finished.tiny.options, "--gpus", "8", "--training.parallel", "hsdp", "--json"]
    words += ["--splitter", "RandomSplit"]
    weights = [
        json.loads(sftmix(*words, *more).out)["stages"]["train"]["memory_bytes"]["weights"]
        for more in ([], ["--gpus_per_node", "2"])
    ]
    assert weights[1] == 4 * weights[0]
