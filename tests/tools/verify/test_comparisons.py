"""What counts as the same: lines of a log, and weights, by rules that need no run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sftmix.tools.verify.certificate import Certificate
from sftmix.tools.verify.steps import Comparison, check_steps
from sftmix.tools.verify.weights import check_weights
from sftmix.tools.verify.window import Window

COUNTS = {"epoch": 0, "rows": "ab", "ntp_tokens": 5, "mixup_tokens": 2, "tokens": 9, "tokens_total": 9}
LINE = {
    "step": 1,
    "time": 1.0,
    **COUNTS,
    "examples_total": 4,
    "loss": 2.5,
    "ntp": 2.0,
    "mixup": 0.5,
    "mu_effective": 0.2,
    "learning_rate": 1e-5,
    "grad_norm": 3.0,
}
EXACT, ROUNDED = Comparison(exact=True), Comparison(exact=False)


def window(*lines: dict) -> Window:
    logged = {step: line for step, line in enumerate(lines, start=1) if line}
    return Window(Path("run"), "train", Path("run/train"), 0, len(lines), len(lines), False, (), logged)


def compared(then: list[dict], now: list[dict], rule: Comparison = EXACT) -> Certificate:
    return Certificate(window(*then), check_steps(window(*then), dict(enumerate(now, start=1)), rule))


def without(*names: str) -> dict:
    return {name: value for name, value in LINE.items() if name not in names}


@pytest.mark.parametrize("name", sorted(LINE.keys() - {"step", "time"}))
def test_an_entry_that_was_deleted_from_the_log_differs(name):
    found = compared([LINE, without(name)], [LINE, LINE])
    assert [f for f in found.findings if f.same is None] == []
    (finding,) = found.different
    assert (finding.note, finding.expected, finding.found) == (f"step 2, {name}", "no entry", LINE[name])


def test_lines_of_a_step_alone_are_not_the_same():
    found = compared([{"step": 1}], [LINE])
    assert {finding.kind for finding in found.different} == {"examples", "losses"}
    assert not [finding for finding in found.findings if finding.same]


def test_a_line_that_was_deleted_differs():
    (finding,) = compared([LINE, {}], [LINE, LINE]).different
    assert (finding.note, finding.expected) == ("step 2", "a line in metrics.jsonl")


def test_figures_that_the_log_does_not_have_are_told():
    found = compared([LINE, LINE], [{**LINE, "eval_nll": 0.1}, LINE])
    assert (found.same, found.exact) == (True, False)
    assert "losses    not compared: eval_nll in 1 of the steps, which the log of the run does not have" in found.lines()


def test_figures_that_the_replay_does_not_give_are_not_claimed():
    found = compared([{**LINE, "eval_nll": 0.1}, LINE], [LINE, LINE])
    assert (found.same, found.exact) == (True, False)
    assert "losses    not compared: eval_nll in 1 of the steps, which the replay does not give" in found.lines()
    assert "eval_nll" not in next(line for line in found.lines() if line.startswith("losses    same"))
    assert found.sentence().endswith("bit for bit; not compared, at least in part: losses")


def test_figures_of_some_steps_are_claimed_of_these():
    now = [{**LINE, "eval_nll": 0.1}, LINE]
    found = compared(now, now)
    assert found.exact
    assert found.lines()[1].endswith(" grad_norm and eval_nll (in 1) of 2 steps, bit for bit")


def test_another_machine_may_round_but_not_count():
    assert not EXACT.same("loss", 1.0, 1.0 + 1e-9)
    assert ROUNDED.same("loss", 1.0, 1.0 + 1e-9)
    assert not ROUNDED.same("loss", 1.0, 1.0 + 1e-4)
    assert not ROUNDED.same("tokens", 1000000, 1000001)
    assert not ROUNDED.same("loss", None, 1.0)


def test_bf16_rounds_losses_and_not_the_learning_rate():
    bf16 = Comparison(exact=False, precision="bf16")
    assert bf16.same("loss", 1.0, 1.0 + 5e-3)
    assert not bf16.same("loss", 1.0, 1.0 + 5e-2)
    assert not bf16.same("learning_rate", 1.0, 1.0 + 5e-3)
    assert bf16.same("grad_norm", 1.0, 1.0 + 5e-2)
    assert not bf16.same("grad_norm", 1.0, 1.0 + 5e-1)
    assert bf16.same("mixing_cosine", 0.001, 0.002)
    assert not bf16.same("mixing_cosine", 0.001, 0.1)


def test_one_more_token_is_told_where_rounding_may_turn_it():
    then, now = {**LINE, "eval_accuracy": 0.50}, {**LINE, "eval_accuracy": 0.51}
    assert [finding.note for finding in compared([then], [now]).different] == ["step 1, eval_accuracy"]
    found = compared([then], [now], ROUNDED)
    assert (found.same, found.exact) == (True, False)
    assert (
        "losses    not compared: eval_accuracy in 1 of the steps, which differ: rounding may turn a token"
        in found.lines()
    )


# ----------------------------------------------------------------------------------------------- weights

BEFORE = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([0.5])}
AFTER = {"a": torch.tensor([1.01, -2.01, 3.0]), "b": torch.tensor([0.5])}


def judged(run: dict, *, before: dict | None = BEFORE, exact: bool = False, after: dict = AFTER) -> list[bool | None]:
    found = check_weights("weights", run, after, "checkpoint", exact=exact, before=before)
    assert all(not finding.exact for finding in found if not torch.equal(run["a"], after["a"]))
    return [finding.same for finding in found]


def test_weights_of_another_machine_are_held_against_what_their_tensor_moved():
    """It moved by 0.01, so two honest trainings end at most 0.02 apart."""
    assert judged({**AFTER, "a": AFTER["a"] + torch.tensor([0.0, 0.0, 0.019])}) == [True]
    assert judged({**AFTER, "a": AFTER["a"] + torch.tensor([0.0, 0.0, 0.021])}) == [False]
    assert judged({**AFTER, "a": AFTER["a"] + torch.tensor([0.0, 3.0, 0.0])}) == [False]
    assert judged({**AFTER, "a": AFTER["a"] + torch.tensor([torch.nan, 0.0, 0.0])}) == [False]
    assert judged({**AFTER, "a": AFTER["a"] + 1e-5}, exact=True) == [False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_replay_that_left_the_numbers_explains_nothing(value):
    assert judged(AFTER, after={**AFTER, "a": torch.tensor([1.01, value, 3.0])}) == [False]


def test_a_tensor_that_did_not_move_may_not_differ():
    assert judged({"a": AFTER["a"], "b": torch.tensor([0.51])}) == [False]


def test_a_model_in_bf16_may_differ_by_its_last_digit():
    run, after = ({"a": torch.tensor([value]).bfloat16()} for value in (1.0, 1.0078125))
    assert judged(run, before=after, after=after) == [True]
    assert judged({"a": torch.tensor([1.03125]).bfloat16()}, before=after, after=after) == [False]


def test_weights_are_told_and_not_judged_without_those_before():
    assert judged({**AFTER, "a": AFTER["a"] + 1e-5}, before=None) == [None]
