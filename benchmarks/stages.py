"""Rows and training stages that the benchmarks of training steps share."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sftmix.batches.order import TokenisedRows, TrainingOrder
from sftmix.components.objectives import NTP
from sftmix.components.pairing import RandomPairs
from sftmix.components.splitters import RandomSplit
from sftmix.data import EncodedDataset, encode_dataset, prepare
from sftmix.model.load import load_tokenizer, model_config
from sftmix.options import CheckpointOptions, DataOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.text.encoder import encoder_for
from sftmix.training.loop import Stage
from sftmix.training.scoring import Scorer
from sftmix.training.step import micro_batches
from sftmix.types import Rows, Scores, Split

WORDS = "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but"


ALPACA = {0: 1, 0.05: 1, 0.1: 5, 0.25: 11, 0.5: 35, 0.75: 88, 0.9: 120, 0.95: 154, 0.99: 280, 1: 555}
"""Share of Alpaca's answers -> their longest one in tokens, about: with the prompt a row has some 70 on average."""


def write_rows(path: Path, count: int, *, shortest: int = 4, longest: int = 40, alpaca: bool = False) -> None:
    """Write Alpaca rows of common words; responses of so many words, each length as often as another.

    alpaca  their lengths are ALPACA's
    """
    random = np.random.default_rng(0)
    words = WORDS.split()
    lengths = random.integers(shortest, longest + 1, count)
    if alpaca:
        lengths = np.interp(random.random(count), list(ALPACA), list(ALPACA.values())).astype(np.int64)
    drawn = iter(random.integers(0, len(words), int(lengths.sum()) + 6 * count, dtype=np.uint8))
    with path.open("w", encoding="utf-8") as out:
        for k, length in enumerate(lengths):
            prompt, answer = (" ".join(words[next(drawn)] for _ in range(n)) for n in (6, length))
            out.write(json.dumps({"instruction": f"{k}: {prompt}", "input": "", "output": answer}) + "\n")


def load_rows(model: str, rows: str, *, limit: int, max_length: int) -> EncodedDataset:
    """Return the first `limit` rows of a file under the model's own tokenizer and template."""
    options = DataOptions(train=[rows], limit=limit)
    encoder = encoder_for(load_tokenizer(model), options)
    return encode_dataset(prepare(options, 0), encoder, max_length=max_length).train


def random_llama(
    source: str,
    place: Path,
    *,
    vocabulary: int | None = None,
    hidden_size: int = 256,
    num_hidden_layers: int = 8,
    weights: bool = True,
    **options: Any,
) -> str:
    """Write a random Llama, base-7m's shape by default, that reads the tokenizer and the context of `source`.

    hidden_size 128 and 2 layers make about an eighth of base-7m's parameters.

    weights  False: the config alone, for `step.py --random`
    options  of the config, in place of what follows from the others
    """
    tokenizer = load_tokenizer(source)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        max_position_embeddings=model_config(source).max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{
            "intermediate_size": hidden_size * 11 // 4,
            "num_attention_heads": hidden_size // 64,
            "num_key_value_heads": hidden_size // 128,
            **options,
        },
    )
    torch.manual_seed(0)
    (LlamaForCausalLM(config) if weights else config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def ntp_stage(
    model: PreTrainedModel, data: TokenisedRows, options: TrainingOptions, world: World, directory: Path
) -> Stage:
    """Return an NTP stage in the order of pairs from random halves; SFTMix's has another objective (and model).

    The halves do not change the cost of a step.
    """
    n = len(data)
    nothing = np.full(n, np.nan)
    scores = Scores([str(row) for row in range(n)], np.arange(n), nothing, nothing, np.asarray(data.lengths))
    split = RandomSplit().split(scores, seed=0)
    return Stage(
        name="ntp",
        model=model,
        data=data,
        order=TrainingOrder(n, partial(_pairs, split, scores), options=options, seed=0),
        objective=NTP(),
        options=options,
        checkpoint=CheckpointOptions(every=0),
        directory=directory,
        seed=0,
        split_of=lambda epoch: split,
        scorer=Scorer(world=world, precision=options.precision),
    )


def tokens_and_slots(stage: Stage, world: World, module: nn.Module, steps: int) -> tuple[int, int]:
    """Return the numbers of real tokens and of token slots in the micro-batches of the first steps, for this module."""
    tokens = slots = 0
    for step in range(steps):
        for batch in micro_batches(
            stage.order.batch(step), stage.data, stage.options, world, module, split=None, pad_id=0
        ):
            tokens += sum(int(segment.attention_mask.sum()) for segment in batch.segments)
            slots += sum(segment.input_ids.numel() for segment in batch.segments)
    return tokens, slots


def _pairs(split: Split, scores: Scores, epoch: int) -> Rows:
    return RandomPairs().pairs(split, scores, epoch=epoch, seed=0)
