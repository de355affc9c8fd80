"""SFTMix inside TRL's SFTTrainer: at mu 0 it is SFTTrainer, above it is our own loop; and dynamics out of its run."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer
from trl import SFTTrainer

from sftmix.batches.order import Slot
from sftmix.common.tables import read_dynamics, write_split
from sftmix.common.world import World
from sftmix.components import FromCheckpoints, SFTMix, objectives
from sftmix.data import load_data, make_encoder
from sftmix.options import DataOptions
from sftmix.tools.integrations import DynamicsCallback
from sftmix.tools.integrations.trainer import groups_of
from sftmix.training.loop import train
from sftmix.types import Split
from tests.forked import on_ranks
from tests.tiny import ROOT, Tiny, make_tiny
from tests.toy import logged, toy_stage

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

sys.path.insert(0, str(ROOT / "docs" / "examples"))
example = importlib.import_module("trl_sftmix")
sys.path.pop(0)

ADAMW = {"learning_rate": 0.01, "weight_decay": 0.0, "max_grad_norm": 0.5}
EPS = 1e-4


class Mixed(example.SFTMixSFTTrainer):
    """It keeps what it draws."""

    drawn = ()

    def _get_num_items_in_batch(self, batches, device):
        counts = super()._get_num_items_in_batch(batches, device)
        self.drawn = [*self.drawn, [[x.tolist() for x in batch["sftmix"]] for batch in batches]]
        return counts


class Plain(SFTTrainer):
    _get_train_sampler = Mixed._get_train_sampler


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), dropout=0.0)


def rows_of(tiny: Tiny):
    encoder = make_encoder(AutoTokenizer.from_pretrained(tiny.model), None)
    return load_data(DataOptions(train=[str(tiny.train)]), encoder, max_length=128, seed=0, progress=False).train


def trainer_of(kind: type, tiny: Tiny, directory: Path, peft: Any = None, given: Any = (), **options: Any) -> Any:
    """Two micro-batches of 4 rows a step; the rows are by turns confident and unconfident, the last is unpaired."""
    data = rows_of(tiny)
    split = Split(np.array([0, 1] * 14 + [-1], dtype=np.int8), ("confident", "unconfident"))
    directory.mkdir(exist_ok=True)
    write_split(directory / "split.parquet", data.ids, split)
    columns = [(e.id, e.input_ids.tolist(), np.where(e.target, e.input_ids, -100).tolist()) for e in data]
    dataset = Dataset.from_list([dict(zip(("id", "input_ids", "labels"), row, strict=True)) for row in columns])
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | options
    options |= {
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "adam_epsilon": EPS,
        "logging_steps": 1,
        "report_to": [],
        **ADAMW,
    }
    options |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 0}
    trainer = kind(
        AutoModelForCausalLM.from_pretrained(tiny.model),
        example.SFTMixConfig(output_dir=str(directory), sftmix_split=str(directory / "split.parquet"), **options),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(tiny.model),
        **({"peft_config": peft} if peft else {}),
        **dict(given),
    )
    trainer._groups = split.group.astype(np.int64)  # for Plain's sampler
    return trainer


def trained(*words: Any, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    trainer = trainer_of(*words, **options)
    trainer.train()
    return trainer, [line for line in trainer.state.log_history if "loss" in line]


def same(found: list[dict[str, float]], right: list[dict[str, float]], *names: str, **rel: float) -> None:
    for name in names or ("loss", "grad_norm", "ntp", "mixup", "mu_effective"):
        values = [line[name] for line in right]
        assert [line[name] for line in found] == pytest.approx(values, rel=rel.get(name, 1e-5))


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)])
def test_at_mu_0_it_is_sft_trainer(tiny, tmp_path, peft):
    (_, found), (_, right) = (
        trained(kind, tiny, tmp_path / kind.__name__, peft, sftmix_mu=0.0, save_strategy="no")
        for kind in (Mixed, Plain)
    )
    same(found, right, "loss", "grad_norm", loss=1e-6, grad_norm=1e-6)
    assert len({line["loss"] for line in found}) == 3
    _, mixed = trained(Mixed, tiny, tmp_path / "mixed", peft, save_strategy="no")
    assert mixed[0]["loss"] == pytest.approx(mixed[0]["ntp"] + 0.2 * mixed[0]["mixup"], rel=1e-5)
    assert mixed[0]["ntp"] == pytest.approx(right[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("mean", ["own", "ntp"])
def test_20_steps_are_those_of_our_own_loop(tiny, tmp_path, monkeypatch, mean):
    """Five epochs: on the same pairs and lambdas two independent loops agree."""
    options = {"sftmix_mu": 0.5, "sftmix_mixup_mean": mean}
    trainer, found = trained(Mixed, tiny, tmp_path / "trl", max_steps=20, save_strategy="no", **options)
    data, batches, lambdas = rows_of(tiny), [], {}
    for epoch in range(5):
        sampler = trainer._get_train_sampler()
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(29))
        for at in range(0, 29, 8):
            units, alone = [], set(order[at : at + 8])
            for micro, (slots, lam) in enumerate(trainer.drawn[len(batches)]):
                for pair, share in zip(slots, lam, strict=True):
                    c, u = (order[at + 4 * micro + slot] for slot in pair)
                    assert (c % 2, u % 2) == (0, 1)
                    lambdas[len(batches), data.ids[c], data.ids[u]] = share
                    units.append((Slot(c), Slot(u)))
                    alone -= {c, u}
            batches.append([*units, *((Slot(row),) for row in alone)])

    def given(seed, purpose, *key):
        return SimpleNamespace(beta=lambda a, b, size: np.full(size, lambdas[key]))

    monkeypatch.setattr(objectives, "generator", given)
    stage = toy_stage(
        tmp_path / "ours",
        batches,
        model=AutoModelForCausalLM.from_pretrained(tiny.model),
        data=data,
        objective=SFTMix(mu=0.5, mixup_mean=mean),
        options={"micro_batch_size": 4, "eps": EPS, **ADAMW},
    )
    train(stage, World())
    same(found, logged(tmp_path / "ours"), grad_norm=3e-5)  # whose squares a Trainer sums in float32


def one_rank(world: World, model: Path, rows: Path, directory: Path, right: list[dict[str, float]]) -> None:
    options = {"gradient_accumulation_steps": 1, "save_strategy": "no"}
    _, found = trained(Mixed, Tiny(model, rows, rows), directory / str(world.rank), **options)
    same(found, right)


def test_ranks_are_micro_batches(tiny, tmp_path):
    """Two ranks (DDP) with one micro-batch each take the steps of one rank with two."""
    _, right = trained(Mixed, tiny, tmp_path / "one", save_strategy="no")
    on_ranks(one_rank, tiny.model, tiny.train, tmp_path, right)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"padding_free": True, "max_length": None},
        {"use_liger_kernel": True},
        {"label_smoothing_factor": 0.1},
        {"loss_type": "dft"},
        {"per_device_train_batch_size": 3},
        {"given": {"compute_loss_func": print}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_it_does_not_work_with_is_named(tiny, tmp_path, options):
    name = next(iter(options.get("given", options)))
    with pytest.raises(ValueError, match=f"leave out .*{name}|even micro-batches"):
        trainer_of(Mixed, tiny, tmp_path, **options)


def test_a_run_of_trl_is_the_reference(tiny, tmp_path, sftmix):
    """The callback's scores are those of the checkpoints, and `confidence` and `split` go on from its file."""
    trainer = trainer_of(SFTTrainer, tiny, tmp_path / "out", max_steps=12, save_steps=4, save_only_model=True)
    file = tmp_path / "dynamics.parquet"
    trainer.add_callback(DynamicsCallback(trainer.train_dataset, file, checkpoints=3))
    trainer.train()
    found = {}
    for name, words in {
        "FromFile": ("--reference.path", str(file)),
        "FromCheckpoints": ("--reference.paths", f"[{tmp_path / 'out' / 'checkpoint-*'}]"),
    }.items():
        run = tmp_path / name
        done = sftmix("split", *tiny.bare, "--reference", name, *words, "--out", str(run))
        assert done.code == 0, done.err
        found[name] = read_dynamics(run / "confidence" / "dynamics.parquet")
    ours, theirs = found["FromFile"], found["FromCheckpoints"]
    assert ours.steps.tolist() == [4, 8, 12]
    assert ours.n_tokens.tolist() == theirs.n_tokens.tolist()
    np.testing.assert_array_equal(ours.n_correct, theirs.n_correct)
    np.testing.assert_allclose(ours.nll_sum, theirs.nll_sum, rtol=1e-5)
    assert np.ptp(ours.nll_sum, axis=1).min() > 1e-3
    names = [Path(path).name for path in FromCheckpoints(paths=[str(tmp_path / "out" / "checkpoint-*")]).paths]
    assert names == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


class Values(dict):
    """A configuration, as axolotl's."""

    __getattr__ = dict.get


def test_axolotls_plugin_trains_alike(tiny, tmp_path, monkeypatch):
    """By axolotl's interface, whose trainer is one of transformers: a reference run, and a run on its split."""
    testing = pytest.importorskip("click.testing")
    pytest.importorskip("pydantic")
    for name in ("", ".integrations", ".integrations.base", ".core", ".core.trainers", ".core.trainers.base"):
        monkeypatch.setitem(sys.modules, f"axolotl{name}", ModuleType(f"axolotl{name}"))
    sys.modules["axolotl.integrations.base"].BasePlugin = object
    sys.modules["axolotl.core.trainers.base"].AxolotlTrainer = Trainer
    axolotl = importlib.import_module("sftmix.tools.integrations.axolotl")
    plugin, file = axolotl.SFTMixPlugin(), str(tmp_path / "dynamics.parquet")
    assert [plugin.get_input_args(), plugin.get_training_args_mixin()] == [
        f"{kind.__module__}.{kind.__name__}" for kind in (axolotl.SFTMixInput, axolotl.SFTMixArguments)
    ]
    given = {"data_collator": DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(tiny.model))}

    first = Values(axolotl.SFTMixInput(sftmix_dynamics=file).model_dump())
    assert plugin.get_trainer_cls(first) is None
    trainer = trainer_of(Trainer, tiny, tmp_path / "first", given=given)
    trainer.train_dataset = trainer.train_dataset.remove_columns("id")  # as axolotl does
    (callback,) = plugin.add_callbacks_post_trainer(first, trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert [len(name) for name in read_dynamics(file).ids] == [32] * 29
    assert groups_of(file, read_dynamics(file).ids).tolist().count(0) == 14

    options = plugin.get_training_args(Values(axolotl.SFTMixInput(sftmix_split=file, sftmix_mu=0.5).model_dump()))
    assert options == {"sftmix_split": file, "sftmix_mu": 0.5, "sftmix_alpha": 0.5, "sftmix_mixup_mean": "own"}
    kind = plugin.get_trainer_cls(Values(options))
    _, found = trained(kind, tiny, tmp_path / "second", given=given, save_strategy="no")
    _, right = trained(Mixed, tiny, tmp_path / "trl", save_strategy="no")
    same(found, right, "loss", "grad_norm")
    assert plugin.add_callbacks_post_trainer(Values(options), None) == []

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["axolotl.cli_commands"]["sftmix"].split(":")
    shown = testing.CliRunner().invoke(getattr(importlib.import_module(module), name), ["components", "--help"])
    assert (shown.exit_code, "sftmix components" in shown.output) == (0, True)
