"""Trained parameters that get no gradient, as the indexer of DeepSeek-V3.2: trained, saved, continued, on any ranks."""

import copy
import io
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from sftmix.batches.order import Slot
from sftmix.components import NTP, Callback
from sftmix.model.adapters import add_adapters
from sftmix.options import LoraOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import train
from sftmix.words.errors import ConfigError, Stopped
from tests.forked import on_ranks
from tests.toy import Interrupt, toy_model, toy_stage
from tests.trained import DATA, assert_exact, assert_near

BATCHES = [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * 2
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
INDEXED = {"num_hidden_layers": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
INDEXED |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 16}
INDEXED |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16}
HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8}
HYBRID |= {"mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8, "adapter_rank": 4}
REAL = {"deepseek_v32": SMALL | INDEXED, "glm_moe_dsa": SMALL | INDEXED, "zamba2": SMALL | HYBRID}
"""Without gradient are the indexer, whose choice of keys has none, and adapters of the adapters that Zamba2 has itself:
its layers share their weights, and each uses others."""
ADAPTERS = {"lora": ["c_attn", "index"], "zamba2": "all-linear"}


class Indexed(nn.Module):
    """An MLP beside which a choice is made that has no gradient."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.index = nn.Linear(16, 2)

    def forward(self, states):
        with torch.no_grad():
            self.index(states)
        return self.mlp(states)


class Experts(nn.Module):
    """Two MLPs, modules of their own, of which a row goes through one."""

    def __init__(self, mlp: nn.Module, *, equal: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp) if equal else nn.Linear(16, 16)])

    def forward(self, states):
        return self.experts[int(states[0, -1, 1] > 0)](states)


KINDS_OF_MLP = {"experts": Experts, "equal experts": partial(Experts, equal=True)}


def model_of(kind: str):
    torch.manual_seed(0)
    if kind in REAL:
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**REAL[kind]))
    else:
        model = toy_model(dtype=torch.float32, tied=True)
        for block in model.transformer.h:
            block.mlp = KINDS_OF_MLP.get(kind, Indexed)(block.mlp)
    if kind in ADAPTERS:
        add_adapters(model, LoraOptions(r=2, target_modules=ADAPTERS[kind]), seed=0)
    return model.eval()


def weights_of(place: Path, kind: str, *, world: World | None = None, parallel: str = "auto", stop: int = -1, **more):
    world = world or World()
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "parallel": parallel, "micro_batch_size": 1}
    callbacks: list[Callback] = [Interrupt(step=stop)]
    stage = toy_stage(place, BATCHES, data=DATA, model=model_of(kind), options=options, callbacks=callbacks, **more)
    return full_weights(train(stage, world).module)


def unreached(kind: str, rows=DATA) -> set[str]:
    """The names of those that no row gives a gradient."""
    model = model_of(kind)
    for row in rows:
        model(input_ids=torch.from_numpy(row.input_ids).long()[None], use_cache=False).logits.sum().backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def assert_left(found: dict[str, torch.Tensor], kind: str) -> None:
    """Those without gradient are as they were, without decay; all others have moved."""
    left, start = unreached(kind), dict(model_of(kind).named_parameters())
    assert left
    assert {name for name in found if name in start and torch.equal(found[name], start[name])} == left


KINDS = ["indexed", "lora", *REAL]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_parameters_without_gradient_goes_on_with_the_same_bits(tmp_path, capsys, kind):
    if kind in REAL and kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    whole = weights_of(tmp_path / "whole", kind)
    said = capsys.readouterr().out
    assert_left(whole, kind)
    with pytest.raises(Stopped):
        weights_of(tmp_path / "parts", kind, stop=2)
    assert_exact(weights_of(tmp_path / "parts", kind), whole)
    left = len(unreached(kind))
    assert f"train: after the first update the optimizer keeps no state of {left} trained parameters, as " in said


def on_two(world: World, path: str, parallel: str, kind: str) -> None:
    """Train whole and in two parts on ranks that share or copy the weights."""
    about = {"world": world, "parallel": parallel}
    with redirect_stdout(io.StringIO()) as said:
        whole = weights_of(Path(path) / "whole", kind, **about)
    try:
        weights_of(Path(path) / "parts", kind, stop=2, **about)
        raise AssertionError("it was to be stopped")
    except Stopped:
        parts = weights_of(Path(path) / "parts", kind, **about)
    if world.is_main:
        assert_exact(parts, whole)
        (Path(path) / "said").write_text(said.getvalue())
        save_file({name: x.clone() for name, x in whole.items()}, Path(path) / "whole.st")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["indexed", "lora", "deepseek_v32"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_trains_and_go_on_with_the_same_bits(tmp_path, parallel, kind):
    on_ranks(on_two, str(tmp_path), parallel, kind)
    two = load_file(tmp_path / "whole.st")
    one = weights_of(tmp_path / "one", kind)
    assert_near({name: one[name] for name in two}, two, atol=1e-5)
    assert_left(two, kind)


@pytest.mark.slow
def test_under_ddp_ranks_may_reach_different_ones(tmp_path):
    """In each step, of two rows, an expert that no rank reaches has no gradient: neither decay nor momentum."""
    reached = [unreached("experts", [row]) for row in DATA]
    assert reached[0] != reached[1]
    on_ranks(on_two, str(tmp_path), "ddp", "experts")
    said = (tmp_path / "said").read_text()
    assert (
        "training.parallel ddp looks for parameters without gradient in each backward: a token misses 12, as " in said
    )
    assert "fsdp cannot train a model whose ranks reach different ones" in said
    two, one = load_file(tmp_path / "whole.st"), weights_of(tmp_path / "one", "experts")
    assert_near({name: one[name] for name in two}, two, atol=1e-5)


def refused_under_fsdp(world: World, path: str, parallel: str) -> None:
    with pytest.raises(ConfigError, match=r"ranks have gradients of other parameters .* use --training.parallel ddp"):
        weights_of(Path(path), "equal experts", world=world, parallel=parallel)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_shards_of_which_ranks_reach_different_ones_are_refused(tmp_path, parallel):
    """Of one size their gradients were added up with each other, and the run ended as if nothing was wrong."""
    on_ranks(refused_under_fsdp, str(tmp_path), parallel)


class States(NTP):
    """A loss of the head's inputs alone: the head itself gets no gradient, as the model's own loss would give it."""

    def loss(self, view, batch, plan):
        loss = (view.hidden.square().mean(1) * plan.row_weight).sum()
        with torch.no_grad():
            return view.sft_loss(batch, plan)._replace(loss=loss)


def without_head(world: World, path: str, parallel: str) -> None:
    def trained(more: dict[str, int]) -> dict[str, torch.Tensor]:
        options = {"learning_rate": 0.01, "parallel": parallel, "micro_batch_size": 1, **more}
        model = toy_model(dtype=torch.float32)
        stage = toy_stage(Path(path), BATCHES, data=DATA, model=model, options=options, objective=States())
        return full_weights(train(stage, world).module)

    if parallel == "ddp":
        for more in ({}, {"reduce_each_micro_batch": True}):
            with pytest.raises(
                ConfigError, match=r"objective States: its loss gives no gradient to lm_head\.weight, for"
            ):
                trained(more)
        return
    found = trained({})
    if world.is_main:
        start = toy_model(dtype=torch.float32).state_dict()
        assert [name for name in found if torch.equal(found[name], start[name])] == ["lm_head.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_objective_that_leaves_the_head_without_gradient_is_refused_under_ddp_alone(tmp_path, parallel):
    on_ranks(without_head, str(tmp_path), parallel)
