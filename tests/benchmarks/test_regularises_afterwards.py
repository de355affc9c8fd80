"""What nobody had planned to look at in what regularises: by other formulas, and on the page that states it."""

import json

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from benchmarks.evidence.packed import whole
from benchmarks.evidence.regularises import afterwards
from benchmarks.evidence.regularises.analyse import (
    BEST,
    ENDPOINTS,
    LAST,
    LOSSES,
    TEMPERED,
    Contrast,
    Runs,
    difference,
    line,
)
from benchmarks.evidence.regularises.run import ARMS
from tests.test_docs import ROOT

RUNS = whole(afterwards.FOLDER) / "runs"


@pytest.fixture(scope="module")
def runs():
    return Runs(whole(afterwards.FOLDER))


def effect(arm, figure):
    """Return f64[S], an arm less NTP after the last step, from the files."""
    nll = [
        [json.loads((RUNS / f"{name}-seed-{seed}.json").read_text())["last"][figure] for seed in range(1, 9)]
        for name in (arm, "NTP")
    ]
    return np.subtract(*np.array(nll))


@pytest.mark.parametrize(("column", "endpoint"), [(1, LAST), (2, TEMPERED)])
def test_an_effect_as_a_multiple_of_sftmixs(column, endpoint, runs):
    """Fieller's bounds are the multiples of SFTMix's effect from which Student's test just tells the arm's effect."""
    (row,) = [row for row in afterwards.of_effects(runs) if row[0] == "SoftLabels"]
    soft, mixed = (effect(arm, endpoint.split(".")[1]) for arm in ("SoftLabels", "SFTMix"))
    middle = soft.mean() / mixed.mean()
    excess = lambda multiple: stats.ttest_1samp(soft - multiple * mixed, 0).pvalue - 0.05  # noqa: E731
    low, high = (optimize.brentq(excess, middle, bound) for bound in (0.5, 4.0))
    assert row[column] == f"{middle:.2f} [{low:.2f}, {high:.2f}]"


@pytest.mark.parametrize("mu", [0.12, 0.827])
def test_where_two_memorised_rows_are_at_rest(mu):
    """For SoftLabels the share of the own label, 3/8 and 1/8 being E[lambda^2] and E[lambda (1 - lambda)]; for SFTMix
    the derivative of its loss by the own logit is 0, with lambda = sin^2 of a uniform angle."""
    assert afterwards.memorised(mu, mixed=False) == pytest.approx((1 + mu * 3 / 8) / (1 + mu / 2), abs=1e-4)
    own = afterwards.memorised(mu, mixed=True)
    logit = np.log(own / (1 - own))

    def slope(angle):
        lam = np.sin(angle) ** 2
        predicted = lam * logit - (1 - lam) * logit
        return (2 * lam - 1) * (1 / (1 + np.exp(-predicted)) - lam) * 2 / np.pi

    mixed = integrate.quad(slope, 0, np.pi / 2, epsabs=1e-12)[0]
    assert 2 * (own - 1) + mu * mixed == pytest.approx(0, abs=1e-4)


def test_the_pilot_in_bf16_is_of_other_runs_than_the_one_in_float32():
    for arm in ("NTP", "SFTMix"):
        for seed in (901, 902):
            first, again = (
                json.loads((whole(afterwards.FOLDER) / name).read_text())
                for name in (f"pilot-bf16/{arm}-seed-{seed}.json", f"runs/pilot-{arm}-seed-{seed}.json")
            )
            assert first["git_revision"] == "5ac6abe3f2cf" != again["git_revision"]
            assert (first["seed"], first["stages"]["train"]["examples"]) == (again["seed"], 640)


def test_the_record_has_what_the_commands_print(runs):
    record = (afterwards.RESULTS / "regularises.md").read_text(encoding="utf-8").splitlines()
    cells = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in record if line.startswith("|")}
    printed = afterwards.of_pilot(), afterwards.of_effects(runs), afterwards.of_added(), afterwards.of_fit(runs)
    rows = [tuple(row) for table in printed for row in table]
    for name, arm in (("soft labels", "SoftLabels"), ("label smoothing", "LabelSmoothing")):  # of picture.py
        contrasts = [(f"{name} − NTP, {end}", difference(arm, "NTP"), ENDPOINTS[end]) for end in LOSSES]
        rows += [tuple(line(runs, Contrast(*each))) for each in contrasts]
    assert [row for row in rows if row not in cells] == []


def test_readme_has_the_means_of_the_record(runs):
    """To three decimals SFTMix − NTP after the last step. At its best epoch NTP is below all ends."""
    words = (ROOT / "README.md").read_text(encoding="utf-8")
    last = runs.values(Contrast("", difference("SFTMix", "NTP"), LAST))
    assert f"SFTMix ends {-last.mean():.3f} below NTP;" in words
    ends = [runs.values(Contrast("", {arm: 1.0}, LAST)) for arm in ARMS]
    assert (runs.values(Contrast("", {"NTP": 1.0}, BEST)) < np.min(ends, axis=0)).all()
    assert {runs.runs["NTP", seed]["eval_nll_best_epoch"] for seed in runs.seeds} == {0}
