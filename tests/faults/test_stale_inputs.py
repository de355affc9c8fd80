"""F19: inputs that changed before the same command continues a run are refused by name, and nothing is written."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sftmix.tools.quickstart import CHAT_TEMPLATE
from tests.faults.mines import KillAt
from tests.faults.runs import one_bit
from tests.forked import SIGKILLED, ended
from tests.tiny import Tiny, contents


def one_letter(path: Path, pattern: str = r'"output": "\w') -> None:
    """Change the last letter of the first match of a pattern."""
    text = path.read_text()
    place = re.search(pattern, text).end() - 1
    path.write_text(f"{text[:place]}{chr(ord(text[place]) ^ 1)}{text[place + 1 :]}")


def without_regex(path: Path) -> None:
    """Let a tokenizer merge across words: it is as valid as before, and makes other tokens."""
    text = path.read_text()
    assert '"use_regex": true' in text
    path.write_text(text.replace('"use_regex": true', '"use_regex": false', 1))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "training rows": (lambda p: one_letter(p / "train.jsonl"), "the training rows are others, as the model sees them"),
    "held-out rows": (lambda p: one_letter(p / "eval.jsonl"), "the held-out rows are others, as the model sees them"),
    "weights of the model": (
        lambda p: one_bit(p / "model" / "model.safetensors"),
        "the model's files are others (model.path)",
    ),
    "configuration of the model": (
        lambda p: one_letter(p / "model" / "config.json", r'"rms_norm_eps": 1'),
        "the model's files are others (model.path)",
    ),
    "tokenizer": (
        lambda p: without_regex(p / "model" / "tokenizer.json"),
        "the training rows are others, as the model sees them (data.train, selector, tokenizer, template)",
    ),
    "template": (
        lambda p: one_letter(p / "chat.jinja", "Hell"),
        "the training rows are others, as the model sees them",
    ),
    "checkpoint of the reference": (
        lambda p: one_bit(p / "checkpoint" / "model.safetensors"),
        "reference_files.checkpoint: ",
    ),
    "dynamics": (lambda p: one_bit(p / "run" / "confidence" / "dynamics.parquet"), "dynamics.parquet"),
    "confidence": (lambda p: one_bit(p / "run" / "confidence" / "confidence.parquet"), "confidence.parquet"),
    "split": (lambda p: one_bit(p / "run" / "split" / "split.parquet"), "split.parquet"),
    "split, deleted": (lambda p: (p / "run" / "split" / "split.parquet").unlink(), "split.parquet"),
    "learning rate": (lambda p: ["--training.learning_rate", "0.02"], "learning_rate: 0.01 -> 0.02"),
    "seed": (lambda p: ["--seed", "43"], "seed: 42 -> 43"),
    "mu": (lambda p: ["--objective.mu", "0.3"], "mu: 0.2 -> 0.3"),
}


TEMPLATE = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}Hello.")


@pytest.fixture(scope="module")
def halfway(small, tmp_path_factory) -> Path:
    """A directory of its own, with model and rows, in which a run was killed after two checkpoints."""
    place = tmp_path_factory.mktemp("halfway")
    for name in ("model", "checkpoint"):
        shutil.copytree(small.model, place / name)
    for file in (small.train, small.eval):
        shutil.copy(file, place)
    (place / "chat.jinja").write_text(TEMPLATE)
    mine = KillAt("train/checkpoints/.tmp-step-00000009", 1)
    assert ended(words(place), cwd=place, faults=[mine]).code == SIGKILLED
    return place


def words(place: Path) -> list[str]:
    """Of a run whose reference is a model on disk, and whose template is a file."""
    tiny = Tiny(place / "model", place / "train.jsonl", place / "eval.jsonl")
    on_disk = ("--reference", "FromCheckpoints", "--reference.paths", "[checkpoint]", "--data.template", "chat.jinja")
    return ["run", *tiny.bare, *on_disk, "--checkpoint.every", "3", "--out", "run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [name if name in ("training rows", "split") else pytest.param(name, marks=pytest.mark.long) for name in CHANGES],
)
def test_a_change_is_refused_by_name(halfway, tmp_path, what):
    place = Path(shutil.copytree(halfway, tmp_path / "place"))
    change, named = CHANGES[what]
    more = change(place)
    before = contents(place / "run", but=["STATUS.json"])
    it = ended([*words(place), *(more if isinstance(more, list) else [])], cwd=place)
    assert it.code == (4 if named.endswith(".parquet") else 2), it.printed
    assert named in it.printed
    assert "Traceback" not in it.printed
    assert contents(place / "run", but=["STATUS.json"]) == before
