"""`export`: a checkpoint as a Hugging Face model directory, or as a repository of the hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sftmix.cli.words import read_words
from sftmix.tools.sharing.command import add_push_options, export

ABOUT = """Write a checkpoint of a run as a Hugging Face model directory: weights, tokenizer, template, stop ids.

  sftmix export runs/first --to my-model
  sftmix export runs/first --to my-model-at-200 --step 200 --dtype bfloat16
  sftmix export runs/lora --to my-model --merge
  sftmix export runs/first --push_to_hub OWNER/NAME --license llama3.1

Of a run with adapters it writes the adapters, as PEFT does, or with --merge the whole model. A model card, README.md,
stands beside the weights. --push_to_hub without --to uploads train/model, or the checkpoint that is named."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", metavar="DIR", help="directory to write; it must not exist yet")
    parser.add_argument("--step", type=int, metavar="N", help="optimizer step of the checkpoint [the newest]")
    best = "the weights of the best held-out evaluation, of a run with --checkpoint.keep_best true"
    parser.add_argument("--best", action="store_true", help=best)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    what = "dtype of the weights; auto: as the base model was stored, adapters float32 [%(default)s]"
    parser.add_argument("--dtype", choices=dtypes, default="auto", help=what)
    parser.add_argument("--merge", action="store_true", help="put the adapters of a LoRA run into the model's weights")
    add_push_options(parser)


def main(argv: Sequence[str]) -> None:
    """Write, and upload where that is asked for."""
    export(read_words("export", ABOUT, add_options, argv))
