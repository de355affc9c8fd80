"""The embedded example: rows, tokenizer and model made on the spot, so that the recipe runs without a download."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.common.files import write_text
from sftmix.tools.quickstart.tasks import Row, make_rows

N_TRAIN = 2400
N_EVAL = 400

BOS, END, PAD = "<|begin|>", "<|im_end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Materials:
    """The paths of the quickstart's inputs: a Hugging Face model directory and two JSONL files."""

    model: Path
    train: Path
    eval: Path


def materialise(out_dir: str | os.PathLike[str], *, seed: int) -> Materials:
    """Write model, tokenizer, training and held-out rows under `out_dir`; the same seed gives the same bytes.

    The model is a random float32 Llama of two layers of width 128, about half a million parameters.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sftmix.common.progress import without_bars_of_transformers

    out = Path(out_dir)
    paths = Materials(model=out / "model", train=out / "train.jsonl", eval=out / "eval.jsonl")
    rows = make_rows(n=N_TRAIN + N_EVAL, seed=seed)
    write_rows(paths.train, rows[:N_TRAIN])
    write_rows(paths.eval, rows[N_TRAIN:])
    tokenizer = make_tokenizer(row[part] for row in rows[:N_TRAIN] for part in ("instruction", "input", "output"))
    tokenizer.save_pretrained(paths.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), without_bars_of_transformers():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(paths.model)
    return paths


def write_rows(path: str | os.PathLike[str], rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    write_text(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> Any:
    """Train a byte-level BPE on `texts`, with a chat template; the end of a turn is also the end of the text.

    Any text can be encoded. A word gets the same tokens at the start of a turn as within one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    roles = [f"<|{role}|>" for role in ROLES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, END, PAD, *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=roles,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
