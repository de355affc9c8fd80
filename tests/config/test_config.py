"""RunConfig: the paper's defaults, the checks that name both options, and the way to YAML and back."""

import json
from dataclasses import replace

import pytest
import yaml

from sftmix.components.base import Reference
from sftmix.components.callbacks import Evaluate
from sftmix.components.component import Need
from sftmix.components.confidence import LogPerplexity, Perplexity
from sftmix.components.objectives import NTP, MixupOnly, SFTMix
from sftmix.components.others.calibration import Calibration
from sftmix.components.others.confidences import IFD, Correctness, LearningPercentage, LowVariability
from sftmix.components.others.mixing import MeasureMixing
from sftmix.components.others.pairings import ConfidenceGapPairs, LengthMatchedPairs
from sftmix.components.others.perturbations import NEFTune
from sftmix.components.others.places import CutMix, ManifoldMixup
from sftmix.components.others.remarks import Remarks
from sftmix.components.others.schedules import AfterFraction, Linear
from sftmix.components.others.selectors import ScoreAtLeast
from sftmix.components.pairing import RandomPairs
from sftmix.components.reference import FromCheckpoints, FromFile, Online, TrainedReference
from sftmix.components.row_format import RowFormat
from sftmix.components.splitters import Median, QualityLabel, RandomSplit
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.config.read import from_dict
from sftmix.options import (
    CheckpointOptions,
    DataOptions,
    LoraOptions,
    ModelOptions,
    ReferenceModel,
    ReferenceTraining,
    TrainingOptions,
)
from sftmix.text import ChatTemplate
from sftmix.text.formats import Messages
from sftmix.words.errors import ConfigError
from tests.configs import read_config


def complete(**changes: object) -> RunConfig:
    """A configuration without a problem, but for the changes."""
    given = {"out": "o", "model": ModelOptions(path="m"), "data": DataOptions(train=["a.json"]), **changes}
    return RunConfig(**given)  # type: ignore[arg-type]


VARIED = [
    RunConfig(),
    complete(
        model=ModelOptions(path="m", lora=LoraOptions(r=8, target_modules=["q_proj", "lm_head"], bias="all")),
        data=DataOptions(train=["a.json", "b.jsonl"], eval="held.json", template="chatml", max_length=64, limit=9),
        training=TrainingOptions(betas=(0.8, 0.95), epochs=0.5, max_steps=3, precision="bf16"),
        checkpoint=CheckpointOptions(every=0, keep=1),
        reference=TrainedReference(
            model=ReferenceModel(path="weak", max_length=32, lora=LoraOptions(r=2, use_dora=True)),
            checkpoints=[0, 0.5, 1],
            token_nll=True,
            training=ReferenceTraining(learning_rate=1e-3, seed=3),
        ),
        confidence=LogPerplexity(),
        splitter=RandomSplit(),
        pairing=LengthMatchedPairs(window=4),
        objective=SFTMix(mu=0, alpha=2.0, lambda_per="token"),
        callbacks=[Evaluate(every=5), Evaluate()],
    ),
    complete(
        objective=SFTMix(mu=AfterFraction(fraction=0.5, value=0.4), alpha=Linear(start=1, end=0.2), mean="sequence"),
        splitter=QualityLabel(high=["good", "fair"], low="bad"),
        data=DataOptions(train=["a.json", "b.json"], labels=["good", "bad"]),
        selector=ScoreAtLeast(field="judge", threshold=4.5),
        perturbation=NEFTune(alpha=10.0),
        confidence=IFD(checkpoint="mean"),
    ),
]


def test_the_defaults_are_the_papers():
    config = RunConfig()
    classes = [config.reference, config.confidence, config.splitter, config.objective, *config.callbacks]
    assert [type(c) for c in classes] == [TrainedReference, Perplexity, Median, SFTMix, Calibration, Remarks, Evaluate]
    objective, training = config.objective, config.training
    assert (objective.mu, objective.alpha, config.reference.checkpoints) == (0.2, 0.5, 5)
    assert (training.learning_rate, training.weight_decay, training.global_batch_size) == (2e-6, 0.1, 32)
    assert (training.schedule, training.warmup_ratio) == ("cosine", 0.1)


def test_auto_pairing_follows_the_objective():
    assert isinstance(complete().resolved_pairing(), RandomPairs)
    assert complete(objective=NTP()).resolved_pairing() is None
    assert isinstance(complete(objective=NTP(), pairing=RandomPairs()).resolved_pairing(), RandomPairs)
    assert complete(pairing=None).resolved_pairing() is None


def test_equality_is_that_of_the_plain_forms():
    assert complete() == complete()
    assert complete(objective=SFTMix(mu=0.2)) == complete()
    assert complete(objective=SFTMix(mu=0.3)) != complete()
    assert complete() != "something else"


@pytest.mark.parametrize("config", VARIED)
def test_yaml_comes_back_equal(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config.yaml(), encoding="utf-8")
    again = read_config(path)
    assert again == config
    assert type(again.objective) is type(config.objective)
    assert json.loads(json.dumps(config.as_dict())) == config.as_dict()
    assert yaml.safe_load(config.yaml()) == config.as_dict()


def test_a_complete_configuration_is_valid():
    validate(complete())
    validate(complete(out=None), needs_out=False)
    validate(complete(training=TrainingOptions(global_batch_size=4, micro_batch_size=8)))
    validate(complete(training=TrainingOptions(micro_batch_tokens=4096, padding_free=True)))
    validate(complete(objective=NTP(), training=TrainingOptions(global_batch_size=3, micro_batch_size=1)))


PROBLEMS = [
    ({"data.train": ["a.json", " "]}, "data.train has an empty name (['a.json', ' '])"),
    ({"data.eval": ""}, "data.eval has an empty name (['']): name a file, directory or hub id"),
    ({"data.eval": "e", "data.eval_fraction": 0.1}, "data.eval (e) and data.eval_fraction (0.1) exclude each other"),
    ({"data.eval": "a.json"}, "data.train and data.eval both name a.json"),
    ({"data.eval_fraction": 1.0}, "data.eval_fraction is 1.0; allowed: in (0, 1)"),
    ({"data.max_length": 1}, "data.max_length is 1; allowed: at least 2"),
    ({"data.eval": []}, "data.eval is an empty list: name files of held-out rows, or null for none"),
    ({"data.limit": 0}, "data.limit is 0; allowed: at least 1"),
    ({"data.limit": 10**18 + 1}, f"data.limit is {10**18 + 1}; allowed: at least 1 and at most 10**18"),
    ({"data.labels": "a", "data.label_field": "q"}, "data.labels (a) and data.label_field (q) exclude each other"),
    ({"data.labels": ["a", "b"]}, "data.labels has 2 values ['a', 'b'] for 1 entries of data.train ['a.json']"),
    ({"training.global_batch_size": 31}, "training.global_batch_size is 31, and pairing needs an even number"),
    (
        {"pairing": {"class_path": "PermutedPairs", "init_args": {"global_batch_size": 16}}},
        "pairing.global_batch_size is 16, and training.global_batch_size 32: partners are drawn within the global",
    ),
    ({"training.global_batch_size": 0}, "training.global_batch_size is 0; allowed: at least 1"),
    ({"training.micro_batch_tokens": 0}, "training.micro_batch_tokens is 0; allowed: at least 1, auto or null"),
    ({"training.micro_batch_tokens": "most"}, "training.micro_batch_tokens"),
    (
        {"training": {"micro_batch_size": 4, "micro_batch_tokens": 512}},
        "training.micro_batch_size (4) and training.micro_batch_tokens (512) exclude each other",
    ),
    (
        {"training": {"micro_batch_size": 4, "micro_batch_tokens": "auto"}},
        "training.micro_batch_size (4) and training.micro_batch_tokens (auto) exclude each other",
    ),
    (
        {"training": {"length_groups": 2, "padding_free": True}},
        "training.length_groups (2) and training.padding_free true exclude each other",
    ),
    (
        {"reference.training": {"epochs": 1, "max_steps": 9}},
        "reference.training.epochs 1 and reference.training.max_steps 9 exclude each other",
    ),
    (
        {"training.shard_group_size": 2},
        "training.shard_group_size is 2, an option of hsdp, but the stage has parallel auto",
    ),
    ({"training.reduce_each_micro_batch": True}, "reduce_each_micro_batch is true, an option of fsdp and hsdp, but"),
    ({"training.reduce_dtype": "bfloat16"}, "reduce_dtype is bfloat16, an option of fsdp and hsdp, but the stage has"),
    (
        {"training.reshard_after_forward": False, "training.parallel": "ddp"},
        "use --training.parallel fsdp, or leave resh",
    ),
    ({"data.cache_dir": "${SCR}/c"}, "'${SCR}/c' cannot be the directory of the cache: it holds a variable"),
    ({"training.learning_rate": 0.0}, "training.learning_rate is 0.0; allowed: above 0"),
    ({"training.learning_rate": float("nan")}, "training.learning_rate is nan; allowed: above 0"),
    ({"training.epochs": 0}, "training.epochs is 0.0; allowed: above 0"),
    ({"training.warmup_ratio": 1.5}, "training.warmup_ratio is 1.5; allowed: in [0, 1]"),
    ({"training.betas": [0.9, 1.0]}, "training.betas is (0.9, 1.0); allowed: two numbers in [0, 1)"),
    ({"training.weight_decay": -0.1}, "training.weight_decay is -0.1; allowed: 0 or more"),
    ({"training.max_grad_norm": -1.0}, "training.max_grad_norm is -1.0; allowed: 0 (no clipping) or more"),
    ({"training.eps": 0.0}, "training.eps is 0.0; allowed: above 0"),
    ({"checkpoint.keep": 0}, "checkpoint.keep is 0; allowed: at least 1"),
    ({"checkpoint.every": -1}, "checkpoint.every is -1; allowed: a number of steps, 0 (none)"),
    ({"checkpoint.every_seconds": 0.0}, "checkpoint.every_seconds is 0.0; allowed: above 0, or null"),
    (
        {"checkpoint.every": 0, "checkpoint.every_seconds": 60.0},
        "checkpoint.every (0) and checkpoint.every_seconds (60)",
    ),
    ({"pairing": None}, "objective SFTMix needs pairs of examples"),
    ({"callbacks.every": 5}, "Evaluate(every=5) has nothing to evaluate; set data.eval"),
    ({"reference.training.learning_rate": -1.0}, "reference.training.learning_rate is -1.0; allowed: above 0"),
]


@pytest.mark.parametrize(("changes", "message"), PROBLEMS)
def test_a_problem_is_named_with_its_options(changes, message):
    whole = {"out": "o", "model.path": "m", "data.train": "a.json"}
    with pytest.raises(ConfigError) as caught:
        validate(from_dict({**whole, **changes}))
    assert "problems" not in str(caught.value)
    assert message in str(caught.value)


class OwnReference(Reference):
    """Says nothing of what its dynamics hold."""

    def collect(self, context):
        raise AssertionError


ALONE = "needs the NLL of each response without its instruction"
BEFORE = "needs the perplexity before training"
CHECKPOINTED = TrainingOptions(activation_checkpointing=True)
CORRECT = "needs the number of correct tokens"
ESTIMATORS = (Perplexity, LogPerplexity, Correctness, LowVariability, IFD, LearningPercentage)


def refused_confidences(reference: Reference, **options: object) -> dict[str, str]:
    """The estimators that cannot go with a reference, by name, with the message of each."""
    given = {"reference": reference, "training": TrainingOptions(**options)}
    found = {kind.__name__: refusal(confidence=kind(), **given) for kind in ESTIMATORS}
    return {name: message for name, message in found.items() if message}


def refusal(**changes: object) -> str:
    try:
        validate(complete(**changes))
    except ConfigError as error:
        return str(error)
    return ""


class OfAPackage(RandomSplit):
    package = "nothing_of_this_name"


class RowsOfAPackage(RowFormat):
    package = "nothing_of_this_name"

    def read(self, row):
        return []


def test_a_package_that_is_not_there_is_named_before_anything_is_read():
    assert "splitter OfAPackage needs the package nothing_of_this_name" in refusal(splitter=OfAPackage())
    said = refusal(row_format=RowsOfAPackage())
    assert "row_format RowsOfAPackage needs the package nothing_of_this_name" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [("template", "chatml"), ("template_options", {"a": 1}), ("thoughts", "drop"), ("packing", False)],
)
def test_a_renderer_and_an_option_of_the_chat_template_exclude_each_other(name, value):
    data = replace(complete().data, **{name: value})
    said = refusal(data=data, renderer=ChatTemplate())
    assert said == f"renderer ChatTemplate and data.{name} ({value}) exclude each other: leave one out"
    assert refusal(data=data) == refusal(renderer=ChatTemplate()) == ""


@pytest.mark.parametrize(
    "reference",
    [
        TrainedReference(model=ReferenceModel(template="chatml")),
        FromCheckpoints(paths=["m"], template="chatml"),
    ],
)
def test_a_renderer_and_a_template_of_the_reference_exclude_each_other(reference):
    said = refusal(reference=reference, renderer=ChatTemplate())
    assert said.startswith("renderer ChatTemplate and reference.template or reference.model.template (chatml) exclude")
    assert refusal(reference=reference) == ""


def test_a_row_format_and_a_word_exclude_each_other_and_columns_are_of_the_one_that_counts():
    data = replace(complete().data, format="alpaca")
    said = refusal(data=data, row_format=Messages())
    assert said == "row_format Messages and data.format (alpaca) exclude each other: leave one out"
    data = replace(complete().data, columns={"messages": "turns"})
    assert refusal(data=data, row_format=Messages()) == ""
    said = refusal(data=data, row_format=Messages(field="dialogue"))
    assert "no format that row_format or data.format chooses has messages" in said
    assert "(Messages: dialogue; each: system, id, weight, tools)" in said


def test_a_pairing_by_confidence_is_refused_where_none_is_estimated():
    said = refusal(pairing=ConfidenceGapPairs(), splitter=RandomSplit())
    assert "pairing ConfidenceGapPairs needs the confidence" in said
    assert "use --splitter Median or Quantile" in said
    assert refusal(pairing=ConfidenceGapPairs()) == ""


class OfTokens(Perplexity):
    needs = frozenset({Need.TOKEN_NLL})


def test_the_losses_of_tokens_are_given_where_they_are_kept():
    assert "set reference.token_nll true" in refusal(confidence=OfTokens())
    assert "reference OwnReference does not give" in refusal(confidence=OfTokens(), reference=OwnReference())
    for reference in (TrainedReference(token_nll=True), FromFile(path="dynamics.parquet")):  # a file may hold them
        assert refusal(confidence=OfTokens(), reference=reference) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"objective": ManifoldMixup(layers=[0, 2]), "training": CHECKPOINTED},
            "--training.activation_checkpointing false",
        ),
        ({"objective": ManifoldMixup(layers=0), "training": CHECKPOINTED}, ""),
        ({"objective": CutMix(), "callbacks": [MeasureMixing()]}, "mixes the inputs of the LM head"),
        ({"objective": SFTMix(), "callbacks": [MeasureMixing()], "training": CHECKPOINTED}, ""),
    ],
)
def test_what_the_first_steps_would_refuse_is_refused_before_the_reference(changes, words):
    said = refusal(**changes)
    assert (words in said) if words else (said == "")


@pytest.mark.parametrize(
    ("reference", "refused"),
    [
        (TrainedReference(), {"IFD": ALONE, "LearningPercentage": BEFORE}),
        (
            TrainedReference(checkpoints=[0], response_alone=True),
            {"LearningPercentage": "3 checkpoints, but", "LowVariability": "needs 2"},
        ),
        (TrainedReference(checkpoints=[0, 0.3, 1], response_alone=True), {}),
        (TrainedReference(checkpoints=1), {"IFD": ALONE, "LearningPercentage": BEFORE, "LowVariability": "needs 2"}),
        (
            TrainedReference(checkpoints="online"),
            {"IFD": ALONE, "LearningPercentage": BEFORE, "Correctness": CORRECT},
        ),
        (
            FromCheckpoints(paths=["a"]),
            {"IFD": ALONE, "LearningPercentage": BEFORE, "LowVariability": "has 1"},
        ),
        (FromCheckpoints(paths=["a", "b", "c"]), {"IFD": ALONE, "LearningPercentage": BEFORE}),
        (FromFile(path="dynamics.parquet"), {}),
        (OwnReference(), {}),
        (
            Online(window=None),
            {"IFD": ALONE, "LearningPercentage": BEFORE, "Correctness": CORRECT, "LowVariability": "has 1"},
        ),
    ],
)
def test_a_confidence_is_refused_where_the_dynamics_lack_what_it_reads(reference, refused):
    """Before any work: each would be found out only when the dynamics are there."""
    found = refused_confidences(reference)
    assert set(found) == set(refused)
    for name, words in refused.items():
        assert words in found[name]
        assert f"confidence {name} " in found[name]
        assert f"reference {type(reference).__name__}" in found[name]
        assert "another --confidence" in found[name]


@pytest.mark.parametrize(
    ("own", "options", "refused"),
    [
        (None, {"epochs": 1.9}, True),
        (None, {"epochs": 2}, False),
        (ReferenceTraining(epochs=1), {"epochs": 3}, True),
        (ReferenceTraining(max_steps=9), {"epochs": 1}, False),
    ],
)
def test_online_checkpoints_are_as_many_as_whole_epochs(own, options, refused):
    reference = TrainedReference(checkpoints="online", training=own)
    assert ("LowVariability" in refused_confidences(reference, **options)) == refused


def test_a_confidence_that_is_not_used_is_not_checked():
    validate(complete(confidence=IFD(), splitter=RandomSplit()))
    validate(complete(confidence=IFD(), objective=NTP(), pairing=None))


def test_a_single_run_needs_an_objective_that_trains_without_pairs():
    with pytest.raises(ConfigError, match="MixupOnly needs pairs or groups in the first epoch, which reference Online"):
        validate(complete(reference=Online(), objective=MixupOnly()))
    validate(complete(reference=Online()))
    validate(complete(objective=MixupOnly()))


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match="4 problems") as caught:
        validate(RunConfig(checkpoint=CheckpointOptions(keep=0)))
    assert [line.split()[1] for line in str(caught.value).splitlines()[1:]] == [
        "out",
        "model.path",
        "data.train",
        "checkpoint.keep",
    ]


class Greedy(NTP):
    needs = frozenset({Need.STOP})


def test_a_need_that_nothing_can_give_is_refused_by_name():
    assert "objective Greedy needs an end of the training" in refusal(objective=Greedy())
