"""What `estimate` says of a run, against the real stages and the command."""

import json
from dataclasses import replace

import pytest

from sftmix.common.errors import ConfigError
from sftmix.common.gpus import GPUS
from sftmix.components import Need
from sftmix.components.optimizers import AdamW
from sftmix.components.reference import TrainedReference
from sftmix.components.splitters import RandomSplit
from sftmix.options import LoraOptions
from sftmix.tools.estimate.run import estimate
from tests.tiny import metrics
from tests.tools.estimate.configs import CPU, config, machine


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
    assert train == baseline
    assert (base["steps"], base["training_tokens"], base["memory_bytes"]["optimizer"]) == (0, 0, 0)
    assert 0 < base["scoring_flops"] < train["scoring_flops"]  # as the arms, without an evaluation of each epoch
    flops = sum(stage["training_flops"] + stage["scoring_flops"] for stage in stages.values())
    assert whole["device_hours"] == pytest.approx(flops / (0.1e12 * 0.5) / 3600)
    assert whole["times_plain"] == pytest.approx(flops / train["training_flops"])


def test_hours_are_the_longer_of_computing_and_sending(tiny):
    given = config(tiny, splitter=RandomSplit())
    slow, fast = (estimate(given, machine(bandwidth=bandwidth))["stages"] for bandwidth in (1e-6, 1e9))
    for name, stage in slow.items():
        scoring = stage["scoring_flops"] / (989e12 * 0.4) / 3600
        sent = sum(stage["step"]["sent_bytes_per_device"].values()) * stage["steps"]
        assert stage["device_hours"] == pytest.approx(4 * sent / 1e3 / 3600 + scoring)
        computing = stage["training_flops"] / (989e12 * 0.4) / 3600
        assert fast[name]["device_hours"] == pytest.approx(computing + scoring)


def test_the_command_prints_a_table_or_json(finished, sftmix, monkeypatch):
    words = ["estimate", *finished.tiny.options, "--splitter", "RandomSplit"]
    printed = sftmix(*words, "--gpu", "cpu").out
    assert "| train |" in printed
    assert "Hours need the peak of the device: --tflops." in printed
    done = sftmix(*words, "--gpus", "4", "--json")
    train = json.loads(done.out)["stages"]["train"]
    memory = train["memory_bytes"]
    assert (done.code, train["fits"]) == (0, True)
    assert memory["peak"] == sum(size for part, size in memory.items() if part != "peak")
    printed = sftmix(*words, "--gpus", "16").out
    assert "note: no time is counted for communication" in printed
    assert "What lowers" not in printed
    monkeypatch.setitem(GPUS, "H100", GPUS["H100"]._replace(gigabytes=1e-6))
    printed = sftmix(*words, "--gpus", "4").out
    assert "warning: train, base: more than the " in printed
    assert printed.count("What lowers activations") == 1


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


def test_the_data_sheet_s_bandwidth_holds_within_a_node():
    given = [machine(gpus=8), machine(gpus=8, bandwidth=300.0), machine(gpus=16), machine(gpus=16, bandwidth=50.0)]
    assert [one.bandwidth for one in given] == [450e9, 300e9, None, 50e9]
    assert [machine(name, None).count for name in ("cpu", "H100")] == [1, 8]


@pytest.mark.parametrize(
    ("quantize", "named"), [(False, "optimizer AdamW"), (True, "model.lora.quantize 4bit")], ids=["optimizer", "4bit"]
)
def test_what_does_not_shard_is_refused_as_by_a_run(tiny, monkeypatch, quantize, named):
    monkeypatch.setattr(AdamW, "needs", frozenset() if quantize else {Need.WHOLE_WEIGHTS})
    given = config(tiny, splitter=RandomSplit())
    if quantize:
        given = replace(given, model=replace(given.model, lora=LoraOptions(r=4, quantize="4bit")))
    assert estimate(given, machine(gpus=1))["stages"]
    with pytest.raises(ConfigError, match=f"{named} and training.parallel auto .here sharded. exclude each other"):
        estimate(given, machine(gpus=8))
