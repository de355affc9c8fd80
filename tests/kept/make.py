"""Make tests/kept/VERSION: small run directories as this version writes them, which every later one has to continue.

python tests/kept/make.py     once, at a release

model, train.jsonl, eval.jsonl   a model of one layer, 24 rows and 8 held out
table                            a table of `compare`: NTP and SFTMix at seed 42, finished
begun                            a run of SFTMix at seed 42 that was stopped in its training, at step 4 of 6
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import sftmix  # noqa: E402
from sftmix.cli import main  # noqa: E402
from sftmix.disk.files import read_json, write_json  # noqa: E402
from sftmix.tools.quickstart import make_rows, make_tokenizer, write_jsonl  # noqa: E402
from sftmix.training.loop import TrainingLoop  # noqa: E402

OPTIONS = [
    *("--model.path", "model", "--data.train", "train.jsonl", "--data.eval", "eval.jsonl"),
    *("--training.learning_rate", "0.01", "--training.global_batch_size", "8", "--training.epochs", "2"),
    *("--reference.checkpoints", "2", "--checkpoint.every", "2", "--checkpoint.keep", "1", "--data.template", "alpaca"),
]
VARIANTS = ["--variants", "{NTP: {objective: NTP}, SFTMix: {}}"]
STOPPED = 4


def write_inputs() -> None:
    rows = make_rows(n=32, seed=2)
    write_jsonl(Path("train.jsonl"), rows[:24])
    write_jsonl(Path("eval.jsonl"), rows[24:])
    tokenizer = make_tokenizer((r[k] for r in rows for k in ("instruction", "input", "output")), vocab_size=300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True, **sizes, **ids
    )
    LlamaForCausalLM(config).save_pretrained("model")
    tokenizer.save_pretrained("model")


def stop_at_step() -> None:
    """Send SIGTERM to this process after a step of `train`."""
    advance = TrainingLoop.advance

    def stopped(self, *words, **more):  # type: ignore[no-untyped-def]
        done = advance(self, *words, **more)
        if self.stage.name == "train" and self.step == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    TrainingLoop.advance = stopped  # type: ignore[method-assign]


def make() -> None:
    to = ROOT / "tests" / "kept" / sftmix.__version__
    if to.exists():
        sys.exit(f"{to} is there: what a release wrote is not made again")
    with tempfile.TemporaryDirectory(prefix="sftmix-kept-") as made:
        os.chdir(made)
        write_inputs()
        assert main(["compare", *OPTIONS, *VARIANTS, "--seeds", "[42]", "--out", "table"]) == 0
        stop_at_step()
        code = main(["run", *OPTIONS, "--out", "begun"])
        assert code == 128 + signal.SIGTERM, code
        for file in Path().rglob("STATUS.json"):
            write_json(file, {**read_json(file), "host": "machine"})
        shutil.copytree(".", to, ignore=shutil.ignore_patterns(".lock", "*.html"))
    print(f"{to}: {sum(file.stat().st_size for file in to.rglob('*')):,} bytes")


if __name__ == "__main__":
    make()
