"""The training options of a reference: its own, the run's where it sets none, and those that exclude each other."""

import json
from dataclasses import fields, replace

import pytest

from sftmix.components.reference import TrainedReference
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.options import DataOptions, ModelOptions, ReferenceTraining, TrainingOptions
from sftmix.options.reference import inherit
from sftmix.words.errors import ConfigError
from tests.tiny import metrics


def with_own(training: TrainingOptions, own: ReferenceTraining) -> RunConfig:
    model, data = ModelOptions(path="m"), DataOptions(train=["a.json"])
    return RunConfig(out="o", model=model, data=data, training=training, reference=TrainedReference(training=own))


REPLACED = [
    ({"micro_batch_size": 8}, {"micro_batch_tokens": 900}, {"micro_batch_size": None}),
    ({"micro_batch_tokens": 900}, {"micro_batch_size": 2}, {"micro_batch_tokens": None}),
    ({"micro_batch_size": 8}, {"micro_batch_tokens": "auto"}, {"micro_batch_size": None}),
    ({"micro_batch_tokens": "auto"}, {"micro_batch_size": 2}, {"micro_batch_tokens": None}),
    ({"max_steps": 500}, {"epochs": 1.0}, {"max_steps": None}),
    ({"length_groups": 4}, {"padding_free": True}, {"length_groups": None}),
    ({"length_groups": 4}, {"padding_free": "auto"}, {}),
    ({"padding_free": True}, {"length_groups": 4}, {"padding_free": "auto"}),
    ({"parallel": "hsdp", "shard_group_size": 2}, {"parallel": "ddp"}, {"shard_group_size": None}),
]


@pytest.mark.parametrize(("run", "own", "dropped"), REPLACED)
def test_an_option_of_the_reference_replaces_what_excludes_it(run, own, dropped):
    training, of_reference = TrainingOptions(**run), ReferenceTraining(**own)
    assert inherit(training, of_reference) == replace(training, **{**own, **dropped})
    validate(with_own(training, of_reference))


@pytest.mark.parametrize(
    ("run", "own", "words"),
    [
        (
            {},
            {"length_groups": 2, "padding_free": True},
            ["reference.training.length_groups (2)", "reference.training.padding_free true", "null"],
        ),
        (
            {"parallel": "fsdp"},
            {"shard_group_size": 2},
            ["reference.training.shard_group_size is 2", "has parallel fsdp", "--reference.training.parallel hsdp"],
        ),
    ],
)
def test_what_the_reference_would_be_trained_with_is_checked(run, own, words):
    with pytest.raises(ConfigError) as caught:
        validate(with_own(TrainingOptions(**run), ReferenceTraining(**own)))
    assert "problems" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "run",
    [{"learning_rate": -1.0}, {"parallel": "ddp", "shard_group_size": 2}],
)
def test_a_problem_of_the_run_is_not_told_again_of_the_reference(run):
    with pytest.raises(ConfigError) as caught:
        validate(with_own(TrainingOptions(**run), ReferenceTraining(epochs=1.0)))
    assert "problems" not in str(caught.value)
    assert "reference.training" not in str(caught.value)


def test_epochs_of_the_reference_end_it_whatever_the_steps_of_the_target(tiny, tmp_path, sftmix):
    """29 rows of 8 a step: four steps an epoch, where the target has two in all."""
    run = tmp_path / "run"
    words = [*tiny.options, "--training.max_steps", "2", "--reference.training.epochs", "1", "--out", str(run)]
    done = sftmix("run", *words)
    assert done.code == 0, done.err
    assert [len(metrics(run, stage)) for stage in ("reference", "train")] == [4, 2]
    training = [json.loads((run / stage / "inputs.json").read_text())["training"] for stage in ("reference", "train")]
    assert [(t["epochs"], t["max_steps"]) for t in training] == [(1.0, None), (3.0, 2)]


def test_the_reference_inherits_every_training_option():
    own = {f.name for f in fields(ReferenceTraining)}
    of_all_stages = {"timeout", "deterministic", "flash_kernels"}  # ranks are joined once, and torch is set once
    assert own == {f.name for f in fields(TrainingOptions)} - of_all_stages | {"seed"}
    assert all(getattr(ReferenceTraining(), name) is None for name in own)
