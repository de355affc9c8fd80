"""The page of results is what the collected files say, and the rules of the preregistration are applied as written."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.evidence import results, tier_lines
from benchmarks.evidence.findings import BEST, LAST, findings
from benchmarks.evidence.forest import forest
from benchmarks.evidence.known_lines import known_pictures
from benchmarks.evidence.losses import HELD_OUT, SAMPLE, TableLosses, run_file
from benchmarks.evidence.pilots import pilot_lines
from benchmarks.evidence.predictions import outcomes
from benchmarks.evidence.secondary import absolute_rows, paired_rows
from benchmarks.evidence.tier_lines import tier_pictures
from benchmarks.evidence.tiers import PILOTS, RESULTS, TITLES, Tier, read_tier
from sftmix.common.files import write_json
from sftmix.tools.compare.statistics import Counts, interval_two_level

ARMS = {name: read_tier(name, Path("nowhere")) for name in TITLES}
OTHERS = ("NTP", "RandomSplit", "LengthMatched", "DecomposedMixup")
PLANNED = [("SFTMix", other) for other in OTHERS]


def summary(last: float, best: float | None = None, *, spread: float = 2.0) -> dict:
    return {
        "git_revision": "abc",
        "confidence_sha256": "def",
        "eval_nll_after": last,
        "eval_nll_best": last if best is None else best,
        "eval_nll_best_epoch": 1,
        "calibration": {"temperature": 1.0, "nll_temperature_scaled": last, "ece": 0.01, "brier": 0.8},
        "confidence_std": {"after": 50.0 * spread, "log_after": spread},
        "mu_effective": 0.7,
        "confounds": {"mixed_token_share": 0.5},
        "eval_nll_by_length": [{"nll": last + k} for k in range(4)],
        "sample_nll_by_half": {"before": {"confident": {"nll": 3.0}}, "after": {"confident": {"nll": 2.0}}},
    }


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


def results_of(made: Tier, end=LAST) -> dict[str, str]:
    return {found.pair[1]: found.result for found in findings(made, end, PLANNED, tested=True)}


# ------------------------------------------------------------------------------------------- the page


def test_the_page_and_the_pictures_are_what_the_collected_results_say():
    tiers, pilots = ({name: read_tier(name) for name in names} for names in (TITLES, PILOTS))
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.filled(page, results.parts_of(tiers, pilots, RESULTS / "known-truth")) == page, (
        "run python benchmarks/evidence/results.py"
    )
    made = {**tier_pictures(tiers), **known_pictures(RESULTS / "known-truth")}
    kept = {path.name: path.read_text(encoding="utf-8") for path in results.PICTURES.glob("*")}
    assert kept == made, "run python benchmarks/evidence/results.py"
    assert set(re.findall(r"images/results/([\w.-]+)", page)) == set(made)


def test_a_page_without_a_mark_is_refused():
    with pytest.raises(ValueError, match="made: tiers"):
        results.filled("# Results", {"tiers": "text"})


def test_nothing_but_a_pilot_is_told_as_nothing_found(tmp_path):
    write_json(tmp_path / "pilot-rate" / "runs" / "rate-5e-4-seed-901.json", summary(3.75))
    tiers, pilots = ({name: read_tier(name, tmp_path) for name in names} for names in (TITLES, PILOTS))
    parts = results.parts_of(tiers, pilots, tmp_path)
    assert parts["predictions"].count("| - | not yet |") == parts["predictions"].count("tier ") == 28
    assert "| rate-5e-4 | 3.7500 | - | 3.7500 |" in parts["pilots"]
    assert "It chooses nothing yet" in parts["pilots"]
    assert tier_pictures(tiers) == {}


def test_a_finished_tier_has_its_tables_and_pictures(tmp_path):
    made = tier("primary", {"SFTMix": (-0.02, -0.02)})
    tiers = {**ARMS, "primary": made}
    parts = results.parts_of(tiers, {}, tmp_path)
    assert "| `primary` | 7 arms, 10 seeds | 70 of 70 |" in parts["state"]
    row = "| SFTMix − NTP | different: lower | -0.0200 ± 0.0007 | [-0.0205, -0.0195] | seeds | 10 | 0.0020 | 0.0078 |"
    assert f"{row} 0.0009 |" in parts["tiers"]
    assert list(tier_pictures(tiers)) == ["primary-last.svg", "primary-best.svg"]


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
        "RandomSplit": "different: lower, and equal within 0.01: real, too small to matter",
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


def test_tiers_with_few_seeds_are_not_tested():
    made = tier("parts", {"MixupOnly": (0.05, 0.05)})
    planned, _ = tier_lines._found(made, LAST)
    assert {each.pair[0]: each.result for each in planned} == {
        "SFTMix": "equal within 0.01",
        "MixupOnly": "not tested",
        "mu-1": "equal within 0.01",
        "single-run": "equal within 0.01",
        "weaker-reference": "equal within 0.01",
    }


def test_a_run_that_diverged_is_told_and_missing_from_its_contrasts():
    made = replace(tier("primary", {}), diverged={"NTP": [3]})
    del made.runs["NTP"][3]
    assert made.complete
    found = {each.pair[1]: each for each in findings(made, LAST, PLANNED, tested=True)}
    assert (len(found["NTP"].differences), len(found["RandomSplit"].differences)) == (9, 10)
    state = "\n".join(results._state({"primary": made}))
    assert "NTP at 3" in state


def test_an_arm_that_always_diverged_counts_among_the_planned_contrasts():
    made = tier("primary", {"SFTMix": (-0.02, -0.02)})
    made = replace(made, runs={**made.runs, "LengthMatched": {}}, diverged={"LengthMatched": made.seeds})
    found = findings(made, LAST, PLANNED, tested=True)
    assert [each.p_holm for each in found] == [4 * 2 / 1024] * 3
    assert list(tier_pictures({"primary": made})) == ["primary-last.svg", "primary-best.svg"]


def test_at_last_the_interval_is_over_the_held_out_rows_too_where_their_losses_are_kept(tmp_path):
    made, rng = tier("primary", {}), np.random.default_rng(3)
    held_out = np.array([True] * 30 + [False] * 5)
    tokens, nothing = rng.integers(3, 40, 35), np.full(35, None, dtype=object)
    kinds = np.where(held_out, HELD_OUT, SAMPLE).astype(object)
    losses = TableLosses(tmp_path, kinds, np.arange(35).astype(object), tokens, tokens * 4.0, nothing, nothing)
    nll = {arm: (4 + rng.normal(size=(10, 35))) * tokens for arm in ("SFTMix", "NTP")}
    for arm, sums in nll.items():
        for seed, own in zip(made.seeds, sums, strict=True):
            pq.write_table(pa.table({"nll_sum": own.astype(np.float32)}), run_file(tmp_path, arm, seed))
    made = replace(made, losses=losses)
    to_ntp, to_random = findings(made, LAST, PLANNED, tested=True)[:2]
    whole = np.broadcast_to(tokens[:30].astype(float), (10, 30))
    expected = interval_two_level(*(Counts(nll[arm][:, :30], whole) for arm in ("SFTMix", "NTP")))
    assert (to_ntp.over, to_random.over) == ("seeds and examples", "seeds")  # RandomSplit's losses are not there
    assert to_ntp.interval == pytest.approx(expected, abs=1e-6)
    assert findings(made, BEST, PLANNED, tested=True)[0].over == "seeds"


def test_predictions_beside_what_came():
    prototype = {
        "primary": {"SFTMix": (-0.005, -0.005), "SFTMix-ntp": (-0.001, -0.001), "LabelSmoothing": (0.03, 0.03)},
        "overfit": {"SFTMix": (-0.12, 0.045), "RandomSplit": (-0.125, 0.045), "DecomposedMixup": (-0.1, 0.04)},
        "parts": {"MixupOnly": (0.01, 0.05)},
    }
    tiers = {**ARMS, **{name: tier(name, off) for name, off in prototype.items()}}
    open_, held, missed = ([] for _ in range(3))
    for each in outcomes(tiers):
        {None: open_, True: held, False: missed}[each.held].append((each.number, each.predicted, each.came))
    assert open_ == []
    assert missed == [
        (4, "tier 1: temperature of LabelSmoothing lower than NTP's", "+0.0000"),
        (7, "tier 2: spread of SFTMix's log confidence below NTP's", "+0.0%"),
        (8, "tier 3, last: MixupOnly − NTP, above 0.02", "+0.0100"),
    ]
    assert {number for number, *_ in held} == {1, 2, 3, 4, 5, 6, 7, 8}
    assert len(held) == 28 - 3
    assert {each.held for each in outcomes(ARMS)} == {None}


def pilot(name: str, values: dict[str, tuple[float, float]]) -> str:
    plan = read_tier(name, Path("nowhere"))
    runs = {arm: dict(zip((901, 902), map(summary, values[arm]), strict=True)) for arm in plan.arms}
    return "\n".join(pilot_lines(replace(plan, runs=runs)))


def test_pilots_choose_by_the_rules():
    rates = {"rate-2.5e-4": (3.9, 3.9), "rate-5e-4": (3.7, 3.8), "rate-1e-3": (3.72, 3.7), "rate-2e-3": (3.8, 3.8)}
    assert "Chosen: rate-1e-3" in pilot("pilot-rate", rates)
    assert "at an end of the grid" in pilot("pilot-rate", {**rates, "rate-2e-3": (3.0, 3.0)})
    names = ("mu-0.1", "mu-0.2", "mu-0.4", "smoothing-0.05", "smoothing-0.1", "smoothing-0.2")
    values = dict(zip(names, [(3.6, 3.8), (3.7, 3.7), (3.69, 3.69), (3.5, 3.7), (3.6, 3.6), (3.7, 3.7)], strict=True))
    told = pilot("pilot-strength", values)
    assert "Chosen: mu-0.4, lower than mu-0.2 at both seeds." in told
    assert "Chosen: smoothing-0.1, the usual one" in told


def test_secondary_figures_are_paired_by_seed():
    made = tier("primary", {})
    for s, run in made.runs["SFTMix"].items():
        run["confidence_std"]["log_after"] = 2.0 * (0.9 + 0.001 * s)
        run["eval_nll_by_length"][3]["nll"] += 0.5
    rows = {name: dict(zip(made.arms[1:], cells, strict=True)) for name, *cells in paired_rows(made)}
    assert rows["sd of log confidence"]["SFTMix"] == "-9.4% ± 0.3%"
    assert rows["NLL, longest quarter"]["SFTMix"].startswith("+0.5000 ± ")
    assert rows["NLL, longest quarter"]["RandomSplit"] == "+0.0000 ± 0.0000"
    assert "best epoch, from 1" not in rows  # the same in all arms
    absolute = {name: cells for name, *cells in absolute_rows(made)}
    assert absolute["best epoch, from 1"][0] == "2.0 ± 0.0"
    assert absolute["sample of training rows, confident: after"][0] == "2.0000 ± 0.0000"


def test_a_forest_has_a_point_for_each_seed_and_its_mean_in_place():
    made = findings(tier("primary", {"SFTMix": (-0.02, 0)}), LAST, PLANNED, tested=True)
    root = ET.fromstring(forest("Title & more", made[:2], made[2:]))
    points = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(points) == 40
    lines = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"SFTMix − NTP", "-0.0200 [-0.0205, -0.0195]"} <= set(lines)
    assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "foreignObject"))]
    widest = [e for e in root.iter("{http://www.w3.org/2000/svg}text") if float(e.get("x", 0)) > 900]
    assert not widest


def test_what_is_far_from_the_others_has_an_arrow_and_leaves_them_their_room():
    near, far = (tier("primary", {"SFTMix": (difference, 0)}) for difference in (-0.02, 2.0))
    made = [findings(each, LAST, PLANNED[:1], tested=True)[0] for each in (near, far)]
    made[1] = replace(made[1], pair=("DFT", "NTP"))
    root = ET.fromstring(forest("Title", made, []))
    drawn = {tag: list(root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")) for tag in ("circle", "path", "text")}
    alone = ET.fromstring(forest("Title", made[:1], []))
    places = [e.get("cx") for e in alone.iter("{http://www.w3.org/2000/svg}circle")]
    assert [e.get("cx") for e in drawn["circle"]] == places
    assert len(drawn["path"]) == 2
    lines = [e.text for e in drawn["text"]]
    assert {"DFT − NTP", "+2.0000 [+1.9995, +2.0005]"} <= set(lines)
    assert any(line.endswith("an arrow: beyond the edge") for line in lines)


def test_collected_runs_of_no_arm_or_seed_of_the_plan_are_left_out(tmp_path):
    for name in ("NTP-seed-1", "NTP-seed-99", "unknown-seed-1"):
        write_json(tmp_path / "primary" / "runs" / f"{name}.json", summary(4.0))
    write_json(tmp_path / "primary" / "runs" / "SFTMix-seed-1.json", {"seed": 1, "exit_code": 6})
    made = read_tier("primary", tmp_path)
    assert made.runs_done == 2
    assert (list(made.runs["NTP"]), made.diverged) == ([1], {"SFTMix": [1]})


def test_a_tier_says_who_trained_it_and_if_the_references_were_the_same():
    made = tier("primary", {})
    assert tier_lines._made_by(made).startswith(
        "Trained by revision abc. The confidence of SFTMix is the same at all seeds"
    )
    made.runs["SFTMix"][2].update(git_revision="xyz", confidence_sha256="other")
    assert tier_lines._made_by(made) == (
        "**Trained by 2 revisions, where the plan asks for one: abc, xyz.** The confidence of SFTMix is of 2 kinds."
    )


def test_a_seed_at_which_an_arm_diverged_is_one_that_all_arms_have():
    made = tier("primary", {})
    made = replace(made, runs={**made.runs, "LengthMatched": {}}, diverged={"LengthMatched": list(made.seeds)})
    del made.runs["NTP"][10]
    assert (made.complete, made.common) == (False, list(range(1, 10)))
    assert len(made.differences(("SFTMix", "NTP"), LAST.figure)) == 9
