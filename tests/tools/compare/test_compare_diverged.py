"""Tables in which a run diverges: a target is a result, a reference ends the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sftmix.common.files import read_json
from tests.conftest import Finished
from tests.forked import done as on_ranks
from tests.tiny import status

Call = Callable[..., SimpleNamespace]


def table_of(finished: Finished, variants: object, directory: Path, seeds: str, *more: str) -> list[str]:
    """`compare` on the tiny model into directory/table, six steps a run."""
    file = directory / "variants.yaml"
    file.write_text(yaml.safe_dump({"variants": variants, "pairing": "RandomPairs"}, sort_keys=False))
    short = ("--training.max_steps", "6", "--checkpoint.every", "0", "--seeds", seeds)
    return ["compare", *finished.tiny.options, "--config", str(file), "--out", str(directory / "table"), *short, *more]


@pytest.mark.slow
def test_a_table_goes_on_past_a_run_that_diverges(finished: Finished, sftmix: Call, tmp_path: Path) -> None:
    wild = {"wild": {"objective": "NTP", "training.learning_rate": 1e30}, "NTP": {"objective": "NTP"}}
    command = table_of(finished, wild, tmp_path, "[1, 2]", "--reference.training.learning_rate", "0.01")
    done = sftmix(*command)
    assert (done.code, done.out.count("diverged; the table goes on. variant wild, seed ")) == (0, 2)
    table = read_json(tmp_path / "table" / "table.json")
    assert (table["complete"], table["variants"]["wild"]["no_value"]) == (True, [1, 2])
    assert table["variants"]["NTP"]["metrics"]["eval_nll_after"]["seeds"] == 2
    assert table["contrasts"][0]["verdict"] == "not measured"
    state = status(tmp_path / "table" / "wild" / "seed-1")
    assert (state["stage"], state["exit_code"]) == ("train", 6)
    assert (tmp_path / "table" / "wild" / "seed-2" / "diverged.json").exists()

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "table" / "wild").rglob("*") if p.is_file()}
    again = sftmix(*command)
    assert (again.code, again.out.count("diverged before, and is not tried again")) == (0, 2)
    assert any(p.name == "metrics.jsonl" for p in before)
    assert all(p.stat().st_mtime_ns == made for p, made in before.items())


@pytest.mark.slow
def test_all_ranks_go_on_past_a_run_that_diverges(finished: Finished, tmp_path: Path) -> None:
    """Rank 0 alone reads and notes how the run ended; a rank that went another way would wait for ever."""
    wild = {"wild": {"objective": "NTP", "training.learning_rate": 1e30}, "NTP": {"objective": "NTP"}}
    command = table_of(finished, wild, tmp_path, "[1]", "--reference.training.learning_rate", "0.01")
    for told in ("diverged; the table goes on. variant wild, seed 1", "diverged before, and is not tried again"):
        assert on_ranks(command, cwd=tmp_path, ranks=2).count(told) == 1
    table = read_json(tmp_path / "table" / "table.json")
    assert (table["complete"], table["variants"]["wild"]["no_value"]) == (True, [1])
    assert table["variants"]["NTP"]["metrics"]["eval_nll_after"]["seeds"] == 1


@pytest.mark.slow
def test_a_reference_that_diverges_ends_the_table(finished: Finished, sftmix: Call, tmp_path: Path) -> None:
    wild = {"NTP": {"objective": "NTP"}, "wild": {"reference.training.learning_rate": 1e30, "pairing": "RandomPairs"}}
    done = sftmix(*table_of(finished, wild, tmp_path, "[1]"))
    assert (done.code, "error: variant wild, seed 1: reference" in done.err) == (6, True)


@pytest.mark.slow
def test_a_leap_of_the_loss_ends_the_table(finished: Finished, sftmix: Call, tmp_path: Path) -> None:
    """LossSpikeGuard was asked for: a person is to look, and the same command goes on with a greater factor."""
    guard = {"class_path": "LossSpikeGuard", "init_args": {"factor": 1.001, "window": 2}}
    wild = {"NTP": {"objective": "NTP", "callbacks": [guard], "training.learning_rate": 1.0}}
    done = sftmix(*table_of(finished, wild, tmp_path, "[1]", "--reference.training.learning_rate", "0.01"))
    assert (done.code, "(LossSpikeGuard)" in done.err) == (6, True)
    assert not (tmp_path / "table" / "NTP" / "seed-1" / "diverged.json").exists()
