"""What a training took is given back before its model is measured and written, which are then no peak of memory."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from sftmix.components import NTP, Callback
from sftmix.config import RunConfig
from sftmix.options import CheckpointOptions, DataOptions, ModelOptions, TrainingOptions
from sftmix.pipeline import recipe

RESIDENT = dict[str, int]()


class Resident(Callback):
    """Notes the bytes that are resident after each step, and once the model is delivered."""

    gives = frozenset()

    def on_step_end(self, state):
        self.held = [
            bytes(100_000) for _ in range(50)
        ]  # lies above what is freed later, which so is not returned by itself
        RESIDENT["step"] = resident()

    def on_delivered(self, state):
        RESIDENT["delivered"] = resident()


def resident() -> int:
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc alone keeps what was freed")
def test_a_bf16_model_is_delivered_without_the_memory_of_its_training(tiny, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    model = LlamaForCausalLM(AutoConfig.from_pretrained(tiny.model, **sizes)).to(torch.bfloat16)
    numbers = model.num_parameters()
    model.save_pretrained(tiny.model)
    del model
    config = RunConfig(
        out=str(tmp_path / "run"),
        model=ModelOptions(path=str(tiny.model)),
        data=DataOptions(train=[str(tiny.train)], limit=4),
        objective=NTP(),
        pairing=None,
        training=TrainingOptions(max_steps=2, global_batch_size=2),
        checkpoint=CheckpointOptions(every=0),
        callbacks=[Resident()],
    )
    recipe.run(config)
    optimizer = 8 * numbers
    assert RESIDENT["delivered"] < RESIDENT["step"] - 0.8 * optimizer
