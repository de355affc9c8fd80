"""A table that was made in parts, seeds side by side, is the table that is made at once."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.evidence.join import TABLE, join
from benchmarks.evidence.run import run_table
from benchmarks.evidence.tiers import read_tier
from sftmix.cli import main
from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json, write_json, write_text
from tests.tiny import ROOT, Tiny, make_tiny

SHORT = ("--training.max_steps", "3", "--checkpoint.every", "0", "--pairing", "RandomPairs")
TIMES = ("wall_seconds", "elapsed", "scoring_seconds", "calibration_seconds", "peak_memory_bytes")


def compare(tiny: Tiny, out: Path, seeds: str) -> dict:
    variants = "{NTP: {objective: NTP}, SFTMix: {}}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        words = ["compare", *tiny.options, *SHORT, "--variants", variants, "--seeds", seeds, "--out", str(out)]
        assert main(words) == 0
    return read_json(out / "table.json")


def untimed(value: object) -> object:
    """The table without times, memory, and which run made what several share."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k != "adopted" and k.rpartition(".")[2] not in TIMES}
    return [untimed(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_table_of_parts_is_the_table_made_at_once(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    whole = compare(tiny, tmp_path / "whole", "[1, 2]")
    parts = [tmp_path / "part-1", tmp_path / "part-2"]
    for seed, part in enumerate(parts, start=1):
        compare(tiny, part, f"[{seed}]")
    assert join(parts, tmp_path / "joined") == [1, 2]
    trained = {p: p.stat().st_mtime_ns for p in (tmp_path / "joined").glob("*/*/train/MANIFEST.json")}
    assert len(trained) == 4
    joined = compare(tiny, tmp_path / "joined", "[1, 2]")
    assert untimed(joined) == untimed(whole)
    assert joined["contrasts"][0]["interval_over"] == "seeds and examples"
    assert {p: p.stat().st_mtime_ns for p in trained} == trained
    assert join(parts, tmp_path / "joined") == [1, 2]  # a second time changes nothing


@pytest.mark.slow
@pytest.mark.long
def test_one_command_runs_a_table_in_parts_and_keeps_it(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path)
    names = {"model.path": tiny.model, "data.train": tiny.train, "data.eval": tiny.eval, "data.max_length": 64}
    names |= {"training.max_steps": 2, "training.global_batch_size": 8, "training.micro_batch_size": 4}
    more = [word for name, value in names.items() for word in (f"--{name}", str(value))]
    words = ["--tables", "pilot-rate", "--jobs", "2", "--runs", "runs", "--out", "kept", "--options", *more]
    script = ROOT / "benchmarks" / "evidence" / "run.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *words]
    for _ in range(2):  # the second call reads what is there
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert "part-1: seeds 901" not in done.stdout
    assert read_json(tmp_path / "runs" / "pilot-rate" / "table.json")["complete"]
    assert len(list((tmp_path / "kept" / "pilot-rate" / "runs").iterdir())) == 8
    assert read_tier("pilot-rate", tmp_path / "kept").complete


def part(directory: Path, seeds: list[int], *, mu: float = 0.2, complete: bool = True) -> Path:
    """A table without runs."""
    write_json(directory / "table.json", {"complete": complete, "runs_done": 1, "runs": 2})
    write_text(directory / TABLE, yaml.safe_dump({"seeds": seeds, "variants": {"SFTMix": {"mu": mu}}}))
    return directory


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"seeds": [2], "complete": False}, "is not finished"),
        ({"seeds": [1, 2]}, "seed 1 is in several"),
        ({"seeds": [2], "mu": 0.4}, "differ in variants"),
    ],
)
def test_parts_that_are_no_parts_of_one_table_are_refused(tmp_path: Path, second: dict, told: str) -> None:
    parts = [part(tmp_path / "a", [1]), part(tmp_path / "b", **second)]
    with pytest.raises(ConfigError, match=told):
        join(parts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_run_that_was_begun_in_the_table_is_not_replaced(tmp_path: Path) -> None:
    made = part(tmp_path / "a", [1])
    write_json(made / "SFTMix" / "seed-1" / "train" / "MANIFEST.json", {})
    (tmp_path / "joined" / "SFTMix" / "seed-1").mkdir(parents=True)
    with pytest.raises(ConfigError, match="was begun there"):
        join([made], tmp_path / "joined")


def test_a_run_that_no_part_could_replace_is_refused_before_hours_of_work(tmp_path: Path) -> None:
    plan = read_tier("pilot-rate", tmp_path)
    (tmp_path / "table" / plan.arms[0] / "seed-901").mkdir(parents=True)
    with pytest.raises(ConfigError, match="seed-901 was begun without parts"):
        run_table(plan, tmp_path / "table", plan.seeds, 2, [])
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
