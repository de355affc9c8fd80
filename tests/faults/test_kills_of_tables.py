"""F1 of other commands: `compare` and `suspects` that are killed, at any moment, end as if nobody had killed them."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from sftmix.disk.files import read_json
from tests.faults.mines import KillAt, KillIn, Record
from tests.faults.runs import LOOP, SCORES, digest, leftovers, long, steps
from tests.forked import SIGKILLED, done, ended
from tests.tiny import Tiny

CELLS = ("NTP/seed-1", "SFTMix/seed-1")


def compare(small: Tiny, place: Path) -> list[str]:
    """The words of a table of two runs, in the directory `table`."""
    variants = {"NTP": {"objective": "NTP"}, "SFTMix": {}}
    (place / "variants.yaml").write_text(json.dumps({"variants": variants, "pairing": "RandomPairs"}))
    few = ("--training.max_steps", "3", "--checkpoint.every", "1", "--seeds", "[1]", "--out", "table")
    return ["compare", *small.options, "--config", str(place / "variants.yaml"), *few]


@long
def test_a_table_that_is_killed_again_and_again(small, tmp_path):
    """In the reference, its scoring, either training, before the table is written, and between two of its files."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    words, place = compare(small, tmp_path), tmp_path / "killed"
    done(words, cwd=tmp_path / "whole")
    files = [KillAt(f"table/.tmp-{name}", 1) for name in ("table.md", "table.json")]
    loops = [KillIn("training/step.py", "train_step", call=call) for call in (2, 3, 2, 3)]
    for mine in (loops[0], KillIn(SCORES, "__call__"), *loops[1:], KillIn(LOOP, "run"), *files):
        assert ended(words, cwd=place, faults=[mine]).codes == [SIGKILLED], mine
    done(words, cwd=place)
    tables = [tmp_path / name / "table" for name in ("whole", "killed")]
    for name in CELLS:
        assert len({digest(table / name) for table in tables}) == 1
        assert steps(tables[0] / name) == steps(tables[1] / name)
    contents = [read_json(table / "table.json") for table in tables]
    assert contents[0]["contrasts"] == contents[1]["contrasts"]
    assert contents[1]["complete"]
    assert leftovers(tables[1]) == []


@pytest.fixture
def suspects(small, tmp_path) -> list[str]:
    """The words of a table of suspects that was made, in which somebody has decided on a row."""
    words = ["suspects", str(small.train), "--embedding", "tfidf", "--top", "1", "--out", "table"]
    done(words, cwd=tmp_path)
    table = tmp_path / "table" / "suspects.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text(lines[0] + lines[1].replace(',"",', ',"keep",', 1) + "".join(lines[2:]))
    assert decided(tmp_path / "table") == ["keep"]
    return words


def decided(table: Path) -> list[str]:
    with (table / "suspects.csv").open(newline="") as file:
        return [row["decision"] for row in csv.DictReader(file) if row["decision"]]


def contents(table: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in table.iterdir()}


@long
def test_every_operation_on_a_table_of_suspects(suspects, tmp_path):
    """What somebody decided is there after each of them, and the same command ends as without a kill."""
    before, record = shutil.copytree(tmp_path / "table", tmp_path / "before"), tmp_path / "operations"
    done_with = ended(suspects, cwd=tmp_path, faults=[Record("table/", str(record))])
    assert done_with.codes == [0], done_with.printed
    whole, count = contents(tmp_path / "table"), len(record.read_text().splitlines())
    assert count >= 6  # two tables and a manifest, which are written and renamed
    for number in range(1, count + 1):
        shutil.rmtree(tmp_path / "table")
        shutil.copytree(before, tmp_path / "table")
        assert ended(suspects, cwd=tmp_path, faults=[KillAt("table/", number)]).codes == [SIGKILLED], number
        assert decided(tmp_path / "table") == ["keep"]
        done(suspects, cwd=tmp_path)
        assert contents(tmp_path / "table") == whole, number


@long
def test_suspects_whose_scoring_is_killed(small, tmp_path):
    """The scores are those of an undisturbed command."""
    words = ["suspects", str(small.train), "--model", str(small.model), "--embedding", "tfidf", "--top", "1", "--out"]
    done([*words, "whole"], cwd=tmp_path)
    for mine in (KillIn(SCORES, "__call__"), KillAt("table/scores/confidence/", 4), KillAt("table/.tmp-suspects", 1)):
        assert ended([*words, "table"], cwd=tmp_path, faults=[mine]).codes == [SIGKILLED], mine
    done([*words, "table"], cwd=tmp_path)
    for name in ("suspects.csv", "suspects.parquet"):
        assert (tmp_path / "table" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert leftovers(tmp_path / "table") == []
