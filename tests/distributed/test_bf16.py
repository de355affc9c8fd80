"""Steps in bf16 through the loop, in one process, DDP, FSDP2 and HSDP: what is computed in bf16, and what is not (T19).

A step is compared with the same step by hand, without any wrapping; the kernel in bf16: tests/functional.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

from sftmix.batches.order import Slot, Unit
from sftmix.components import DFT, NEFTune, SFTMix
from sftmix.model.adapters import add_adapters
from sftmix.options import LoraOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.loop import TrainingLoop
from sftmix.training.module import TrainingModule
from sftmix.training.step import micro_batches, normalise
from tests.distributed.test_sharding import Collectives
from tests.forked import on_ranks
from tests.toy import VOCABULARY, toy_model, toy_rows, toy_stage

pytestmark = pytest.mark.slow

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])
UNITS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4),), (Slot(5),)]
SHARING = ("ddp", "fsdp", "hsdp")
WAYS: dict[str, dict[str, Any]] = {
    "one process": {"parallel": "none"},
    **{parallel: {"parallel": parallel} for parallel in SHARING},
    **{f"{parallel}, perturbed": {"parallel": parallel, "perturbation": NEFTune()} for parallel in ("ddp", "fsdp")},
}
for parallel in SHARING:  # bf16 has no 0.3, and the weights of sequences and of DFT are float64
    sequences = {"objective": SFTMix(mu=0.3, mean="sequence"), "padding_free": True}
    WAYS |= {f"{parallel}, sequences without padding": {"parallel": parallel, **sequences}}
    WAYS |= {f"{parallel}, DFT of adapters": {"parallel": parallel, "objective": DFT(), "lora": True}}


def objective_of(way: str) -> Any:
    return WAYS[way].get("objective", SFTMix(mu=0.5))


def model_of(way: str) -> Any:
    model = toy_model(dtype=torch.float32, tied=True)
    if "lora" in WAYS[way]:
        add_adapters(model, LoraOptions(r=4, target_modules=["c_attn", "wte", "lm_head"]), seed=0)
    return model


def options_of(way: str) -> dict[str, Any]:
    parallel, one_row = WAYS[way]["parallel"], WAYS[way].get("padding_free", False)
    group = {"shard_group_size": 1} if parallel == "hsdp" else {}
    return {"parallel": parallel, "precision": "bf16", "micro_batch_size": 2, "padding_free": one_row, **group}


def first_step(world: World, directory: Path, way: str) -> dict[str, torch.Tensor]:
    """Gradients of the first of two steps, whole, its loss and both terms; dtypes are checked on the way."""
    more = {"model": model_of(way), "objective": objective_of(way), "perturbation": WAYS[way].get("perturbation")}
    loop = TrainingLoop(toy_stage(directory, [UNITS, UNITS], data=DATA, options=options_of(way), **more), world)
    model, inside = loop.stage.model, set()
    for module in model.modules():
        if type(module).__name__ == "GPT2MLP":
            module.register_forward_hook(lambda module, args, out: inside.add(out.dtype))
    taken: list[dict[str, torch.Tensor]] = []

    def take(optimizer: Any, args: Any, kwargs: Any) -> None:
        taken.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    loop.optimizer.register_step_pre_hook(take)
    with Collectives() as collectives:
        metrics = loop.advance()
    whole = {name: whole_of(gradient).clone().contiguous() for name, gradient in taken[0].items()}
    loop.advance()
    assert inside == {torch.bfloat16}
    trained = [p for p in model.parameters() if p.requires_grad]
    stored = [*trained, *taken[0].values(), *taken[1].values()]
    stored += [value for state in loop.optimizer.state.values() for value in state.values()]
    assert len(loop.optimizer.state) == len(whole) == len(trained)
    assert {tensor.dtype for tensor in stored} == {torch.float32}
    check_collectives(collectives, WAYS[way]["parallel"])
    return whole | {name: torch.tensor(metrics[name], dtype=torch.float64) for name in ("loss", "ntp_loss", "mixup")}


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_collectives(found: Collectives, parallel: str) -> None:
    """Gradients are summed in float32; weights are gathered in what is computed in."""
    if parallel == "fsdp":
        assert found.dtypes["reduce_scatter"] == {torch.float32}
        assert found.dtypes["all_gather"] == {torch.bfloat16}
    if parallel in ("ddp", "hsdp"):  # hsdp in groups of one rank
        assert found.dtypes["all_reduce"] == {torch.float32, torch.float64}  # and the counts of tokens


def of_ranks(world: World, path: str) -> None:
    for way in WAYS:
        if way != "one process":
            found = first_step(world, Path(path) / way, way)
            if world.is_main:
                save_file(found, Path(path) / f"{way}.safetensors")


def by_hand(way: str, *, compute: str) -> dict[str, torch.Tensor]:
    """The gradients and the loss of `first_step`, the micro-batches of all ranks one after the other on a plain model.

    compute  autocast to bf16; or a model in bf16, as a rank under FSDP has it while it computes
    """
    size = 1 if way == "one process" else 2
    objective, options = objective_of(way), TrainingOptions(**options_of(way))
    module = TrainingModule(model_of(way).to(torch.bfloat16 if compute == "bf16" else torch.float32))
    module.padding_free = options.padding_free is True
    batches = [
        batch
        for rank in range(size)
        for batch in micro_batches(UNITS, DATA, options, World(rank=rank, size=size), module, split=None, pad_id=0)
    ]
    plans = [objective.plan(batch, step=0, total_steps=2, seed=0) for batch in batches]
    ntp, mixup = sum(plan.ntp_count for plan in plans), sum(plan.mixup_count for plan in plans)
    perturb = partial(NEFTune().embeddings, step=0, seed=0) if "perturbation" in WAYS[way] else None
    total: dict[str, torch.Tensor] = {"loss": torch.zeros((), dtype=torch.float64)}
    for batch, plan in zip(batches, plans, strict=True):
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == "autocast"):
            scaled = normalise(plan, ntp_count=ntp, mixup_count=mixup, world_size=1)
            loss = module(batch, scaled, perturb=perturb, loss=objective.loss).loss
        loss.backward()
        grads = {name: p.grad.float() for name, p in module.model.named_parameters() if p.grad is not None}
        total = {name: x + total.get(name, 0) for name, x in (grads | {"loss": loss.detach().double()}).items()}
    return total


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Callable[[str], dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("bf16")
    on_ranks(of_ranks, str(path))
    save_file(first_step(World(), path / "one", "one process"), path / "one process.safetensors")
    return lambda way: load_file(path / f"{way}.safetensors")


@pytest.mark.parametrize("way", WAYS)
def test_a_step_in_bf16_is_that_of_a_plain_model(steps, way):
    """The roundings to bf16 are the same ones, so what is left is the order of float32 sums over micro-batches and
    ranks: a few roundings of at most 2^-24 = 6e-8 each. Lambdas, weights and counts reach the loss as they were
    planned, or it would be off by one of 2^-9; and the loss that is logged is made of both terms that are logged."""
    found = steps(way)
    expected = by_hand(way, compute="bf16" if WAYS[way]["parallel"] in ("fsdp", "hsdp") else "autocast")
    ntp, mixup = float(found.pop("ntp_loss")), float(found.pop("mixup"))
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert float((found[name] - right).norm()) <= 1e-6 * float(right.norm()), name
    if isinstance(objective := objective_of(way), SFTMix):
        assert mixup > 1
        assert float(found["loss"]) == pytest.approx(ntp + objective.mu * mixup, rel=1e-6, abs=0)


def routes_in_float32(world: World, path: str) -> None:
    """What the routers choose by has the bits of a model that transformers loads in bfloat16."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "moe_layer_start_index": 1}
    small |= {"moe_intermediate_size": 8, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 0}
    model = AutoModelForCausalLM.from_config(Ernie4_5_MoeConfig(**small))
    layer = model.model.layers[1]
    router, seen = layer.mlp.gate, list[torch.Tensor]()
    weight, bias = router.weight, router.moe_statics.e_score_correction_bias
    bias.data += 0.5 + 0.001 * torch.randn(8)  # bfloat16 has one or two of them
    before = [weight.detach().clone(), bias.detach().clone()]

    def note(module: Any, *_: Any) -> None:
        seen.extend(p.detach().clone() for p in (module.weight, module.moe_statics.e_score_correction_bias))

    router.register_forward_hook(note)
    layer.mlp.experts.register_forward_pre_hook(lambda module, _: seen.append(module.down_proj))
    options = {"parallel": "fsdp", "precision": "bf16", "micro_batch_size": 2, "learning_rate": 0.01}
    loop = TrainingLoop(toy_stage(Path(path), [UNITS, UNITS], data=DATA, options=options, model=model), world)
    loop.advance()
    assert seen[2].dtype == torch.bfloat16, "an expert's weight"
    assert all(map(torch.equal, seen[:2], before))
    assert not torch.equal(whole_of(router.weight), before[0]), "it is trained"


def test_routers_that_transformers_keeps_in_float32_are_gathered_so(tmp_path):
    """FSDP gave them as bfloat16: other experts than in one process, or in the model that is exported."""
    on_ranks(routes_in_float32, str(tmp_path))
