"""Variants x seeds from YAML: every run is checked before the first starts, and what they share does not vary."""

import re
from collections.abc import Callable

import pytest
import yaml

from sftmix.cli.parsing import read_arguments
from sftmix.components.callbacks import Evaluate
from sftmix.components.objectives import NTP
from sftmix.components.others.mixing import MeasureMixing
from sftmix.components.reference import TrainedReference
from sftmix.config.read import from_dict
from sftmix.tools.compare import Comparison, compare
from sftmix.tools.compare.command import CompareOptions, comparison_of, listing
from sftmix.words.errors import ConfigError
from tests.components.examples import TailSFT

COMPLETE = {"model": {"path": "m"}, "data": {"train": ["a.json"], "eval_fraction": 0.1}, "out": "o", "seeds": [1, 2]}
Table = Callable[..., Comparison]


@pytest.fixture
def table(tmp_path) -> Table:
    """The comparison of a configuration file that holds these keys, and of more words."""

    def make(*words: str, **keys: object) -> Comparison:
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump({**COMPLETE, **keys}, sort_keys=False))
        return comparison_of(read_arguments(["--config", str(path), *words], CompareOptions))

    return make


def test_a_variant_is_its_options_over_those_of_all(table):
    made = table(
        *("--objective.mu", "0.3", "--training.epochs", "2"),
        variants={
            "NTP": {"objective": "NTP"},
            "base": None,
            "mu": {"objective.mu": 0.4, "training": {"epochs": 5}},
            "added": {"callbacks+": "MeasureMixing", "callbacks.every": 3, "data.train+": "b.json"},
        },
    )
    ntp, base, mu, added = made.variants.values()
    assert isinstance(ntp.objective, NTP)
    assert base.objective.spec()["init_args"]["mu"] == 0.3
    assert (mu.objective.spec()["init_args"]["mu"], mu.training.epochs) == (0.4, 5.0)
    assert base.training.epochs == 2.0
    evaluate, mixing = added.callbacks[-2:]
    assert (type(evaluate), evaluate.every, type(mixing), mixing.every) == (Evaluate, None, MeasureMixing, 3)
    assert (added.data.train, base.data.train) == (["a.json", "b.json"], ["a.json"])
    assert made.baseline == "NTP"
    assert made.contrasts == [(name, "NTP") for name in ("base", "mu", "added")]


def test_a_cell_is_a_variant_at_a_seed(table):
    made = table(variants={"a": {}, "b": {"objective.mu": 1}})
    configs = [from_dict(cell.plain) for cell in made.cells]
    assert [(c.seed, c.out) for c in configs] == [(n, f"o/{v}/seed-{n}") for n in (1, 2) for v in "ab"]


@pytest.mark.parametrize(
    ("words", "of_data", "of_reference"),
    [
        ("", 42, 42),
        ("--data.eval_fraction null", None, 42),
        ("--data.seed 7 --reference.training.seed 8", 7, 8),
        ("--fresh_reference true", None, None),
        ("--reference FromFile --reference.path d.parquet", 42, None),
    ],
)
def test_the_seeds_that_decide_rows_and_reference_are_the_same_in_all_cells(table, words, of_data, of_reference):
    for cell in table(*words.split(), variants={"a": {}}).cells:
        config = from_dict(cell.plain)
        assert config.data.seed == of_data
        training = config.reference.training
        assert (training and training.seed) == of_reference


class WithoutSeed(TrainedReference):
    """Has no option for the seed of its training."""

    def __init__(self, *, checkpoints: int = 2):
        super().__init__(checkpoints=checkpoints)


def test_a_reference_that_cannot_be_the_same_at_all_seeds_is_refused(table):
    words = ("--reference", f"{__name__}.WithoutSeed")
    with pytest.raises(ConfigError, match=r"reference WithoutSeed would be trained at each seed.*fresh_reference true"):
        compare(table(*words, variants={"a": {}}))
    table(*words, "--fresh_reference", "true", variants={"a": {}}).validate()
    table(*words, "--splitter", "RandomSplit", variants={"a": {}}).validate()


def test_what_a_table_writes_down_is_read_back_equal_and_overrides_the_command_line(table, tmp_path, capsys):
    """It has all options of every variant, so an option of the base changes nothing, which is said."""
    made = table(variants={"NTP": {"objective": "NTP"}, "mu": {"objective.mu": 0.4, "data.limit": 5}}, metrics=["x"])
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(made.as_dict(), sort_keys=False))
    words = ["--config", str(path), "--out", "o"]
    again = comparison_of(read_arguments(words, CompareOptions))
    assert again.options == made.options
    assert [cell.plain for cell in again.cells] == [cell.plain for cell in made.cells]
    words += ["--training.learning_rate", "0.1", "--data.train+", "b", "--metric", "x"]
    comparison_of(read_arguments(words, CompareOptions))
    named = re.findall(r"note: (\S+) changes nothing here", capsys.readouterr().err)
    assert sorted(named) == ["--data.train+", "--training.learning_rate"]
    with pytest.raises(ConfigError, match="variants"):
        table("--training.learning_rate", "0.1").validate()
    assert "changes nothing here" not in capsys.readouterr().err, "there is no variant that sets it"


def test_the_printed_table_is_read_back_equal(table, tmp_path, capsys):
    """The base is printed with the defaults of its component, which are no options of a variant's component."""
    base = {"objective": {"class_path": "Rho1", "dynamics": "d"}, "reference.model.max_length": 9}
    variants = {
        "rho": None,
        "tail": {"objective": f"{TailSFT.__module__}.TailSFT"},
        "none": {"reference.model": None, "callbacks": []},
    }
    made = table(variants=variants, **base)
    assert made.variants["tail"].objective.spec()["init_args"]["share"] == 0.5
    with pytest.raises(SystemExit):
        table("--print_config", variants=variants, **base)
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    again = comparison_of(read_arguments(["--config", str(path)], CompareOptions))
    assert (again.out, again.options) == (made.out, made.options)
    assert [cell.plain for cell in again.cells] == [cell.plain for cell in made.cells]


def test_the_listing_names_variants_runs_and_too_few_seeds(table):
    made = table(variants={"NTP": {"objective": "NTP"}, "b": {"training.epochs": 9}}, out=None)
    made.validate()
    first, ntp, b, warning = listing(made).splitlines()
    assert first.startswith("compare: 2 variants x 2 seeds, 0 of them done")
    assert re.search(r"NTP: training.epochs: 3.0; objective: NTP\(\)", ntp)
    assert re.search(r"b: training.epochs: 9.0; objective: SFTMix\(mu=0.2", b)
    assert "6 seeds are needed before one of 1 contrast can" in warning


@pytest.mark.parametrize(
    ("keys", "words", "expected"),
    [
        ({}, [], ["variants is missing"]),
        ({"variants": {"a": {"objective.mo": 1}}}, [], ["variant a", "objective.mo", "Did you mean mu?"]),
        ({"variants": {"a": {"seed": 3}}}, [], ["variant a", "seed is not an option of a variant"]),
        ({"variants": {"a": 3}}, [], ["variant a", "3 is not a mapping"]),
        ({"variants": {"a": {"training": {"epochs": -1}}, "b": {"pairing": None}}}, [], ["2 problems", "a:", "b:"]),
        (
            {"variants": {"a": {"training": {"epochs": -1, "warmup_ratio": 2}}, "b": {"pairing": None}}},
            [],
            ["3 problems", "variant a: training.epochs", "variant a: training.warmup_ratio", "variant b: "],
        ),
        *(({"variants": {name: {}}}, [], [repr(name)]) for name in ("a/b", "table.md", "compare.yaml", "STATUS.json")),
        ({"variants": {"a": {}}}, ["--with_baseline"], ["with_baseline"]),
        ({"variants": {"a": {}}, "seeds": [1, 1]}, [], ["seeds is [1, 1]"]),
        ({"variants": {"a": {}}, "baseline": "b"}, [], ["baseline is 'b'", "variants a"]),
        ({"variants": {"a": {}, "b": {}}, "contrasts": [["a", "c"]]}, [], ["contrasts: ['a', 'c'] names c", "a, b"]),
        (
            {"variants": {"a": {}, "b": {}}, "contrasts": [["a", "b", "a", "c"]]},
            [],
            ["names a, more than once", "names c"],
        ),
        ({"variants": {"a": {}, "b": {}, "c": {}}, "contrasts": [["a", "b", "c"]]}, [], ["nor [A, B, C, D]"]),
        ({"variants": {0.4: {}, "b": {}}, "contrasts": [[0.4, "b"]]}, [], ["contrasts: 0.4 is no text", "in quotes"]),
        (
            {"variants": {"a": {}, "b": {}}, "contrasts": [["a", "b"], ["b", "a"]]},
            [],
            ["one difference more than once"],
        ),
        (
            {"variants": {name: {} for name in "abcd"}, "contrasts": [[*"abcd"], [*"acbd"]]},
            [],
            ["one difference more than once"],
        ),
        ({"variants": {"a": {}}, "list": True}, [], ["list true is for the command line (--list)"]),
        ({"variants": {"a": {}}, "out": None}, [], ["out is missing"]),
        ({"variants": {"a": {}}, "data": {"train": ["a"]}}, [], ["eval_nll_after needs held-out rows"]),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(table, keys, words, expected):
    with pytest.raises(ConfigError) as error:
        compare(table(*words, **keys))
    for word in expected:
        assert word in str(error.value)


def test_a_problem_of_the_base_is_said_once(table, capsys):
    variants = {"a": {}, "b": {"training.epochs": -1}, "c": {"training.epochs": -1}}
    keys = {"variants": variants, "training.warmup_ratio": 2, "training.learning_rate": 3}
    with pytest.raises(ConfigError) as error:
        table(**keys).validate()
    first, *problems = str(error.value).split("\n  - ")
    assert first == "2 problems in the table"
    assert [problem.partition(" is ")[0] for problem in problems] == [
        "all variants: training.warmup_ratio",
        "variant b, c: training.epochs",
    ]
