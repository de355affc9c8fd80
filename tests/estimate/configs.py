"""The configuration and the model that the estimate's tests start from."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from sftmix.config import RunConfig
from sftmix.options import DataOptions, ModelOptions, TrainingOptions

TRAINING = TrainingOptions(global_batch_size=8, micro_batch_size=4, precision="fp32")


def config(tiny, **changes) -> RunConfig:
    """Of the tiny model and its rows; `data` is a dict of changes to those options, the rest replaces what it names."""
    data = {"train": [str(tiny.train)], "eval": [str(tiny.eval)]} | changes.pop("data", {})
    changes = {"training": TRAINING, "model": ModelOptions(path=str(tiny.model))} | changes
    return RunConfig(data=DataOptions(**data), **changes)


VOCABULARY, WIDTH, INNER, LAYERS = 96, 32, 64, 3


def small_llama(directory: Path, *, tied: bool = False) -> str:
    """Write a random Llama whose every dimension two and four ranks divide; its path."""
    made = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(made).save_pretrained(directory)
    return str(directory)
