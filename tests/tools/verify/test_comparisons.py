"""What counts as the same: lines of a log, and weights, by rules that need no run."""

from __future__ import annotations

import pytest
import torch

from sftmix.tools.verify.certificate import Finding
from sftmix.tools.verify.compare import EXAMPLES, LOSSES, Rule, compare, compare_logs

LINE = {"step": 1, "time": 1.0, **dict.fromkeys(EXAMPLES, 5), **dict.fromkeys(LOSSES, 0.5), "rows": "ab"}
EXACT, ROUNDED = Rule(exact=True), Rule(exact=False)


def compared(then: list[dict], now: list[dict], rule: Rule = EXACT) -> list[Finding]:
    run, replay = ({step: line for step, line in enumerate(log, 1) if line} for log in (then, now))
    return compare_logs(run, replay, range(1, len(now) + 1), rule)


def verdicts(then: dict, now: dict, rule: Rule = EXACT) -> dict[str, bool | None]:
    return {finding.kind: finding.same for finding in compared([{**LINE, **then}], [{**LINE, **now}], rule)}


@pytest.mark.parametrize("name", [*EXAMPLES, *LOSSES])
def test_an_entry_that_was_deleted_from_the_log_differs(name):
    (finding,) = (f for f in compared([LINE, {k: v for k, v in LINE.items() if k != name}], [LINE] * 2) if not f.same)
    assert (finding.same, finding.note.split(";")[0], finding.expected, finding.found) == (
        False,
        f"metrics.jsonl, {name}, step 2",
        "nan" if name != "rows" else None,
        LINE[name],
    )


def test_a_line_that_was_deleted_differs():
    (finding,) = (f for f in compared([LINE, {}], [LINE, LINE]) if not f.same)
    assert (finding.note, finding.expected) == ("metrics.jsonl, step 2", "none")


@pytest.mark.parametrize("side", [0, 1])
def test_figures_that_one_log_lacks_in_some_steps_are_not_claimed(side):
    logs = [[LINE, LINE], [LINE, LINE]]
    logs[side] = [{**LINE, "eval_nll": 0.1}, LINE]
    assert [(f.kind, f.same) for f in compared(*logs) if not f.same] == [("losses", None)]
    assert "eval_nll" not in next(f.note for f in compared(*logs) if f.kind == "losses" and f.same)
    assert all(f.same and f.exact for f in compared(logs[side], logs[side]))


@pytest.mark.parametrize(
    ("name", "then", "now", "precision", "same"),
    [
        ("loss", 1.0, 1.0 + 1e-9, "fp32", True),
        ("loss", 1.0, 1.0 + 1e-4, "fp32", False),
        ("loss", None, 1.0, "fp32", False),
        ("loss", 1.0, 1.0 + 5e-3, "bf16", True),
        ("loss", 1.0, 1.0 + 5e-2, "bf16", False),
        ("learning_rate", 1.0, 1.0 + 5e-3, "bf16", False),
        ("grad_norm", 1.0, 1.0 + 5e-2, "bf16", True),
        ("grad_norm", 1.0, 1.0 + 5e-1, "bf16", False),
        ("mixing_cosine", 0.001, 0.002, "bf16", True),
        ("mixing_cosine", 0.001, 0.1, "bf16", False),
    ],
)
def test_another_machine_may_round(name, then, now, precision, same):
    found = verdicts({name: then}, {name: now}, Rule(exact=False, precision=precision))
    assert found == {"examples": True, "losses": same}
    assert verdicts({name: then}, {name: now}) == {"examples": True, "losses": False}


def test_another_machine_may_not_count_in_another_way():
    assert verdicts({"tokens": 1000000}, {"tokens": 1000001}, ROUNDED) == {"examples": False, "losses": True}


def test_one_more_token_is_not_judged_where_rounding_may_turn_it():
    then, now = {"eval_accuracy": 0.50}, {"eval_accuracy": 0.51}
    assert verdicts(then, now)["losses"] is False
    assert [f.same for f in compared([LINE | then], [LINE | now], ROUNDED) if f.kind == "losses"] == [None, True]


# ----------------------------------------------------------------------------------------------- weights

BEFORE = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([0.5])}
AFTER = {"a": torch.tensor([1.01, -2.01, 3.0]), "b": torch.tensor([0.5])}


def judged(run: dict, *, before: dict = BEFORE, after: dict = AFTER, rule: Rule = ROUNDED) -> bool | None:
    (finding,) = compare("weights", "checkpoint", run, after, within=rule.of_weights(after, before))
    assert not finding.exact
    return finding.same


@pytest.mark.parametrize(
    ("change", "same"),
    [([0.0, 0.0, 0.019], True), ([0.0, 0.0, 0.021], False), ([0.0, 3.0, 0.0], False), ([0.0, 0.0, torch.nan], False)],
)
def test_weights_of_another_machine_are_held_against_what_their_tensor_moved(change, same):
    """It moved by 0.01, so two honest trainings end at most 0.02 apart."""
    run = {**AFTER, "a": AFTER["a"] + torch.tensor(change)}
    assert judged(run) is same
    assert judged(run, rule=EXACT) is False


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_replay_that_left_the_numbers_explains_nothing(value):
    assert judged(AFTER, after={**AFTER, "a": torch.tensor([1.01, value, 3.0])}) is False


def test_a_tensor_that_did_not_move_may_not_differ():
    assert judged({"a": AFTER["a"], "b": torch.tensor([0.51])}) is False


def test_a_model_in_bf16_may_differ_by_its_last_digit():
    run, after = ({"a": torch.tensor([value]).bfloat16()} for value in (1.0, 1.0078125))
    assert judged(run, before=after, after=after) is True
    assert judged({"a": torch.tensor([1.03125]).bfloat16()}, before=after, after=after) is False
