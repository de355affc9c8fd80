"""A small model that has been trained a little, with its optimizer: what checkpoints keep."""

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import PreTrainedModel

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import NTP, AdamW, Optimizer
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import full_weights
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import gradient_sync, unwrap, wrap
from sftmix.training.update import build_optimizer
from tests.toy import toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4)])
TRAINING = TrainingOptions(learning_rate=0.01)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)


class Trained:
    """A wrapped model and its optimizer after some steps on the same batch on every rank."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        steps: int,
        world: World | None = None,
        parallel: str = "none",
        optimizer: Optimizer | None = None,
        options: TrainingOptions = TRAINING,
    ) -> None:
        self.wrapped = wrap(TrainingModule(model), parallel=parallel, precision="fp32", world=world or World())
        self.optimizer = build_optimizer(model, options, optimizer or AdamW())
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        batch = collate([(Slot(row),) for row in range(len(DATA))], DATA)
        with gradient_sync(self.wrapped, enabled=True):
            self.wrapped(batch, NTP().plan(batch, step=0, total_steps=1, seed=0)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def everything(self) -> dict[str, torch.Tensor]:
        """What is trained and the whole optimizer state, gathered, by name; numbers as tensors (on rank 0; call it on
        every rank)."""
        state = get_optimizer_state_dict(unwrap(self.wrapped), self.optimizer, options=FULL)
        numbers = {k: torch.as_tensor(v) for k, v in state.items() if isinstance(v, (int, float, torch.Tensor))}
        return {k: v.clone().contiguous() for k, v in (full_weights(self.wrapped) | numbers).items()}


def assert_exact(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


def assert_near(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], *, atol: float) -> None:
    assert left.keys() == right.keys()
    assert max(float((left[k].double() - right[k].double()).abs().max()) for k in left) < atol
