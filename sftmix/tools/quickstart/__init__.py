"""The embedded example: rows, tokenizer and model made on the spot, so that the recipe runs without a download."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from sftmix.tools.quickstart.tasks import Row, make_rows

N_TRAIN = 2400
N_EVAL = 400


@dataclass(frozen=True, slots=True)
class Materials:
    """The paths of the quickstart's inputs: a Hugging Face model directory and two JSONL files."""

    model: Path
    train: Path
    eval: Path


def materialise(out_dir: str | os.PathLike[str], *, seed: int) -> Materials:
    """Write model, tokenizer, training and held-out rows under `out_dir`; the same seed gives the same bytes."""
    from sftmix.common.progress import without_bars_of_transformers
    from sftmix.tools.quickstart.model import make_model, make_tokenizer

    out = Path(out_dir)
    paths = Materials(model=out / "model", train=out / "train.jsonl", eval=out / "eval.jsonl")
    rows = make_rows(n=N_TRAIN + N_EVAL, seed=seed)
    train, held_out = rows[:N_TRAIN], rows[N_TRAIN:]
    tokenizer = make_tokenizer(text for row in train for text in (row["instruction"], row["input"], row["output"]))
    with without_bars_of_transformers():
        make_model(tokenizer, seed=seed).save_pretrained(paths.model)
    tokenizer.save_pretrained(paths.model)
    write_rows(paths.train, train)
    write_rows(paths.eval, held_out)
    return paths


def write_rows(path: str | os.PathLike[str], rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
