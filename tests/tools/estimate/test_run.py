"""What `estimate` says of a run, against the real stages and the command; numbers of a model and FLOPs,
against the real model and torch's counter."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, MambaConfig

from sftmix.components import ASFT
from sftmix.components.base import Selector
from sftmix.components.component import Need
from sftmix.components.objectives import NTP
from sftmix.components.others.selectors import Longest
from sftmix.components.reference import TrainedReference
from sftmix.components.splitters import RandomSplit
from sftmix.config import RunConfig
from sftmix.model.adapters import add_adapters
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, ModelOptions, TrainingOptions
from sftmix.pipeline.loaded import load_for_run
from sftmix.pipeline.rows import read_rows
from sftmix.ranks.world import World
from sftmix.tools.estimate.command import described
from sftmix.tools.estimate.model import QUANTIZED_BYTES, FakeModel, forward_flops, training_flops
from sftmix.tools.estimate.run import estimate
from sftmix.training.gpus import GPUS, gpu_named
from sftmix.training.parallel import shards_of
from sftmix.words.errors import ConfigError
from tests.tiny import metrics
from tests.tools.estimate.configs import (
    CPU,
    LAYERS,
    VOCABULARY,
    WIDTH,
    config,
    machine,
    small_llama,
)
from tests.toy import toy_rows

NO_LORA, LORA, QLORA = LoraOptions(), LoraOptions(r=4), LoraOptions(r=4, quantize="4bit")
DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])


@pytest.mark.slow
def test_stages_steps_and_tokens_are_those_of_the_run(finished):
    given = config(finished.tiny, with_baseline=True, reference=TrainedReference(checkpoints=2))
    whole = estimate(given, CPU)
    stages, tokens = whole["stages"], whole["tokens"]
    assert list(stages) == ["reference", "train", "baseline", "base"]
    for name in ("reference", "train", "baseline"):
        done = metrics(finished.path, name)
        assert stages[name]["steps"] == len(done)
        assert stages[name]["training_tokens"] == sum(line["tokens"] for line in done) == 3 * tokens
    reference, train, baseline, base = stages.values()
    assert reference["scored_tokens"] == 2 * tokens
    mixed, alone = train.pop("memory_bytes"), baseline.pop("memory_bytes")
    assert mixed["peak"] >= alone["peak"]
    assert len(train.pop("plans")) == len(baseline.pop("plans")) == 1, "there is nothing to choose on a CPU"
    assert train == baseline
    assert train["training_slots"] > train["training_tokens"]  # rows of unlike length are padded
    assert [base[key] for key in ("trained", "steps", "training_tokens")] == [0, 0, 0]
    assert (base["memory_bytes"]["optimizer"], train["trained"]) == (0, train["numbers"])
    assert 0 < base["scoring_flops"] < train["scoring_flops"]  # as the arms, without an evaluation of each epoch
    flops = sum(stage["training_flops"] + stage["scoring_flops"] for stage in stages.values())
    assert whole["device_hours"] == pytest.approx(flops / (0.1e12 * 0.5) / 3600)
    assert whole["times_plain"] == pytest.approx(flops / train["training_flops"])


@pytest.mark.slow
def test_on_a_cpu_files_that_are_read_may_be_the_peak(tiny, tmp_path):
    """A model in half precision is mapped, with float32 beside it: loaded, and in the export that is read back."""
    halved = tmp_path / "halved"
    shutil.copytree(tiny.model, halved)
    load_model(tiny.model).bfloat16().save_pretrained(halved)
    given = config(tiny, splitter=RandomSplit(), model=ModelOptions(path=str(halved), lora=LORA))
    given.training = replace(given.training, precision="bf16", micro_batch_size=2)
    stages = estimate(given, CPU)["stages"]
    for stage, beside in ((stages["train"], True), (stages["base"], False)):
        memory = stage["memory_bytes"]
        step = sum(memory[part] for part in ("weights", "optimizer", "gradients", "activations", "working"))
        read = 6 * stage["numbers"] + beside * memory["weights"]
        assert memory["peak"] == memory["process"] + max(step, read)
    assert read > step, "the case has a peak of files"
    assert "files" not in estimate(given, machine())["stages"]["base"]["memory_bytes"]


@pytest.mark.slow
def test_hours_in_fp32_need_its_peak(tiny):
    """The data sheets' is of bf16, several times that of fp32."""
    given = config(tiny, splitter=RandomSplit())
    for options, known in (({}, False), ({"tflops": 67.0}, True)):
        whole = estimate(given, machine(**options))
        found = [whole["device_hours"], *(stage["device_hours"] for stage in whole["stages"].values())]
        assert [hours is not None for hours in found] == [known] * 3
    train = whole["stages"]["train"]
    flops_of_step = train["training_flops"] / train["steps"]
    assert train["step"]["computing_seconds"] == pytest.approx(flops_of_step / (4 * 67e12 * 0.4))


def test_a_teacher_takes_memory_of_the_optimizer_s_part_and_leaves_less_for_each_plan(tiny):
    taught, alone = (
        estimate(config(tiny, objective=one, splitter=RandomSplit()), machine())["stages"]["train"]
        for one in (ASFT(), NTP())
    )
    numbers, head = taught["numbers"], load_model(tiny.model).get_output_embeddings().weight.numel()
    less = {plan["parallel"]: plan["free"] for plan in alone["plans"]}
    for plan in taught["plans"]:
        teacher = 4 * numbers / (4 if plan["parallel"] == "fsdp" else 1) + 4 * head
        assert less[plan["parallel"]] - plan["free"] == teacher
    part = taught["memory_bytes"]["optimizer"] - alone["memory_bytes"]["optimizer"]
    assert part == 4 * numbers / (4 if taught["plans"][0]["parallel"] == "fsdp" else 1) + 4 * head


def test_the_command_prints_a_table_or_json(finished, sftmix, monkeypatch):
    words = ["estimate", *finished.tiny.options, "--splitter", "RandomSplit"]
    printed = sftmix(*words, "--gpu", "cpu").out
    assert re.search(r"^ +train +base$", printed, re.M)
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.startswith("Needs "), "the answer is first"
    assert "Hours need the peak of the device in the training's precision: --tflops." in printed
    done = sftmix(*words, "--gpu", "H100", "--gpus", "4", "--json")
    train = json.loads(done.out)["stages"]["train"]
    memory = train["memory_bytes"]
    assert (done.code, train["fits"]) == (0, True)
    assert memory["peak"] == sum(size for part, size in memory.items() if part != "peak")
    printed = sftmix(*words, "--gpu", "H100", "--gpus", "16").out
    assert "No time is counted for what they send each other." in printed
    assert printed.startswith("Fits: ")
    assert "What lowers" not in printed
    monkeypatch.setitem(GPUS, "H100", GPUS["H100"]._replace(gigabytes=1e-6))
    printed = sftmix(*words, "--gpu", "H100", "--gpus", "4").out
    assert printed.startswith("Does not fit: ")
    assert "warning: train, base: more than 0.9 of what weights leave of the " in printed
    assert printed.count("What lowers activations") == 1


class Half(Selector):
    needs = frozenset({Need.CONFIDENCE})

    def select(self, scores, *, seed):
        raise NotImplementedError


def test_a_line_says_that_rows_are_chosen_later_and_training_is_counted_on_all(tiny):
    said = "The selector will choose some of them by scores: training is counted on all."
    for selector, chosen in ((Half(), True), (Longest(k=9), False)):
        needs = estimate(config(tiny, selector=selector, objective=NTP()), CPU)
        assert (needs["chosen_later"], said in described(needs)) == (chosen, chosen)


def test_without_a_name_it_is_this_machine(finished, sftmix):
    """A CPU's memory is what is free; a GPU has a name in the table, as its driver calls it."""
    done = sftmix("estimate", *finished.tiny.options, "--splitter", "RandomSplit", "--tflops", "0.2", "--json")
    found = json.loads(done.out)
    assert (found["machine"]["name"], found["machine"]["count"]) == ("cpu", 1)
    assert 0 < found["machine"]["memory"] < 2**50
    assert found["stages"]["train"]["fits"] is True


def test_responses_that_are_scored_without_their_prompts_as_well_count_twice(tiny):
    """Each behind the first token of its row."""
    given = config(tiny, reference=TrainedReference(checkpoints=2))
    again = config(tiny, reference=TrainedReference(checkpoints=2, response_alone=True))
    once, twice = (estimate(one, CPU)["stages"]["reference"] for one in (given, again))
    rows = read_rows(given, World())[1].data.train
    assert twice["scored_tokens"] - once["scored_tokens"] == 2 * int((rows.n_targets + 1).sum())
    assert twice["scoring_flops"] > once["scoring_flops"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA T4", None),
    ],
)
def test_a_gpu_is_known_as_its_driver_calls_it(name, known):
    assert gpu_named(name) == known


def test_times_are_in_days_hours_minutes_and_seconds(tiny):
    needs = estimate(config(tiny, splitter=RandomSplit()), CPU)
    assert "In all 3 days, 4:12:00 on 1 x cpu: 3 days, 4:12:00 of device time." in described(
        needs | {"device_hours": 76.2}
    )
    assert "In all 0:00:03 on" in described(needs | {"device_hours": 3 / 3600})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "H1000"}, "gpu is 'H1000'; there are B200"),
        ({"gpus": 0}, "gpus is 0"),
        ({"mfu": 1.5}, "mfu is 1.5"),
        ({"tflops": 0.0}, "tflops is 0.0"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        machine(**values)


def test_a_node_has_eight_gpus():
    assert [machine(name, None).count for name in ("cpu", "H100")] == [1, 8]


def test_what_does_not_shard_is_refused_as_by_a_run(tiny):
    model = ModelOptions(path=str(tiny.model), lora=QLORA)
    given = config(tiny, splitter=RandomSplit(), model=model)
    assert estimate(given, machine(gpus=1))["stages"]
    with pytest.raises(ConfigError, match=r"4bit and training\.parallel auto .here sharded. exclude"):
        estimate(given, machine(gpus=8))


# --------------------------------------------------------------------------------------- models, FLOPs, layouts


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return small_llama(tmp_path_factory.mktemp("llama"), num_key_value_heads=2)


def test_numbers_are_those_of_the_real_model(path, tmp_path):
    real, fake = load_model(path), FakeModel(path, None, NO_LORA)
    assert fake.numbers.whole.all == fake.numbers.whole.trained == sum(p.numel() for p in real.parameters())
    assert fake.numbers.head.shape == real.get_output_embeddings().weight.shape
    assert fake.per_token.all == sum(p.numel() for x in real.model.layers for p in x.parameters() if p.dim() == 2)
    adapted = FakeModel(path, None, LoraOptions(r=4, target_modules=["q_proj"]))
    assert adapted.numbers.whole.trained == LAYERS * 2 * 4 * WIDTH
    assert adapted.numbers.whole.all == fake.numbers.whole.all + adapted.numbers.whole.trained
    assert not adapted.numbers.head.requires_grad
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=512).save_pretrained(tmp_path / "gpt2")
    gpt2 = FakeModel(tmp_path / "gpt2", None, NO_LORA)
    assert gpt2.per_token.all == 2 * 12 * 16 * 16  # 512 learned positions are looked up, not multiplied with
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50}
    MambaConfig(**sizes, architectures=["MambaForCausalLM"]).save_pretrained(tmp_path / "mamba")
    mamba = FakeModel(tmp_path / "mamba", None, NO_LORA)
    assert (mamba.attention_width, mamba.numbers.n_layers) == (0, 2)  # and not 4: each block has a mixer, which is none


def test_four_bit_layers_are_counted_as_bitsandbytes_stores_them(path):
    """Embeddings, head, norms and adapters stay float32 (bitsandbytes leaves them, load_model loads them so)."""
    real, fake = load_model(path), FakeModel(path, "sdpa", QLORA)
    add_adapters(real, LORA, seed=0)
    in_4_bits = sum(p.numel() for p in real.model.layers.parameters() if p.dim() == 2 and not p.requires_grad)
    others = sum(p.numel() for p in real.parameters()) - in_4_bits
    assert others > 2 * VOCABULARY * WIDTH
    assert fake.stored_bytes == 4 * others + QUANTIZED_BYTES * in_4_bits
    read = FakeModel(path, "sdpa", QLORA.without_adapters())
    assert read.stored_bytes == fake.stored_bytes - 4 * fake.numbers.whole.trained


@pytest.mark.slow
def test_a_base_in_bfloat16_is_counted_as_a_run_keeps_it(path, tmp_path):
    load_model(path).bfloat16().save_pretrained(tmp_path)
    for lora in (LORA, NO_LORA):
        options = ModelOptions(path=str(tmp_path), lora=lora)
        for precision in ("bf16", "fp32"):
            given = RunConfig(model=options, training=TrainingOptions(precision=precision))
            real = load_for_run(given, World(), trains=bool(lora.r))
            fake = FakeModel(str(tmp_path), None, lora, precision=precision, trains=bool(lora.r))
            assert fake.stored_bytes == sum(p.nbytes for p in real.parameters())
            assert (fake.stored_bytes < 4 * fake.numbers.whole.all) == (precision == "bf16")


@pytest.mark.parametrize(
    ("lora", "over"), [(NO_LORA, 1), (LORA, 1.03), (LoraOptions(r=4, target_modules=["q_proj"]), 1.06)]
)
def test_flops_are_those_that_torch_counts(path, lora, over):
    """torch counts whole attention matrices, of which a causal mask needs half; so the squares count twice here.

    In front of the first adapter torch computes no gradient, which is counted here.
    """
    fake, real = FakeModel(path, "sdpa", lora), load_model(path, attention="eager").eval()
    if lora.r:
        add_adapters(real, lora, seed=0)
    with FlopCounterMode(display=False) as forward:
        loss = real(input_ids=torch.ones(1, 24, dtype=torch.int64)).logits.sum()
    amount = np.array([24, 24, 2 * 24**2])
    of_rope = 24 * real.config.head_dim if Version(transformers.__version__) < Version("5.18") else 0  # a matmul there
    ours = forward.get_total_flops() - of_rope
    assert sum(forward_flops(fake, amount)) == ours
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    both = training_flops(fake, amount, recompute=False)
    assert 1 <= both / (ours + backward.get_total_flops()) <= over
    head = forward_flops(fake, amount)[2]
    assert training_flops(fake, amount, recompute=True) == both + ours - head
    if lora.r:  # bitsandbytes multiplies matrices of the same sizes
        quantized = FakeModel(path, "sdpa", replace(lora, quantize="4bit"))
        assert training_flops(quantized, amount, recompute=False) == both


def test_hsdp_shares_within_a_node():
    def shards(count: int, group: int | None = None) -> int:
        options = TrainingOptions(parallel="hsdp", shard_group_size=group)
        return shards_of(options, machine(gpus=count).world)

    assert (shards(16), shards(4), shards(16, 2)) == (8, 4, 2)
    with pytest.raises(ConfigError, match="shard_group_size is 8, which does not divide the 12 ranks"):
        shards(12)
