"""The losses of single examples that are kept of a table."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence.collect import collect
from benchmarks.evidence.losses import with_losses
from benchmarks.evidence.real import answers
from benchmarks.evidence.study import HELD_OUT, SAMPLE, Study, TableLosses, read_study, write_study
from sftmix.disk.files import write_json
from sftmix.disk.tables import write_dynamics, write_eval
from sftmix.types import RowLosses, TrainingDynamics
from sftmix.words.errors import ConfigError

RNG = np.random.default_rng(5)
HELD, TRAIN = [f"h{k:02}" for k in range(40)], [f"t{k:02}" for k in range(16)]
TOKENS = {i: int(n) for i, n in zip(HELD + TRAIN, RNG.integers(3, 90, 56), strict=True)}
BASE = {i: n * float(RNG.uniform(2, 6)) for i, n in TOKENS.items()}
Nats = Mapping[str, float]


def write_stage(path: Path, nll: Nats, held: list[str] = HELD, train: list[str] = TRAIN) -> None:
    """Write what is read of a stage, in the opposite order of the ids."""
    held, train = held[::-1], train[::-1]
    tokens = np.array([TOKENS[i] for i in held])
    write_eval(path / "eval.parquet", held, RowLosses(np.array([nll[i] for i in held]), tokens, 0 * tokens))
    tokens = np.array([TOKENS[i] for i in train])
    sums = np.array([[nll[i]] for i in train])
    write_dynamics(path / "sample.parquet", TrainingDynamics(train, np.array([3]), sums, tokens, 0 * tokens[:, None]))
    write_json(path / "MANIFEST.json", {})


def finish(table: Path, arm: str, seed: int, nll: Nats, **sides: list[str]) -> tuple[Path, str, int]:
    place = table / arm / f"seed-{seed}"
    write_stage(place / "base", BASE, **sides)
    write_stage(place / "train", nll, **sides)
    return place, arm, seed


# ---------------------------------------------------------------------------------------------- keeping


def again(losses: TableLosses | None, file: Path) -> TableLosses | None:
    """Return the losses as they are read back."""
    write_study(file, Study(runs={run: {"seed": run[1]} for run in losses.nll_sum} if losses else {}, losses=losses))
    return read_study(file).losses


@pytest.fixture
def kept(tmp_path) -> TableLosses:
    """Those of NTP at seed 1: 2 nats per token, 1 more at the training rows."""
    nll = {i: n * (2.0 + (i in TRAIN)) for i, n in TOKENS.items()}
    return again(with_losses(None, [finish(tmp_path, "NTP", 1, nll)]), tmp_path / "kept.parquet")


def test_losses_are_read_back_in_the_order_of_the_ids(kept, tmp_path):
    assert kept.ids.tolist() == HELD + TRAIN
    assert kept.rows.tolist() == [HELD_OUT] * 40 + [SAMPLE] * 16
    assert kept.n_tokens.tolist() == [TOKENS[i] for i in kept.ids]
    np.testing.assert_allclose(kept.base_nll_sum, [BASE[i] for i in kept.ids], rtol=1e-7)
    assert (kept.nll_sum["NTP", 1] == kept.n_tokens * np.where(kept.rows == SAMPLE, 3.0, 2.0)).all()
    other = finish(tmp_path, "DFT", 2, BASE)  # a later sitting adds what is new
    more = with_losses(kept, [other, (tmp_path / "NTP" / "seed-3", "NTP", 3)])
    found = again(more, tmp_path / "kept.parquet")
    assert (found.nll_sum["DFT", 2] == found.base_nll_sum).all()
    assert (found.nll_sum["NTP", 1] == kept.nll_sum["NTP", 1]).all()
    assert found.nll_sum.keys() == {("DFT", 2), ("NTP", 1)}
    assert again(None, tmp_path / "none.parquet") is read_study(tmp_path / "nothing.parquet").losses is None


def test_a_run_with_other_sampled_rows_keeps_its_held_out_ones_and_other_held_out_rows_are_refused(kept, tmp_path):
    others = finish(tmp_path, "NTP", 2, TOKENS, train=[*TRAIN[:-1], "h00"])
    found = again(with_losses(kept, [others]), tmp_path / "kept.parquet").nll_sum["NTP", 2]
    assert found[:40].tolist() == [TOKENS[i] for i in HELD]
    assert np.isnan(found[40:]).all()
    wrong = finish(tmp_path, "NTP", 3, TOKENS, held=HELD[:-1])
    with pytest.raises(ConfigError, match=r"seed-3.train.eval\.parquet has other held-out rows"):
        with_losses(kept, [wrong])


def test_figures_are_read_back_with_their_types_and_a_run_without_losses_has_none(kept, tmp_path):
    """Whole numbers stay so, a text that looks like JSON stays text, and None is a figure that is not there."""
    nested = {"stages": {"train": {"steps": 40, "mixed": None}}, "evaluations": [2.5, 2.0], "empty": []}
    runs = {
        ("NTP", 1): {"seed": 1, "version": "0.1.0", "eval_nll_after": 2.0, "ntp_tokens": 3, "mu": None, **nested},
        ("NTP", 10): {"seed": 10, "exit_code": 6},
        ("Mix", 2): {"seed": 2, "version": "[1]", "eval_nll_after": 0.1 + 0.2, "mu": 1, "ntp_tokens": 4},
        ("Mix", 3): {"seed": 3, "version": "x", "mu": 0.5},
    }
    about = {"variants": {"NTP": {}}, "options": {"seeds": [1, 2]}}
    write_study(tmp_path / "all.parquet", Study(about, runs, kept))
    found = read_study(tmp_path / "all.parquet")
    assert found.about == about
    assert found.runs == {run: {k: v for k, v in of.items() if v is not None} for run, of in runs.items()}
    types = {(run, name): type(value) for run, of in found.runs.items() for name, value in of.items()}
    assert types == {(run, name): type(v) for run, of in runs.items() for name, v in of.items() if v is not None}
    assert list(found.losses.nll_sum) == [("NTP", 1)]
    assert list(found.runs) == [("Mix", 2), ("Mix", 3), ("NTP", 1), ("NTP", 10)]


def test_groups_of_rows_stay_with_them(kept, tmp_path):
    """Those of the first study: a later sitting writes them again."""
    topics = np.array([None, *(f"topic {k % 3}" for k in range(1, len(kept.ids)))], dtype=object)
    found = again(replace(kept, groups={"topic": topics}), tmp_path / "kept.parquet")
    assert found.groups["topic"].tolist() == topics.tolist()


def test_a_run_that_diverged_is_kept_as_such_and_runs_of_other_tables_are_not(tmp_path):
    made, out = tmp_path / "table", tmp_path / "out.parquet"
    about = {"seed": 0, "trained_by": [], "contrasts": [{"p": 0.01}]}
    variants = {arm: {"options": {}, "runs": []} for arm in ("NTP", "SFTMix")}
    write_json(made / "table.json", {"variants": variants, "options": {"seeds": [1, 2]}, **about})
    for arm, seed in (("NTP", 1), ("NTP", 3), ("other", 1)):
        place, *_ = finish(made, arm, seed, BASE)
        write_json(place / "summary.json", {"eval_nll_after": 2.0, "data": {"rows": 8}})
    write_json(made / "SFTMix" / "seed-1" / "diverged.json", {"message": "not finite"})
    write_json(made / "SFTMix" / "seed-2" / "STATUS.json", {"exit_code": 6, "stage": "reference"})
    assert collect(made, out, halves="SFTMix") == 1
    found = read_study(out)
    assert list(found.runs) == [("NTP", 1), ("SFTMix", 1)]
    assert found.runs["SFTMix", 1] == {"seed": 1, "exit_code": 6}
    assert "contrasts" not in found.about  # no test of a table that may be unfinished
    assert (found.runs["NTP", 1]["eval_nll_after"], "data" in found.runs["NTP", 1]) == (2.0, False)
    assert list(found.losses.nll_sum) == [("NTP", 1)]
    answers.keep(out, ("NTP", 1), {"ended": 0.5})
    answers.keep(out, None, {"medmcqa": 0.25})
    collect(made, out, halves="SFTMix")  # again: answers stay
    again = read_study(out)
    assert again.runs == found.runs | {("NTP", 1): found.runs["NTP", 1] | {"ended": 0.5}}
    assert again.about == found.about | {"base": {"medmcqa": 0.25}}


def test_answers_of_a_run_that_is_not_kept_yet_are_not_asked_for(tmp_path, monkeypatch):
    finish(tmp_path, "NTP", 1, BASE)
    words = ["--table", str(tmp_path), "--data", "none", "--name", "table", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["answers.py", *words])
    with pytest.raises(SystemExit, match=r"table\.parquet has no run \('NTP', 1\): .*collect\.py must"):
        answers.main()


def test_a_table_that_ran_in_two_directories_has_the_seeds_of_both(tmp_path):
    for place, seeds in (("a", [1, 4]), ("b", [3])):
        about = {"seed": 0, "trained_by": [f"0.1.0 {place}"], "variants": {"NTP": {"options": {}, "runs": []}}}
        write_json(tmp_path / place / "table.json", about | {"options": {"seeds": seeds}})
        collect(tmp_path / place, tmp_path / "out.parquet", halves="SFTMix")
    found = read_study(tmp_path / "out.parquet").about
    assert (found["options"]["seeds"], found["trained_by"]) == ([1, 3, 4], ["0.1.0 a", "0.1.0 b"])
