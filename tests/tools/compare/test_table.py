"""A table: its figures, contrasts and notes from results that are written down here; and whole on the tiny model.

Through the command line: what is made once, resuming, failing, and diverging.
"""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy import stats

from sftmix.cli import main
from sftmix.components.pairing import RandomPairs
from sftmix.disk.files import read_json, write_json
from sftmix.disk.tables import read_columns, read_dynamics, write_dynamics, write_eval, write_table
from sftmix.tools.compare.statistics import interval, per_example
from sftmix.tools.compare.table import build_table
from sftmix.tools.compare.written import markdown, write_result
from sftmix.types import RowLosses, TrainingDynamics
from sftmix.words.errors import DataError
from tests.components.examples import EXAMPLES
from tests.conftest import Finished
from tests.forked import done as on_ranks
from tests.tiny import metrics, status
from tests.tools.compare.tables import table_of


def test_numbers_of_a_summary_get_dotted_names(tmp_path):
    summary = {"a": 1, "b": {"c": {"e": 3}}, "f": "text", "h": None, "i": float("inf"), "seed": 1}
    summary |= {"data": {"max_length": 9}, "version": "0.1", "git_revision": "abc"}
    table = build_table(table_of(tmp_path, "A", 1), {"A/seed-1": summary})
    assert table["variants"]["A"]["runs"][0]["metrics"] == {"a": 1.0, "b.c.e": 3.0}
    assert table["trained_by"] == ["0.1 abc"]


def test_the_fit_is_of_the_training_rows_that_a_run_measured(tmp_path):
    """Over their tokens, at the last step; a run that diverged has none, whatever is left in its directory."""
    comparison = table_of(tmp_path, "AB", 2, metric="fit")
    for cell in comparison.cells[:3]:  # B at seed 2 measured none
        nll_sum, tokens = np.array([[9.0, 2.0 * cell.seed], [9.0, 5.0]]), np.array([1, 4])
        dynamics = TrainingDynamics(["a", "b"], np.array([1, 2]), nll_sum, tokens, np.zeros((2, 2), dtype=np.int64))
        write_dynamics(cell.path / "train" / "sample.parquet", dynamics)
    table = build_table(comparison, {cell.name: {"x": 1.0} for cell in comparison.cells} | {"A/seed-2": {}})
    fits = {run["run"]: run["metrics"].get("fit") for arm in table["variants"].values() for run in arm["runs"]}
    assert fits == {"A/seed-1": 7 / 5, "B/seed-1": 7 / 5, "A/seed-2": None, "B/seed-2": None}
    assert "fit: nats per response token of the training rows." in markdown(table)


def test_the_fit_is_of_the_rows_that_were_chosen_after_the_scoring(tmp_path):
    comparison, chosen = table_of(tmp_path, "AB", 1, metric="fit"), {"A": ["b", "c"], "B": ["c"]}
    for cell in comparison.cells:
        nll_sum, tokens = np.array([[2.0], [6.0]]), np.array([1, 4])
        dynamics = TrainingDynamics(["a", "b"], np.array([1]), nll_sum, tokens, np.zeros((2, 1), dtype=np.int64))
        write_dynamics(cell.path / "train" / "sample.parquet", dynamics)
        write_table(cell.path / "choice" / "selected.parquet", chosen[cell.variant])
    variants = build_table(comparison, {cell.name: {"x": 1.0} for cell in comparison.cells})["variants"]
    assert [arm["runs"][0]["metrics"] for arm in variants.values()] == [{"x": 1.0, "fit": 6 / 4}, {"x": 1.0}]


def test_holm_counts_the_contrasts_that_were_planned(tmp_path):
    """Three planned, one without a value: the smallest p is multiplied by three all the same."""
    comparison = table_of(tmp_path, "ABCD", 7)
    value = {"A": 0.0, "B": 1.0, "C": 2.0}
    figures = {c.name: {"x": value[c.variant] * c.seed} if c.variant in value else {} for c in comparison.cells}
    table = build_table(comparison, figures)
    assert [c["p"] for c in table["contrasts"]] == [pytest.approx(2 / 2**7), pytest.approx(2 / 2**7), None]
    assert [c["p_holm"] for c in table["contrasts"]] == [pytest.approx(6 / 2**7), pytest.approx(6 / 2**7), None]
    none = "not tested: 0 of at least 6 seeds"  # the others are rejected, so Holm would multiply its p by 1
    assert [c["verdict"] for c in table["contrasts"]] == ["different", "different", none]


@pytest.mark.parametrize(
    ("first", "of_b", "verdict", "p_holm"),
    [
        (1, 1, "different", 2 / 64),
        (1, -1, "no difference shown", 4 / 64),
        (-1, 1, "not tested: 6 of at least 7 seeds", 4 / 64),
    ],
)
def test_fewer_seeds_are_enough_if_holm_rejects_the_other_contrast(tmp_path, first, of_b, verdict, p_holm):
    """B lacks two of eight seeds: its p is times 1 after the 2/256 of C, and times 2 if C's signs differ."""
    differences = {"A": [0] * 8, "B": [of_b, 2, 3, 4, 5, 6], "C": [1, 2, 3, 4, 5 * first, 6 * first, 7, 8]}
    comparison = table_of(tmp_path, "ABC", 8)
    figures = {cell.name: {} for cell in comparison.cells}
    for name, values in differences.items():
        figures |= {f"{name}/seed-{seed}": {"x": float(value)} for seed, value in enumerate(values, 1)}
    contrast = build_table(comparison, figures)["contrasts"][0]
    assert (contrast["verdict"], contrast["p_holm"]) == (verdict, pytest.approx(p_holm))


def test_four_arms_make_a_difference_of_differences(tmp_path):
    """Within each seed, over the examples too; a seed at which one arm has no value is left out."""
    rng, sums, tokens = np.random.default_rng(1), {}, np.arange(3, 14)
    comparison = table_of(tmp_path, "ABCD", 4, metric="eval_nll_after", contrasts=[["A", "B", "C", "D"]])
    for cell in comparison.cells:
        sums[cell.name] = rng.gamma(2, 5, 11)
        scores = RowLosses(sums[cell.name], tokens, np.ones(11, dtype=np.int64))
        write_eval(cell.path / "train" / "eval.parquet", [f"{i:02}" for i in range(11)], scores)
        write_json(
            cell.path / "train" / "inputs.json", {"split": cell.variant in "CD", "objective": cell.variant in "AC"}
        )
    figures = {name: {"eval_nll_after": own.sum() / tokens.sum()} for name, own in sums.items()}
    (contrast,) = build_table(comparison, figures | {"D/seed-2": {}})["contrasts"]
    a, b, c, d = (np.array([sums[f"{v}/seed-{s}"] for s in (1, 3, 4)]) for v in "ABCD")
    assert (contrast["seeds"], contrast["inputs_that_differ"]) == ([1, 3, 4], ["objective"])
    expected = ((a - b) - (c - d)).sum(1) / tokens.sum()
    assert contrast["differences"] == pytest.approx(expected.tolist(), rel=1e-12)
    parts = [per_example(own, np.tile(tokens.astype(float), (3, 1))) for own in (a, b, c, d)]
    assert contrast["interval"] == pytest.approx(interval(parts[0] - parts[1] - parts[2] + parts[3]), rel=1e-12)
    assert contrast["interval_over"] == "seeds and examples"
    assert "| (A − B) − (C − D) " in markdown(build_table(comparison, figures))


def test_a_part_of_the_seeds_gives_no_contrast(tmp_path):
    comparison = table_of(tmp_path, "AB", 8)
    figures = {c.name: {"x": (c.variant == "B") * (1.0 + c.seed)} for c in comparison.cells}
    whole, part = (build_table(comparison, dict([*figures.items()][:n])) for n in (16, 14))
    assert "INCOMPLETE: 14 of 16 runs are done." in markdown(part)
    assert part["contrasts"] == []
    assert "INCOMPLETE" not in markdown(whole)
    (contrast,) = whole["contrasts"]
    assert (contrast["verdict"], contrast["p"], contrast["interval_over"]) == ("different", 2 / 2**8, "seeds")
    assert contrast["interval"] == pytest.approx(tuple(stats.ttest_1samp(range(2, 10), 0).confidence_interval()))


def test_examples_enter_the_interval_where_the_runs_kept_them(tmp_path):
    """Of the seeds that have the metric on both sides; files need not agree in their order."""
    rng, sums, tokens = np.random.default_rng(0), {}, np.arange(3, 14)
    comparison = table_of(tmp_path, "AB", 3, metric="eval_nll_after")
    for cell in comparison.cells:
        sums[cell.name], order = rng.gamma(2, 5, 11), rng.permutation(11)
        scores = RowLosses(sums[cell.name][order], tokens[order], np.ones(11, dtype=np.int64))
        write_eval(cell.path / "train" / "eval.parquet", [f"{i:02}" for i in order], scores, np.zeros(11))
    figures = {name: {"eval_nll_after": own.sum() / tokens.sum()} for name, own in sums.items()}
    for seeds, over in (([1, 3], "seeds and examples"), ([2], "examples")):
        known = {name: own if int(name[-1]) in seeds else {} for name, own in figures.items()}
        (contrast,) = build_table(comparison, known)["contrasts"]
        count = np.tile(tokens.astype(float), (len(seeds), 1))
        ours, theirs = (per_example(np.array([sums[f"{v}/seed-{s}"] for s in seeds]), count) for v in "BA")
        assert contrast["interval"] == pytest.approx(interval(ours - theirs), rel=1e-12)
        assert contrast["interval_over"] == over
    file = comparison.cells[0].path / "train" / "eval.parquet"
    table = read_columns(file, "id", "nll_sum", "n_tokens", "n_correct")
    scores = RowLosses(table["nll_sum"], table["n_tokens"], table["n_correct"])
    write_eval(file, ["other", *table["id"][1:]], scores)
    (contrast,) = build_table(comparison, figures)["contrasts"]
    assert contrast["interval_over"] == "seeds"


def test_the_files_say_the_same(tmp_path):
    comparison = table_of(tmp_path, "AB", 2)
    figures = {cell.name: {"x": cell.seed / 3, "only": 7.0} for cell in comparison.cells}
    del figures["A/seed-2"]["only"]
    table = write_result(tmp_path, build_table(comparison, figures))
    assert read_json(tmp_path / "table.json") == json.loads(json.dumps(table))
    assert (tmp_path / "table.md").read_text() == markdown(table)
    assert re.search(r"^\| 2 +\| 0\.6667 \| 0\.6667 \|$", (tmp_path / "table.md").read_text(), re.M)
    assert re.search(r"^A & 0\.5\S* \$\\pm\$ 0\.24 ", (tmp_path / "table.tex").read_text(), re.M)


# ----------------------------------------------------------------------------------------------- whole tables


VARIANTS = {"NTP": {"objective": "NTP"}, "SFTMix": {}}
WILD = {"wild": {"objective": "NTP", "training.learning_rate": 1e30}, "NTP": {"objective": "NTP"}}
CELLS = ("NTP/seed-1", "SFTMix/seed-1", "NTP/seed-2", "SFTMix/seed-2")


def words(
    finished: Finished, directory: Path, variants: object = VARIANTS, *more: str, seeds: str = "[1, 2]"
) -> list[str]:
    """`compare` on the tiny model into directory/table; pairs in every variant, so that all of them need the split."""
    file = directory / "variants.yaml"
    file.write_text(yaml.safe_dump({"variants": variants, "pairing": "RandomPairs"}, sort_keys=False))
    small = ("--training.max_steps", "3", "--checkpoint.every", "0", "--seeds", seeds, *more)
    return ["compare", *finished.tiny.options, "--config", str(file), "--out", str(directory / "table"), *small]


@pytest.fixture(scope="module")
def ran(finished, tmp_path_factory) -> SimpleNamespace:
    """A finished table; copy it before you change it."""
    directory = tmp_path_factory.mktemp("compare")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(words(finished, directory)) == 0
    return SimpleNamespace(out=directory / "table", printed=printed.getvalue())


def test_the_reference_is_trained_once_and_the_target_in_every_run(ran):
    adopted = {name: sorted(p.parent.name for p in (ran.out / name).glob("*/adopted.json")) for name in CELLS}
    assert adopted["NTP/seed-1"] == []
    assert adopted["SFTMix/seed-1"] == ["base", "confidence", "reference", "split"]
    assert adopted["NTP/seed-2"] == ["base", "confidence", "reference"]  # a split has a seed
    assert adopted["SFTMix/seed-2"] == adopted["SFTMix/seed-1"]
    for name in CELLS[1:]:
        source = read_json(ran.out / name / "reference" / "adopted.json")["from"]
        assert (ran.out / name / "reference" / source).resolve() == (ran.out / "NTP/seed-1/reference").resolve()
    for file in ("reference/metrics.jsonl", "confidence/dynamics.parquet"):
        assert len({(ran.out / name / file).stat().st_ino for name in CELLS}) == 1
    assert [len(metrics(ran.out / name)) for name in CELLS] == [3] * 4


def test_the_table_holds_what_the_runs_say(ran):
    table = read_json(ran.out / "table.json")
    values = {name: read_json(ran.out / name / "summary.json")["eval_nll_after"] for name in CELLS}
    assert (table["complete"], table["runs_done"], table["baseline"]) == (True, 4, "NTP")
    contrast = table["contrasts"][0]
    off = [values[f"SFTMix/seed-{seed}"] - values[f"NTP/seed-{seed}"] for seed in (1, 2)]
    assert (contrast["differences"], contrast["p"]) == (pytest.approx(off), 0.5 if off[0] * off[1] > 0 else 1.0)
    assert (contrast["interval_over"], contrast["inputs_that_differ"]) == ("seeds and examples", ["objective"])
    files = {"table.md", "table.tex", "table.json", "compare.yaml", "STATUS.json", ".lock"}
    assert {p.name for p in ran.out.iterdir()} == {*files, *VARIANTS}
    for line in (ran.out / "table.md").read_text().partition("\n## Variants")[0].splitlines():
        for cell in line.strip("|").split(" | ") if line.startswith("| ") else ():
            assert cell.strip() in ran.printed, "the screen has what the file has"
    screen = ran.printed[ran.printed.index("\n# eval_nll_after") : ran.printed.index("\nsee table.md")].splitlines()
    assert [line for line in screen if len(line) > 80] == []
    fits = {name: read_dynamics(ran.out / name / "train" / "sample.parquet").mean_nll for name in CELLS}
    found = {run["run"]: run["metrics"]["fit"] for arm in table["variants"].values() for run in arm["runs"]}
    assert all(fits[name].min() < fit < fits[name].max() for name, fit in found.items())
    assert all(f"| {name} " in ran.printed for name in ("calibration.nll_temperature_scaled", "fit"))
    once = (" rows read: ", "computing in fp32 on cpu ", "; ranks: 1\n")
    assert [ran.printed.count(said) for said in once] == [1, 1, 1]  # of 4 cells
    assert "SFTMix, seed 2 (4 of 4)" in ran.printed
    assert status(ran.out)["exit_code"] == 0


@pytest.mark.slow
def test_an_unfinished_table_continues_and_a_refused_change_leaves_it(ran, finished, sftmix, tmp_path):
    """As a kill leaves it, in the third of four runs. A later variant is changed, before which others are read back."""
    out = tmp_path / "table"
    shutil.copytree(ran.out, out)
    shutil.rmtree(out / CELLS[3])
    (out / CELLS[2] / "train" / "MANIFEST.json").unlink()
    (out / "table.json").unlink()
    models = [out / name / "train" / "model" / "model.safetensors" for name in CELLS[:2]]
    before = [file.stat().st_mtime_ns for file in models]
    assert sftmix(*words(finished, tmp_path)).code == 0
    ours, theirs = (read_json(place / "table.json")["contrasts"][0] for place in (out, ran.out))
    assert ours["differences"] == theirs["differences"]
    files = {file: file.read_bytes() for file in out.glob("*.*") if file.name != "STATUS.json"}
    assert len(files) == 5
    changed = sftmix(*words(finished, tmp_path, {**VARIANTS, "SFTMix": {"objective.mu": 0.7}}))
    assert (changed.code, "variant SFTMix, seed 1" in changed.err) == (2, True), changed.err
    assert "objective.mu: 0.2 -> 0.7" in changed.err
    assert "variant NTP" not in changed.err
    assert f"move {out / 'SFTMix'} away: the others stay" in changed.err
    assert {file: file.read_bytes() for file in files} == files
    assert [file.stat().st_mtime_ns for file in models] == before


class Mine(RandomPairs):
    """A class of one's own."""


@pytest.mark.slow
@pytest.mark.long
def test_after_an_edit_of_a_class_the_runs_to_move_are_named_at_the_start(finished, sftmix, tmp_path):
    variants = {"NTP": {"objective": "NTP"}, "mine": {"pairing": f"{__name__}.Mine"}}
    assert sftmix(*words(finished, tmp_path, variants, seeds="[1]")).code == 0
    inputs = tmp_path / "table" / "mine" / "seed-1" / "train" / "inputs.json"
    write_json(inputs, {**read_json(inputs), "files": {f"{__name__}.Mine": "of an earlier text of the class"}})
    changed = sftmix(*words(finished, tmp_path, variants, seeds="[1, 2]"))
    assert (changed.code, "variant mine, seed 1" in changed.err) == (2, True), changed.err
    assert f"move {tmp_path / 'table' / 'mine'} away: the others stay" in changed.err
    assert not (tmp_path / "table" / "NTP" / "seed-2").exists()
    (tmp_path / "table" / "mine").rename(tmp_path / "earlier")
    assert sftmix(*words(finished, tmp_path, variants, seeds="[1, 2]")).code == 0


@pytest.mark.long
@pytest.mark.slow
def test_a_table_is_put_together_from_parts_that_ran_elsewhere(ran, finished, sftmix, tmp_path):
    """The other part trained its own reference, to the same values: nothing is made again, and no figure differs."""
    assert sftmix(*words(finished, tmp_path, seeds="[2]")).code == 0
    part, out = tmp_path / "part", tmp_path / "table"
    out.rename(part)
    shutil.copytree(ran.out, out, ignore=shutil.ignore_patterns("seed-2"))
    for variant in VARIANTS:
        (part / variant / "seed-2").rename(out / variant / "seed-2")
    models = {file: file.stat().st_mtime_ns for file in out.glob("*/*/train/model/*.safetensors")}
    assert sftmix(*words(finished, tmp_path)).code == 0
    ours, theirs = (read_json(place / "table.json") for place in (out, ran.out))
    assert (ours["complete"], ours["contrasts"]) == (True, theirs["contrasts"])
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/*/train/model/*.safetensors")} == models


@pytest.mark.slow
@pytest.mark.long
def test_a_table_grows_by_variants(ran, finished, sftmix, tmp_path):
    """The inputs that differ decide whether both sides train on one order, which the tokens of their steps show."""
    shutil.copytree(ran.out, tmp_path / "table")
    more = {"again": {}, "control": {"splitter": "RandomSplit"}, "alone": {**VARIANTS["NTP"], "pairing": None}}
    more |= {"drawn": {"selector": "Random", "selector.k": 20}}
    assert sftmix(*words(finished, tmp_path, {**VARIANTS, **more})).code == 0
    out, table = tmp_path / "table", read_json(tmp_path / "table" / "table.json")
    assert (table["runs"], len(table["contrasts"])) == (12, 5)
    orders = {name: [step["ntp_tokens"] for step in metrics(out / name / "seed-1")] for name in table["variants"]}
    for contrast in table["contrasts"]:
        of_order = {name.partition(".")[0] for name in contrast["inputs_that_differ"]} - {"objective"}
        assert bool(of_order) == (orders[contrast["ours"]] != orders[contrast["theirs"]]), contrast
    assert (out / "again" / "seed-2" / "train" / "adopted.json").exists()
    assert {p.parent.name for p in (out / "control" / "seed-1").glob("*/adopted.json")} == {"base"}
    ours, theirs = (table["variants"][name]["metrics"]["eval_nll_after"]["mean"] for name in ("again", "SFTMix"))
    assert ours == theirs


@pytest.mark.parametrize("word", ["true", "yes"])
def test_a_listing_starts_nothing(finished, sftmix, tmp_path, word):
    done = sftmix(*words(finished, tmp_path, VARIANTS, "--list", word))
    assert (done.code, "2 variants x 2 seeds, 0 of them done" in done.out) == (0, True), done.err
    assert not (tmp_path / "table").exists()


def test_a_place_is_no_value_of_the_flag(finished, sftmix, tmp_path):
    done = sftmix(*words(finished, tmp_path, VARIANTS, "--list", "runs/role"))
    refusal = "error: list: 'runs/role' is not allowed; allowed: true or false"
    assert (done.code, refusal in done.err) == (2, True), done.err


def test_a_directory_of_others_is_left_alone(finished, sftmix, tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "table.md").write_text("my notes")
    done = sftmix(*words(finished, tmp_path))
    assert (done.code, "holds table.md, which no table wrote" in done.err) == (2, True)
    assert [p.name for p in (tmp_path / "table").iterdir()] == ["table.md"]


class Failing(RandomPairs):
    """A class of one's own that fails when it is used."""

    def pairs(self, split, scores, *, epoch, seed):
        raise DataError("no pairs today")


@pytest.mark.slow
def test_a_run_that_fails_names_its_cell_and_keeps_its_exit_code(finished, sftmix, tmp_path):
    variants = {"NTP": {"objective": "NTP"}, "late": {"pairing": f"{__name__}.Failing"}}
    done = sftmix(*words(finished, tmp_path, variants))
    assert done.code == 3
    assert "error: variant late, seed 1: " in done.err
    state = status(tmp_path / "table")
    assert (state["stage"], state["exit_code"], state["step"]) == ("late/seed-1", done.code, 1)
    assert "INCOMPLETE: 1 of 4 runs are done." in (tmp_path / "table" / "table.md").read_text()


LONGER = ("--training.max_steps", "6", "--reference.training.learning_rate", "0.01")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_table_goes_on_past_a_run_that_diverges(finished, sftmix, tmp_path, ranks):
    """Rank 0 alone reads and notes how the run ended; a rank that went another way would wait for ever."""
    command = words(finished, tmp_path, WILD, *LONGER, seeds="[1]")
    wild, before = tmp_path / "table" / "wild" / "seed-1", {}
    for line in ("diverged; the table goes on. variant wild, seed 1", "diverged before, and is not tried again"):
        out = on_ranks(command, cwd=tmp_path, ranks=ranks) if ranks > 1 else sftmix(*command).out
        assert out.count(line) == 1
        after = {p: p.stat().st_mtime_ns for p in wild.rglob("*") if p.is_file()}
        assert not before or after == before
        before = after
    assert (status(wild)["stage"], status(wild)["exit_code"], (wild / "diverged.json").exists()) == ("train", 6, True)
    table = read_json(tmp_path / "table" / "table.json")
    assert (table["complete"], table["variants"]["wild"]["no_value"]) == (True, [1])
    assert table["variants"]["NTP"]["metrics"]["eval_nll_after"]["seeds"] == 1
    assert table["contrasts"][0]["seeds"] == []


@pytest.mark.slow
def test_what_diverges_and_ends_the_table(finished, sftmix, tmp_path, monkeypatch):
    """A reference, from which nothing can be made; and a leap of the loss, at which a person is to look."""
    monkeypatch.syspath_prepend(EXAMPLES)
    wild = {"wild": {"reference.training.learning_rate": 1e30}}
    done = sftmix(*words(finished, tmp_path, wild, "--training.max_steps", "6"))
    assert (done.code, "error: variant wild, seed 1: reference" in done.err) == (6, True)
    shutil.rmtree(tmp_path / "table")
    guard = {"class_path": "loss_spikes.LossSpikeGuard", "init_args": {"factor": 1.001, "window": 2}}
    wild = {"NTP": {"objective": "NTP", "callbacks": [guard], "training.learning_rate": 1.0}}
    done = sftmix(*words(finished, tmp_path, wild, *LONGER))
    assert (done.code, "(LossSpikeGuard)" in done.err) == (6, True)
    assert not (tmp_path / "table" / "NTP" / "seed-1" / "diverged.json").exists()
