"""Run directories of releases (tests/kept/make.py) are continued, extended, adopted and verified by this version."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.kept.make import OPTIONS, STOPPED, VARIANTS
from tests.tiny import ROOT, contents, metrics

KEPT = sorted(path for path in (ROOT / "tests" / "kept").iterdir() if re.fullmatch(r"[\d.]+", path.name))
CELL = Path("table/SFTMix/seed-42")


@pytest.fixture(params=KEPT, ids=[path.name for path in KEPT])
def kept(request, tmp_path, monkeypatch) -> Path:
    """A copy, which is the working directory: names in it are relative."""
    place = Path(shutil.copytree(request.param, tmp_path / "kept"))
    monkeypatch.chdir(place)
    return place


def files(directory: Path) -> dict[str, bytes]:
    """Name and content of each file but the cards, which no manifest has."""
    return contents(directory, but={"README.md"})


def test_there_is_one_of_this_version():
    assert [path.name for path in KEPT] == ["0.1.0"]


def test_what_was_begun_is_continued(kept, sftmix):
    before = files(kept / "begun" / "reference")
    done = sftmix("run", *OPTIONS, "--out", "begun")
    assert done.code == 0, done.err
    assert f"resuming after step {STOPPED}" in done.out
    assert files(kept / "begun" / "reference") == before
    steps, others = metrics(kept / "begun"), metrics(kept / CELL)
    assert [line["step"] for line in steps] == list(range(1, 7))
    # the same settings, data and seed; other CPUs add up in other orders
    assert [line["loss"] for line in steps] == pytest.approx([line["loss"] for line in others], rel=1e-5)


def test_what_is_finished_is_read_back(kept, sftmix):
    before = {name: data for name, data in files(kept / CELL).items() if name.partition("/")[2]}  # of stages
    done = sftmix("run", *OPTIONS, "--out", str(CELL))
    assert done.code == 0, done.err
    assert {name: data for name, data in files(kept / CELL).items() if name.partition("/")[2]} == before


def test_a_table_is_extended(kept, sftmix):
    before = files(kept / CELL / "train")
    done = sftmix("compare", *OPTIONS, *VARIANTS, "--seeds", "[42, 43]", "--out", "table")
    assert done.code == 0, done.err
    assert files(kept / CELL / "train") == before
    assert (kept / "table" / "SFTMix" / "seed-43" / "train" / "MANIFEST.json").exists()
    table = json.loads((kept / "table" / "table.json").read_text())
    assert table["variants"]["SFTMix"]["metrics"]["eval_nll_after"]["seeds"] == 2


def test_a_stage_is_adopted(kept, sftmix):
    """By a cell of another objective, from the reference of a release before."""
    variants = ["--variants", "{NTP: {objective: NTP}, SFTMix: {}, Strong: {objective.mu: 0.5}}"]
    done = sftmix("compare", *OPTIONS, *variants, "--seeds", "[42]", "--out", "table")
    assert done.code == 0, done.err
    cell = kept / "table" / "Strong" / "seed-42"
    assert (cell / "reference" / "adopted.json").exists()
    assert (cell / "reference" / "MANIFEST.json").read_bytes() == (kept / CELL / "reference/MANIFEST.json").read_bytes()


def test_a_run_is_verified(kept, sftmix):
    done = sftmix("verify", str(CELL), "--trust")  # it was signed by whoever made it
    assert done.code == 0, done.err + done.out


def test_another_setting_is_refused_by_name(kept, sftmix):
    """So the test above would fail if all directories were taken."""
    done = sftmix("run", *OPTIONS, "--training.weight_decay", "0.3", "--out", "begun")
    assert done.code == 2
    assert "training.weight_decay: 0.1 -> 0.3" in done.err
