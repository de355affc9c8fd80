"""Sentences of README and of the pages have the figures of the study, and say no more than its rules allow."""

from __future__ import annotations

from benchmarks.evidence import results
from benchmarks.evidence.findings import BEST, LAST, Finding, findings
from benchmarks.evidence.tiers import RESULTS, read_tier
from sftmix.common.files import read_json
from sftmix.tools.compare.statistics import mean_sd

OTHERS = ("NTP", "RandomSplit", "LengthMatched", "DecomposedMixup")
PLANNED = [("SFTMix", other) for other in OTHERS]


def overfitting() -> list[list[Finding]]:
    """The planned contrasts of tier 2, at last and at best."""
    return [findings(read_tier("overfit"), end, PLANNED, tested=True) for end in (LAST, BEST)]


def test_the_first_screen_of_the_readme_says_what_the_page_says():
    words = " ".join((results.ROOT / "README.md").read_text(encoding="utf-8").partition("## Set-up")[0].split())
    tests = read_json(RESULTS / "known-truth" / "contrasts.json")
    found = {share: tests["auc"][share]["deterministic"]["mean"] for share in ("10", "40")}
    assert f"AUC {found['10']:.2f} where 10% of them are wrong, {found['40']:.2f} where 40% are" in words
    undecided = [each for name in ("gap", "exact") for each in tests[name]["SFTMix - NTP"].values()]
    assert all(each["p_holm"] > 0.05 for each in undecided) == ("was not shown to keep" in words)
    to_ntp, *others = findings(read_tier("primary"), LAST, PLANNED, tested=True)
    assert to_ntp.interval
    mean, low, high = (f"{figure:+.4f}" for figure in (to_ntp.mean, *to_ntp.interval))
    assert f"minus NTP: {mean} nats per token, 95% interval {low} to {high}, ten seeds" in words
    told = "random halves do as well, and so do the same pairs with both losses added up instead of mixed"
    assert all(each.equal for each in (to_ntp, *others)) == (told in words)
    last, best = overfitting()
    assert (last[0].lower, best[0].higher) == (True, True)
    assert f"SFTMix ends {-last[0].mean:.4f} nats lower, but with each stopped at its best epoch it is" in words
    assert f"it is {best[0].mean:.4f} higher: stopping plain fine-tuning earlier gives more" in words
    assert all(each.equal for each in (*last[1:3], *best[1:3])) == (
        "Random halves do as well as halves by confidence there, too" in words
    )


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
    pages = {name: " ".join((results.ROOT / name).read_text(encoding="utf-8").split()) for name in SAID}
    for name, least in (("README.md", single), ("docs/cost.md", single)):
        assert f"within {widest(least)} nat" in pages[name]
    page = pages["docs/results.md"]
    assert f"within {widest(single, weaker)} nat (95% intervals)" in page
    assert f"and ends {found['MixupOnly'].mean:.4f} above NTP. At μ = 1 SFTMix ends {found['mu-1'].mean:.4f}" in page
    (low, high), (under, over) = single.interval, weaker.interval
    faq = pages["docs/faq.md"]
    assert f"({single.mean:+.4f} nat, 95% interval {low:+.4f} to {high:+.4f}, six seeds)" in faq
    assert f"`--reference.model.path SMALLER`: {weaker.mean:+.4f}, {under:+.4f} to {over:+.4f})" in faq
    assert f"At μ = 1 it ended {found['mu-1'].mean:.4f} nats above plain fine-tuning" in faq


SAID = ("README.md", "docs/cost.md", "docs/results.md", "docs/faq.md")


def test_the_questions_have_the_figures_of_the_study():
    words = " ".join((results.ROOT / "docs" / "faq.md").read_text(encoding="utf-8").split())
    auc = read_json(RESULTS / "known-truth" / "contrasts.json")["auc"]
    few, many = (
        [f"{auc[s][n]['mean']:.0%}" for n in ("within_families", "deterministic", "all")] for s in ("10", "40")
    )
    assert f"in {few[0]} of the pairs" in words
    assert f"in {few[1]} of the pairs with a right one of any kind, and in {few[2]} if rows" in words
    assert f"it was {many[0]}, {many[1]} and {many[2]}." in words
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
    page = " ".join((results.ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    assert f"(sd {spread[0]:.4f} beside {spread[1]:.4f})" in page
    assert f"the difference is within {widest(to_ntp)} nat (95% interval), as with one choice of rows" in page
    assert len(tier.confidences) == len(tier.seeds)
    faq = " ".join((results.ROOT / "docs/faq.md").read_text(encoding="utf-8").split())
    assert f"on five other draws of the rows, each with a reference of its own, within {widest(to_ntp)} nat" in faq


def test_what_is_said_of_other_methods_has_their_figures():
    tier = read_tier("others")
    pairs = [*tier.contrasts, ("NEFTune", "SFTMix")]
    last, best = ({each.pair: each for each in findings(tier, end, pairs, tested=False)} for end in (LAST, BEST))
    controls = [last["SFTMix", "SameGroupPairs"], last["SFTMix", "online-reference"]]
    assert all(each.equal for each in controls)
    page = " ".join((results.ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    assert f"end where SFTMix does, within {widest(*controls)} nat (95% intervals): so which" in page
    noise, beside = last["NEFTune", "NTP"], last["NEFTune", "SFTMix"]
    assert noise.equal
    assert all(difference < 0 for difference in noise.differences.values())
    assert f"is {-noise.mean:.4f} below NTP, at each of the six seeds, and {-beside.mean:.4f} below SFTMix" in page
    dft = last["DFT", "NTP"]
    assert f"ends {dft.mean:.4f} above NTP, above even the untrained model, and is best after its first" in page
    assert best["DFT", "NTP"].mean < dft.mean
    runs = tier.runs["DFT"].values()
    assert all(run["eval_nll_after"] > run["eval_nll_before"] for run in runs)
    scaled = mean_sd([run["eval_nll_after"] - run["calibration"]["nll_temperature_scaled"] for run in runs])[0]
    assert f"a temperature mends {scaled:.2f} nats of it" in page
    faq = " ".join((results.ROOT / "docs/faq.md").read_text(encoding="utf-8").split())
    assert f"NEFTune, noise on the embeddings, ended {-noise.mean:.4f} nats below plain fine-tuning" in faq
