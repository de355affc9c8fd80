"""Online losses of a step that is skipped: one example that is not finite leaves those beside it as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sftmix.batches.order import Slot, Unit
from sftmix.common.world import World
from sftmix.components import NTP
from sftmix.components.base import Perturbation
from sftmix.options import CheckpointOptions, TrainingOptions
from sftmix.training.loop import Stage, TrainingLoop
from sftmix.training.online import OnlineLosses
from tests.forked import on_ranks
from tests.toy import VOCABULARY, FixedOrder, toy_model, toy_rows

SIZES = [(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)]
DATA = toy_rows(SIZES, vocabulary=VOCABULARY - 1)
BAD, TOKEN = 3, VOCABULARY - 1
DATA[BAD].input_ids[1] = TOKEN  # which no other example has
STEPS: list[list[Unit]] = [
    [(Slot(0), Slot(1)), (Slot(2), Slot(BAD)), (Slot(6), Slot(2, 0.0))],
    [(Slot(4),), (Slot(5),)],
]
"""No weight has moved when the second is computed: the first is skipped where BAD is not finite."""


class Break(Perturbation):
    """Makes BAD not finite."""

    def embeddings(self, e, mask, *, ids, step, seed):
        return e * torch.tensor([float("inf") if i == DATA.ids[BAD] else 1.0 for i in ids])[:, None, None]


def recorded(world: World, directory: Path, *, parallel: str, padding_free: bool, broken: str) -> tuple[int, int]:
    """Forward passes of the model and skipped steps in an epoch whose losses are kept in `directory`.

    broken  what makes BAD not finite: a weight, a perturbation or nothing
    """
    trained, passes = toy_model(dtype=torch.float32), []
    if broken == "weight":
        trained.get_input_embeddings().weight.data[TOKEN] = float("inf")
    trained.transformer.register_forward_hook(lambda *_: passes.append(1))
    loop = TrainingLoop(
        Stage(
            name="train",
            model=trained,
            data=DATA,
            order=FixedOrder(STEPS),  # type: ignore[arg-type]
            objective=NTP(),
            options=TrainingOptions(parallel=parallel, padding_free=padding_free, micro_batch_size=8, length_groups=1),
            checkpoint=CheckpointOptions(),
            directory=directory,
            seed=0,
            perturbation=Break() if broken == "perturbation" else None,
            online=OnlineLosses(DATA.ids, directory, world),
        ),
        world,
    )
    passes.clear()  # those of the probe
    for _ in STEPS:
        loop.advance()
    return len(passes), int(loop.totals.skipped)


@torch.no_grad()
def one_by_one() -> np.ndarray:
    """The NLL of each example, which has the pass to itself."""
    untrained, found = toy_model(dtype=torch.float32), []
    for example in DATA:
        ids = torch.from_numpy(example.input_ids)
        logp = untrained(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        found.append(-sum(float(logp[t - 1, ids[t]]) for t in np.flatnonzero(example.target)))
    return np.array(found)


def check(directory: Path) -> None:
    found = OnlineLosses(DATA.ids, directory, World()).read(0)
    others = np.arange(len(DATA)) != BAD
    np.testing.assert_array_equal(found.n_tokens, np.where(others, [n for _, n in SIZES], 0))
    np.testing.assert_allclose(found.nll_sum[others, 0], one_by_one()[others], rtol=1e-6)


@pytest.mark.parametrize("broken", ["weight", "perturbation"])
@pytest.mark.parametrize("padding_free", [True, False])
def test_an_example_that_is_not_finite_costs_no_other_its_loss(tmp_path, padding_free, broken):
    """Padding-free, all six examples of the first step stand in one row, and are computed once more."""
    passes, skipped = recorded(World(), tmp_path, parallel="none", padding_free=padding_free, broken=broken)
    assert (passes, skipped) == (3 if padding_free else 2, 1)
    check(tmp_path)


def test_what_is_finite_is_computed_once(tmp_path):
    assert recorded(World(), tmp_path, parallel="none", padding_free=True, broken="") == (2, 0)


def of_ranks(world: World, path: str) -> None:
    for parallel in ("ddp", "fsdp"):
        _, skipped = recorded(world, Path(path) / parallel, parallel=parallel, padding_free=True, broken="weight")
        assert skipped == 1


@pytest.mark.slow
def test_nor_does_it_on_two_ranks(tmp_path):
    on_ranks(of_ranks, str(tmp_path))
    check(tmp_path / "ddp")
    check(tmp_path / "fsdp")
