"""Routed experts compute in the precision of linear layers: dtypes of their products, and numbers beside float32's."""

import copy
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import SFTMix
from sftmix.model.adapters import add_adapters
from sftmix.model.experts import expert_weights
from sftmix.model.layers import decoder_layers, keep_in_bfloat16
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.parallel import autocast, training_module
from tests.model.test_models import TINY, random_model
from tests.toy import toy_rows

HALF = torch.bfloat16
DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])
ROUTED = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
CONFIGS: dict[str, Any] = {
    "qwen3 moe": transformers.Qwen3MoeConfig(**TINY, **ROUTED, num_experts=4),
    "mixtral": transformers.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
    "glm 4": transformers.Glm4MoeConfig(
        **TINY, **ROUTED, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1
    ),
    "gpt-oss, with biases": transformers.GptOssConfig(
        **TINY, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager"
    ),
}
SPARSE = {"glm 4": 1}
"""Layers with experts, of two, if not both have them."""


class Products(TorchDispatchMode):
    """The dtypes of the operands of products over experts, and how often each pair was met."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[torch.dtype, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "grouped_mm" in str(func):
            self.found[tuple(x.dtype for x in args[:2])] += 1
        return func(*args, **(kwargs or {}))


def computed(model: Any, precision: str = "bf16", *, noting: bool = True) -> tuple[dict[str, torch.Tensor], Counter]:
    """The loss of a micro-batch and the gradients, by the shipped module, and the products over experts."""
    world = World()
    module = training_module(model, TrainingOptions(), precision=precision, world=world, trains=True)
    batch, objective = collate([(Slot(0), Slot(1)), (Slot(2),), (Slot(3),)], DATA), SFTMix(mu=0.5)
    plan = objective.plan(batch, step=1, total_steps=2, seed=0)
    products = Products()
    with products if noting else nullcontext():  # no graph is made within such a mode
        with autocast(module, precision, world.device):
            out = module(batch, plan, loss=objective.loss)
        out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"nll": out.nll.detach(), **gradients}, products.found


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to what is expected."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("family", CONFIGS)
def test_products_are_those_of_the_precision(family):
    """Beside a loop of linear layers, which autocast casts, and beside float32."""
    model = random_model(CONFIGS[family])
    loop = copy.deepcopy(model)
    loop.set_experts_implementation("eager")
    (half, products), (single, exact) = computed(copy.deepcopy(model)), computed(model, "fp32")
    by_linear = computed(loop)[0]
    layers = SPARSE.get(family, 2)
    # Two products forward; two for each of them backward.
    assert products == {(HALF, HALF): 6 * layers}
    assert exact == {(torch.float32, torch.float32): 6 * layers}
    assert off(half["nll"], single["nll"]) < 2**-6  # bfloat16 has 8 bits, and two layers round several times
    for name in (name for name in single if "experts" in name and single[name].dim() == 3):
        assert half[name].dtype == torch.float32
        assert off(half[name], by_linear[name]) < 2**-6
        assert off(half[name], single[name]) > 2**-12, "nothing was rounded"


@pytest.mark.parametrize("family", CONFIGS)
def test_frozen_experts_are_kept_in_half_and_not_a_bit_changes(family):
    model, found = random_model(CONFIGS[family]).to(HALF).float(), []
    for halved in (True, False):
        one = copy.deepcopy(model)
        add_adapters(one, LoraOptions(r=4, target_modules=["q_proj"], init_lora_weights=False), seed=0)
        if halved:
            keep_in_bfloat16(one, trains=True)
        kept = sum(p.numel() for p in expert_weights(one) if p.dtype == HALF)
        assert kept == halved * sum(p.numel() for p in expert_weights(one))
        found.append(computed(one)[0])
    assert len(expert_weights(model)) == 2 * SPARSE.get(family, 2)
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


def test_frozen_experts_with_adapters_are_kept_and_compute_in_half():
    """Their sum with the adapter is rounded once; the adapter's factors before that."""
    model, found = random_model(CONFIGS["mixtral"]).to(HALF).float(), []
    for halved in (True, False):
        one = copy.deepcopy(model)
        add_adapters(one, LoraOptions(r=4, init_lora_weights=False), seed=0)
        if halved:
            keep_in_bfloat16(one, trains=True)
        assert {p.dtype for p in expert_weights(one)} == {HALF if halved else torch.float32}
        found.append(computed(one))
    (half, products), (single, _) = found
    assert products.keys() == {(HALF, HALF)}
    adapters = [name for name in single if "experts" in name]
    assert len(adapters) == 8
    assert all(half[name].dtype == torch.float32 and off(half[name], single[name]) < 2**-5 for name in adapters)
    assert off(half["nll"], single["nll"]) < 2**-7


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which it hides by itself outside of pytest
@pytest.mark.parametrize("family", ["qwen3 moe", "mixtral"])
def test_compiled_layers_have_the_same_products(family):
    """In a graph transformers takes a loop in Python unless the weights that it gets are bfloat16."""
    model = random_model(CONFIGS[family])
    eager = computed(copy.deepcopy(model))[0]
    seen: list[str] = []

    def inspect(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for layer in decoder_layers(model):
        layer.compile(backend=inspect, dynamic=True, fullgraph=True)
    compiled = computed(model, noting=False)[0]
    assert sum("grouped_mm" in name for name in seen) >= 2
    assert not any("fallback" in name for name in seen)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_a_line_says_in_what_experts_compute(capsys):
    computed(random_model(CONFIGS["mixtral"]))
    said = "4 weights of experts compute in bfloat16, as linear layers do (autocast_grouped_mm)"
    assert said in capsys.readouterr().out
    computed(random_model(transformers.LlamaConfig(**TINY)))
    assert "experts" not in capsys.readouterr().out
