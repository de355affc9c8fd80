"""A base that is stored and computed in bfloat16 stays in it: against the same values, stored in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import SFTMix
from sftmix.config import RunConfig
from sftmix.options import LoraOptions, ModelOptions, TrainingOptions
from sftmix.pipeline.loaded import load_for_run
from sftmix.ranks.world import World
from sftmix.training.parallel import autocast, training_module, unwrap
from tests.forked import on_ranks
from tests.model.test_models import build
from tests.toy import toy_rows

HALF, SINGLE = torch.bfloat16, torch.float32
DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])
WORLD = World()
LORA: dict[str, LoraOptions] = {
    "body": LoraOptions(r=4, init_lora_weights=False),
    "all": LoraOptions(r=4, target_modules=["all-linear", "embed_tokens", "lm_head"], init_lora_weights=False),
    "DoRA": LoraOptions(r=4, use_dora=True, init_lora_weights=False),
    "head in full": LoraOptions(r=4, modules_to_save=["lm_head"], init_lora_weights=False),
}


def twins(place: Path, family: str) -> dict[torch.dtype, Path]:
    """Directories of one model in two dtypes."""
    model, paths = build(family).to(HALF), {}
    for dtype in (HALF, SINGLE):
        paths[dtype] = place / f"{family}-{dtype}"
        model.to(dtype).save_pretrained(paths[dtype])
    return paths


def module_of(path: Path, lora: LoraOptions, *, precision: Any = "bf16", parallel: Any = "ddp", world=WORLD) -> Any:
    """The module that a run trains, or scores with (without adapters)."""
    options, trains = TrainingOptions(precision=precision, parallel=parallel), bool(lora.r)
    config = RunConfig(model=ModelOptions(path=str(path), lora=lora), training=options, seed=3)
    model = load_for_run(config, world, trains=trains)
    return training_module(model, options, precision=precision, world=world, trains=trains)


def computed(module: Any, world: World = WORLD) -> dict[str, torch.Tensor]:
    """The losses of a micro-batch, and the gradients of all that is trained."""
    batch, objective = collate([(Slot(0), Slot(1)), (Slot(2),), (Slot(3),)], DATA), SFTMix(mu=0.5)
    plan = objective.plan(batch, step=1, total_steps=2, seed=0)
    with autocast(module, "bf16", world.device):
        out = module(batch, plan, loss=objective.loss)
    found = {"loss": out.loss.detach(), "nll": out.nll, "mixup": out.mixup.detach()}
    if out.loss.requires_grad:
        out.loss.backward()
    trained = {name: p.grad for name, p in unwrap(module).named_parameters() if p.grad is not None}
    return found | {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in trained.items()}


def assert_same_bits(found: dict, expected: dict, least: int) -> None:
    assert found.keys() == expected.keys()
    assert len(found) >= least
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def in_half(module: Any) -> dict[str, int]:
    """How many numbers each kind of layer has in bfloat16."""
    parts = {(type(part).__name__, p) for part in module.modules() for p in part.parameters(recurse=False)}
    return {kind: sum(p.numel() for k, p in parts if (k, p.dtype) == (kind, HALF)) for kind, _ in parts}


FAMILIES = [
    "llama",
    *(
        pytest.param(name, marks=(pytest.mark.slow, pytest.mark.long))
        for name in ("llama tied", "qwen2", "gemma3", "phi (head bias)")
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapters", [*LORA, "none"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, of a trained copy of a tied head
def test_not_a_bit_changes(family, adapters, tmp_path):
    lora, paths = LORA.get(adapters, LoraOptions()), twins(tmp_path, family)
    half, single = (module_of(paths[dtype], lora) for dtype in (HALF, SINGLE))
    kept = in_half(half)
    frozen = sum(p.numel() for m in half.modules() if type(m) is nn.Linear for p in [m.weight] if p.dtype == HALF)
    assert kept["Linear"] == frozen > 10_000
    assert sum(kept.values()) == frozen, "embeddings, norms, biases and adapters are float32"
    assert not any(in_half(single).values())
    assert_same_bits(computed(half), computed(single), least=3 if adapters == "none" else 17)


def test_in_float32_and_in_full_training_nothing_is_rounded(tmp_path):
    path = twins(tmp_path, "llama")[HALF]
    assert not any(in_half(module_of(path, LORA["body"], precision="fp32")).values())
    options = TrainingOptions(precision="bf16")
    whole = RunConfig(model=ModelOptions(path=str(path)), training=options)
    assert {p.dtype for p in load_for_run(whole, WORLD, trains=True).parameters()} == {SINGLE}


def of_ranks(world: World, paths: list[str], parallel: str) -> None:
    for adapters, lora in {**LORA, "none": LoraOptions()}.items():
        found = []
        for path in paths:
            module = module_of(Path(path), lora, parallel=parallel, world=world)
            found.append((in_half(module), computed(module, world)))
        (half, ours), (single, theirs) = found
        assert half["Linear"] > 10_000
        assert not any(single.values())
        assert_same_bits(ours, theirs, least=3 if adapters == "none" else 17)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_on_two_ranks(parallel, tmp_path):
    """Under FSDP a rank keeps half of each weight in bfloat16, beside trained ones in float32 in the same group."""
    on_ranks(of_ranks, [str(path) for path in twins(tmp_path, "llama").values()], parallel)
