"""The runs of the fault tests, and what two of them must have in common."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sftmix.disk.files import read_json, steps_in, write_json
from tests.faults.mines import KillIn
from tests.forked import done
from tests.tiny import STAGES, Tiny, metrics

EVERY = 3
"""Steps between the checkpoints of a run here: it has 12 steps, so it saves four times and prunes twice."""

LOOP, SCORES, MEASURES = "training/loop.py", "training/scoring.py", "measure/model.py"
PHASES = {
    "reference": KillIn(LOOP, "run"),
    "scoring": KillIn(SCORES, "__call__", call=2),
    "training": KillIn(LOOP, "run"),
    "measuring": KillIn(MEASURES, "measure"),
}
"""What a run does, and a kill at its beginning."""


def long(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a slow test that takes minutes."""
    return pytest.mark.slow(pytest.mark.long(test))


def words_of(tiny: Tiny, *more: str) -> list[str]:
    """The words of a whole run of the tiny model, in the directory `run`."""
    return ["run", *tiny.options, "--checkpoint.every", str(EVERY), "--out", "run", *more]


# ------------------------------------------------------------------------------------------------ what is compared


def digest(run: Path, stage: str = "train") -> str:
    """The SHA-256 of the exported weights, or adapters."""
    (weights,) = (run / stage / "model").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def steps(run: Path, stage: str = "train") -> list[tuple[int, str, str]]:
    """Step, loss and norm of the gradient of each step, every bit of them."""
    return [(m["step"], float(m["loss"]).hex(), float(m["grad_norm"]).hex()) for m in metrics(run, stage)]


def assert_same(run: Path, whole: Path) -> None:
    """Every loss of both trainings, every score and every weight are those of the uninterrupted run."""
    assert steps(run) == steps(whole)
    assert steps(run, "reference") == steps(whole, "reference")
    assert digest(run) == digest(whole)
    for name in ("confidence/dynamics.parquet", "split/split.parquet", "train/eval.parquet"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def from_split(whole: Path, place: Path) -> Path:
    """A run directory in which all is done but the training."""
    for stage in STAGES:
        shutil.copytree(whole / stage, place / "run" / stage)
    return place / "run"


def checkpoints(run: Path, stage: str = "train") -> list[str]:
    """The names in the directory of checkpoints, leftovers included."""
    directory = run / stage / "checkpoints"
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


def leftovers(run: Path) -> list[str]:
    """What a kill may leave behind, and the next run must remove."""
    return [str(p.relative_to(run)) for pattern in (".tmp-*", ".old-*") for p in run.rglob(pattern)]


def goes_on(words: list[str], place: Path, whole: Path, *, ranks: int = 1) -> str:
    """The same command ends as the uninterrupted run, without leftovers; return what it printed."""
    printed = done(words, cwd=place, ranks=ranks)
    assert_same(place / "run", whole)
    assert leftovers(place / "run") == []
    return printed


def one_bit(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_little_is_lost(run: Path) -> None:
    for stage in ("reference", "train"):
        if (run / stage / "metrics.jsonl").exists() and not (run / stage / "MANIFEST.json").exists():
            made, saved = len(steps(run, stage)), steps_in(run / stage / "checkpoints")
            assert made - max(saved, default=0) <= EVERY + 1, (stage, made, saved)


def change(file: Path, **values: object) -> None:
    """Change values of a JSON file."""
    write_json(file, {**read_json(file), **values})
