"""The study of what regularises: its arms are valid, its rows are those of the plan, its control has its formula."""

import json

import numpy as np
import pytest
import torch

from benchmarks.evidence.prepare import digest, plain
from benchmarks.evidence.regularises.analyse import p_equal, power
from benchmarks.evidence.regularises.rows import LIST, SIZES, listed, parts_of, text_of
from benchmarks.evidence.regularises.run import ARMS, FOLDER, LATER, Study, interpolated
from benchmarks.evidence.regularises.soft import soft
from sftmix.config.read import from_plain
from sftmix.testing import check_objective

PLAN = (FOLDER.parent / "preregistration-regularises.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out"))


def test_the_arms_are_those_of_the_plan(study):
    assert list(study.variants) == [*ARMS, *LATER]
    assert all(f"`{arm}`" in PLAN for arm in study.variants)
    configs = {arm: from_plain(study.config(arm, 3) | {"out": "o"}) for arm in study.variants}
    for config in configs.values():
        assert (config.seed, config.training.epochs, config.training.global_batch_size) == (3, 8, 16)
        assert (config.training.learning_rate, config.data.max_length, config.training.precision) == (1e-4, 256, "fp32")
        assert config.data.train == [str(study.work / "data" / "train-3.json")]
        assert config.resolved_pairing() is not None
    splits = {arm: type(config.splitter).__name__ for arm, config in configs.items()}
    assert {arm for arm, name in splits.items() if name == "RandomSplit"} == {"NTP-random", "SFTMix-random"}
    assert {arm for arm, name in splits.items() if name == "LengthMatched"} == set(LATER)
    means = {arm: getattr(config.objective, "mixup_mean", None) for arm, config in configs.items()}
    assert [arm for arm, mean in means.items() if mean == "ntp"] == ["SFTMix-literal"]


def test_the_rows_are_those_of_the_list(shared):
    parts = parts_of(shared / "data" / "alpaca")
    assert listed(parts) == json.loads(LIST.read_text(encoding="utf-8"))
    assert {name: len(part) for name, part in parts.items() if name in SIZES} == SIZES
    instructions = [plain(row["instruction"]) for name in SIZES for row in parts[name]]
    assert len(set(instructions)) == len(instructions)
    for name in ("held_out", "watch", "pilot", "train-1"):
        assert digest(text_of(parts[name])) in PLAN


def test_soft_labels_are_the_formula_of_the_plan(study):
    check_objective(study.variants["SoftLabels"].objective)
    z_c, z_u = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y_c, y_u, lam = torch.arange(5), torch.arange(5) + 2, torch.linspace(0, 1, 5, dtype=torch.float64)
    target = lam[:, None] * torch.eye(7)[y_c] + (1 - lam[:, None]) * torch.eye(7)[y_u]
    of_c, of_u = (-(target * z.log_softmax(-1)).sum(-1) for z in (z_c, z_u))
    torch.testing.assert_close(soft(z_c, z_u, y_c, y_u, lam), lam * of_c + (1 - lam) * of_u, rtol=1e-12, atol=0)


def test_the_share_is_on_the_line_through_the_last_two_points():
    assert interpolated({0.0: 1.4, 0.1: 1.3, 0.2: 1.1}, 1.15) == 0.175
    assert interpolated({0.0: 1.2, 0.02: 1.1}, 1.3) == 0.0
    assert interpolated({0.2: 1.2, 0.3: 1.15}, 1.1) == 0.3


def test_equality_is_two_one_sided_tests():
    values = np.array([0.001, -0.002, 0.0005, 0.0, 0.0015, -0.001])
    assert p_equal(values, np.full(6, 0.005)) < 0.01 < p_equal(values, np.full(6, 0.0005))
    assert p_equal(values + 0.02, np.full(6, 0.005)) > 0.99
    assert p_equal(values - 0.02, np.full(6, 0.005)) > 0.99
    assert power(0.0103, 0.0097, 16, 0.05) == pytest.approx(0.95, abs=0.01)
