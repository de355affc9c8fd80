"""Evaluate: when the held-out rows are looked at."""

import pytest

from sftmix.components import Callback, Evaluate, StageState
from sftmix.words.errors import ConfigError


def evaluated(callback, *, held_out=True):
    """Call the hooks as the loop does, in two epochs of four steps; return the step of each evaluation."""
    steps = []
    for step in range(1, 9):
        evaluate = (lambda step=step: {"eval_nll": step}) if held_out else None
        state = StageState("train", step, 8, step // 4, evaluate=evaluate)
        results = [callback.on_step_end(state), callback.on_epoch_end(state) if step % 4 == 0 else None]
        assert not any(result.stop for result in results if result)
        steps += [result.metrics["eval_nll"] for result in results if result]
    return steps


def test_each_epoch_or_each_so_many_steps():
    assert evaluated(Evaluate()) == [4, 8]
    assert evaluated(Evaluate(every=3)) == [3, 6]
    assert evaluated(Evaluate(every=4)) == [4, 8]


def test_without_held_out_rows_there_is_nothing_to_do():
    assert evaluated(Evaluate(), held_out=False) == evaluated(Evaluate(every=1), held_out=False) == []


def test_a_hook_that_nothing_calls_is_refused_where_it_is_written():
    def hook(self, state):
        """Do nothing."""

    for name in ("on_train_begin", "on_step_ends"):
        with pytest.raises(ConfigError, match=rf"callbacks: Mine has {name}\(\), which nothing calls.*on_step_end"):
            type("Mine", (Callback,), {name: hook})
    type("Mine", (Callback,), {"on_step_end": hook, "once": hook})
