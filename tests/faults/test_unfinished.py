"""F7 before a stage is done: a reference is killed, what it has written is damaged, and the same command goes on."""

import shutil
from pathlib import Path

import pytest

from tests.faults.mines import KillAt
from tests.faults.runs import goes_on, one_bit, words_of
from tests.forked import SIGKILLED, done, ended
from tests.tiny import Tiny

ONLINE = ("--reference.checkpoints", "online")


@pytest.fixture(scope="module")
def killed(small, whole, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """How the reference is looked at -> a run that was killed in its last save, and the uninterrupted one."""
    runs = {}
    for how, more in (("scored", ()), ("online", ONLINE)):
        place, undisturbed = tmp_path_factory.mktemp(how), whole
        if more:
            undisturbed = tmp_path_factory.mktemp("whole-online") / "run"
            done(words(small, *more), cwd=undisturbed.parent)
        mine = KillAt("reference/checkpoints/.tmp-step-00000012", 1)
        assert ended(words(small, *more), cwd=place, faults=[mine]).code == SIGKILLED
        runs[how] = place / "run", undisturbed
    return runs


def words(small: Tiny, *more: str) -> list[str]:
    given = words_of(small, *more)
    if more:
        at = given.index("--reference.checkpoints")
        del given[at : at + 2]  # the number of the tiny options
    return given


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "name", "step"),
    [
        ("scored", "scores/step-00000006.parquet", None),  # both checkpoints have its hash
        ("scored", "scores/step-00000012.parquet", 9),  # none has it
        ("online", "online/epoch-001.parquet", 6),  # the last one has it
        ("online", "metrics.jsonl", None),
    ],
)
def test_one_bit_of_what_is_there_before_the_stage_is_done(small, killed, tmp_path, how, name, step):
    run, whole = killed[how]
    shutil.copytree(run, tmp_path / "run")
    more = ONLINE if how == "online" else ()
    reference = tmp_path / "run" / "reference"
    file = reference / name
    assert file.exists()
    if name == "metrics.jsonl":
        file.write_bytes(file.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
    else:
        one_bit(file)
    if step is None:
        it = ended(words(small, *more), cwd=tmp_path)
        assert it.code == 4
        assert f"../../{name} does not have the hash it was written with" in it.printed
        assert "move them away to start again" in it.printed
        shutil.rmtree(reference / "checkpoints")
    printed = goes_on(words(small, *more), tmp_path, whole)
    assert (f"reference: resuming after step {step} of 12" in printed) is (step is not None)
