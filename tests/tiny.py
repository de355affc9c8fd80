"""A model, a tokenizer and rows so small that a whole run takes a second, and ways to run the command line on them."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from sftmix.disk.files import read_json
from sftmix.pipeline.signature import write_start
from sftmix.tools.quickstart import make_rows, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("reference", "confidence", "split")
SHORT = ("--training.max_steps", "2", "--training.warmup_ratio", "0", "--checkpoint.every", "0")
"""Options of a run of two steps, all at the full learning rate, without checkpoints."""


@dataclass(frozen=True)
class Tiny:
    """Where the tiny model and rows lie: 29 training rows (an odd number, so one stays unpaired), 11 held out."""

    model: Path
    train: Path
    eval: Path

    @property
    def options(self) -> list[str]:
        return [
            *("--model.path", str(self.model), "--data.train", str(self.train), "--data.eval", str(self.eval)),
            *("--training.learning_rate", "0.01", "--reference.checkpoints", "2"),
            *("--training.global_batch_size", "8", "--training.micro_batch_size", "4"),
        ]

    @property
    def bare(self) -> list[str]:
        """The same for other references than a trained one, which have no number of checkpoints."""
        return [word for word in self.options if word not in ("--reference.checkpoints", "2")]


def make_tiny(directory: Path, *, dropout: float = 0.1) -> Tiny:
    """Write model, tokenizer and rows, the same ones each time.

    dropout  of attention; above 0, a resume that forgot the random state would show
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from sftmix.tools.quickstart import make_tokenizer

    rows = make_rows(n=40, seed=1)
    tiny = Tiny(directory / "model", directory / "train.jsonl", directory / "eval.jsonl")
    write_jsonl(tiny.train, rows[:29])
    write_jsonl(tiny.eval, rows[29:])
    tokenizer = make_tokenizer((r[k] for r in rows for k in ("instruction", "input", "output")), vocab_size=400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        attention_dropout=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tiny.model)
    tokenizer.save_pretrained(tiny.model)
    return tiny


def sftmix(*words: str, ranks: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python cli.py ...` or `torchrun -m sftmix ...` in a process of its own, one thread per rank."""
    launcher, program = [sys.executable], [str(ROOT / "cli.py")]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        program = ["-m", "sftmix"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*launcher, *program, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def in_this_process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same for one rank without a process of its own, which would import every library anew."""
    from sftmix.cli import main

    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def contents(directory: Path, *, but: Collection[str] = ()) -> dict[str, bytes]:
    """Every file below a directory but those of these names."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name not in but)
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def metrics(run: Path, stage: str = "train") -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, stage: str = "train") -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model" / "model.safetensors")


def status(run: Path) -> dict:
    return json.loads((run / "STATUS.json").read_text())


def table(path: Path) -> dict[str, list]:
    return pq.read_table(path).to_pydict()


def groups(run: Path) -> dict[str, str]:
    split = table(run / "split" / "split.parquet")
    return dict(zip(split["id"], split["group"], strict=True))


def cut_before_the_end(whole: Path, cut: Path) -> None:
    """Copy a run of 4 steps as if it were killed after step 3: the checkpoint of step 2 is the newest."""
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "train" / "model")
    shutil.rmtree(cut / "train" / "checkpoints" / "step-00000004")
    for name in ("MANIFEST.json", "figures.json"):
        (cut / "train" / name).unlink()


def sign(run: Path) -> None:
    """Sign a run whose config.yaml or started.json a test has changed: it is the user's own as before."""
    started = read_json(run / "started.json", directory=str, relative=str)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    write_start(run, {name: started[name] for name in ("directory", "relative")}, text)
