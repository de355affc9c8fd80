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
ARMS = ["NTP", "SFTMix", "RandomSplit", "DecomposedMixup", "NTP-shuffled"]
TABLES = {"main": 6, "overfit": 6, "gemma-main": 3, "gemma-overfit": 3}
"""Table -> seeds."""
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


@pytest.mark.parametrize(("name", "seeds"), TABLES.items())
def test_arms_seeds_and_regimes_are_those_of_the_plan(name, seeds):
    made = table(name)
    assert list(made.variants) == ARMS
    assert made.options.seeds == list(range(1, seeds + 1))
    assert made.contrasts == [("SFTMix", other) for other in ("NTP", "NTP-shuffled", "RandomSplit", "DecomposedMixup")]
    for config in made.variants.values():
        rows, epochs = (80, 8) if name.endswith("overfit") else (SIZES["train"], 2)
        assert (config.data.limit or SIZES["train"], config.training.epochs) == (rows, epochs)
        assert (rows * epochs) / config.training.global_batch_size == 40
        assert config.data.template == ("alpaca" if name.startswith("gemma") else None)
    assert made.variants["SFTMix"].objective.spec()["init_args"]["mu"] == 0.2
    assert made.variants["DecomposedMixup"].objective.spec()["init_args"]["mu"] == 0.2


@pytest.mark.parametrize("name", PILOTS)
def test_a_pilot_is_ntp_alone_on_rows_of_its_own(name):
    assert list(table(name).variants) == ["rate-1e-5", "rate-3e-5", "rate-1e-4"]
    for config in table(name).variants.values():
        assert type(config.objective).__name__ == "NTP"
        assert config.pairing is None
        assert config.data.eval == ["runs/real/data/pilot.json"]


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
