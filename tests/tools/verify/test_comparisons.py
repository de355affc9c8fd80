"""What counts as the same: lines of a log, by rules that need no run."""

import re

import pytest

from sftmix.components.contracts import OF_EXAMPLES, OF_LOSSES
from sftmix.tools.verify.findings import Finding, compare_logs, findings_of

LINE = {"time": 1.0, **dict.fromkeys(OF_EXAMPLES, 5), **dict.fromkeys(OF_LOSSES, 0.5), "rows": "ab"}


def compared(then: list[dict], now: list[dict], precision=None) -> list[Finding]:
    logs = ([{**line, "step": step} for step, line in enumerate(log, 1) if line] for log in (then, now))
    return compare_logs(*logs, range(1, len(now) + 1), precision)


def verdicts(then: dict, now: dict, precision=None) -> dict[str, bool | None]:
    return {finding.kind: finding.same for finding in compared([{**LINE, **then}], [{**LINE, **now}], precision)}


@pytest.mark.parametrize("lost", [*([name] for name in (*OF_EXAMPLES, *OF_LOSSES)), LINE], ids=str)
def test_an_entry_or_a_line_that_was_deleted_from_the_log_differs(lost):
    then = [LINE, {name: value for name, value in LINE.items() if name not in lost}]
    found = [re.sub("; .* differ", "", f.note) for f in compared(then, [LINE] * 2) if f.same is False]
    names = [name for name in LINE if name in lost and name != "time"]
    assert sorted(found) == sorted(
        f"metrics.jsonl, {name}, step 2: expected None, found {LINE[name]}" for name in names
    )


@pytest.mark.parametrize("then", [10**400, [10**400, 1], None, True, [[1], {"a": 2}], {"a": [1]}])
@pytest.mark.parametrize("relative", [{}, {"one": 1e-6}])
def test_a_value_of_another_kind_differs(then, relative):
    (found,) = findings_of("figures", "train", {"one": then}, {"one": "text"}, relative)
    assert (found.same, found.exact) == (False, False)
    (found,) = findings_of("figures", "train", {"one": then}, {"one": then}, relative)
    assert (found.same, found.exact) == (True, True)


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
    ],
)
def test_another_machine_may_round(name, then, now, precision, same):
    found = verdicts({name: then}, {name: now}, precision)
    assert found == {"examples": True, "losses": same}
    assert verdicts({name: then}, {name: now}) == {"examples": True, "losses": False}


def test_another_machine_may_not_count_in_another_way():
    assert verdicts({"tokens": 1000000}, {"tokens": 1000001}, "fp32") == {"examples": False, "losses": True}


def test_what_callbacks_measured_is_compared_on_the_machine_of_the_run_alone():
    then, now = {"eval_accuracy": 0.50}, {"eval_accuracy": 0.51}
    assert verdicts(then, now)["losses"] is False
    found = [f.same for f in compared([LINE | then], [LINE | now], "fp32") if f.kind == "losses"]
    assert found == [None, True]
