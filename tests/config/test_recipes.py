"""The shipped recipes: each is a valid configuration without any file beside the checkout, and has a small twin."""

import pytest

from sftmix.cli.parsing import read_arguments
from sftmix.components import SFTMix
from sftmix.config.checks import validate
from sftmix.config.read import config_file, read_config, read_layers, recipes
from sftmix.tools.compare import Comparison
from sftmix.tools.compare.command import CompareOptions, comparison_of
from sftmix.tools.compare.statistics import seeds_needed

ALL = {name: read_layers(config_file(f"recipe:{name}")) for name in recipes()}
TABLES = [name for name, layers in ALL.items() if any("variants" in values for _, values in layers)]
RUNS = [n for n in recipes() if n not in TABLES]
SMALL = "small/"
WITHOUT_TWIN = {"quickstart", "smollm2-135m"}  # small themselves


def table(name: str) -> Comparison:
    return comparison_of(read_arguments(["--config", f"recipe:{name}", "--out", "o"], CompareOptions))


def test_every_recipe_has_a_small_twin_that_is_made_from_it():
    mine = {n for n in recipes() if not n.startswith(SMALL)} - WITHOUT_TWIN
    assert not [n for n in mine if f"{SMALL}{n}" not in recipes()]
    for name in mine:
        layers = [layer for layer, _ in ALL[f"{SMALL}{name}"]]
        assert f"recipe:{name}" in layers, f"{SMALL}{name} repeats what recipe:{name} says"


@pytest.mark.parametrize("name", [n for n in RUNS if n not in WITHOUT_TWIN])
def test_a_run_is_valid_without_the_files_it_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config(config_file(f"recipe:{name}"))
    validate(config, needs_out=False)


LARGE = [n for n in recipes() if not n.startswith((SMALL, "pretrain")) and n not in WITHOUT_TWIN]


@pytest.mark.parametrize("name", LARGE)
def test_a_step_of_eight_gpus_is_one_micro_batch(name):
    """FSDP keeps the gradient of the ones before whole, in float32: 55 GiB on each GPU at 14B."""
    training = {key: value for _, values in ALL[name] for key, value in values.get("training", {}).items()}
    assert training["global_batch_size"] <= 8 * training.get("micro_batch_size", 8)


QUICK = ("small/table1-alpaca-llama3.1-8b", "small/table5-role", "small/controls")
OF_A_TABLE = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TABLES]


@pytest.mark.parametrize("name", OF_A_TABLE)
def test_a_table_is_valid_without_the_files_it_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = table(name)
    made.validate()
    if name.startswith(SMALL):
        twin = {
            k: v
            for _, values in ALL[name.removeprefix(SMALL)]
            for k, v in values.items()
            if k in ("variants", "contrasts")
        }
        assert len(made.variants) == len(twin["variants"])
        assert made.options.contrasts == twin.get("contrasts")
    else:
        assert len(made.options.seeds) >= seeds_needed(len(made.contrasts)), "no contrast could be significant"


@pytest.mark.parametrize("name", ["baselines", "small/baselines"])
def test_ntp_at_equal_compute_has_the_epochs_of_the_whole_recipe(name):
    """Epochs of the reference and the target, and a third of an epoch (a forward alone) for each scoring."""
    variants = table(name).variants
    epochs, scorings = variants["SFTMix"].training.epochs, variants["SFTMix"].reference.checkpoints
    assert variants["NTP-equal-compute"].training.epochs == pytest.approx(2 * epochs + scorings / 3, abs=0.01)


@pytest.mark.parametrize("name", ["table5-role", "small/table5-role"])
def test_table_5_has_each_sum_of_both_losses_as_it_is_read_literally(name):
    sums = [arm.objective for arm in table(name).variants.values() if type(arm.objective) is SFTMix]
    assert sorted((each.mu, each.mixup_mean) for each in sums) == [
        (0.2, "ntp"),
        (0.2, "own"),
        (1, "ntp"),
        (1, "own"),
    ]
