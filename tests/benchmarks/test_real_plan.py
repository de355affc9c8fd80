"""The study at 135M and 270M: its tables are valid, and share what preregistration-real.md says."""

import json
from functools import cache
from pathlib import Path

import pytest

from benchmarks.evidence.prepare import digest, parts_of
from benchmarks.evidence.real.rows import PROMPTS, SIZES
from sftmix.cli.parsing import read_arguments
from sftmix.tools.compare import Comparison
from sftmix.tools.compare.command import CompareOptions, comparison_of
from sftmix.words.differing import differing

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "evidence" / "real"
PLAN = (FOLDER.parent / "preregistration-real.md").read_text(encoding="utf-8")
TABLES = ("main", "overfit", "gemma-main", "gemma-overfit")
PILOTS = ("pilot", "gemma-pilot")


def comparison(config: str) -> Comparison:
    return comparison_of(read_arguments(["--config", config, "--out", "o"], CompareOptions))


@cache
def table(name: str) -> Comparison:
    return comparison(str(FOLDER / f"{name}.yaml"))


def test_every_file_is_a_table_of_the_plan():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"common", *TABLES, *PILOTS}
    assert all(f"`{name}`" in PLAN for name in (*TABLES, *PILOTS))


@pytest.mark.parametrize("name", [*TABLES, *PILOTS])
def test_a_table_is_valid_without_the_files_it_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(name).validate()


def test_the_recipe_for_everybody_is_the_main_table_on_the_hub():
    ours, theirs = table("main"), comparison("recipe:smollm2-135m")
    assert list(ours.variants) == list(theirs.variants)
    assert ours.contrasts == theirs.contrasts
    for arm, config in ours.variants.items():
        changed = {option for option, *_ in differing(config.as_dict(), theirs.variants[arm].as_dict())}
        assert changed == {"model.path", "data.train", "data.eval", "data.format", "seed"}


def test_the_rows_are_those_of_the_plan(shared):
    whole = parts_of(json.loads((shared / "data" / "alpaca" / "alpaca_8k.json").read_text(encoding="utf-8")))
    parts = {name: whole[name][:size] for name, size in SIZES.items()}
    for part in (*parts.values(), parts["held_out"][:PROMPTS]):
        assert digest(json.dumps(part, ensure_ascii=False, indent=0) + "\n") in PLAN
