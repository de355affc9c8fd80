"""The record of the study is what the collected results say, by the rules of the plan."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence.findings import BEST, LAST, Finding, findings
from benchmarks.evidence.results import lines
from benchmarks.evidence.study import HELD_OUT, SAMPLE, Study, TableLosses, write_study
from benchmarks.evidence.tiers import PILOTS, REAL, RESULTS, TITLES, Tier, read_tier
from sftmix.tools.compare.statistics import interval, per_example
from tests.tiny import ROOT

ARMS = {name: read_tier(name, Path("nowhere")) for name in TITLES}
OTHERS = ("NTP", "RandomSplit", "LengthMatched", "DecomposedMixup")
PLANNED = [("SFTMix", other) for other in OTHERS]


def summary(last: float, best: float | None = None) -> dict:
    return {"eval_nll_after": last, "eval_nll_best": last if best is None else best}


def tier(name: str, off: dict[str, tuple[float, float]], *, wobble: float = 0.001, seeds: Sequence[int] = ()) -> Tier:
    """A tier whose arms lie `off` (last, best) from 4.0; SFTMix alone differs between seeds, around a mean of 0."""
    plan = ARMS[name]
    seeds = seeds or plan.seeds
    noise = dict(zip(seeds, np.linspace(-wobble, wobble, len(seeds)).tolist(), strict=True))
    runs: dict[str, dict[int, dict]] = {arm: {} for arm in plan.arms}
    for arm, own in runs.items():
        for seed in seeds:
            own[seed] = summary(*(4.0 + each + (arm == "SFTMix") * noise[seed] for each in off.get(arm, (0.0, 0.0))))
    return replace(plan, runs=runs)


def planned(made: Tier, end=LAST) -> dict[str, Finding]:
    return {each.pair[1]: each for each in findings(made, end, PLANNED, tested=True)}


def results_of(made: Tier) -> dict[str, str]:
    return {other: found.result for other, found in planned(made).items()}


# ------------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("name", [*TITLES, *(name for name in REAL if read_tier(name).common)])
def test_the_record_has_the_contrasts_of_the_collected_results(name):
    record = (RESULTS / ("real.md" if name in REAL else "README.md")).read_text(encoding="utf-8").splitlines()
    rows = [line.rstrip(" |") for line in lines(read_tier(name)) if " − " in line]
    assert rows
    assert [row for row in rows if not any(line.startswith(row) for line in record)] == []


@pytest.mark.parametrize("name", PILOTS)
def test_the_record_has_the_means_of_the_pilots(name):
    record = (RESULTS / "README.md").read_text(encoding="utf-8")
    tier = read_tier(name)
    assert tier.complete
    for arm in tier.arms:
        first, second = tier.values(arm, LAST).values()
        assert f"| {arm} | {first:.4f} | {second:.4f} | {(first + second) / 2:.4f} |" in record


def test_the_results_have_the_figures_of_the_record():
    words = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    first = findings(read_tier("primary"), LAST, PLANNED, tested=True)
    second = [findings(read_tier("overfit"), end, PLANNED, tested=True) for end in (LAST, BEST)]
    found = [each.mean for each in (first[0], second[0][0], second[1][0], first[3])]
    assert [f"{abs(figure):.4f}" for figure in found if f"{abs(figure):.4f}" not in words] == []


@pytest.mark.parametrize("name", ["primary", "overfit", *REAL])
def test_the_first_table_of_the_results_has_the_record(name):
    """SFTMix − NTP at both endpoints, as in the record, in one row."""
    tier = read_tier(name)
    words = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n## ")[0]
    both = [findings(tier, end, [("SFTMix", "NTP")], tested=False)[0] for end in (LAST, BEST)]
    cells = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(each.mean, *each.interval) for each in both]
    assert f"| {' | '.join(cells)} |" in words


def test_readme_has_the_figures_of_the_record():
    tier = read_tier("real-main")
    last = findings(tier, LAST, [("SFTMix", "NTP")], tested=False)[0].mean
    warmed = [
        {seed: run["calibration"]["nll_temperature_scaled"] for seed, run in tier.runs[arm].items()}
        for arm in ("SFTMix", "NTP")
    ]
    rest = np.mean([nll - warmed[1][seed] for seed, nll in warmed[0].items()])
    words = f"SFTMix ends {-last:.4f} below NTP, and {rest:.4f} above it after a temperature for each"
    assert words in (ROOT / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------ the rules


def flips(differences: Sequence[float]) -> float:
    """The exact sign-flip test, written naively."""
    observed = abs(sum(differences)) - 1e-12
    signs = itertools.product((-1, 1), repeat=len(differences))
    return sum(abs(np.dot(s, differences)) >= observed for s in signs) / 2 ** len(differences)


def test_p_is_exact_and_holm_counts_the_four_planned_contrasts():
    made = tier("primary", {"SFTMix": (0.0004, 0), "RandomSplit": (-0.03, 0), "LengthMatched": (0.001, 0)})
    found = findings(made, LAST, PLANNED, tested=True)
    p_values = [flips(list(each.differences.values())) for each in found]
    assert [each.p for each in found] == pytest.approx(p_values)
    ranked, running = sorted(range(4), key=p_values.__getitem__), 0.0
    for k, at in enumerate(ranked):
        running = max(running, min(1.0, p_values[at] * (4 - k)))
        assert found[at].p_holm == pytest.approx(running)


def test_words_of_a_result():
    off = {"SFTMix": (0.0, 0.0), "NTP": (0.02, 0), "RandomSplit": (0.005, 0), "LengthMatched": (-0.05, 0)}
    assert results_of(tier("primary", off)) == {
        "NTP": "different: lower",
        "RandomSplit": "different: lower, and equal within 0.01",
        "LengthMatched": "different: higher",
        "DecomposedMixup": "equal within 0.01",
    }
    assert results_of(tier("primary", {}, wobble=0.05))["NTP"] == "undecided"
    assert set(results_of(tier("primary", off, seeds=range(1, 6))).values()) == {"unfinished"}


def test_an_unfinished_tier_has_no_interval_and_the_seeds_that_all_arms_have():
    made = tier("primary", {"SFTMix": (-0.02, -0.02)})
    del made.runs["NTP"][7]
    assert not made.complete
    assert made.common == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    found = findings(made, LAST, PLANNED, tested=True)
    assert all(each.p is each.interval is None and list(each.differences) == made.common for each in found)


def test_a_run_that_diverged_is_told_and_missing_from_its_contrasts():
    made = replace(tier("primary", {}), diverged={"NTP": [3]})
    del made.runs["NTP"][3]
    assert made.complete
    found = planned(made)
    assert (len(found["NTP"].differences), len(found["RandomSplit"].differences)) == (9, 10)
    assert "70 of 70 runs; NTP diverged at [3]" in "\n".join(lines(made))


def test_an_arm_that_always_diverged_counts_among_the_planned_contrasts():
    made = tier("primary", {"SFTMix": (-0.02, -0.02)})
    made = replace(made, runs={**made.runs, "LengthMatched": {}}, diverged={"LengthMatched": made.seeds})
    found = findings(made, LAST, PLANNED, tested=True)
    assert [each.p_holm for each in found] == [4 * 2 / 1024] * 3
    del made.runs["NTP"][10]  # a seed at which an arm diverged is one that all have
    assert (made.complete, made.common) == (False, list(range(1, 10)))
    assert len(made.differences(("SFTMix", "NTP"), LAST)) == 9


def test_at_last_the_interval_is_over_the_held_out_rows_too_where_their_losses_are_kept():
    made, rng = tier("primary", {}), np.random.default_rng(3)
    held_out = np.array([True] * 30 + [False] * 5)
    tokens = rng.integers(3, 40, 35)
    kinds = np.where(held_out, HELD_OUT, SAMPLE).astype(object)
    nll = {arm: (4 + rng.normal(size=(10, 35))) * tokens for arm in ("SFTMix", "NTP")}
    of_runs = {(arm, seed): own for arm, sums in nll.items() for seed, own in zip(made.seeds, sums, strict=True)}
    losses = TableLosses(kinds, np.arange(35).astype(object), tokens, tokens * 4.0, of_runs)
    made = replace(made, losses=losses)
    to_ntp, to_random = findings(made, LAST, PLANNED, tested=True)[:2]
    whole = np.broadcast_to(tokens[:30].astype(float), (10, 30))
    ours, theirs = (per_example(nll[arm][:, :30], whole) for arm in ("SFTMix", "NTP"))
    assert (to_ntp.over, to_random.over) == ("seeds and examples", "seeds")  # RandomSplit's losses are not there
    assert to_ntp.interval == pytest.approx(interval(ours - theirs), abs=1e-12)
    assert findings(made, BEST, PLANNED, tested=True)[0].over == "seeds"


def test_collected_runs_of_no_arm_or_seed_of_the_plan_are_left_out(tmp_path):
    runs = {(arm, seed): summary(4.0) | {"seed": seed} for arm, seed in (("NTP", 1), ("NTP", 99), ("unknown", 1))}
    runs["SFTMix", 1] = {"seed": 1, "exit_code": 6}
    write_study(tmp_path / "primary.parquet", Study(runs=runs))
    made = read_tier("primary", tmp_path)
    assert made.runs_done == 2
    assert (list(made.runs["NTP"]), made.diverged) == ([1], {"SFTMix": [1]})
