"""SFTMix inside TRL's SFTTrainer: at mu 0 it is SFTTrainer, above it is our own loop; and dynamics out of its run."""

import importlib
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    TrainerCallback,
)
from trl import SFTTrainer

from sftmix.batches.order import Slot
from sftmix.components import SFTMix
from sftmix.data import encode_dataset, prepare
from sftmix.disk.tables import read_dynamics, write_split
from sftmix.options import DataOptions
from sftmix.ranks.world import World
from sftmix.tools.integrations.dynamics import DynamicsCallback, TrainerRows, row_ids
from sftmix.training.loop import train
from sftmix.types import Split
from sftmix.words.errors import ConfigError, DataError
from tests.forked import on_ranks
from tests.text.small_tokenizers import make_encoder
from tests.tiny import ROOT, Tiny
from tests.toy import metrics_of, toy_stage

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

sys.path.insert(0, str(ROOT / "docs" / "examples"))
example = importlib.import_module("trl_sftmix")
sys.path.pop(0)

ADAMW = {"learning_rate": 0.01, "weight_decay": 0.0, "max_grad_norm": 0.5}
EPS = 1e-4


Mixed = example.SFTMixSFTTrainer


class Plain(SFTTrainer):
    _groups = np.array([0, 1] * 14 + [-1])
    """The rows are by turns confident and unconfident; the last is unpaired."""
    _get_train_sampler = Mixed._get_train_sampler


def rows_of(tiny):
    encoder = make_encoder(AutoTokenizer.from_pretrained(tiny.model), None)
    return encode_dataset(prepare(DataOptions(train=[str(tiny.train)]), 0), encoder, max_length=128).train


def trainer_of(kind, tiny, directory, keep=("id", "input_ids", "labels"), given=(), model=None, **options):
    """Two micro-batches of 4 rows a step."""
    config = options.pop("config", example.SFTMixConfig)
    data, directory = rows_of(tiny), str(directory)
    os.makedirs(directory, exist_ok=True)
    split = Split(Plain._groups.astype(np.int8), ("confident", "unconfident"))
    write_split(f"{directory}/split.parquet", data.ids, split)
    rows = [{"id": e.id, "input_ids": e.input_ids, "labels": np.where(e.target, e.input_ids, -100)} for e in data]
    fixed = {"lr_scheduler_type": "constant", "warmup_steps": 0, "adam_epsilon": EPS, "logging_steps": 1, **ADAMW}
    fixed |= {"report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}
    usual = {"sftmix_split": f"{directory}/split.parquet", "save_strategy": "no", "max_steps": 3}
    usual |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return kind(
        model or AutoModelForCausalLM.from_pretrained(tiny.model),
        config(directory, seed=0, **fixed | usual | options),
        train_dataset=Dataset.from_list(rows).select_columns(list(keep)),
        processing_class=AutoTokenizer.from_pretrained(tiny.model),
        **dict(given),
    )


def trained(*words, resume=None, **options):
    trainer = trainer_of(*words, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [line for line in trainer.state.log_history if "loss" in line]


def same(found, right, *names, rel=1e-5):
    for name in names:
        values = [line[name] for line in right]
        assert [line[name] for line in found] == pytest.approx(values, rel=rel)


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)])
def test_at_mu_0_it_is_sft_trainer(plain, tmp_path, peft):
    given = {"peft_config": peft}
    _, found = trained(Mixed, plain, tmp_path / "found", given=given, sftmix_mu=0.0)
    _, right = trained(Plain, plain, tmp_path / "right", given=given)
    same(found, right, "loss", "grad_norm", rel=1e-6)
    _, (mixed, *_) = trained(Mixed, plain, tmp_path / "mixed", given=given)
    assert [mixed["ntp"], mixed["loss"]] == pytest.approx([right[0]["loss"], mixed["ntp"] + 0.2 * mixed["mixup"]])


@pytest.mark.parametrize("mean", ["own", "ntp"])
def test_20_steps_are_those_of_our_own_loop(plain, tmp_path, mean):
    """Five epochs: on the same pairs two independent loops draw the same lambdas, and agree."""
    options = {"sftmix_mu": 0.5, "sftmix_mixup_mean": mean}
    trainer, found = trained(Mixed, plain, tmp_path / "trl", max_steps=20, **options)
    data, batches = rows_of(plain), []
    for epoch in range(5):
        sampler = trainer._get_train_sampler()
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(29))
        for at in range(0, 29, 8):
            units = [order[here : here + 2] for here in range(at, min(at + 8, 29), 2)]
            assert all(one % 2 == 0 and other % 2 == 1 for one, other in units[: 4 if at < 24 else 2])
            batches.append([tuple(map(Slot, unit)) for unit in units])
    stage = toy_stage(
        tmp_path / "ours",
        batches,
        model=AutoModelForCausalLM.from_pretrained(plain.model),
        data=data,
        objective=SFTMix(mu=0.5, mixup_mean=mean),
        seed=0,
        options={"micro_batch_size": 4, "eps": EPS, **ADAMW},
    )
    train(stage, World())
    lines = metrics_of(tmp_path / "ours")
    same(found, lines, "loss", "ntp", "mixup", "mu_effective")
    same(found, lines, "grad_norm", rel=2e-4)  # of float32 weights that 20 steps of AdamW drive apart


def test_pairs_and_lambdas_do_not_depend_on_the_size_of_a_micro_batch(plain, tmp_path, monkeypatch):
    """Rows without a partner are between the pairs: seven of the confident ones, and five of neither kind."""
    monkeypatch.setattr(Plain, "_groups", np.array([0, 1] * 8 + [0] * 8 + [-1] * 5))
    _, right = trained(Mixed, plain, tmp_path / "4", max_steps=8)
    for size, steps in ((2, 4), (8, 1)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        _, found = trained(Mixed, plain, tmp_path / str(size), max_steps=8, **sizes)
        same(found, right, "loss", "ntp", "mixup")
    assert min(line["mixup"] for line in right) >= 0 < max(line["mixup"] for line in right)


@pytest.mark.parametrize("mean", ["own", "ntp"])
def test_a_step_without_a_pair_has_no_weight_of_mixup(plain, tmp_path, monkeypatch, mean):
    """As the lines of a run of sftmix have it; there is one pair among 29 rows."""
    monkeypatch.setattr(Plain, "_groups", np.array([0, 1] + [-1] * 27))
    trainer, found = trained(Mixed, plain, tmp_path, max_steps=4, sftmix_mixup_mean=mean)
    order, sizes = list(trainer._get_train_sampler()), [len(e.target[1:].nonzero()[0]) for e in rows_of(plain)]
    right = []
    for at in range(0, 29, 8):
        of_step = order[at : at + 8]
        tokens, mixed = sum(sizes[row] for row in of_step), min(sizes[:2])
        right.append((0.2 * tokens / mixed if mean == "own" else 0.2) if 0 in of_step else 0.0)
    assert right.count(0.0) == 3
    assert [line["mu_effective"] for line in found] == pytest.approx(right)


def one_rank(world, model, rows, directory, right):
    options = {"gradient_accumulation_steps": 1, "max_steps": 8, "save_strategy": "steps", "save_steps": 6}
    words = Mixed, Tiny(model, rows, rows), directory / str(world.rank)
    _, found = trained(*words, **options)
    same(found[:3], right, "loss", "grad_norm", "ntp", "mixup")
    _, resumed = trained(*words, resume=str(directory / "0" / "checkpoint-6"), **options)
    same(resumed, found, "loss", "grad_norm", "ntp", "mixup")


@pytest.mark.long
def test_ranks_are_micro_batches(plain, tmp_path):
    """Two ranks (DDP) with one micro-batch each take the steps of one rank with two, and resume within an epoch."""
    _, right = trained(Mixed, plain, tmp_path / "one")
    on_ranks(one_rank, plain.model, plain.train, tmp_path, right)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"padding_free": True, "max_length": None},
        {"use_liger_kernel": True},
        {"label_smoothing_factor": 0.1},
        {"loss_type": "dft"},
        {"train_sampling_strategy": "group_by_length"},
        {"auto_find_batch_size": True},
        {"accelerator_config": {"split_batches": True}},
        {"per_device_train_batch_size": 3},
        {"given": {"compute_loss_func": print}},
        {"given": {"model_init": print}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_it_does_not_work_with_is_named(plain, tmp_path, options):
    name = next(iter(options.get("given", options.get("accelerator_config", options))))
    with pytest.raises(ValueError, match=f"leave out .*{name}|{name} is 3; use an even number"):
        trainer_of(Mixed, plain, tmp_path, **options)


def test_one_process_with_several_gpus_is_refused(plain, tmp_path, monkeypatch):
    """TRL would spread the model over them, and the Trainer would cut the counts of a batch."""
    monkeypatch.setattr(example.SFTMixConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"this one sees 2: accelerate launch, or CUDA_VISIBLE_DEVICES=0"):
        trainer_of(Mixed, plain, tmp_path)


@pytest.mark.parametrize("alpha", [0, -0.5])
def test_an_alpha_without_a_distribution_is_named(plain, tmp_path, alpha):
    with pytest.raises(ConfigError, match=rf"sftmix_alpha is {alpha}; allowed: above 0"):
        trainer_of(Mixed, plain, tmp_path, sftmix_alpha=alpha)


def test_it_needs_a_split_and_rows_by_number(plain, tmp_path):
    with pytest.raises(ValueError, match=r"sftmix_split is '', which is no file"):
        trainer_of(Mixed, plain, tmp_path, sftmix_split="")
    with pytest.raises(ValueError, match=r"train_dataset is a list; .* use a datasets\.Dataset"):
        row_ids([{"input_ids": [1]}])
    with pytest.raises(ValueError, match="train_dataset is a IterableDataset; "):
        row_ids(Dataset.from_list([{"input_ids": [1]}]).to_iterable_dataset())


def test_a_forward_that_replaces_ours_is_no_plain_training(plain, tmp_path):
    trainer = trainer_of(Mixed, plain, tmp_path)
    trainer.model.forward = lambda sftmix, **inputs: type(trainer.model).forward(trainer.model, **inputs)
    with pytest.raises(ValueError, match="SFTMix is in the forward of the trainer's model, and another ran"):
        trainer.train()


def test_data_seed_draws_the_pairs(plain, tmp_path):
    orders = [list(trainer_of(Mixed, plain, tmp_path, data_seed=k)._get_train_sampler()) for k in (None, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_ids_are_those_of_plain_rows_in_any_format(plain, tmp_path):
    rows = Dataset.from_dict({"id": [7, 8], "input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]})
    for kind in (rows, rows.remove_columns("id")):
        assert row_ids(kind.with_format("torch")) == row_ids(kind)
        assert TrainerRows(kind.with_format("torch")).lengths.tolist() == [2, 2]
    assert row_ids(rows) == ["7", "8"]
    twice = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [1, 2], [1, 2]]})
    first, other, *again = row_ids(twice)
    assert (first != other, again) == (True, [f"{first}#1", f"{first}#2"])


@pytest.mark.parametrize("kind", ["later tokens", "fewer embeddings"])
def test_a_model_that_does_not_fit_is_named(plain, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(plain.model)
    if kind == "later tokens":
        model.config.is_causal = False
    else:
        model.resize_token_embeddings(90)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(plain.model).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"sees later tokens|the model embeddings for 90 ids"):
        trainer_of(Mixed, replace(plain, model=tmp_path / "model"), tmp_path)


def test_a_run_of_trl_is_the_reference(plain, tmp_path, sftmix):
    """The callback's scores are those of the checkpoints, and `confidence` and `split` go on from its file."""
    trainer = trainer_of(SFTTrainer, plain, tmp_path / "out", max_steps=12, save_strategy="steps", save_steps=4)
    file = tmp_path / "dynamics.parquet"
    trainer.add_callback(DynamicsCallback(trainer.train_dataset, file, checkpoints=3))
    trainer.train()
    found = {}
    for name, words in {
        "FromFile": ("--reference.path", str(file)),
        "FromCheckpoints": ("--reference.paths", f"[{tmp_path / 'out' / 'checkpoint-*'}]"),
    }.items():
        run = tmp_path / name
        done = sftmix("split", *plain.bare, "--reference", name, *words, "--out", str(run))
        assert done.code == 0, done.err
        found[name] = read_dynamics(run / "confidence" / "dynamics.parquet")
    ours, theirs = found["FromFile"], found["FromCheckpoints"]
    assert ours.steps.tolist() == [4, 8, 12]
    for name in ("n_tokens", "n_correct", "nll_sum"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5)
    assert np.ptp(ours.nll_sum, axis=1).min() > 1e-3


def dynamics_of(tiny, directory, order=range(29), stop=None, resume=None, **options):
    """Return what is in the file after a run of 8 steps, which may stop after one of them."""
    trainer = trainer_of(SFTTrainer, tiny, directory, max_steps=8, save_strategy="steps", save_steps=2, **options)
    trainer.train_dataset = trainer.train_dataset.select(order)
    file = directory / "dynamics.parquet"
    trainer.add_callback(DynamicsCallback(trainer.train_dataset, file, checkpoints=2))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop

    trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=resume)
    return read_dynamics(file) if file.exists() else None


def test_a_resumed_run_joins_its_checkpoints_by_id(plain, tmp_path):
    dynamics_of(plain, tmp_path, stop=4, learning_rate=0.0)
    found = dynamics_of(plain, tmp_path, range(28, -1, -1), resume=True, learning_rate=0.0)
    assert found.steps.tolist() == [4, 8]
    np.testing.assert_allclose(found.nll_sum[:, 0], found.nll_sum[:, 1], rtol=1e-5)


def test_a_resumed_run_of_other_rows_is_refused(plain, tmp_path):
    dynamics_of(plain, tmp_path, range(20), stop=4)
    with pytest.raises(DataError, match="has no scores of 9 of the 29 rows"):
        dynamics_of(plain, tmp_path, resume=True)


def test_scores_of_an_earlier_run_do_not_stay(plain, tmp_path):
    dynamics_of(plain, tmp_path, learning_rate=1e-5)
    assert dynamics_of(plain, tmp_path, stop=2) is None
    whole = dynamics_of(plain, tmp_path)
    again = dynamics_of(plain, tmp_path, resume=str(tmp_path / "checkpoint-6"))
    assert again.steps.tolist() == [4, 8]
    np.testing.assert_allclose(again.nll_sum, whole.nll_sum, rtol=1e-5)
    dynamics_of(plain, tmp_path, stop=6, learning_rate=1e-5, resume=str(tmp_path / "checkpoint-2"))
    assert read_dynamics(tmp_path / "dynamics.parquet").steps.tolist() == [4]


class Scaled(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda head, inputs: (inputs[0] / 4,))


@pytest.mark.parametrize("kind", ["scaled", "prompt"])
def test_a_model_whose_loss_is_another_is_refused_before_the_first_step(plain, tmp_path, kind):
    model = (Scaled if kind == "scaled" else LlamaForCausalLM).from_pretrained(plain.model)
    if kind == "prompt":
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ConfigError, match=r"would train another model|does not run as backbone and head"):
        dynamics_of(plain, tmp_path, model=model)
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_scaled_head_is_known_under_mixed_precision(plain, tmp_path):
    """accelerate has the model's own forward in autocast, where it rounds otherwise than the head."""
    config = GraniteConfig(**LlamaForCausalLM.from_pretrained(plain.model).config.to_dict() | {"logits_scaling": 3.0})
    model = GraniteForCausalLM(config)
    assert dynamics_of(plain, tmp_path, model=model, bf16=True).steps.tolist() == [4, 8]


def test_rows_without_labels_and_a_run_without_scorings_are_refused(plain, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 2]]})
    with pytest.raises(ValueError, match=r"the rows have no column labels \(they have \['input_ids'\]\)"):
        DynamicsCallback(rows, tmp_path / "dynamics.parquet")
    seen = rows.add_column("labels", [[1, 2]]).add_column("pixel_values", [[0.5]])
    with pytest.raises(ValueError, match="the rows have pixel_values, and tokens alone are scored"):
        DynamicsCallback(seen, tmp_path / "dynamics.parquet")
    with pytest.raises(ConfigError, match="checkpoints is 0; allowed: a number of scorings from 1"):
        DynamicsCallback(rows.add_column("labels", [[1, 2]]), tmp_path / "dynamics.parquet", checkpoints=0)
    with pytest.raises(ConfigError, match="checkpoints is 'online'; allowed: a number of scorings from 1"):
        DynamicsCallback(rows.add_column("labels", [[1, 2]]), tmp_path / "dynamics.parquet", checkpoints="online")
