"""The losses of single examples that are kept of a table, and the differences by groups that are made of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks.evidence.by_example import by_example, example_lines
from benchmarks.evidence.collect import collect
from benchmarks.evidence.groups import Found, largest_p
from benchmarks.evidence.losses import HELD_OUT, SAMPLE, keep_losses, read_losses
from benchmarks.evidence.tiers import Tier, read_tier
from sftmix.common.errors import ConfigError
from sftmix.common.files import read_json, write_json, write_text
from sftmix.common.tables import write_dynamics, write_eval, write_split
from sftmix.types import RowScores, Split, TrainingDynamics

RNG = np.random.default_rng(5)
HELD, TRAIN = [f"h{k:02}" for k in range(40)], [f"t{k:02}" for k in range(16)]
TOKENS = {i: int(n) for i, n in zip(HELD + TRAIN, RNG.integers(3, 90, 56), strict=True)}
BASE = {i: n * float(RNG.uniform(2, 6)) for i, n in TOKENS.items()}
INSTRUCTIONS = (
    "Bake the bread with flour in the oven",
    "Name the planet whose orbit the moon crosses",
    "Paint a forest with green colours on canvas",
)
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


def split(table: Path, seed: int) -> None:
    """Write halves: the training rows of odd number are confident, and the first has no pair."""
    group = np.array([int(i[1:]) % 2 == 0 for i in TRAIN], dtype=np.int8)
    group[0] = -1
    halves = Split(group=group, names=("confident", "unconfident"))
    write_split(table / "SFTMix" / f"seed-{seed}" / "split" / "split.parquet", TRAIN, halves)


def texts(table: Path, arm: str, seed: int) -> None:
    """Write the rows of a run, every third of cooking; the last of each file is not there."""
    for name, ids in (("eval", HELD), ("train", TRAIN)):
        rows = [
            {"id": i, "instruction": INSTRUCTIONS[k % 3], "input": "", "output": f"Answer {i}"}
            for k, i in enumerate(ids[:-1])
        ]
        write_json(table / f"{name}.json", rows)
    files = f"{{train: ['{table}/train.json'], eval: ['{table}/eval.json'], format: alpaca}}"
    write_text(table / arm / f"seed-{seed}" / "config.yaml", f"data: {files}\n")


# ---------------------------------------------------------------------------------------------- keeping


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A table of NTP at seed 1, whose losses are kept: 2 nats per token, 1 more at the training rows."""
    nll = {i: n * (2.0 + (i in TRAIN)) for i, n in TOKENS.items()}
    keep_losses([run(tmp_path, "NTP", 1, nll)], tmp_path / "SFTMix", tmp_path / "losses")
    return tmp_path


def test_losses_are_read_back_in_the_order_of_the_ids(kept):
    found = read_losses(kept / "losses")
    assert found.ids.tolist() == HELD + TRAIN
    assert found.rows.tolist() == [HELD_OUT] * 40 + [SAMPLE] * 16
    assert found.n_tokens.tolist() == [TOKENS[i] for i in found.ids]
    np.testing.assert_allclose(found.base_nll_sum, [BASE[i] for i in found.ids], rtol=1e-7)
    assert (found.nll_sum("NTP", 1) == found.n_tokens * np.where(found.rows == SAMPLE, 3.0, 2.0)).all()
    assert (found.nll_sum("NTP", 2), found.seeds("NTP"), found.seeds("SFTMix")) == (None, [1], [])
    assert not any(found.half)
    assert not any(found.topic)
    assert read_losses(kept / "nothing") is None


def test_a_second_time_writes_nothing_and_a_later_sitting_adds_what_is_new(kept):
    times = {path: path.stat().st_mtime_ns for path in (kept / "losses").iterdir()}
    keep_losses([(kept / "NTP" / "seed-1", "NTP", 1)], kept / "SFTMix", kept / "losses")
    assert {path: path.stat().st_mtime_ns for path in (kept / "losses").iterdir()} == times
    other = run(kept, "SFTMix", 2, BASE)
    split(kept, 2)
    texts(kept, "SFTMix", 2)
    keep_losses([other, (kept / "NTP" / "seed-3", "NTP", 3)], kept / "SFTMix", kept / "losses")
    found = read_losses(kept / "losses")
    assert (found.seeds("NTP"), found.seeds("SFTMix")) == ([1], [2])
    assert (found.nll_sum("SFTMix", 2) == found.base_nll_sum).all()
    halves = {i: half for i, half in zip(found.ids, found.half, strict=True) if half}
    assert halves == {i: ("confident", "unconfident")[int(i[1:]) % 2 == 0] for i in TRAIN[1:]}
    topic = dict(zip(found.ids, found.topic, strict=True))
    assert topic[HELD[-1]] is topic[TRAIN[-1]] is None
    for kind, instruction in enumerate(INSTRUCTIONS):
        (words,) = {topic[i] for i in HELD[kind:-1:3] + TRAIN[kind:-1:3]}
        assert words.split(", ")[0] in instruction.lower().split()


def test_a_run_with_other_sampled_rows_keeps_its_held_out_ones_and_other_held_out_rows_are_refused(kept):
    others = run(kept, "NTP", 2, TOKENS, train=[*TRAIN[:-1], "h00"])
    keep_losses([others], kept / "SFTMix", kept / "losses")
    found = read_losses(kept / "losses").nll_sum("NTP", 2)
    assert found[:40].tolist() == [TOKENS[i] for i in HELD]
    assert np.isnan(found[40:]).all()
    before = (kept / "losses" / "NTP-seed-2.parquet").stat().st_mtime_ns
    keep_losses([others], kept / "SFTMix", kept / "losses")
    assert (kept / "losses" / "NTP-seed-2.parquet").stat().st_mtime_ns == before
    wrong = run(kept, "NTP", 3, TOKENS, held=HELD[:-1])
    with pytest.raises(ConfigError, match=r"seed-3.train.eval\.parquet .*rows\.parquet"):
        keep_losses([wrong], kept / "SFTMix", kept / "losses")


def test_a_run_that_diverged_is_kept_as_such_and_runs_of_other_tables_are_not(tmp_path):
    made, out = tmp_path / "table", tmp_path / "out"
    about = {"seed": 0, "versions": {}, "trained_by": [], "contrasts": [{"p": 0.01}]}
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


# ------------------------------------------------------------------------------------------- by example


SEEDS = range(1, 11)
SHORTEST = sorted(HELD, key=lambda i: (TOKENS[i], i))[:10]
PAIR = ("SFTMix", "NTP")


def noisy(seed: int, offset: Mapping[str, float], size: float = 0.02) -> dict[str, float]:
    """Losses of 3 nats per token, with noise of each row and an offset of some, both per token."""
    rng = np.random.default_rng(seed)
    return {i: n * (3 + size * float(rng.standard_normal()) + offset.get(i, 0.0)) for i, n in TOKENS.items()}


def finished(results: Path, offset: Mapping[str, float], lost: int | None = None) -> dict[str, Tier]:
    """Keep a table of two arms at ten seeds, the second arm without offset; return its tier, which is complete."""
    made = results / "made"
    runs = [
        run(made, arm, seed, noisy(100 * seed + (arm == "NTP"), offset if arm == "SFTMix" else {}))
        for arm in PAIR
        for seed in SEEDS
        if (arm, seed) != ("NTP", lost)
    ]
    split(made, 1)
    texts(made, "SFTMix", 1)
    keep_losses(runs, made / "SFTMix", results / "primary" / "losses")
    plan = read_tier("primary", Path("nowhere"))
    return {"primary": replace(plan, runs={arm: {seed: {} for seed in plan.seeds} for arm in plan.arms})}


@pytest.fixture(scope="module")
def shortest(tmp_path_factory) -> tuple[dict[str, Tier], Path]:
    """SFTMix is lower by 0.1 nats per token in the shortest quarter of the held-out rows."""
    results = tmp_path_factory.mktemp("shortest")
    return finished(results, dict.fromkeys(SHORTEST, -0.1)), results


def named(found: list[Found]) -> dict[tuple[str, str], Found]:
    return {(each.rows, each.group): each for each in found}


def test_an_effect_in_one_group_is_found_there_beyond_the_other_rows(shortest):
    tiers, results = shortest
    found, notes = by_example(tiers, results, [PAIR])
    assert notes == []
    group = named(found)[HELD_OUT, "length: shortest"]
    apart, together = [], []
    for seed in SEEDS:
        ours, theirs = noisy(100 * seed, dict.fromkeys(SHORTEST, -0.1)), noisy(100 * seed + 1, {})
        per_token = [
            sum(ours[i] - theirs[i] for i in own) / sum(TOKENS[i] for i in own)
            for own in (SHORTEST, [i for i in HELD if i not in SHORTEST])
        ]
        together.append(per_token[0])
        apart.append(per_token[0] - per_token[1])
    assert list(group.inside.values()) == pytest.approx(together, abs=1e-5)
    assert list(group.beyond.values()) == pytest.approx(apart, abs=1e-5)
    assert group.mean_beyond == pytest.approx(-0.1, abs=0.02)
    student = ttest_1samp(apart, 0.0).confidence_interval()
    assert group.interval_beyond == pytest.approx((student.low, student.high), abs=1e-5)
    assert group.interval_inside[1] < -0.05
    # All ten seeds agree in sign, so only the two assignments of one sign are as large.
    assert group.p == group.p_largest == 2 / 1024
    asked = [each for each in found if each.asked]
    assert group.p_holm == pytest.approx(len(asked) * 2 / 1024)
    assert min(asked, key=lambda each: each.mean_beyond) is group
    assert all(each.p_largest > 0.05 for each in asked if each.rows == SAMPLE)


def test_the_groups_are_those_of_confidence_length_half_and_topic(shortest):
    tiers, results = shortest
    found = named(by_example(tiers, results, [PAIR])[0])
    quarters = ("second quarter", "third quarter")
    words = [f"confidence: {w}" for w in ("least confident", *quarters, "most confident")]
    words += [f"length: {w}" for w in ("shortest", *quarters, "longest")]
    for rows, halves, size in ((HELD_OUT, [], 10), (SAMPLE, ["half: unconfident", "half: confident"], 4)):
        own = [name for kind, name in found if kind == rows]
        assert own[: len(words) + len(halves)] == words + halves
        assert all(name.startswith("topic: ") for name in own[len(words) + len(halves) :])
        assert {found[rows, word].examples for word in words} == {size}
    unconfident = sorted(HELD, key=lambda i: -BASE[i] / TOKENS[i])[:10]
    tokens, expected = sum(TOKENS[i] for i in unconfident), []
    for seed in SEEDS:
        ours, theirs = noisy(100 * seed, dict.fromkeys(SHORTEST, -0.1)), noisy(100 * seed + 1, {})
        expected.append(sum(ours[i] - theirs[i] for i in unconfident) / tokens)
    assert list(found[HELD_OUT, words[0]].inside.values()) == pytest.approx(expected, abs=1e-5)
    # One row of the sample has no half, so the two halves are two questions here.
    assert found[SAMPLE, "half: confident"].asked
    assert found[SAMPLE, "half: unconfident"].examples == 7


def test_an_effect_that_is_the_same_in_all_rows_is_beyond_the_others_in_no_group(tmp_path):
    found, _ = by_example(finished(tmp_path, dict.fromkeys(TOKENS, -0.1)), tmp_path, [PAIR])
    assert all(each.interval_inside[1] < 0 for each in found)
    assert all(each.p_holm > 0.05 and each.p_largest > 0.05 for each in found if each.asked)
    assert min(each.p for each in found if each.asked) < 0.2  # so many looks find something without a correction


def test_a_table_tells_what_it_could_find_and_what_it_left_out(tmp_path):
    tiers = finished(tmp_path, dict.fromkeys(SHORTEST, -0.1), lost=4)
    others = run(tmp_path / "made", "NTP", 7, noisy(701, {}), train=TRAIN[:-1])
    keep_losses([others], tmp_path / "made" / "SFTMix", tmp_path / "primary" / "losses")
    tiers |= {"overfit": read_tier("overfit", Path("nowhere"))}
    text = "\n".join(example_lines(tiers, tmp_path))
    assert "**Exploratory: no plan named these tests" in text
    assert "`primary`, SFTMix − NTP: left out, since their losses were not kept: seeds 4." in text
    assert "left out, since some seed lacks their rows: confidence: least confident (training sample); " in text
    assert "`primary`, SFTMix − RandomSplit: left out, since their losses were not kept: seeds 1, 2, " in text
    assert "`overfit` is unfinished (0 of 60 runs)." in text
    assert "11 questions are asked. The smallest p that 9 seeds can give is 0.0039." in text
    assert "it is 0.0430: could pass." in text
    assert "| `primary` | SFTMix − NTP | held-out | length: shortest: -0.1" in text
    assert f"| {SAMPLE} |" not in text


def test_an_unfinished_table_tells_nothing(shortest):
    tiers, results = shortest
    runs = {**tiers["primary"].runs, "NTP": {1: {}}}
    unfinished = {"primary": replace(tiers["primary"], runs=runs), "overfit": read_tier("overfit", Path("nowhere"))}
    assert list(example_lines(unfinished, results)) == [
        "**Exploratory**, and nothing to tell yet: `primary` is unfinished (61 of 70 runs); "
        "`overfit` is unfinished (0 of 60 runs)."
    ]


def test_the_correction_by_the_largest_counts_assignments_of_signs():
    rng = np.random.default_rng(0)
    d = rng.normal(size=(5, 3)) + np.array([0, 0.5, 2])
    columns = [dict(enumerate(column)) for column in d.T.tolist()]
    del columns[0][4]  # a seed that the first group lacks

    def statistics(signs: tuple[int, ...]) -> list[float]:
        return [
            abs(sum(signs[s] * x for s, x in each.items())) / sum(x * x for x in each.values()) ** 0.5
            for each in columns
        ]

    largest = [max(statistics(signs)) for signs in itertools.product((1, -1), repeat=5)]
    expected = [sum(each >= own - 1e-9 for each in largest) / 32 for own in statistics((1,) * 5)]
    assert largest_p(columns) == pytest.approx(expected)
    assert expected[2] <= 4 / 32 < expected[0]
    assert largest_p([]) == []
    assert largest_p([{1: 0.0, 2: 0.0}]) == [1.0]


def test_the_correction_by_the_largest_finds_something_by_chance_once_in_twenty():
    rng, rounds, n = np.random.default_rng(1), 400, 8
    shared = rng.normal(size=(rounds, n, 1))  # groups of one table vary together
    found = [
        min(largest_p([dict(enumerate(column)) for column in each.T.tolist()])) <= 0.05
        for each in shared + rng.normal(size=(rounds, n, 12))
    ]
    assert np.mean(found) == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / rounds) ** 0.5)
