"""Sentences of README and of the pages have the figures of the study, and say no more than its rules allow."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks.evidence import results
from benchmarks.evidence.contrasts import in_brackets
from benchmarks.evidence.findings import BEST, LAST, MARGIN, Finding, findings
from benchmarks.evidence.losses import HELD_OUT
from benchmarks.evidence.prepare import parts_of
from benchmarks.evidence.tiers import RESULTS, read_tier
from sftmix.common.files import read_json, write_json
from sftmix.config.read import read_config
from sftmix.data import load_data
from sftmix.data.encoders import encoder_for
from sftmix.tools.compare.statistics import Counts, interval_seeds, interval_two_level, mean_sd

OTHERS = ("NTP", "RandomSplit", "LengthMatched", "DecomposedMixup")
RECORD = "benchmarks/results/evidence/README.md"
PLANNED = [("SFTMix", other) for other in OTHERS]


def page(name: str) -> str:
    """A page in one line."""
    return " ".join((results.ROOT / name).read_text(encoding="utf-8").split())


def overfitting() -> list[list[Finding]]:
    """The planned contrasts of tier 2, at last and at best."""
    return [findings(read_tier("overfit"), end, PLANNED, tested=True) for end in (LAST, BEST)]


def test_the_first_screen_of_the_readme_says_what_the_page_says():
    words = page("README.md")
    tests = read_json(RESULTS / "known-truth" / "contrasts.json")
    found = {share: tests["auc"][share]["deterministic"]["mean"] for share in ("10", "40")}
    assert f"AUC {found['10']:.2f} where 10% of them are wrong, {found['40']:.2f} where 40% are" in words
    undecided = [each for name in ("gap", "exact") for each in tests[name]["SFTMix - NTP"].values()]
    assert all(each["p_holm"] > 0.05 for each in undecided) == ("was not shown to keep" in words)
    to_ntp, *others = findings(read_tier("primary"), LAST, PLANNED, tested=True)
    assert to_ntp.interval
    mean, low, high = (f"{figure:+.4f}" for figure in (to_ntp.mean, *to_ntp.interval))
    assert f"minus NTP: {mean} nats per token, 95% interval {low} to {high}, ten seeds" in words
    assert all(each.equal for each in (to_ntp, *others))
    assert all(each > 0 for each in others[2].differences.values()), "SFTMix is above the unmixed losses at each seed"
    assert f"added up instead of mixed end {others[2].mean:.4f} lower than SFTMix at each of the ten seeds" in words
    last, best = overfitting()
    assert f"SFTMix ends {-last[0].mean:.4f} nats lower, but with each stopped at its best epoch it is" in words
    assert f"it is {best[0].mean:.4f} higher: stopping plain fine-tuning earlier gives more" in words
    assert all(each.equal for each in (*last[1:3], *best[1:3])) == (
        "Random halves do as well as halves by confidence there, too" in words
    )


def test_what_the_planned_contrasts_mean_is_what_they_are():
    """The sentences below the table of the state, by the rules of the plan."""
    words = page(RECORD)
    made = {name: read_tier(name) for name in ("primary", "overfit", "parts")}
    first = made["primary"]
    assert all(first.values(arm, LAST.figure) == first.values(arm, BEST.figure) for arm in first.arms)
    ends = [findings(first, end, PLANNED, tested=True) for end in (LAST, BEST)]
    assert all(each.equal for found in ends for each in found)
    assert [each.different for found in ends for each in found] == [False, False, False, True] * 2
    last, best = overfitting()
    assert [each.result.partition(",")[0] for each in (last[0], best[0])] == ["different: lower", "different: higher"]
    assert all(each.equal and not each.different for each in (*last[1:3], *best[1:3]))
    assert [(each.small, each.direction) for each in (last[3], best[3])] == [(True, "lower"), (True, "higher")]
    of_seeds, both = (interval_seeds(list(last[3].differences.values())), last[3].interval)
    of_rows = (both[1] - both[0]) ** 2 - (of_seeds[1] - of_seeds[0]) ** 2  # squared widths add up
    low, high = best[3].interval
    reach = ((high - low) ** 2 + of_rows) ** 0.5 / 2
    assert f"over the seeds alone, {in_brackets((low, high))}, as planned" in words
    assert f"it is {in_brackets((best[3].mean - reach, best[3].mean + reach))}, and *equal* is not shown" in words
    assert best[3].mean + reach > MARGIN
    weights = findings(made["overfit"], BEST, [("DecomposedMixup", "NTP")], tested=False)[0].mean
    assert f"{best[0].mean:.4f} by which SFTMix is above NTP there, the weights make {weights:.4f}" in words
    assert f"the mixing {best[3].mean:.4f}, a third" in words
    assert best[3].mean / best[0].mean == pytest.approx(1 / 3, abs=0.01)
    ends = [mean_sd(list(made["overfit"].values("NTP", end.figure).values()))[0] for end in (LAST, BEST)]
    assert f"NTP ends {ends[0] - ends[1]:.4f} nat above its best evaluation (0.05 or more was asked for)" in words
    for name, arm, near in (("primary", "LabelSmoothing", "is not"), ("parts", "single-run", "is")):
        off = [mean_sd(list(made[name].differences((arm, "SFTMix"), end.figure).values()))[0] for end in (LAST, BEST)]
        assert all(mean <= MARGIN for mean in off) == (near == "is")
        assert f"{near} within 0.01 nat of SFTMix or below it ({off[0]:+.4f} at last, {off[1]:+.4f} at best" in words


def test_what_is_said_of_rows_that_are_cut(shared, tmp_path):
    for name, rows in parts_of(json.loads((shared / "data" / "alpaca" / "alpaca_8k.json").read_bytes())).items():
        write_json(tmp_path / f"{name}.json", rows)
    options = read_config(results.ROOT / "benchmarks" / "evidence" / "study.yaml").data
    options = replace(options, train=str(tmp_path / "train.json"), eval=str(tmp_path / "held_out.json"))
    encoder = encoder_for(AutoTokenizer.from_pretrained(shared / "models" / "base-7m"), options)
    first, second = (
        load_data(replace(options, limit=limit), encoder, max_length=224, seed=0, progress=False)
        for limit in (960, 480)
    )
    is_cut, scored = first.eval.truncated, first.eval.n_targets
    words = page(RECORD)
    assert f"{first.train.truncated.sum()} of the other {len(first.train)} lose their end" in words
    assert f"(of tier 2's {len(second.train)}: {second.train.truncated.sum()})" in words
    share = scored[is_cut].sum() / scored.sum()
    assert f"{is_cut.sum()} of the {len(is_cut):,} held-out rows, which hold {share:.0%} of the scored tokens" in words


def test_what_is_said_of_the_shuffled_order_has_its_figures():
    words, tiers = page(RECORD), [read_tier("primary"), read_tier("shuffled")]
    assert tiers[1].complete
    assert tiers[1].revisions == tiers[0].revisions
    runs = {arm: found for tier in tiers for arm, found in tier.runs.items()}
    rows = [
        [column[tier.losses.rows == HELD_OUT] for column in (tier.losses.ids, tier.losses.n_tokens)] for tier in tiers
    ]
    assert all((ours == theirs).all() for ours, theirs in zip(*rows, strict=True))

    def counts(arm: str) -> Counts:
        losses = tiers[arm == "NTP-shuffled"].losses
        nll = np.stack([losses.nll_sum(arm, seed)[losses.rows == HELD_OUT] for seed in tiers[0].seeds])
        return Counts(nll, np.broadcast_to(rows[0][1].astype(float), nll.shape))

    assert all(run["eval_nll_after"] == run["eval_nll_best"] for run in runs["NTP-shuffled"].values())
    for pair in (("NTP-shuffled", "NTP"), ("SFTMix", "NTP-shuffled")):
        for end in (LAST, BEST):
            ours, theirs = ([end.figure(runs[arm][seed]) for seed in tiers[0].seeds] for arm in pair)
            off = np.subtract(ours, theirs)
            mean, sd = mean_sd(off)
            interval = interval_two_level(*map(counts, pair)) if end is LAST else interval_seeds(off)
            over = "seeds and examples" if end is LAST else "seeds"
            row = (
                f"{pair[0]} − {pair[1]} | {end.name} | {mean:+.4f} ± {sd:.4f} | {in_brackets(interval)} | {over} | 10 |"
            )
            assert f"| {row}" in words
            if "NTP" in pair:
                assert f"to matter no more than {max(map(abs, interval)):.4f} nat (95% interval)" in words


def parts() -> dict[str, Finding]:
    """The planned contrasts of tier 3 at last, by their first arm; at best they are the same runs at the same step."""
    tier = read_tier("parts")
    ends = [findings(tier, end, tier.contrasts, tested=False) for end in (LAST, BEST)]
    assert [each.differences for each in ends[0]] == [each.differences for each in ends[1]]
    return {found.pair[0]: found for found in ends[0]}


def widest(*found: Finding) -> str:
    return f"{max(abs(end) for each in found for end in each.interval or ()):.4f}"


def test_what_is_said_of_parts_of_the_recipe_has_their_figures():
    found = parts()
    single, weaker = found["single-run"], found["weaker-reference"]
    assert (single.pair[1], weaker.pair[1], found["mu-1"].pair[1]) == ("SFTMix", "SFTMix", "NTP")
    assert single.equal
    assert weaker.equal
    pages = {name: page(name) for name in SAID}
    for name, least in (("README.md", single), ("docs/cost.md", single)):
        assert f"within {widest(least)} nat" in pages[name]
    words = pages[RECORD]
    assert f"within {widest(single, weaker)} nat (95% intervals)" in words
    assert f"and ends {found['MixupOnly'].mean:.4f} above NTP. At μ = 1 SFTMix ends {found['mu-1'].mean:.4f}" in words
    (low, high), (under, over) = single.interval, weaker.interval
    faq = pages["docs/faq.md"]
    assert f"({single.mean:+.4f} nat, 95% interval {low:+.4f} to {high:+.4f}, six seeds)" in faq
    assert f"`--reference.model.path SMALLER`: {weaker.mean:+.4f}, {under:+.4f} to {over:+.4f})" in faq
    assert f"At μ = 1 it ended {found['mu-1'].mean:.4f} nats above plain fine-tuning" in faq


SAID = ("README.md", "docs/cost.md", RECORD, "docs/faq.md")


def test_the_questions_have_the_figures_of_the_study():
    words = page("docs/faq.md")
    auc = read_json(RESULTS / "known-truth" / "contrasts.json")["auc"]
    for share, found in auc.items():
        cells = [f"{found[name]['mean']:.0%}" for name in ("within_families", "deterministic", "all")]
        assert f"| {share}% | {' | '.join(cells)} |" in words
        assert (found["all"]["interval"][1] < 0.5) == (share != "10")  # "the order is turned round"
    arms = [(arm, "NTP") for arm in ("SFTMix", "RandomSplit", "DecomposedMixup")]
    ends = [end for each in findings(read_tier("primary"), LAST, arms, tested=False) for end in each.interval or ()]
    assert (max(map(abs, ends)) < 0.003) == ("within 0.003 nat (95% intervals)" in words)
    mixing = findings(read_tier("primary"), LAST, PLANNED, tested=True)[3]
    assert mixing.small == ("real, too small to matter" in words)
    assert f"Without mixing it is {mixing.mean:.4f} lower than by SFTMix" in words
    last, best = overfitting()
    lower, higher = f"{-last[0].mean:.4f}", f"{best[0].mean:.4f}"
    assert f"SFTMix ends {lower} nats lower than plain fine-tuning, and is {higher} nats higher where each is" in words
    assert all(each.equal for each in (*last[1:3], *best[1:3])) == ("random halves do the same" in words)


def test_what_is_said_of_other_rows_has_their_figures():
    tier, first = read_tier("rows"), read_tier("primary")
    (to_ntp, _), best = (findings(tier, end, tier.contrasts, tested=False) for end in (LAST, BEST))
    assert to_ntp.pair == ("SFTMix", "NTP")
    assert all(each.equal for each in (to_ntp, *best))
    spread = [mean_sd(list(each.values("NTP", LAST.figure).values()))[1] for each in (tier, first)]
    words = page(RECORD)
    assert f"(sd {spread[0]:.4f} beside {spread[1]:.4f})" in words
    assert f"the difference is within {widest(to_ntp)} nat (95% interval), as with one choice of rows" in words
    assert len(tier.confidences) == len(tier.seeds)
    faq = page("docs/faq.md")
    assert f"on five other draws of the rows, each with a reference of its own, within {widest(to_ntp)} nat" in faq


def test_what_is_said_of_other_methods_has_their_figures():
    tier = read_tier("others")
    pairs = [*tier.contrasts, ("NEFTune", "SFTMix")]
    last, best = ({each.pair: each for each in findings(tier, end, pairs, tested=False)} for end in (LAST, BEST))
    controls = [last["SFTMix", "SameGroupPairs"], last["SFTMix", "online-reference"]]
    assert all(each.equal for each in controls)
    words = page(RECORD)
    assert f"end where SFTMix does, within {widest(*controls)} nat (95% intervals): so which" in words
    noise, beside = last["NEFTune", "NTP"], last["NEFTune", "SFTMix"]
    assert noise.equal
    assert all(difference < 0 for difference in noise.differences.values())
    assert f"is {-noise.mean:.4f} below NTP, at each of the six seeds, and {-beside.mean:.4f} below SFTMix" in words
    dft = last["DFT", "NTP"]
    assert f"ends {dft.mean:.4f} above NTP, above even the untrained model, and is best after its first" in words
    assert best["DFT", "NTP"].mean < dft.mean
    runs = tier.runs["DFT"].values()
    assert all(run["eval_nll_after"] > run["eval_nll_before"] for run in runs)
    scaled = mean_sd([run["eval_nll_after"] - run["calibration"]["nll_temperature_scaled"] for run in runs])[0]
    assert f"a temperature mends {scaled:.2f} nats of it" in words
    faq = page("docs/faq.md")
    assert f"NEFTune, noise on the embeddings, ended {-noise.mean:.4f} nats below plain fine-tuning" in faq


def test_the_short_page_has_the_figures_of_the_record():
    words = page("docs/results.md")
    first = findings(read_tier("primary"), LAST, PLANNED, tested=True)
    last, best = overfitting()
    for label, number in (("NTP", 0), ("random halves", 1), ("the same pairs, losses added up instead of mixed", 3)):
        cells = [f"{found[number].mean:+.4f}" for found in (first, last, best)]
        row = words.partition(f"| SFTMix − {label} |")[2].partition("|\n")[0].split("|")[:3]
        assert [cell.strip(" *").partition(",")[0] for cell in row] == cells
        for cell, found in zip(row, (first, last, best), strict=True):
            assert ("equal" in cell, "different" in cell) == (found[number].equal, bool(found[number].different))
    auc = read_json(RESULTS / "known-truth" / "contrasts.json")["auc"]
    shares = (auc[share]["deterministic"]["mean"] for share in ("10", "40"))
    assert [f"{share:.0%}" in words for share in shares] == [True, True]
