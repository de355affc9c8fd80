"""The plan of the study: its tables are valid, share what the preregistration says, and its scripts count right."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks.evidence.base_model import make_base
from benchmarks.evidence.collect import by_half, by_length
from benchmarks.evidence.prepare import HELD_OUT, PILOT, ordered, parts_of, plain
from benchmarks.evidence.tiers import read_tier
from sftmix.cli.parsing import read_arguments
from sftmix.disk.tables import write_dynamics, write_eval, write_split
from sftmix.tools.compare import Comparison
from sftmix.tools.compare.command import CompareOptions, comparison_of
from sftmix.tools.compare.statistics import seeds_needed
from sftmix.types import RowLosses, Split, TrainingDynamics

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "evidence"
PILOTS = ("pilot-rate", "pilot-strength")
TIERS = {"primary": (7, 10), "overfit": (6, 10), "parts": (6, 6), "rows": (3, 5), "others": (6, 6)}
"""Table -> its arms and seeds."""
PLANNED = [("SFTMix", other) for other in ("NTP", "RandomSplit", "LengthMatched", "DecomposedMixup")]


@cache
def table(name: str) -> Comparison:
    words = ["--config", str(FOLDER / f"{name}.yaml"), "--out", "o"]
    return comparison_of(read_arguments(words, CompareOptions))


@pytest.mark.parametrize("name", ["shuffled", *TIERS, *PILOTS])
def test_a_table_is_valid_without_the_files_it_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(name).validate()


def test_every_file_of_a_table_is_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"study", "shuffled", *TIERS, *PILOTS}


@pytest.mark.parametrize("name", [*TIERS, *PILOTS])
def test_tiers_are_those_of_the_plan_and_the_page_of_results_reads_the_same(name):
    made, read = table(name), read_tier(name)
    assert (list(made.variants), made.options.seeds) == (read.arms, read.seeds)
    assert (made.baseline, made.contrasts) == (read.baseline, read.contrasts)
    if name in TIERS:
        assert (len(made.variants), len(made.options.seeds)) == TIERS[name]
        assert made.baseline == "NTP"
        assert set(made.options.seeds) <= set(range(1, 11))
    if name in ("primary", "overfit"):  # whose planned contrasts can be significant
        assert made.contrasts == PLANNED
        assert len(made.options.seeds) >= seeds_needed(len(PLANNED))


# ------------------------------------------------------------------------------------------ the scripts


@pytest.mark.slow
def test_a_base_model_like_the_studys_is_made_of_text(shared, tmp_path):
    make_base(shared / "data" / "text", tmp_path)
    places = (tmp_path, shared / "models" / "base-7m")
    made, known = ({**AutoConfig.from_pretrained(path).to_dict(), "_name_or_path": ""} for path in places)
    assert made == known
    made, known = (AutoTokenizer.from_pretrained(path) for path in places)
    assert made.chat_template == known.chat_template
    text = "Wörds in 1984,\n twice  so"
    assert made.decode(made(text)["input_ids"]) == text
    assert (len(made), made.all_special_ids) == (len(known), known.all_special_ids)
    assert made.convert_tokens_to_ids("<|im_end|>") == known.convert_tokens_to_ids("<|im_end|>")


def row(instruction: str, given: str = "", output: str = "Yes.") -> dict[str, str]:
    return {"instruction": instruction, "input": given, "output": output}


def test_the_cut_keeps_an_instruction_on_one_side_whatever_the_order_of_the_file():
    rows = [row(f"Question {k % 1_500}?", given=str(k)) for k in range(3_000)]
    parts = parts_of(rows)
    assert [len(parts[name]) for name in ("held_out", "pilot")] == [HELD_OUT, PILOT]
    sides = [{plain(row["instruction"]) for row in found} for found in parts.values()]
    assert sum(map(len, sides)) == len(set().union(*sides))
    assert len(parts["train"]) == 3_000 - HELD_OUT - PILOT - 1  # HELD_OUT is odd: one row of two was left over
    assert parts_of(rows[::-1]) == parts


def test_rows_without_a_response_and_repeated_questions_are_dropped():
    rows = [row("Add  1 and 2!"), row("add 1 and 2"), row("Add 1 and 2", given="now"), row("Nothing", output=" \n")]
    assert sorted(r["input"] for r in ordered(rows)) == ["", "now"]
    assert rows[0] in ordered(rows)


def test_losses_by_length_and_by_half_are_sums_over_tokens(tmp_path):
    ids, tokens = list("hgfedcba"), np.array([8, 7, 6, 5, 4, 3, 2, 1])
    nll, zeros = np.array([8.0, 14.0, 3.0, 5.0, 2.0, 9.0, 1.0, 4.0]), np.zeros(8, dtype=np.int64)
    write_eval(tmp_path / "eval.parquet", ids, RowLosses(nll, tokens, zeros), np.zeros(8))
    quartiles = by_length(tmp_path / "eval.parquet")
    assert [q["rows"] for q in quartiles] == [2, 2, 2, 2]
    assert [q["nll"] for q in quartiles] == pytest.approx([5 / 3, 11 / 7, 8 / 11, 22 / 15])

    dynamics = TrainingDynamics(ids, np.array([3]), nll[:, None], tokens, zeros[:, None])
    write_dynamics(tmp_path / "sample.parquet", dynamics)
    group = np.array([0, 1, 0, 1, 0, 1, -1, 0], dtype=np.int8)
    write_split(tmp_path / "split.parquet", ids[:8], Split(group=group, names=("confident", "unconfident")))
    halves = by_half(tmp_path / "sample.parquet", tmp_path / "split.parquet")
    assert json.loads(json.dumps(halves)) == {
        "confident": {"rows": 4, "tokens": 19, "nll": pytest.approx(17 / 19)},
        "unconfident": {"rows": 3, "tokens": 15, "nll": pytest.approx(28 / 15)},
    }
