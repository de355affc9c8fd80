"""The configurations, models and micro-batches that the estimate's tests start from."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.config import RunConfig
from sftmix.options import DataOptions, ModelOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.tools.estimate.work import Machine
from sftmix.types import Batch
from tests.toy import toy_rows

TRAINING = TrainingOptions(global_batch_size=8, micro_batch_size=4, precision="fp32")


def machine(gpu: str = "H100", gpus: int | None = 4, **options) -> Machine:
    """A machine of the options of the command line, with its defaults."""
    defaults = {"mfu": 0.4, "tflops": None}
    return Machine(gpu, gpus, **(defaults | options))


CPU = machine("cpu", 1, mfu=0.5, tflops=0.1)


def config(tiny, **changes) -> RunConfig:
    """Of the tiny model and its rows; `data` is a dict of changes to those options, the rest replaces what it names."""
    data = {"train": [str(tiny.train)], "eval": [str(tiny.eval)]} | changes.pop("data", {})
    changes = {"training": TRAINING, "model": ModelOptions(path=str(tiny.model))} | changes
    return RunConfig(data=DataOptions(**data), **changes)


VOCABULARY, WIDTH, INNER, LAYERS = 96, 32, 64, 3
LAYER = 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH


def small_llama(directory: Path, *, empty: bool = False, **options) -> str:
    """Write a random Llama whose every dimension two and four ranks divide; its path. empty: without weights."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    made = LlamaConfig(**({"vocab_size": VOCABULARY, "max_position_embeddings": 128} | sizes | options))
    made.architectures = ["LlamaForCausalLM"]
    (made if empty else LlamaForCausalLM(made)).save_pretrained(directory)
    return str(directory)


def micro_batch(rows: int, width: int) -> Batch:
    """So many rows of `width` tokens, all but one of which are trained; two make a pair."""
    data = toy_rows([(1, width - 1)] * rows)
    return collate([(Slot(k), Slot(k + 1)) for k in range(0, rows, 2)], data)


@contextmanager
def fake_ranks(world: World) -> Iterator[None]:
    """Ranks of which only this one is there."""
    options = FakeProcessGroup.Options()  # type: ignore[call-arg]  # with the timeout that `wrap` looks for
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size, pg_options=options)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout")
            yield
    finally:
        dist.destroy_process_group()
