"""The analysis of what the soft labels are, on simulated files: its figures are those of the plan's page, by hand."""

import json
import math
import re
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from scipy.stats import t

from benchmarks.evidence.losses import _write as write_parquet
from benchmarks.evidence.packed import pack, whole
from benchmarks.evidence.softlabels import analyse
from benchmarks.evidence.softlabels.arms import PermutedPairs
from benchmarks.evidence.softlabels.contrasts import ARMS, least, powers
from benchmarks.evidence.softlabels.run import BF16, FOLDER, ORDER
from sftmix.disk.tables import write_dynamics
from sftmix.types import Scores, Split, TrainingDynamics

PLAN = (FOLDER.parent / "preregistration-softlabels.md").read_text(encoding="utf-8")
STOP = datetime(2026, 12, 5, 12, tzinfo=UTC)
BEFORE = STOP - timedelta(minutes=1)
TOKENS = np.array([30, 5, 120, 64, 9], dtype=np.float64)
"""Of five held-out rows."""
LAST, TEMPERED, BEST, TEMPERATURE = "last.nll", "last.nll_temperature_scaled", "best.nll", "last.temperature"
COLUMNS = {LAST: "last_nll_sum", TEMPERED: "last_tempered_sum", BEST: "best_nll_sum", "last.accuracy": "last_n_correct"}
OTHERS = (TEMPERATURE, "answers.words", "answers.ended")
KNOWN = [(arm, seed) for arm in ("NTP", "SFTMix", "SoftLabels") for seed in range(1, 9)]
ALL = [*KNOWN, *ORDER, *BF16]
PRIMARY = {
    "P1": ("SoftLabels", "Unigram", TEMPERED, 0.015),
    "P2": ("SFTMix", "SoftLabels-weak", TEMPERED, 0.015),
    "P3": ("Unigram", "Uniform", TEMPERED, 0.015),
    "P4": ("Unigram", "NTP", BEST, 0.005),
    "P5": ("SFTMix", "SFTMix-permuted", LAST, 0.011),
}
LEVELS = {"Unigram": 0.02, "Uniform": 0.001, "SFTMix-permuted": 0.009, "NTP": 0.08}
"""By how much the losses of an arm are higher: each word of the plan is found."""


class Kept:
    """Both studies' folders of simulated runs, and f64[S] of an arm, an endpoint and some seeds."""

    def __init__(self, folder, runs=ALL):
        self.folder, self.rng, self.values = folder, np.random.default_rng(3), {}
        for study in ("regularises", "softlabels"):
            for kind in ("runs", "losses", "scores"):
                (folder / study / kind).mkdir(parents=True)
            write_parquet(folder / study / "losses" / "rows.parquet", n_tokens=TOKENS.astype(np.int32))
        for run in runs:
            self.write(*run)

    def file(self, arm, seed):
        study = "regularises" if (arm, seed) in KNOWN else "softlabels"
        return self.folder / study / "runs" / f"{arm}-seed-{seed}.json"

    def write(self, arm, seed, **figures):
        """Write a run as run.py keeps it, of random losses, some figures (`where__name`) as they are given."""
        columns, found = {}, {"last": {}, "best": {}, "answers": {}, "git_revision": "abc"}
        for endpoint, column in COLUMNS.items():
            rows = self.rng.normal(0, 0.1, len(TOKENS))
            means = rows - rows @ TOKENS / TOKENS.sum() + 2.0 + LEVELS.get(arm, 0) + self.rng.normal(0, 0.006)
            columns[column] = (means * TOKENS).astype(np.float32)
            self._set(found, arm, seed, endpoint, float(columns[column].sum(dtype=np.float64) / TOKENS.sum()))
        for endpoint in OTHERS:
            value = figures.get(endpoint.replace(".", "__"), 1.3 + self.rng.normal(0, 0.005))
            self._set(found, arm, seed, endpoint, float(value))
        nll, tokens = self.rng.uniform(0.1, 0.4, 2), [1454, 3128]
        halves = zip(("confident", "unconfident"), nll.tolist(), tokens, strict=True)
        found["sample_nll_by_half"] = {name: {"rows": 40, "tokens": n, "nll": x} for name, x, n in halves}
        self.values[arm, "fit.nll", seed] = nll @ tokens / 4582
        found |= {"confounds": {"mixed_token_share": 0.4 + seed / 100}, "mu_effective": 0.8 + seed / 100}
        file = self.file(arm, seed)
        file.write_text(json.dumps(found))
        write_parquet(file.parent.parent / "losses" / f"{arm}-seed-{seed}.parquet", **columns)

    def _set(self, figures, arm, seed, endpoint, value):
        where, name = endpoint.split(".")
        figures[where][name] = self.values[arm, endpoint, seed] = value

    def of(self, arm, endpoint, seeds=range(1, 9)):
        return np.array([self.values[arm, endpoint, seed] for seed in seeds])

    def difference(self, ours, theirs, endpoint, seeds=range(1, 9)):
        return self.of(ours, endpoint, seeds) - self.of(theirs, endpoint, seeds)

    def score(self, seeds):
        """Write scores of 80 rows; the confidence falls with the row."""
        for seed in seeds:
            n_tokens, nll = np.full(80, 10), np.linspace(5, 30, 80)[:, None]
            ids = [f"row-{row:02}" for row in range(80)]
            dynamics = TrainingDynamics(ids, np.array([1]), nll, n_tokens, np.zeros((80, 1), dtype=np.int64))
            write_dynamics(self.folder / "regularises" / "scores" / f"seed-{seed}.parquet", dynamics)


@pytest.fixture
def kept(tmp_path):
    kept = Kept(tmp_path)
    kept.score(range(1, 9))
    return kept


@pytest.fixture
def analysed(monkeypatch, capsys):
    """Return what the analysis prints, and the cells of its tables by their first cell, the first one of a name."""

    def call(kept, *words, now=STOP):
        monkeypatch.setattr(sys, "argv", ["analyse.py", "--results", str(kept.folder), *words])
        analyse.main(now)
        text, cells = capsys.readouterr().out, {}
        for line in text.splitlines():
            name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            cells.setdefault(name[:2] if re.match(r"P\d:", name) else name, rest)
        return text, cells

    return call


def student(values):
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"[{values.mean() - half:+.4f}, {values.mean() + half:+.4f}]"


def raw_p(values, margin):
    """Return p of a difference and of equality within the margin, before Holm."""
    error, free = values.std(ddof=1) / len(values) ** 0.5, len(values) - 1
    one_sided = t.cdf((values.mean() - margin) / error, free), t.sf((values.mean() + margin) / error, free)
    return float(2 * t.sf(abs(values.mean()) / error, free)), float(max(one_sided))


def over_five(p):
    """Return Holm's p, of up to five; those that are not there are larger than all."""
    found = {}
    for rank, name in enumerate(sorted(p, key=p.get)):
        found[name] = min(1.0, max([(5 - rank) * p[name], *found.values()]))
    return found


def check_primary(kept, cells, seeds_of):
    values = {name: kept.difference(*PRIMARY[name][:3], seeds) for name, seeds in seeds_of.items()}
    raw = {name: raw_p(values[name], PRIMARY[name][3]) for name in values}
    different, equal = (over_five({name: p[side] for name, p in raw.items()}) for side in (0, 1))
    words = set()
    for name, x in values.items():
        found = cells[name]
        assert found[:3] == [str(len(x)), f"{x.mean():+.4f}", student(x)]
        assert found[4:7] == [str(PRIMARY[name][3]), f"{different[name]:.2g}", f"{equal[name]:.2g}"]
        shown = [f"{'below' if x.mean() < 0 else 'above'} 0"] * (different[name] <= 0.05)
        shown += ["equal"] * (equal[name] <= 0.05)
        assert found[8] == (" and ".join(shown) or "undecided")
        words.add(found[8])
    return words


def test_the_primary_contrasts_are_those_of_the_plan(kept, analysed):
    text, cells = analysed(kept, now=BEFORE)
    both = dict.fromkeys(PRIMARY, range(1, 9)) | {"P1": range(1, 17), "P4": range(1, 17)}
    assert check_primary(kept, cells, both) == {"below 0", "above 0", "equal", "undecided"}
    for name, (ours, theirs, _, margin) in PRIMARY.items():
        numbers = {arm: row for row, arm in re.findall(r"^\| (\d+) \| `(.+?)`", PLAN, flags=re.MULTILINE)}
        assert re.search(rf"\| {name} \| {numbers[ours]} − {numbers[theirs]} \| \w+ \| {margin} \|", PLAN)
    warmer = kept.difference("SFTMix", "SoftLabels-weak", TEMPERATURE).mean()
    assert cells["P2"][7] == f"{warmer:+.4f}"
    assert "Not there: none." in text
    assert "Diverged, left out: none." in text
    assert "Revisions of the new runs: abc." in text


def test_what_is_not_planned_as_primary_has_intervals_alone(kept, analysed):
    _, cells = analysed(kept)
    for ours, theirs, end, endpoint, seeds in (
        ("SoftElsewhere", "SoftLabels", "tempered", TEMPERED, range(1, 9)),
        ("SoftLabels-weak", "NTP", "last", LAST, range(1, 9)),
        ("SoftLabels", "Unigram", "best", BEST, range(1, 17)),
        ("SoftLabels", "NTP", "temperature", TEMPERATURE, range(1, 17)),
        ("SFTMix", "SFTMix-permuted", "words of an answer", "answers.words", range(1, 9)),
        ("Uniform", "NTP", "fit", "fit.nll", range(1, 9)),
    ):
        values = kept.difference(ours, theirs, endpoint, seeds)
        found = cells[f"{ours} − {theirs}, {end}"]
        assert found[:3] == [str(len(values)), f"{values.mean():+.4f}", student(values)]
        assert len(found) == 4
    for arm in ARMS:
        assert f"{arm} − NTP, accuracy" in cells or arm == "NTP"
    assert cells["Uniform"][0] == "8"
    assert cells["Uniform"][-1] == f"{kept.of('Uniform', 'fit.nll').mean():.4f}"


def test_precision_is_judged_on_its_four_seeds(kept, analysed):
    text, cells = analysed(kept)
    four = range(1, 5)
    bf16 = kept.difference("NTP-bf16", "NTP", TEMPERED, four)  # NTP is 0.08 above all other arms
    assert cells["NTP-bf16 − NTP, tempered"][:3] == ["4", f"{bf16.mean():+.4f}", student(bf16)]
    assert "Precision regularises: yes, by the interval over seeds." in text
    both = [kept.difference("SFTMix-bf16", "NTP-bf16", BEST, four), kept.difference("SFTMix", "NTP", BEST, four)]
    change = cells["(SFTMix-bf16 − NTP-bf16) − (SFTMix − NTP), best"]
    assert change[1:3] == [f"{(both[0] - both[1]).mean():+.4f}", student(both[0] - both[1])]
    assert cells["SFTMix − NTP, best"][:3] == ["4", f"{both[1].mean():+.4f}", student(both[1])]
    signs = {np.sign(x.mean()) for x in both}
    assert f"has {'another' if len(signs) == 2 else 'the same'} sign under bf16" in text
    effects = bf16 - kept.difference("SFTMix", "NTP", TEMPERED, four)
    p = raw_p(effects, 0.015)[1]
    assert cells["(NTP-bf16 − NTP) − (SFTMix − NTP), tempered"][1] == f"{effects.mean():+.4f}"
    assert f"As much as SFTMix: {'yes' if p <= 0.05 else 'not shown'}, p of equality within 0.015: {p:.2g}." in text


def test_precision_regularises_only_if_its_whole_interval_is_below_0(tmp_path, analysed, monkeypatch):
    monkeypatch.setitem(LEVELS, "NTP-bf16", LEVELS["NTP"] - 0.004)
    kept = Kept(tmp_path)
    kept.score(range(1, 9))
    text, cells = analysed(kept)
    low, high = map(float, cells["NTP-bf16 − NTP, tempered"][2].strip("[]").split(", "))
    assert low < 0 < high
    assert "Precision regularises: not shown, by the interval over seeds." in text


def test_what_is_not_there_stops_no_other_contrast(tmp_path, analysed):
    """P2 has no run of one arm, P3 lacks a seed of its second block, P5 has none; Holm is over five all the same."""
    lacking = {("Uniform", 7)} | {(arm, seed) for arm in ("SoftLabels-weak", "SFTMix-permuted") for seed in range(17)}
    kept = Kept(tmp_path, [run for run in ALL if run not in lacking and run not in BF16])
    text, cells = analysed(kept)
    check_primary(kept, cells, {"P1": range(1, 17), "P3": range(1, 5), "P4": range(1, 17)})
    assert cells["P2"][:2] == cells["P5"][:2] == ["0", "not there"]
    assert cells["P2"][-1] == "not there"
    assert cells["NTP-bf16 − NTP, tempered"][1] == "not there"
    assert "Uniform 7" in text.split("Not there: ")[1].splitlines()[0]
    assert "Precision regularises" not in text


@pytest.mark.parametrize("warmer", [0.031, -0.031, 0.029, -0.029])
def test_arms_of_other_temperatures_are_not_matched(warmer, kept, analysed):
    """Whatever P2 shows; P5 is no contrast of matched arms."""
    for seed in range(1, 9):
        kept.write("SFTMix", seed, last__temperature=1.3)
        for arm in ("SoftLabels-weak", "SFTMix-permuted"):
            kept.write(arm, seed, last__temperature=1.3 + warmer)
    _, cells = analysed(kept)
    assert cells["P2"][7] == cells["P5"][7] == f"{-warmer:+.4f}"
    assert (cells["P2"][8] == "not matched") == (abs(warmer) > 0.03)
    assert cells["P5"][8] != "not matched"


def test_a_run_that_diverged_is_left_out_of_the_contrasts_with_its_arm(kept, analysed):
    kept.file("Uniform", 3).write_text('{"exit_code": 6}')
    text, cells = analysed(kept)
    both = dict.fromkeys(PRIMARY, range(1, 9)) | {"P1": range(1, 17), "P4": range(1, 17)}
    check_primary(kept, cells, both | {"P3": [1, 2, 4, 5, 6, 7, 8]})
    assert "Diverged, left out: Uniform 3." in text
    assert "Not there: none." in text


def test_nothing_is_analysed_before_the_stop_or_the_last_run(tmp_path, analysed):
    kept = Kept(tmp_path, [run for run in ALL if run != ("SFTMix-bf16", 4)])
    kept.score(range(1, 9))
    with pytest.raises(SystemExit, match=r"1 of 96 runs are not there.* 2026-12-05 12:00 UTC"):
        analysed(kept, now=BEFORE)
    assert not (tmp_path / "softlabels" / "analysed.json").exists()
    text, _ = analysed(kept, "--ends_here", now=BEFORE)
    assert "Not there: SFTMix-bf16 4." in text
    assert text == analysed(kept, now=STOP)[0]


def test_the_first_call_is_kept(kept, analysed):
    text, _ = analysed(kept, now=datetime(2026, 12, 1, 7, 5, tzinfo=UTC))
    file = kept.folder / "softlabels" / "analysed.json"
    written = file.read_bytes()
    first = json.loads(written)
    assert first["time"] == "2026-12-01 07:05 UTC"
    assert re.fullmatch(r"[0-9a-f]{12}\+?", first["git_revision"])
    seeds = first["seeds"]
    assert seeds["P1: SoftLabels − Unigram, tempered"] == [*range(1, 17)]
    assert seeds["P2: SFTMix − SoftLabels-weak, tempered"] == [*range(1, 9)]
    assert seeds["SFTMix − NTP, best"] == [1, 2, 3, 4]
    kept.file("Unigram", 16).unlink()
    again, _ = analysed(kept, now=STOP)
    line = f"First analysed on 2026-12-01 07:05 UTC, at revision {first['git_revision']}."
    assert text.splitlines()[0] == again.splitlines()[0] == line
    assert file.read_bytes() == written


def test_a_packed_study_is_analysed_as_before(kept, analysed):
    """What is in the pack has the first call, too."""
    folder = kept.folder / "softlabels"
    text, _ = analysed(kept)
    whole.cache_clear()
    pack(folder)
    again, _ = analysed(kept, now=datetime(2026, 12, 6, tzinfo=UTC))
    assert again == text
    assert [file.name for file in folder.rglob("*") if file.is_file()] == ["files.parquet"]


def test_a_call_that_fails_is_no_first_call(kept, analysed):
    (kept.folder / "softlabels" / "losses" / "Unigram-seed-3.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"Unigram-seed-3\.parquet"):
        analysed(kept)
    assert not (kept.folder / "softlabels" / "analysed.json").exists()


def test_a_run_without_a_number_for_its_loss_has_diverged(kept, analysed):
    file = kept.file("Uniform", 3)
    figures = json.loads(file.read_text())
    figures["last"]["nll"] = math.nan
    file.write_text(json.dumps(figures))
    assert "Diverged, left out: Uniform 3." in analysed(kept)[0]


def test_pairs_of_both_orders_are_reported(kept, analysed):
    text, _ = analysed(kept)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("## Pairs")[1].splitlines()]
    ours, permuted = (row for row in rows if row[0].startswith("SFTMix"))
    assert ours[1:] == ["8", "1.0000", "0.4450", "0.8450"]  # of seeds 1 to 8: 0.4 and 0.8 + 0.045
    assert permuted[3:] == ["0.4450", "0.8450"]
    split, crossing = Split(np.repeat([0, 1], 40), ["confident", "unconfident"]), []
    scores = Scores([""] * 80, np.arange(80), -np.arange(80.0), np.ones(80), np.ones(80, dtype=int))
    for seed in range(1, 9):
        for epoch in range(8):
            first, second = PermutedPairs(batch=8).pairs(split, scores, epoch=epoch, seed=seed).T
            crossing.append(((first < 40) != (second < 40)).mean())
    assert permuted[1:3] == ["8", f"{np.mean(crossing):.4f}"]


def test_both_studies_have_one_list_of_rows(kept, analysed):
    write_parquet(kept.folder / "regularises" / "losses" / "rows.parquet", n_tokens=TOKENS[::-1].astype(np.int32))
    with pytest.raises(SystemExit, match="different held-out rows"):
        analysed(kept)


def test_a_run_of_the_new_study_counts_before_the_old_one(kept, analysed):
    """Seed 3 of NTP is made anew; the file of the study before is of another run."""
    old = kept.file("NTP", 3).read_text()
    for name in ("runs/NTP-seed-3.json", "losses/NTP-seed-3.parquet"):
        (kept.folder / "regularises" / name).rename(kept.folder / "softlabels" / name)
    figures = json.loads(old)
    figures["last"]["nll"] += 1
    kept.file("NTP", 3).write_text(json.dumps(figures))
    _, cells = analysed(kept)
    values = kept.difference("Unigram", "NTP", LAST, range(1, 17))
    assert cells["Unigram − NTP, last"][1] == f"{values.mean():+.4f}"


def test_the_power_is_that_of_the_plan():
    """Where the plan's table and its spread disagree, its deviations have the figures."""
    cells = {}
    for line in powers().splitlines():
        name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        cells[name] = [rest[0], *map(float, re.findall(r"\d\.\d+", " ".join(rest[1:])))]
    both = r"(\S+) \((\S+)\)"
    rows = re.findall(rf"^\| (P\d(?:, P\d)?) \| (\d+) \| {both} \| {both} \|$", PLAN, flags=re.MULTILINE)
    assert len(rows) == 4
    right = {name: [seeds, *map(float, figures)] for names, seeds, *figures in rows for name in names.split(", ")}
    deviation = re.search(r"P5 finds (\S+) \((\S+)\), and equality is shown in\s+(\S+) \((\S+)\)", PLAN)
    right["P5"] = ["8", *map(float, deviation.groups())]
    for name, (seeds, *figures) in right.items():
        assert cells[name][0] == seeds
        assert cells[name][1:3] == pytest.approx(figures[:2], abs=0.0006)
        assert cells[name][3:] == pytest.approx(figures[2:], abs=0.006)


def test_the_least_difference_is_found_four_times_in_five():
    draws = np.random.default_rng(1).normal(least(0.0126, 16, 0.01), 0.0126, (20_000, 16))
    found = abs(draws.mean(axis=1)) * 4 / draws.std(axis=1, ddof=1) > t.ppf(0.995, 15)
    assert found.mean() == pytest.approx(0.8, abs=0.012)  # 3 standard errors of both simulations
