"""The losses of single examples that are kept of a table."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence.collect import collect
from benchmarks.evidence.losses import HELD_OUT, SAMPLE, keep_losses, read_losses
from sftmix.disk.files import read_json, write_json
from sftmix.disk.tables import write_dynamics, write_eval
from sftmix.types import RowScores, TrainingDynamics
from sftmix.words.errors import ConfigError

RNG = np.random.default_rng(5)
HELD, TRAIN = [f"h{k:02}" for k in range(40)], [f"t{k:02}" for k in range(16)]
TOKENS = {i: int(n) for i, n in zip(HELD + TRAIN, RNG.integers(3, 90, 56), strict=True)}
BASE = {i: n * float(RNG.uniform(2, 6)) for i, n in TOKENS.items()}
Nats = Mapping[str, float]


def stage(path: Path, nll: Nats, held: list[str] = HELD, train: list[str] = TRAIN) -> None:
    """Write what is read of a stage, in the opposite order of the ids."""
    held, train = held[::-1], train[::-1]
    tokens = np.array([TOKENS[i] for i in held])
    write_eval(path / "eval.parquet", held, RowScores(np.array([nll[i] for i in held]), tokens, 0 * tokens))
    tokens = np.array([TOKENS[i] for i in train])
    sums = np.array([[nll[i]] for i in train])
    write_dynamics(path / "sample.parquet", TrainingDynamics(train, np.array([3]), sums, tokens, 0 * tokens[:, None]))
    write_json(path / "MANIFEST.json", {})


def run(table: Path, arm: str, seed: int, nll: Nats, **sides: list[str]) -> tuple[Path, str, int]:
    place = table / arm / f"seed-{seed}"
    stage(place / "base", BASE, **sides)
    stage(place / "train", nll, **sides)
    return place, arm, seed


# ---------------------------------------------------------------------------------------------- keeping


@pytest.fixture
def kept(tmp_path) -> Path:
    """A table of NTP at seed 1, whose losses are kept: 2 nats per token, 1 more at the training rows."""
    nll = {i: n * (2.0 + (i in TRAIN)) for i, n in TOKENS.items()}
    keep_losses([run(tmp_path, "NTP", 1, nll)], tmp_path / "losses")
    return tmp_path


def test_losses_are_read_back_in_the_order_of_the_ids(kept):
    found = read_losses(kept / "losses")
    assert found.ids.tolist() == HELD + TRAIN
    assert found.rows.tolist() == [HELD_OUT] * 40 + [SAMPLE] * 16
    assert found.n_tokens.tolist() == [TOKENS[i] for i in found.ids]
    np.testing.assert_allclose(found.base_nll_sum, [BASE[i] for i in found.ids], rtol=1e-7)
    assert (found.nll_sum("NTP", 1) == found.n_tokens * np.where(found.rows == SAMPLE, 3.0, 2.0)).all()
    assert read_losses(kept / "nothing") is None
    other = run(kept, "SFTMix", 2, BASE)  # a later sitting adds what is new
    keep_losses([other, (kept / "NTP" / "seed-3", "NTP", 3)], kept / "losses")
    found = read_losses(kept / "losses")
    assert (found.nll_sum("SFTMix", 2) == found.base_nll_sum).all()
    assert found.nll_sum("NTP", 3) is None


def test_a_run_with_other_sampled_rows_keeps_its_held_out_ones_and_other_held_out_rows_are_refused(kept):
    others = run(kept, "NTP", 2, TOKENS, train=[*TRAIN[:-1], "h00"])
    keep_losses([others], kept / "losses")
    found = read_losses(kept / "losses").nll_sum("NTP", 2)
    assert found[:40].tolist() == [TOKENS[i] for i in HELD]
    assert np.isnan(found[40:]).all()
    wrong = run(kept, "NTP", 3, TOKENS, held=HELD[:-1])
    with pytest.raises(ConfigError, match=r"seed-3.train.eval\.parquet .*rows\.parquet"):
        keep_losses([wrong], kept / "losses")


def test_a_run_that_diverged_is_kept_as_such_and_runs_of_other_tables_are_not(tmp_path):
    made, out = tmp_path / "table", tmp_path / "out"
    about = {"seed": 0, "trained_by": [], "contrasts": [{"p": 0.01}]}
    variants = {arm: {"options": {}, "runs": []} for arm in ("NTP", "SFTMix")}
    write_json(made / "table.json", {"variants": variants, "options": {"seeds": [1, 2]}, **about})
    for arm, seed in (("NTP", 1), ("NTP", 3), ("other", 1)):
        place, *_ = run(made, arm, seed, BASE)
        write_json(place / "summary.json", {"eval_nll_after": 2.0, "data": {"rows": 8}})
    write_json(made / "SFTMix" / "seed-1" / "diverged.json", {"message": "not finite"})
    write_json(made / "SFTMix" / "seed-2" / "STATUS.json", {"exit_code": 6, "stage": "reference"})
    assert collect(made, out, halves="SFTMix") == 1
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["NTP-seed-1.json", "SFTMix-seed-1.json"]
    assert read_json(out / "runs" / "SFTMix-seed-1.json") == {"seed": 1, "exit_code": 6}
    assert "contrasts" not in read_json(out / "table.json")  # no test of a table that may be unfinished
    summary = read_json(out / "runs" / "NTP-seed-1.json")
    assert (summary["eval_nll_after"], "data" in summary) == (2.0, False)
    assert sorted(path.name for path in (out / "losses").iterdir()) == ["NTP-seed-1.parquet", "rows.parquet"]


def test_a_table_that_ran_in_two_directories_has_the_seeds_of_both(tmp_path):
    for place, seeds in (("a", [1, 4]), ("b", [3])):
        about = {"seed": 0, "trained_by": [f"0.1.0 {place}"], "variants": {"NTP": {"options": {}, "runs": []}}}
        write_json(tmp_path / place / "table.json", about | {"options": {"seeds": seeds}})
        collect(tmp_path / place, tmp_path / "out", halves="SFTMix")
    found = read_json(tmp_path / "out" / "table.json")
    assert (found["options"]["seeds"], found["trained_by"]) == ([1, 3, 4], ["0.1.0 a", "0.1.0 b"])
