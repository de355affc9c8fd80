"""What `estimate` says of a run, against the real model, the real stages, torch's count of FLOPs and the command."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sftmix.common.errors import ConfigError
from sftmix.common.gpus import GPUS
from sftmix.components import Need
from sftmix.components.optimizers import AdamW
from sftmix.components.reference import TrainedReference
from sftmix.components.splitters import RandomSplit
from sftmix.model.load import load_model
from sftmix.options import LoraOptions, ModelOptions
from sftmix.tools.estimate.model import FakeModel
from sftmix.tools.estimate.needs import forward_flops, training_flops
from sftmix.tools.estimate.run import estimate
from sftmix.tools.estimate.work import Amount
from tests.tiny import metrics
from tests.tools.estimate.configs import CPU, config, gpus, machine


def test_numbers_are_those_of_the_real_model(finished):
    path = str(finished.tiny.model)
    real, fake = load_model(path), FakeModel(path, None, LoraOptions())
    assert fake.numbers == (sum(p.numel() for p in real.parameters()),) * 2
    assert fake.head_shape == tuple(real.get_output_embeddings().weight.shape)
    assert fake.per_token.all == sum(
        p.numel() for layer in real.model.layers for p in layer.parameters() if p.dim() == 2
    )
    adapted = FakeModel(path, None, LoraOptions(r=4, target_modules=["q_proj"]))
    assert adapted.numbers.trained == 2 * 4 * sum(real.model.layers[0].self_attn.q_proj.weight.shape)
    assert adapted.numbers.all == fake.numbers.all + adapted.numbers.trained
    assert not adapted.head_is_trained


def test_experts_count_as_many_as_a_token_meets_and_embeddings_not(tmp_path):
    from transformers import GPT2Config, MixtralConfig

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    MixtralConfig(**sizes, **heads, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path / "mixtral")
    router, attention = 8 * 16, 4 * 16 * 16
    expected = 2 * (attention + router + 2 * 3 * 16 * 24)
    assert FakeModel(tmp_path / "mixtral", None, LoraOptions()).per_token.all == expected
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=512).save_pretrained(tmp_path / "gpt2")
    gpt2 = FakeModel(tmp_path / "gpt2", None, LoraOptions())
    assert gpt2.per_token.all == 2 * 12 * 16 * 16  # 512 learned positions are looked up, not multiplied with


def test_a_model_without_attention_is_estimated(finished, tmp_path):
    from transformers import AutoTokenizer, MambaConfig

    tokenizer = AutoTokenizer.from_pretrained(finished.tiny.model)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": len(tokenizer)}
    MambaConfig(**sizes, architectures=["MambaForCausalLM"]).save_pretrained(tmp_path)
    model = FakeModel(tmp_path, None, LoraOptions())
    assert (model.attention_width, model.n_layers) == (0, 2)  # and not 4: each block has a mixer, which is none
    found = estimate(config(finished.tiny, model=ModelOptions(path=str(tmp_path))), CPU)
    assert found["stages"]["train"]["training_flops"] > 0


def test_the_attention_of_heads_of_several_sizes(tmp_path):
    """DeepSeek's head_dim is the part of a query that has a position; Gemma 4's layers have one each."""
    from transformers import DeepseekV3Config, Gemma4TextConfig

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10, "kv_lora_rank": 8, "q_lora_rank": 8}
    few = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    deepseek = DeepseekV3Config(
        **sizes, **heads, **few, first_k_dense_replace=1, architectures=["DeepseekV3ForCausalLM"]
    )
    deepseek.save_pretrained(tmp_path / "deepseek")
    assert FakeModel(tmp_path / "deepseek", None, LoraOptions()).attention_width == 2 * (4 + 8 + 10) / 2
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "global_head_dim": 24}
    gemma = Gemma4TextConfig(**sizes, **kinds, architectures=["Gemma4ForCausalLM"])
    gemma.save_pretrained(tmp_path / "gemma")
    assert FakeModel(tmp_path / "gemma", None, LoraOptions()).attention_width == 2 * (8 + 24) / 2


def test_no_tensor_of_experts_is_allocated(tmp_path):
    """256 experts of DeepSeek-V3 in one tensor are 30 GB; these are 4 TB."""
    from transformers import MixtralConfig

    sizes = {"vocab_size": 50, "hidden_size": 2**14, "intermediate_size": 2**16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2**9}
    MixtralConfig(**sizes, **heads, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    assert FakeModel(tmp_path, None, LoraOptions()).numbers.all > 2**39


def test_flops_are_those_that_torch_counts(finished):
    """torch counts whole attention matrices, of which a causal mask needs half; so the squares count twice here."""
    path, length = str(finished.tiny.model), 24
    fake, real = FakeModel(path, "sdpa", LoraOptions()), load_model(path, attention="eager").eval()
    ids = torch.ones(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        loss = real(input_ids=ids).logits.sum()
    amount = Amount(length, length, 2 * length**2)
    assert sum(forward_flops(fake, amount)) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert training_flops(fake, amount, recompute=False) == both


def test_stages_steps_and_tokens_are_those_of_the_run(finished):
    given = config(finished.tiny, with_baseline=True, reference=TrainedReference(checkpoints=2))
    found = estimate(given, CPU)
    stages, tokens = found["stages"], found["tokens"]
    assert list(stages) == ["reference", "train", "baseline", "base"]
    for name in ("reference", "train", "baseline"):
        done = metrics(finished.path, name)
        assert stages[name]["steps"] == len(done)
        assert stages[name]["training_tokens"] == sum(line["tokens"] for line in done) == 3 * tokens
    reference, train, baseline, base = stages.values()
    assert reference["scored_tokens"] == 2 * tokens
    assert train == baseline
    assert (base["steps"], base["training_tokens"], base["memory_bytes"]["optimizer"]) == (0, 0, 0)
    assert 0 < base["scoring_flops"] < train["scoring_flops"]  # as the arms, without an evaluation of each epoch
    whole = sum(stage["training_flops"] + stage["scoring_flops"] for stage in stages.values())
    assert found["device_hours"] == pytest.approx(whole / (0.1e12 * 0.5) / 3600)
    assert found["times_plain"] == pytest.approx(whole / train["training_flops"])


def test_hours_are_the_longer_of_computing_and_sending(tiny):
    given = config(tiny, splitter=RandomSplit())
    slow, fast = (estimate(given, gpus(bandwidth=bandwidth))["stages"] for bandwidth in (1e-6, 1e9))
    for name, stage in slow.items():
        sent = stage["step"]["sent_bytes_per_device"]["all"] * stage["steps"] + stage["scoring_sent_bytes_per_device"]
        assert stage["device_hours"] == pytest.approx(4 * sent / 1e3 / 3600)
        flops = stage["training_flops"] + stage["scoring_flops"]
        assert fast[name]["device_hours"] == pytest.approx(flops / (989e12 * 0.4) / 3600)
    slow_link = gpus(bandwidth=1.0)  # both take long: sending takes half the time of the computation, or twice it
    assert slow_link.hours(4 * 989e12 * 0.4 * 3600, 1e9 * 1800) == pytest.approx(4)
    assert slow_link.hours(4 * 989e12 * 0.4 * 3600, 1e9 * 7200) == pytest.approx(8)


# -------------------------------------------------------------------------------------------- command


def test_the_command_prints_a_table_or_json(finished, sftmix):
    words = ["estimate", *finished.tiny.options, "--splitter", "RandomSplit"]
    printed = sftmix(*words, "--gpu", "cpu").out
    assert "| train |" in printed
    assert "Hours need the peak of the device: --tflops." in printed
    done = sftmix(*words, "--gpus", "4", "--json")
    found = json.loads(done.out)
    train = found["stages"]["train"]
    step, sent, memory = train["step"], train["step"]["sent_bytes_per_device"], train["memory_bytes"]
    assert (done.code, train["fits"]) == (0, True)
    assert memory["peak"] == sum(size for part, size in memory.items() if part != "peak")
    assert step["tokens_per_device"] == pytest.approx(train["training_tokens"] / train["steps"] / 4)
    assert sent["all"] == sent["weights"] + sent["gradients"] > 0
    assert step["communicating_seconds"] == pytest.approx(sent["all"] / 450e9)
    assert step["computing_seconds"] == pytest.approx(train["training_flops"] / train["steps"] / (4 * 989e12 * 0.4))
    printed = sftmix(*words, "--gpus", "4").out
    assert f"train: {step['tokens_per_device']:,.0f} tokens in 1 micro-batch, " in printed
    assert " sent and as much received (weights " in printed
    assert "note: no time is counted for communication" in sftmix(*words, "--gpus", "16").out


def test_what_does_not_fit_is_said_with_what_lowers_it(finished, sftmix, monkeypatch):
    words = ["estimate", *finished.tiny.options, "--splitter", "RandomSplit", "--gpus", "1"]
    assert "What lowers" not in sftmix(*words).out
    monkeypatch.setitem(GPUS, "H100", GPUS["H100"]._replace(gigabytes=1e-6))
    assert json.loads(sftmix(*words, "--json").out)["stages"]["train"]["fits"] is False
    printed = sftmix(*words).out
    assert re.search("warning: train needs .* MiB on each H100, which has 0.000954 MiB.", printed)
    assert printed.count("What lowers activations and loss") == 1
    assert all(option in printed for option in ("--training.micro_batch_size", "--gpus", "AdamW8bit", "lora.r"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "H1000"}, "gpu is 'H1000'; there are B200"),
        ({"gpus": 0}, "gpus is 0"),
        ({"mfu": 1.5}, "mfu is 1.5"),
        ({"tflops": 0.0}, "tflops is 0.0"),
        ({"gpus_per_node": 0}, "gpus_per_node is 0"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        machine(**values)


def test_the_data_sheet_s_bandwidth_holds_within_a_node():
    bandwidths = [gpus(8), gpus(8, bandwidth=300.0), gpus(16), gpus(16, bandwidth=50.0)]
    assert [one.bandwidth for one in bandwidths] == [450e9, 300e9, None, 50e9]
    assert [machine(name, None).count for name in ("cpu", "H100")] == [1, 8]


@pytest.mark.parametrize(
    ("changes", "named"),
    [({}, "optimizer AdamW"), ({"lora": LoraOptions(r=4, quantize="4bit")}, "model.lora.quantize 4bit")],
)
def test_what_does_not_shard_is_refused_as_by_a_run(tiny, monkeypatch, changes, named):
    monkeypatch.setattr(AdamW, "needs", frozenset() if changes else {Need.WHOLE_WEIGHTS})
    given = config(tiny, splitter=RandomSplit())
    for name, value in changes.items():
        setattr(given.model, name, value)
    monkeypatch.setattr("sftmix.tools.estimate.run.validate", lambda config, **_: None)  # bitsandbytes need not be here
    assert estimate(given, gpus(1))["stages"]
    with pytest.raises(ConfigError, match=f"{named} and training.parallel auto .here fsdp. exclude each other"):
        estimate(given, gpus(8))
