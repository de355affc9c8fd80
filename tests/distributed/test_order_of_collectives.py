"""What FSDP gathers and reduces in a step, in this order: head and last norm in the middle, not around everything."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import EmbeddingMixup, SFTMix
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import own_weights
from sftmix.training.parallel import gradient_sync, reshard, training_module, unwrap
from sftmix.training.step import normalise
from tests.forked import on_ranks
from tests.toy import toy_rows

pytestmark = pytest.mark.slow

COLLECTIVES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce"}
DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])


class Order(TorchDispatchMode):
    """The collectives of weights and gradients with the part of the model that has so many numbers, in their order."""

    def __init__(self, parts: dict[int, str]) -> None:
        super().__init__()
        self.parts, self.seen = parts, list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = COLLECTIVES.get(func.__name__.split(".")[0]) if func.namespace == "c10d" else None
        if name:
            whole = args[1] if name == "reduce" else args[0]
            self.seen.append(f"{name} {self.parts[whole.numel()]}")
        return func(*args, **(kwargs or {}))


def model_of(*, tied: bool = False) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, tie_word_embeddings=tied, **sizes))


def order_of(world: World, objective, **how) -> tuple[list[str], list[str]]:
    """The collectives of the forward of a micro-batch, and of its backward."""
    model = model_of(**how)
    options = TrainingOptions(parallel="fsdp", padding_free=False)
    module = training_module(model, options, precision="fp32", world=world, trains=True).train()
    head, embeddings = (one.weight.numel() for one in (model.lm_head, model.model.embed_tokens))
    layer, norm = (sum(p.numel() for p in one.parameters()) for one in (model.model.layers[0], model.model.norm))
    parts = {embeddings: "embeddings", layer: "layer", norm + head: "head"}  # a tied head is the embeddings
    batch = collate([(Slot(0), Slot(1))], DATA)
    plan = objective.plan(batch, step=0, total_steps=1, seed=0)
    scaled = normalise(plan, ntp_count=plan.ntp_count, mixup_count=plan.mixup_count, world_size=2)
    with gradient_sync(module, enabled=True):
        with Order(parts) as forward:
            out = module(batch, scaled, loss=objective.loss)
        with Order(parts) as backward:
            out.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not any(group.is_unsharded for group in groups_of(module))
    return forward.seen, backward.seen


def groups_of(module):
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    return [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]


def check_order(world: World) -> None:
    forward, backward = order_of(world, SFTMix())
    # The next layer is asked for before a layer computes, and the head before the last one does.
    assert forward == ["gather embeddings", *["gather layer"] * 3, "gather head"]
    # The gradient of the head is sent before the layers have theirs; each layer is gathered while the one behind works.
    assert backward == [
        "gather layer",
        "reduce head",
        *["gather layer", "reduce layer"] * 2,
        "reduce layer",
        "reduce embeddings",
    ]
    forward, backward = order_of(world, SFTMix(), tied=True)
    assert forward == ["gather head", *["gather layer"] * 3]
    assert backward[-1] == "reduce head"


def test_head_and_norm_are_gathered_in_the_last_layer_and_reduced_before_the_layers():
    on_ranks(check_order)


def check_two_passes(world: World) -> None:
    """The second pass has another norm; the weights are there until all passes have gone back."""
    forward, backward = order_of(world, EmbeddingMixup(mu=0.5))
    assert forward.count("gather head") == 1
    assert backward.count("gather head") == 0


def test_a_second_pass_gathers_the_head_no_second_time():
    on_ranks(check_two_passes)


@torch.no_grad()
def check_without_norm(world: World) -> None:
    """As where packing is probed, and the weights of a checkpoint are loaded then."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = OlmoForCausalLM(OlmoConfig(vocab_size=64, tie_word_embeddings=False, eos_token_id=1, **sizes))
    whole = model.lm_head.weight.clone()
    options = TrainingOptions(parallel="fsdp", padding_free=False)
    module = training_module(model, options, precision="fp32", world=world, trains=True)
    batch = collate([(Slot(0), Slot(1))], DATA)
    unwrap(module).read(lambda it: it.hidden_states(batch).sum())
    reshard(module)
    for weight in own_weights(module).values():
        weight.mul_(2)
    assert torch.equal(unwrap(module).read(lambda it: it.head.weight.clone()), 2 * whole)


def test_a_head_behind_a_norm_without_weights_has_the_values_of_now():
    on_ranks(check_without_norm)
