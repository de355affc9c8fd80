"""The study of what regularises: its arms are valid, its rows are those of the plan, its control has its formula."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t

from benchmarks.evidence.losses import _write as write_parquet
from benchmarks.evidence.prepare import digest, plain
from benchmarks.evidence.regularises.analyse import COLUMNS, ENDPOINTS, main, p_equal, power, share
from benchmarks.evidence.regularises.rows import LIST, SIZES, listed, parts_of, text_of
from benchmarks.evidence.regularises.run import ARMS, FOLDER, LATER, Study
from sftmix.components import LossView
from sftmix.config.read import from_dict
from sftmix.types import Plan

PLAN = (FOLDER.parent / "preregistration-regularises.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out"))


def test_the_arms_are_those_of_the_plan(study):
    assert list(study.variants) == [*ARMS, *LATER]
    assert all(f"`{arm}`" in PLAN for arm in study.variants)
    configs = {arm: from_dict(study.config(arm, 3) | {"out": "o"}) for arm in study.variants}
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


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_with_nothing_mixed_soft_labels_are_sftmix(study, lam):
    """At a lambda of 0 or 1 both train one row of a pair on its own label, with the same weight and gradients."""
    hidden, weight = torch.randn(2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden, head = hidden.requires_grad_(), SimpleNamespace(weight=weight, bias=None, softcap=None, scale=1.0)
    pairs, share = torch.tensor([[0, 5], [1, 6], [2, 7]]), torch.full((3,), 0.2 / 3, dtype=torch.float64)
    rest, lams = torch.tensor([3, 4, 8]), torch.full((3,), lam, dtype=torch.float64)
    plan = Plan(torch.full((9,), 0.1, dtype=torch.float64), pairs, share, lams, 1.0, 1.0, mu=0.2, unpaired=rest)
    batch, found = SimpleNamespace(labels=torch.arange(9) % 7), []
    for arm in ("SFTMix", "SoftLabels"):
        out = study.variants[arm].objective.loss(LossView(head, lambda: hidden), batch, plan)
        found.append((out.loss, out.mixup, *torch.autograd.grad(out.loss, hidden)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-13, atol=1e-15)


def test_equality_is_two_one_sided_tests():
    values = np.array([0.001, -0.002, 0.0005, 0.0, 0.0015, -0.001])
    assert p_equal(values, np.full(6, 0.005)) < 0.01 < p_equal(values, np.full(6, 0.0005))
    assert p_equal(values + 0.02, np.full(6, 0.005)) > 0.99
    assert p_equal(values - 0.02, np.full(6, 0.005)) > 0.99
    assert power(0.0103, 0.0097, 16, 0.05) == pytest.approx(0.95, abs=0.01)


TOKENS = np.array([30, 5, 120, 64, 9], dtype=np.float64)
"""Of five held-out rows."""


def kept(folder, seeds, arms=ARMS):
    """Write runs as run.py keeps them, of random losses; return f64[S] of each arm and endpoint."""
    rng = np.random.default_rng(3)
    (folder / "runs").mkdir(parents=True)
    (folder / "losses").mkdir()
    write_parquet(folder / "losses" / "rows.parquet", n_tokens=TOKENS.astype(np.int32))
    found = {}
    for place, arm in enumerate(arms):
        for seed in seeds:
            means = 2.0 + 0.1 * place + rng.normal(0, 0.01, (len(ENDPOINTS), 1)) + rng.normal(0, 0.1, (1, len(TOKENS)))
            sums = dict(zip(ENDPOINTS.values(), (means * TOKENS).astype(np.float32), strict=True))
            figures = {"last": {}, "best": {}, "answers": {}}
            for endpoint, by_row in sums.items():
                where, name = endpoint.split(".")
                figures[where][name] = found[arm, endpoint, seed] = float(by_row.sum(dtype=np.float64) / TOKENS.sum())
            (folder / "runs" / f"{arm}-seed-{seed}.json").write_text(json.dumps(figures))
            columns = {column: sums[endpoint] for endpoint, column in COLUMNS.items() if endpoint in sums}
            write_parquet(folder / "losses" / f"{arm}-seed-{seed}.parquet", **columns)
    return lambda arm, endpoint, some=seeds: np.array([found[arm, endpoint, seed] for seed in some])


def analysed(folder, monkeypatch, capsys, *words):
    """Return the lines of tables, by their first cell; of one that is in several tables, the first."""
    monkeypatch.setattr(sys, "argv", ["analyse.py", "--results", str(folder), *words])
    main()
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        lines.setdefault(cells[0], cells[1:])
    return lines


def student(values):
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def test_the_primary_contrasts_are_those_of_the_plan(tmp_path, monkeypatch, capsys):
    of = kept(tmp_path, range(1, 17), [*ARMS, *LATER])
    found = analysed(tmp_path, monkeypatch, capsys)
    last, tempered = "last.nll", "last.nll_temperature_scaled"
    mixed, random = (of(f"SFTMix{order}", last) - of(f"NTP{order}", last) for order in ("", "-random"))
    right = [
        (mixed - random, -0.1 * random),
        (of("SFTMix", tempered) - of("LabelSmoothing", tempered), np.full(16, 0.005)),
        (of("SFTMix-literal", last) - of("NTP", last), -0.1 * mixed),
    ]
    raw = [[], []]
    for values, margins in right:
        scale = np.sqrt(16)
        raw[0].append(2 * t.sf(abs(values.mean()) * scale / values.std(ddof=1), 15))
        above = t.sf((values + margins).mean() * scale / (values + margins).std(ddof=1), 15)
        raw[1].append(max(above, t.cdf((values - margins).mean() * scale / (values - margins).std(ddof=1), 15)))
    for place, (values, margins) in enumerate(right):
        (cells,) = [cells for name, cells in found.items() if name.startswith(f"E{place + 1}:") and len(cells) == 7]
        assert cells[:2] == [f"{values.mean():+.4f}", "[{:+.4f}, {:+.4f}]".format(*student(values))]
        assert cells[3] == f"{margins.mean():.4f}"
        for p, cell in zip(raw, cells[4:6], strict=True):  # Holm's, by hand
            less = sorted(p)[: sorted(p).index(p[place]) + 1]
            assert cell == f"{min(1.0, max((3 - rank) * value for rank, value in enumerate(less))):.2g}"
    ratio = float(found["E1: (SFTMix − NTP) − (random halves − NTP in their order)"][6].split()[0])
    assert ratio == pytest.approx((mixed - random).mean() / random.mean(), abs=6e-4)
    soft = of("SFTMix", "best.nll") - of("SoftLabels", "best.nll")
    assert found["SFTMix − soft labels, best"][0] == f"{soft.mean():+.4f}"
    ended = of("SFTMix", "answers.ended") - of("NTP", "answers.ended")
    assert found["SFTMix − NTP, answers that end"][1] == "[{:+.4f}, {:+.4f}]".format(*student(ended))
    length = mixed - (of("SFTMix-length", last) - of("NTP-length", last))
    name = "(SFTMix − NTP) − (halves of like lengths − NTP in their order), last"
    assert found[name][0] == f"{length.mean():+.4f}"


def test_losses_of_another_run_are_noticed(tmp_path, monkeypatch, capsys):
    kept(tmp_path, range(1, 9))
    shutil.copy(tmp_path / "losses" / "NTP-seed-3.parquet", tmp_path / "losses" / "NTP-seed-2.parquet")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        analysed(tmp_path, monkeypatch, capsys, "--ends_here")


def test_the_share_has_fiellers_interval():
    """Its ends are the ratios r at which the mean of part - r whole is just not 0 to Student's test."""
    rng = np.random.default_rng(0)
    part, whole = rng.normal(0.01, 0.01, 12), rng.normal(0.1, 0.02, 12)
    ratio, low, high = share(part, whole)
    assert low < ratio == part.mean() / whole.mean() < high
    for end in (low, high):
        assert min(map(abs, student(part - end * whole))) == pytest.approx(0, abs=1e-12)
    assert np.isnan(share(part, part - part.mean())[1])
