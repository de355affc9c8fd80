"""Evaluate: when the held-out rows are looked at."""

from sftmix.components import Evaluate, StageState


def run(callback, *, steps_per_epoch=4, epochs=2, held_out=True):
    """Call the hooks as the loop does; return (step, metrics) of every evaluation."""
    logged = []
    for step in range(1, steps_per_epoch * epochs + 1):
        state = StageState(
            stage="train",
            step=step,
            total_steps=steps_per_epoch * epochs,
            epoch=step // steps_per_epoch,
            evaluate=(lambda step=step: {"eval_nll": float(step)}) if held_out else None,
        )
        hooks = [callback.on_step_end] + [callback.on_epoch_end] * (step % steps_per_epoch == 0)
        results = [result for hook in hooks if (result := hook(state)) is not None]
        logged += [(step, dict(result.metrics)) for result in results]
        assert not any(result.stop for result in results)
    return logged


def test_each_epoch_or_each_so_many_steps():
    assert run(Evaluate()) == [(4, {"eval_nll": 4.0}), (8, {"eval_nll": 8.0})]
    assert [step for step, _ in run(Evaluate(every=3))] == [3, 6]
    assert [step for step, _ in run(Evaluate(every=4))] == [4, 8]


def test_without_held_out_rows_there_is_nothing_to_do():
    assert run(Evaluate(), held_out=False) == run(Evaluate(every=1), held_out=False) == []
