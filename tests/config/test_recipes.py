"""The recipes name no file beside a checkout, each becomes small, and what docs/method.md measured is valid."""

import re
from functools import cache
from pathlib import Path

import pytest

from sftmix.cli.parsing import parse, read_arguments
from sftmix.components import SFTMix
from sftmix.config import RunConfig
from sftmix.config.checks import validate
from sftmix.config.read import config_file, read_layers, recipes
from sftmix.tools.compare import Comparison
from sftmix.tools.compare.command import CompareOptions, comparison_of
from sftmix.tools.compare.statistics import seeds_needed
from tests.configs import read_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = "small"
WITHOUT_SMALL = {"quickstart", "smollm2-135m", "ideas-smollm2", "cleaned"}  # small themselves
ALL = {name: read_layers(config_file(f"recipe:{name}")) for name in recipes()}
TABLES = [name for name, layers in ALL.items() if any("variants" in values for _, values in layers)]
RUNS = [name for name in recipes() if name not in (*TABLES, SMALL)]
LARGE = [name for name in recipes() if not name.startswith(SMALL) and name not in WITHOUT_SMALL]

METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").partition("<!-- experiments -->")[2]
MEASURED = re.findall(r"^\| [^|]+ \| [^|`]*`([^`]+)`[^|]* \| `([^`|]+)` \|", METHOD, re.MULTILINE)
"""(recipe, file of benchmarks/small) of each row of the table of experiments."""
QUICK = {"table3-weaker-reference", "table4-quality-labels", "table7-selection", "pretrain-mixup"}


def arguments(*files: str) -> list[str]:
    return [word for file in files for word in ("--config", file)] + ["--out", "o"]


@cache
def table_of(*files: str) -> Comparison:
    return comparison_of(read_arguments(arguments(*files), CompareOptions))


def config_of(*files: str) -> RunConfig:
    return parse(read_arguments(arguments(*files)))[0]


def made_small(name: str) -> list[str]:
    own = f"{SMALL}/{name}"
    return [f"recipe:{own}"] if own in ALL else [f"recipe:{name}", f"recipe:{SMALL}"]


def measured(recipe: str, file: str) -> list[str]:
    return [f"recipe:{recipe}", str(ROOT / "benchmarks" / "small" / f"{file}.yaml")]


def slow_but(quick: set[str], names: list[str]) -> list[object]:
    """Return the names; a test of those that are not `quick` is slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_names_no_file_beside_a_checkout(name):
    assert "../" not in Path(config_file(f"recipe:{name}")).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in RUNS if name not in WITHOUT_SMALL])
def test_a_run_is_valid_without_the_files_it_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    validate(read_config(config_file(f"recipe:{name}")), needs_out=False)


@pytest.mark.parametrize("name", [name for name in LARGE if not name.startswith("pretrain")])
def test_a_step_of_eight_gpus_is_one_micro_batch(name):
    """FSDP keeps the gradient of the ones before whole, in float32: 55 GiB on each GPU at 14B."""
    training = {key: value for _, values in ALL[name] for key, value in values.get("training", {}).items()}
    assert training["global_batch_size"] <= 8 * training.get("micro_batch_size", 8)


@pytest.mark.parametrize("name", slow_but(QUICK, [name for name in LARGE if name in TABLES]))
def test_a_table_is_valid_without_the_files_it_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = table_of(f"recipe:{name}")
    made.validate()
    assert len(made.options.seeds) >= seeds_needed(len(made.contrasts)), "no contrast could be significant"


# ------------------------------------------------------------------------------------------------ small


def is_small(config: RunConfig) -> bool:
    """Whether a run takes the model of recipe:small, a smaller reference and few rows of the hub, not too long."""
    small = next(values for _, values in ALL[SMALL])
    reference = getattr(config.reference, "model", None)
    models = [config.model.path == small["model"]["path"]]
    models += [reference.path == "distilbert/distilgpt2"] if reference and reference.path else []
    few = config.data.limit or sum(int(re.findall(r"\[(\d*):(\d+)\]", rows)[0][1]) for rows in config.data.train)
    return all(models) and few <= 200 and config.data.max_length <= 256


@pytest.mark.parametrize("name", slow_but(QUICK, [name for name in LARGE if name in TABLES]))
def test_a_table_is_made_small_with_the_same_variants(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, large = table_of(*made_small(name)), table_of(f"recipe:{name}")
    made.validate()
    assert all(is_small(config) for config in made.variants.values())
    assert len(made.variants) == len(large.variants)
    assert made.options.contrasts == large.options.contrasts


@pytest.mark.parametrize("name", [name for name in LARGE if name not in TABLES])
def test_a_run_is_made_small(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = config_of(*made_small(name))
    validate(made)
    assert is_small(made)


@pytest.mark.parametrize("files", [["recipe:baselines"], made_small("baselines"), measured("baselines", "baselines")])
def test_ntp_at_equal_compute_has_the_epochs_of_the_whole_recipe(files):
    """Epochs of the reference and the target, and a third of an epoch (a forward alone) for each scoring."""
    variants = table_of(*files).variants
    epochs, scorings = variants["SFTMix"].training.epochs, variants["SFTMix"].reference.checkpoints
    assert variants["NTP-equal-compute"].training.epochs == pytest.approx(2 * epochs + scorings / 3, abs=0.01)


@pytest.mark.parametrize("files", [["recipe:table5-role"], made_small("table5-role")])
def test_table_5_has_each_sum_of_both_losses_as_it_is_read_literally(files):
    sums = [arm.objective for arm in table_of(*files).variants.values() if type(arm.objective) is SFTMix]
    assert sorted((each.mu, each.mixup_mean) for each in sums) == [
        (0.2, "ntp"),
        (0.2, "own"),
        (1, "ntp"),
        (1, "own"),
    ]


# ------------------------------------------------------------------------------------------------ what was measured


def test_each_file_for_the_figures_has_a_row():
    there = {path.stem for path in (ROOT / "benchmarks" / "small").glob("*.yaml")}
    assert {file for _, file in MEASURED} == there


@pytest.mark.parametrize("recipe", slow_but(QUICK, [recipe for recipe, _ in MEASURED]))
def test_what_was_measured_is_valid_without_the_files_it_names(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = measured(recipe, dict(MEASURED)[recipe])
    if recipe in TABLES:
        made = table_of(*files)
        made.validate()
        assert len(made.variants) == len(table_of(f"recipe:{recipe}").variants)
    else:
        validate(config_of(*files))
