"""Variants x seeds from YAML: every run is checked before the first starts, and what they share does not vary."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from sftmix.cli.parsing import read_arguments
from sftmix.common.errors import ConfigError
from sftmix.common.files import write_json
from sftmix.components.objectives import NTP, SFTMix
from sftmix.components.reference import FromFile, TrainedReference
from sftmix.config import RunConfig
from sftmix.options import DataOptions, ModelOptions, ReferenceTraining
from sftmix.tools.compare import Comparison, TableOptions
from sftmix.tools.compare.cells import CellResult, result_of
from sftmix.tools.compare.command import comparison_of, listing, table_options
from sftmix.tools.compare.markdown import markdown
from sftmix.tools.compare.statistics import smallest_effect
from sftmix.tools.compare.table import build_table

COMPLETE = {"model": {"path": "m"}, "data": {"train": ["a.json"], "eval_fraction": 0.1}, "out": "o", "seeds": [1, 2]}
Table = Callable[..., Comparison]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """The comparison of a configuration file that holds these keys, and of more words."""

    def make(*words: str, **keys: object) -> Comparison:
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump({**COMPLETE, **keys}, sort_keys=False))
        return comparison_of(read_arguments(["--config", str(path), *words], table_options()))

    return make


def test_a_variant_is_its_options_over_those_of_all(table: Table) -> None:
    made = table(
        "--objective.mu",
        "0.3",
        "--training.epochs",
        "2",
        variants={
            "NTP": {"objective": "NTP"},
            "base": None,
            "mu": {"objective.mu": 0.4, "training": {"epochs": 5}},
            "whole": {"splitter": {"class_path": "RandomSplit"}, "pairing": None, "objective": {"class_path": "NTP"}},
        },
    )
    ntp, base, mu, whole = made.variants.values()
    assert isinstance(ntp.objective, NTP)
    assert base.objective.spec()["init_args"]["mu"] == 0.3
    assert (mu.objective.spec()["init_args"]["mu"], mu.training.epochs) == (0.4, 5.0)
    assert (type(whole.splitter).__name__, whole.pairing, whole.training.epochs) == ("RandomSplit", None, 2.0)
    assert made.baseline == "NTP"
    assert made.contrasts == [("base", "NTP"), ("mu", "NTP"), ("whole", "NTP")]
    assert made.options_of("mu")["training.epochs"] == 5.0
    assert "training.epochs" in made.options_of("NTP")


def test_a_variant_takes_its_options_as_a_file_does_and_leaves_the_others_alone(table: Table) -> None:
    variants = {
        "added": {"callbacks+": "MeasureMixing", "callbacks.every": 3},
        "nested": {"splitter.levels": 6, "splitter": {"class_path": "Quantile"}},
        "rows": {"data.train+": "b.json"},
        "base": {},
    }
    added, nested, rows, base = table(variants=variants).variants.values()
    assert [(type(c).__name__, vars(c)["every"]) for c in added.callbacks] == [("Evaluate", None), ("MeasureMixing", 3)]
    assert nested.splitter.spec()["init_args"]["levels"] == 6
    assert rows.data.train == ["a.json", "b.json"]
    assert (base.data.train, [type(c).__name__ for c in base.callbacks]) == (["a.json"], ["Evaluate"])
    with pytest.raises(ConfigError, match=r"variant a: objective\.mu has two values, 1 and 2"):
        table(variants={"a": {"objective.mu": 1, "objective": {"mu": 2}}})
    given = "{a: {objective: {class_path: SFTMix, init_args: {mu: {class_path: Constant, init_args: {value: 1}}}}}}"
    assert table("--variants", given).variants["a"].objective.spec()["init_args"]["mu"]["class_path"]


def test_an_option_that_every_variant_overrides_is_named(table: Table, tmp_path: Path, capsys) -> None:
    """As with compare.yaml, which a table writes with all options of every variant."""
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(table(variants={"NTP": {"objective": "NTP"}, "SFTMix": {}}).plain()))

    def noted(*words: str, **keys: object) -> list[str]:
        if keys:
            table(*words, **keys)
        else:
            comparison_of(
                read_arguments(["--config", str(path), "--out", "t2", "--seed", "7", *words], table_options())
            )
        return re.findall(r"note: --(\S+ \S+) changes nothing here", capsys.readouterr().err)

    ignored = ("training.learning_rate 0.1", "data.train+ b", "pairing RandomPairs")
    assert [noted(*f"--{option}".split()) for option in ignored] == [[option] for option in ignored]
    assert noted("--training.learning_rate", "2e-6", "--data.eval_fraction", "0.1") == []
    some = {"a": {"training.epochs": 1, "objective.mu": 0.1}, "b": {"objective": {"mu": 0.4}}}
    assert noted("--training.epochs", "2", "--objective", "DecomposedMixup", variants=some) == []
    assert noted("--objective.mu", "0.3", variants=some) == ["objective.mu 0.3"]


def test_the_seeds_vary_the_training_and_not_what_all_share(table: Table) -> None:
    made = table(variants={"a": {}, "b": {"objective.mu": 1}})
    configs = [cell.config() for cell in made.cells]
    assert [(c.variant, c.seed) for c in made.cells] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [c.seed for c in configs] == [1, 1, 2, 2]
    assert [c.out for c in configs] == ["o/a/seed-1", "o/b/seed-1", "o/a/seed-2", "o/b/seed-2"]
    assert {c.data.seed for c in configs} == {42}
    assert {c.reference.training.seed for c in configs if isinstance(c.reference, TrainedReference)} == {42}


def test_the_seeds_do_not_vary_which_rows_are_taken(table: Table) -> None:
    alone = ("--data.eval_fraction", "null")
    for words, seed in ((alone, None), ((*alone, "--data.take", "5"), 42)):
        assert {cell.config().data.seed for cell in table(*words, variants={"a": {}}).cells} == {seed}


def test_a_given_seed_of_the_split_or_the_reference_stays(table: Table) -> None:
    made = table("--data.seed", "7", "--reference.training.seed", "8", variants={"a": {}})
    config = made.cells[0].config()
    assert isinstance(config.reference, TrainedReference)
    assert isinstance(config.reference.training, ReferenceTraining)
    assert (config.data.seed, config.reference.training.seed) == (7, 8)


def test_fresh_references_follow_the_seed(table: Table) -> None:
    config = table("--fresh_reference", "true", variants={"a": {}}).cells[0].config()
    assert config.data.seed is None
    assert isinstance(config.reference, TrainedReference)
    assert config.reference.training is None


def test_a_reference_without_training_is_left_alone(table: Table) -> None:
    made = table(variants={"a": {"reference": {"class_path": "FromFile", "init_args": {"path": "d.parquet"}}}})
    assert isinstance(made.cells[0].config().reference, FromFile)


def test_cells_share_no_component(table: Table) -> None:
    cell = table(variants={"a": {}}).cells[0]
    assert cell.config().callbacks[0] is not cell.config().callbacks[0]


def test_the_hash_is_that_of_the_configuration_wherever_it_is_run(table: Table) -> None:
    here, there = table(variants={"a": {}, "b": {"objective.mu": 1}}), table("--out", "elsewhere", variants={"a": {}})
    assert here.hash_of(here.cells[0]) == there.hash_of(there.cells[0])
    assert len({here.hash_of(cell) for cell in here.cells}) == 4


def test_what_a_table_writes_down_is_read_back_equal(table: Table, tmp_path: Path) -> None:
    made = table(variants={"NTP": {"objective": "NTP"}, "mu": {"objective.mu": 0.4, "data.limit": 5}}, metrics=["x"])
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(made.plain(), sort_keys=False))
    again = comparison_of(read_arguments(["--config", str(path), "--out", "o"], table_options()))
    assert again.options == made.options
    assert [cell.plain for cell in again.cells] == [cell.plain for cell in made.cells]


@pytest.mark.slow
def test_the_listing_counts_what_is_shared(table: Table) -> None:
    variants = {"NTP": {"objective": "NTP"}, "a": {}, "b": {"training.epochs": 9}, "c": {"splitter": "RandomSplit"}}
    lines = listing(table(variants=variants))
    assert lines[0] == "4 variants x 2 seeds in o"
    nowhere = table(variants=variants, out=None)
    nowhere.validate(needs_out=False)
    assert listing(nowhere) == ["4 variants x 2 seeds in (no --out yet)", *lines[1:]]
    assert re.search(r"b +training.epochs: 9.0; objective: SFTMix", lines[3])
    assert lines[-1] == "references: 2, used by 4 runs"  # b trains its own: the reference inherits the epochs
    shared = listing(table("--reference.training.epochs", "3", variants=variants))
    assert shared[-1] == "references: 1, used by 4 runs"
    random = {"NTP": {"objective": "NTP"}, "drawn": {"selector": "Random", "selector.k": 5}}
    assert listing(table(variants=random))[-1] == "references: 2 at most, used by 2 runs"  # one for each seed's rows
    stored = {"a": {"reference": {"class_path": "FromFile", "init_args": {"path": "d.parquet"}}}}
    assert listing(table(variants=stored))[-1] == "references: 1, used by 2 runs"  # nothing of it depends on a seed
    adapters = {"all": {}, "lora": {"model.lora.r": 4}}
    assert listing(table(variants=adapters))[-1] == "references: 2, used by 4 runs"
    file = ("--data.eval", "e.json", "--data.eval_fraction", "null")
    assert listing(table(*file, variants={"a": {}}))[-1] == "references: 1, used by 2 runs"  # no seed chooses rows
    seeded = listing(table(*file, variants={"a": {}, "b": {"data.seed": 7}}))
    assert seeded[-1] == "references: 1, used by 4 runs"
    computed = {"default": {}, "eager": {"model.attention": "eager"}, "small": {"training.micro_batch_size": 2}}
    assert listing(table(variants=computed))[-1] == "references: 2, used by 6 runs"  # no input is a layout
    optimizers = {"a": {}, "b": {"optimizer": {"class_path": "AdamW"}}, "c": {"data.num_proc": 2}}
    assert listing(table(variants=optimizers))[-1] == "references: 1, used by 6 runs"
    fresh = listing(table("--fresh_reference", "true", variants={"a": {}, "b": {"objective.mu": 1}}))
    assert fresh[-1] == "references: 2, used by 4 runs"


@pytest.mark.parametrize(("seeds", "contrasts", "needed"), [(5, 1, 6), (6, 3, 7), (8, 7, 9)])
def test_too_few_seeds_for_the_planned_contrasts_are_announced(
    table: Table, seeds: int, contrasts: int, needed: int
) -> None:
    variants = {f"v{i}": {"objective.mu": i / 10} for i in range(contrasts + 1)}
    few = table("--seeds", str(list(range(seeds))), variants=variants)
    assert [f"{needed} seeds" in line and f"there are {seeds}" in line for line in few.warnings()] == [True]
    assert few.warnings()[0] in listing(few)
    assert table("--seeds", str(list(range(needed))), variants=variants).warnings() == []


def test_what_one_variant_uses_is_no_news_of_another(table: Table) -> None:
    variants = {"NTP": {"objective": "NTP"}, "SFTMix": {}}
    assert not [line for line in table(variants=variants, confidence="LogPerplexity").warnings() if "not used" in line]
    alone = table(variants={"NTP": {"objective": "NTP"}}, confidence="LogPerplexity").warnings()
    assert [line for line in alone if "not used by this run: confidence LogPerplexity" in line]


def test_a_variant_that_ignores_a_component_says_so_once(table: Table) -> None:
    made = table(variants={"NTP": {"objective": "NTP"}, "drawn": {"splitter": "RandomSplit"}}, splitter="Quantile")
    assert [line for line in made.warnings() if "not used" in line] == [
        "note: variant NTP: not used by this run: splitter Quantile; no examples are paired (pairing null, or an "
        "objective that does not mix)",
    ]


def test_a_contrast_of_a_training_with_itself_is_named(tmp_path: Path) -> None:
    """Two variants whose options decide nothing about the target's training: one adopts the other's."""
    comparison = table_of(tmp_path, "AB", 2, metric="x")
    for cell in comparison.cells:
        options = {"global_batch_size": 8, "epochs": 3.0, "max_steps": None}
        write_json(cell.path / "train" / "inputs.json", {"data": {}, "seed": cell.seed, "training": options})
    table = build_table(comparison, [result_of(cell, {"x": 1.0}) for cell in comparison.cells])
    assert table["contrasts"][0]["same_training"] is True
    assert "- **B and A are the same training: " in markdown(table)
    changed = {"data": {}, "seed": 2, "training": {**options, "eps": 1}}
    write_json(tmp_path / "B" / "seed-2" / "train" / "inputs.json", changed)
    table = build_table(comparison, [result_of(cell, {"x": 1.0}) for cell in comparison.cells])
    assert table["contrasts"][0]["same_training"] is False
    assert "same training" not in markdown(table)


def test_nothing_is_announced_where_nothing_is_tested(table: Table) -> None:
    assert table(variants={"a": {}}).warnings() == []


@pytest.mark.parametrize(
    ("keys", "words", "expected"),
    [
        ({}, [], ["variants is missing", "`run`"]),
        ({"variants": {"a": {"objective.mo": 1}}}, [], ["variant a", "objective.mo", "Did you mean mu?"]),
        ({"variants": {"a": {}, "b": {"trainng.epochs": 1}}}, [], ["variant b", "Did you mean training.epochs?"]),
        ({"variants": {"a": {"objective": "NTPP"}}}, [], ["variant a", "objective", "Did you mean NTP?"]),
        ({"variants": {"a": {"seed": 3}}}, [], ["variant a", "seed is not an option of a variant"]),
        ({"variants": {"a": {"out": "x"}}}, [], ["variant a", "out is not an option of a variant"]),
        ({"variants": {"a": {"config": "x.yaml"}}}, [], ["variant a: config is not an option of a variant"]),
        ({"variants": {"a": {"print_config": ""}}}, [], ["variant a: unknown option print_config"]),
        ({"variants": {"a": {"help": "data"}}}, [], ["variant a: unknown option help"]),
        ({"variants": {"a": 3}}, [], ["variant a", "3 is not a mapping"]),
        ({"variants": {"a": {"objective.mu": -1}}}, [], ["variant a", "mu is -1"]),
        ({"variants": {"a": {"training": {"epochs": -1}}, "b": {"pairing": None}}}, [], ["2 problems", "a:", "b:"]),
        ({"variants": {"a/b": {}}}, [], ["'a/b'", "directory's name"]),
        ({"variants": {"table.md": {}}}, [], ["'table.md'", "a file of the table's directory; choose another name"]),
        ({"variants": {"compare.yaml": {}}}, [], ["'compare.yaml'", "a file of the table's directory"]),
        ({"variants": {"STATUS.json": {}}}, [], ["'STATUS.json'", "a file of the table's directory"]),
        ({"variants": {False: {}}}, [], ["variants: a name is False to YAML; put it in quotes"]),
        ({"variants": {"a": {}}}, ["--with_baseline"], ["with_baseline", "objective: NTP"]),
        ({"variants": {"a": {}}, "seeds": [1, 1]}, [], ["seeds is [1, 1]"]),
        ({"variants": {"a": {}}, "seeds": []}, [], ["seeds is []"]),
        ({"variants": {"a": {}}, "baseline": "b"}, [], ["baseline is 'b'", "variants a"]),
        ({"variants": {"a": {}, "b": {}}, "contrasts": [["a", "c"]]}, [], ["contrasts: ['a', 'c']", "a, b"]),
        ({"variants": {"a": {}}, "out": None}, [], ["out is missing"]),
        ({"variants": {"a": {}}, "data": {"train": ["a"]}}, [], ["eval_nll_after needs held-out rows"]),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(
    table: Table, keys: dict[str, object], words: list[str], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        table(*words, **keys).validate()
    for word in expected:
        assert word in str(error.value)


def test_a_table_works_without_yaml() -> None:
    def config(**changes: object) -> RunConfig:
        data = DataOptions(train=["a.json"], eval=["b.json"])
        return RunConfig(model=ModelOptions(path="m"), data=data, **changes)  # type: ignore[arg-type]

    variants = {"NTP": config(objective=NTP()), "mu": config(objective=SFTMix(mu=0.4))}
    made = Comparison(out="o", variants=variants, options=TableOptions(seeds=[1, 2]))
    made.validate()
    assert len(made.cells) == 4
    mixed = Comparison(out="o", variants={**variants, "odd": config(seed=3)})
    with pytest.raises(ConfigError, match="different seeds"):
        mixed.validate()


def results_on(comparison: Comparison, figures: dict[str, dict[str, float]]) -> list[CellResult]:
    """Finished cells with these figures, by the cell's name."""
    same = dict.fromkeys(("data", "eval", "reference", "order"))
    return [CellResult(c, figures[c.name], [], {}, "0.1 abc", same) for c in comparison.cells if c.name in figures]


def table_of(directory: Path, names: str, seeds: int, **options: object) -> Comparison:
    variants = {name: RunConfig(model=ModelOptions(path="m"), objective=NTP()) for name in names}
    table = TableOptions(seeds=list(range(1, seeds + 1)), **options)
    return Comparison(out=str(directory), variants=variants, options=table)


def test_holm_counts_the_contrasts_that_were_planned(tmp_path: Path) -> None:
    """Three planned, one without a value: the smallest p is multiplied by three all the same."""
    comparison = table_of(tmp_path, "ABCD", 7, metric="x")
    value = {"A": 0.0, "B": 1.0, "C": 2.0}
    figures = {c.name: {"x": value[c.variant] * c.seed} if c.variant in value else {} for c in comparison.cells}
    found = build_table(comparison, results_on(comparison, figures))["contrasts"]
    assert [c["p"] for c in found] == [pytest.approx(2 / 2**7), pytest.approx(2 / 2**7), None]
    assert [c["p_holm"] for c in found] == [pytest.approx(6 / 2**7), pytest.approx(6 / 2**7), None]


def test_a_part_of_the_seeds_gives_no_verdict(tmp_path: Path) -> None:
    comparison = table_of(tmp_path, "AB", 8, metric="x")
    figures = {c.name: {"x": (c.variant == "B") * (1.0 + c.seed)} for c in comparison.cells}
    whole = build_table(comparison, results_on(comparison, figures))["contrasts"][0]
    part = build_table(comparison, results_on(comparison, figures)[:-2])["contrasts"][0]
    assert (whole["verdict"], whole["p"]) == ("different", 2 / 2**8)
    assert (part["verdict"], part["p"]) == ("wait for the end", 2 / 2**7)
    assert (part["interval"], part["smallest_effect"]) == (None, None)
    assert whole["interval"] == pytest.approx(
        tuple(stats.ttest_1samp([2, 3, 4, 5, 6, 7, 8, 9], 0).confidence_interval())
    )
    assert whole["smallest_effect"] == smallest_effect(np.std(range(8), ddof=1), 8)
    assert (whole["same_rows"], whole["same_order"]) == (None, None)  # nobody wrote down what these were trained on


def test_what_is_detectable_counts_the_contrasts_that_were_planned(tmp_path: Path) -> None:
    comparison = table_of(tmp_path, "ABCD", 7, metric="x")
    figures = {c.name: {"x": (c.variant == "B") * (1.0 + c.seed)} for c in comparison.cells}
    found = build_table(comparison, results_on(comparison, figures))["contrasts"]
    assert found[0]["smallest_effect"] == smallest_effect(found[0]["sd"], 7, contrasts=3)
    comparison = table_of(tmp_path, "ABCD", 6, metric="x")  # 3 contrasts need 7 seeds
    table = build_table(comparison, results_on(comparison, figures))
    assert [c["smallest_effect"] for c in table["contrasts"]] == [None] * 3
    assert "detectable:" not in markdown(table)
    assert re.search(r"^\| B − A .* \| - +\| no difference shown \|$", markdown(table), re.M)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({}, True),
        ({"objective": {"mu": 1}, "optimizer": "other"}, True),
        ({"pairing": None, "split": None, "confidence": None}, False),
        ({"pairing": {"class_path": "AnyPairs"}}, False),
        ({"split": "another"}, False),
        ({"confidence": "another"}, False),
        ({"data": {"limit": 5}}, False),
        ({"training": {"global_batch_size": 16, "epochs": 3.0, "max_steps": None, "learning_rate": 1}}, False),
        ({"training": {"global_batch_size": 8, "epochs": 2.0, "max_steps": None, "learning_rate": 1}}, False),
        ({"training": {"global_batch_size": 8, "epochs": 3.0, "max_steps": None, "learning_rate": 2}}, True),
        ({"online": [{}]}, False),
    ],
)
def test_the_order_of_a_training_is_told_from_its_inputs(tmp_path: Path, changed: dict, same: bool) -> None:
    training = {"global_batch_size": 8, "epochs": 3.0, "max_steps": None, "learning_rate": 1}
    inputs = {
        "data": {"limit": 9},
        "split": "s",
        "confidence": "c",
        "pairing": {"class_path": "RandomPairs"},
        "seed": 1,
    }
    comparison = table_of(tmp_path, "AB", 1, metric="x")
    results = []
    for cell in comparison.cells:
        own = {**inputs, "training": training, **(changed if cell.variant == "B" else {})}
        write_json(cell.path / "train" / "inputs.json", own)
        results.append(result_of(cell, {"x": 1.0, "version": "0.1", "git_revision": None}))
    contrast = build_table(comparison, results)["contrasts"][0]
    assert (contrast["same_order"], contrast["same_rows"]) == (same, "data" not in changed)


def test_pairs_of_own_losses_are_the_same_in_equal_runs_alone(tmp_path: Path) -> None:
    training = {"global_batch_size": 8, "epochs": None, "max_steps": 5}
    comparison = table_of(tmp_path, "ABC", 1, metric="x")
    results = []
    for cell in comparison.cells:
        own = {"data": {}, "training": training, "online": [{}], "objective": "mu 1" if cell.variant == "C" else "mu 2"}
        write_json(cell.path / "train" / "inputs.json", own)
        results.append(result_of(cell, {"x": 1.0, "version": "0.1", "git_revision": None}))
    assert [c["same_order"] for c in build_table(comparison, results)["contrasts"]] == [True, False]


def test_the_spread_of_confidence_is_shown_relative_to_the_baseline(tmp_path: Path) -> None:
    comparison = table_of(tmp_path, "AB", 2, metric="x")
    name, spread = "confidence_std.log_after", {"A": {1: 2.0, 2: 4.0}, "B": {1: 1.9, 2: 3.6}}
    figures = {c.name: {"x": 12.0, name: spread[c.variant][c.seed]} for c in comparison.cells}
    table = build_table(comparison, results_on(comparison, figures))
    assert table["variants"]["B"]["metrics"][name]["relative"] == pytest.approx((1.9 / 2 + 3.6 / 4) / 2 - 1)
    assert "relative" not in table["variants"]["A"]["metrics"][name]
    text = markdown(table)
    assert "± 1.2021 (-7.5%)" in text
    figures["B/seed-1"][name], figures["A/seed-2"][name] = 3e17, 0.0  # nearly diverged; nothing to be relative to
    extreme = build_table(comparison, results_on(comparison, figures))["variants"]["B"]["metrics"][name]
    assert extreme["relative"] == pytest.approx(3e17 / 2 - 1, rel=1e-12)
    assert "Trained by sftmix 0.1 abc." in text
    assert "| A       | 2     | 12 " in text  # a count without decimals
