"""F19: inputs that changed before the same command continues a run are refused by name, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.mines import KillAt
from tests.faults.processes import SIGKILLED, ended, from_split, words_of
from tests.tiny import Tiny

pytestmark = pytest.mark.long


def one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = len(content) - 40
    content[place] ^= 1
    path.write_bytes(content)


def one_letter(path: Path) -> None:
    text = path.read_text()
    place = text.rindex('"output": "') + len('"output": "')
    path.write_text(f"{text[:place]}{chr(ord(text[place]) ^ 1)}{text[place + 1 :]}")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "training rows": (lambda p: one_letter(p / "train.jsonl"), "data.fingerprint: "),
    "held-out rows": (lambda p: one_letter(p / "eval.jsonl"), "eval: "),
    "weights of the model": (lambda p: one_byte(p / "model" / "model.safetensors"), "model: "),
    "dynamics": (lambda p: one_byte(p / "run" / "confidence" / "dynamics.parquet"), "dynamics.parquet"),
    "confidence": (lambda p: one_byte(p / "run" / "confidence" / "confidence.parquet"), "confidence.parquet"),
    "split": (lambda p: one_byte(p / "run" / "split" / "split.parquet"), "split.parquet"),
    "split, deleted": (lambda p: (p / "run" / "split" / "split.parquet").unlink(), "split.parquet"),
    "learning rate": (lambda p: ["--training.learning_rate", "0.02"], "learning_rate: 0.01 -> 0.02"),
    "seed": (lambda p: ["--seed", "43"], "seed: 42 -> 43"),
    "batch size": (lambda p: ["--training.global_batch_size", "10"], "global_batch_size: 8 -> 10"),
    "mu": (lambda p: ["--objective.mu", "0.3"], "mu: 0.2 -> 0.3"),
}


@pytest.fixture(scope="module")
def halfway(small: Tiny, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of its own, with model and rows, in which a run was killed after two checkpoints."""
    place = tmp_path_factory.mktemp("halfway")
    shutil.copytree(small.model, place / "model")
    for file in (small.train, small.eval):
        shutil.copy(file, place)
    from_split(whole, place)
    mine = KillAt("train/checkpoints/.tmp-step-00000009", 1)
    assert ended(words(place), cwd=place, faults=[mine]).code == SIGKILLED
    return place


def words(place: Path) -> list[str]:
    return words_of(Tiny(place / "model", place / "train.jsonl", place / "eval.jsonl"))


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "STATUS.json"}


@pytest.mark.parametrize(
    "what",
    [name if name in ("training rows", "split") else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES],
)
def test_a_change_is_refused_by_name(halfway: Path, tmp_path: Path, what: str, record_property) -> None:
    place = Path(shutil.copytree(halfway, tmp_path / "place"))
    change, named = CHANGES[what]
    more = change(place)
    before = contents(place / "run")
    it = ended([*words(place), *(more if isinstance(more, list) else [])], cwd=place)
    assert it.code == 2, it.printed
    assert named in it.printed
    assert "Traceback" not in it.printed
    assert contents(place / "run") == before
    record_property("F19", f"{what}: exit 2, named, nothing written")
