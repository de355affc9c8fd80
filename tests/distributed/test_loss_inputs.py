"""Lambdas, weights and scales reach the loss as they were planned, in float32 or better, in whatever way ranks share a
step in bf16; and the loss that is logged is what they make of the two terms that are logged."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sftmix.batches.order import Slot, Unit
from sftmix.common.rng import generator
from sftmix.common.world import World
from sftmix.components import DFT, SFTMix
from sftmix.components.base import Objective
from sftmix.functional import SFTLoss, sft_loss
from sftmix.model.adapters import add_adapters
from sftmix.options import CheckpointOptions, LoraOptions, TrainingOptions
from sftmix.training.loop import Stage, TrainingLoop
from tests.forked import on_ranks
from tests.toy import FixedOrder, toy_model, toy_rows

pytestmark = pytest.mark.slow

SIZES = [(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)]
DATA = toy_rows(SIZES)
TOKENS = [response for _, response in SIZES]
UNITS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(2, 0.0)), (Slot(5),), (Slot(6),)]
MIXED = 2 + 4 + 1
"""Pairs of response tokens."""
MU = 0.3  # which bf16 does not have
OBJECTIVES = [SFTMix(mu=MU), SFTMix(mu=MU, mean="sequence"), DFT()]
"""One for each step: weights of pairs in float32, in float64, and a rule, which multiplies weights in float64."""
WAYS = [" ".join(words) for words in product(("ddp", "fsdp", "hsdp"), ("padded", "padding-free", "lora"))]
RANKS = 2

Entered: TypeAlias = "dict[str, Tensor]"
"""What one call of the loss was given and returned, and who was in its micro-batch."""


class Watched(Objective):
    """Another objective in each step; keeps who was in the micro-batches that it was asked about."""

    def __init__(self, *, seen: list) -> None:
        self.seen = seen

    def plan(self, batch, *, step, total_steps, seed):
        who = {"rows": batch.rows, "ntp_weight": batch.ntp_weight, "slot_pairs": batch.slot_pairs}
        self.seen.append((step, who))  # the next step is planned before this one is done
        self.current = OBJECTIVES[step]
        return self.current.plan(batch, step=step, total_steps=total_steps, seed=seed)

    def loss(self, view, batch, plan):
        return self.current.loss(view, batch, plan)


def loop_of(way: str, world: World, directory: Path, who: list) -> TrainingLoop:
    parallel, layout = way.split()
    model = toy_model(dtype=torch.float32, tied=True)
    if layout == "lora":
        add_adapters(model, LoraOptions(r=4, target_modules=["c_attn", "wte", "lm_head"]), seed=0)
    options = TrainingOptions(
        parallel=parallel,
        precision="bf16",
        micro_batch_size=2,
        padding_free=layout == "padding-free",
        shard_group_size=1 if parallel == "hsdp" else None,
    )
    stage = Stage(
        name="train",
        model=model,
        data=DATA,
        order=FixedOrder([UNITS] * len(OBJECTIVES)),  # type: ignore[arg-type]
        objective=Watched(seen=who),
        options=options,
        checkpoint=CheckpointOptions(),
        directory=directory,
        seed=0,
    )
    return TrainingLoop(stage, world)


def steps_of(way: str, world: World, directory: Path) -> dict[str, Tensor]:
    """By step: what entered the loss in each micro-batch and left it, and who was in it; and what was logged."""
    seen: list[tuple[int, dict[str, Tensor]]] = []
    entered: list[dict[str, Tensor]] = []

    def watch(hidden: Tensor, weight: Tensor, labels: Tensor, pairs: Tensor, lam: Tensor, **others) -> SFTLoss:
        out = sft_loss(hidden, weight, labels, pairs, lam, **others)
        found = {"hidden": hidden[:0], "weight": weight[:0], "lam": lam} | others | out._asdict()
        entered.append({name: x.detach().clone() for name, x in found.items() if isinstance(x, Tensor)})
        return out

    loop, kept = loop_of(way, world, directory, seen), {}
    for step in range(len(OBJECTIVES)):
        with patch("sftmix.functional.sft_loss", watch):
            metrics, _ = loop.advance()
        who = [part for number, part in seen if number == step]
        assert len(who) == len(entered) > 1
        for k, part in enumerate(who):
            kept |= {f"{step} {k} {name}": x for name, x in (part | entered[k]).items()}
        kept |= {
            f"{step} logged {name}": torch.tensor(metrics[name], dtype=torch.float64)
            for name in ("loss", "ntp", "mixup")
        }
        entered.clear()
    return kept


def of_ranks(world: World, path: str) -> None:
    for way in WAYS:
        save_file(steps_of(way, world, Path(path) / way), Path(path) / f"{way} {world.rank}.safetensors")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Callable[[str], list[dict[str, Tensor]]]:
    path = tmp_path_factory.mktemp("loss")
    on_ranks(of_ranks, str(path), ranks=RANKS)
    return lambda way: [load_file(path / f"{way} {rank}.safetensors") for rank in range(RANKS)]


def calls(kept: dict[str, Tensor], step: int) -> list[Entered]:
    """The calls of the loss on one rank in one step."""
    found: dict[str, Entered] = {}
    for key, value in kept.items():
        of_step, k, name = key.split()
        if of_step == str(step) and k != "logged":
            found.setdefault(k, {})[name] = value
    return list(found.values())


def by_pair(call: Entered, value: Callable[[int, int], float]) -> list[float]:
    """A value of each pair of rows, for each pair of tokens."""
    pairs = [call["rows"][pair].tolist() for pair in call["slot_pairs"]]
    return [value(c, u) for c, u in pairs for _ in range(min(TOKENS[c], TOKENS[u]))]


def by_token(call: Entered, value: Callable[[int], float]) -> list[float]:
    """A value of each row, for each of its tokens; 0 where the slot is a repeat."""
    slots = zip(call["rows"].tolist(), call["ntp_weight"].tolist(), strict=True)
    return [weight * value(row) for row, weight in slots for _ in range(TOKENS[row])]


def planned(call: Entered, step: int) -> dict[str, Tensor]:
    """Gradients are averaged over ranks, so weights are multiplied with their number and divided by global counts."""

    def lam(c: int, u: int) -> float:
        return generator(0, "lambda", step, f"example-{c}", f"example-{u}").beta(0.5, 0.5)

    f32, f64 = torch.float32, torch.float64
    if step == 2:
        return {"row_scale": torch.tensor(by_token(call, lambda row: RANKS / sum(TOKENS)), dtype=f64)}
    lambdas = {"lam": torch.tensor(by_pair(call, lam), dtype=f32)}
    if step == 0:
        rows, pairs = by_token(call, lambda row: RANKS / sum(TOKENS)), by_pair(call, lambda c, u: MU * RANKS / MIXED)
        return lambdas | {"row_weight": torch.tensor(rows, dtype=f64), "pair_weight": torch.tensor(pairs, dtype=f32)}
    rows = by_token(call, lambda row: RANKS / len(SIZES) / TOKENS[row])
    pairs = by_pair(call, lambda c, u: MU * RANKS / 3 / min(TOKENS[c], TOKENS[u]))
    return lambdas | {"row_weight": torch.tensor(rows, dtype=f64), "pair_weight": torch.tensor(pairs, dtype=f64)}


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_given_what_was_planned(ranks, way):
    """To two roundings of its dtype, lambdas exactly; the matmuls are in bf16, what they lead to is in float32."""
    computed = {torch.bfloat16, torch.float32} if "ddp" in way else {torch.bfloat16}  # ddp: autocast, within the loss
    tokens = pairs = 0
    for step in range(len(OBJECTIVES)):
        for call in [call for kept in ranks(way) for call in calls(kept, step)]:
            for name, expected in planned(call, step).items():
                rtol = 0 if name == "lam" else 2 * torch.finfo(expected.dtype).eps
                torch.testing.assert_close(call[name], expected, rtol=rtol, atol=0, msg=lambda m, n=name: f"{n}: {m}")
            assert {call["hidden"].dtype, call["weight"].dtype} <= computed
            assert call["loss"].dtype == call["nll"].dtype == call["mixup"].dtype == torch.float32
            tokens += int(call["ntp_weight"] @ torch.tensor(TOKENS, dtype=torch.float32)[call["rows"]])
            pairs += len(call["lam"])
    assert tokens == len(OBJECTIVES) * sum(TOKENS)
    assert pairs == 2 * MIXED


@pytest.mark.parametrize("way", WAYS)
def test_the_logged_loss_is_ntp_plus_mu_mixup(ranks, way):
    """Terms of one sign, so errors are relative: each sum of float32 in pairs over at most 2^4 tokens of a micro-batch
    rounds 4 times after the product and the weight, the loss and its terms apart: 12 roundings of 2^-24 = 7e-7."""
    for step in range(2):
        for kept in ranks(way):
            loss, ntp, mixup = (float(kept[f"{step} logged {name}"]) for name in ("loss", "ntp", "mixup"))
            assert mixup > 1
            assert loss == pytest.approx(ntp + MU * mixup, rel=1e-6, abs=0)
