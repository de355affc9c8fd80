"""EarlyStopping: when it stops, through the real command, on any number of ranks and after any resume."""

from pathlib import Path

import pytest

from sftmix import RunConfig, run
from sftmix.components import Callback, CallbackResult, EarlyStopping, StageState, TrainedReference
from sftmix.disk.files import read_json
from sftmix.options import DataOptions, ModelOptions, TrainingOptions
from tests.tiny import Tiny, in_this_process, metrics
from tests.tiny import sftmix as command

pytestmark = pytest.mark.long

SINGLE = ("--objective", "NTP", "--training.warmup_ratio", "0", "--training.max_steps", "12")
STOPPING = ("--callbacks.every", "2", "--callbacks+", "EarlyStopping")
HOT = ("--training.learning_rate", "0.1")
"""A learning rate at which the first evaluations are the best."""


def stops_at(nll: list[float], patience: int, min_delta: float = 0.0) -> int | None:
    """The first evaluation (from 1) with `patience` of them behind it that no earlier best was undercut by; naively."""
    best, place = float("inf"), 0
    for k, value in enumerate(nll, start=1):
        if best - value > min_delta:
            best, place = value, k
        if k - place == patience:
            return k
    return None


def asked(callback: EarlyStopping, nll: list[float], hook: str = "on_step_end") -> int | None:
    """The first evaluation after which the callback stops."""
    for k in range(1, len(nll) + 1):
        seen = tuple((2 * step, value) for step, value in enumerate(nll[:k], start=1))
        found = getattr(callback, hook)(StageState("train", 2 * k, 100, 0, evaluations=seen))
        if found.stop:
            return k
    return None


@pytest.mark.parametrize(
    ("nll", "patience", "min_delta", "stop"),
    [
        ([3.0, 2.0, 1.0, 0.5], 1, 0.0, None),
        ([3.0, 2.0, 2.5, 2.4, 2.3], 3, 0.0, 5),
        ([3.0, 2.0, 2.5, 2.4, 1.9, 2.5, 2.6], 3, 0.0, None),
        ([3.0, 2.95, 2.92, 2.85, 2.84], 2, 0.1, 3),
        ([1.0, 2.0, 3.0], 2, 0.0, 3),
    ],
)
def test_it_stops_after_so_many_evaluations_without_improvement(nll, patience, min_delta, stop):
    callback = EarlyStopping(patience=patience, min_delta=min_delta)
    assert asked(callback, nll) == asked(callback, nll, "on_epoch_end") == stop == stops_at(nll, patience, min_delta)


def test_a_run_in_which_nothing_evaluates_is_refused(tiny, refused):
    told = refused("run", *tiny.options, *SINGLE, "--callbacks", "EarlyStopping")
    assert "EarlyStopping needs the evaluations of a callback before it" in told


# ---------------------------------------------------------------------------------------------------- in runs


def evaluations(run: Path) -> dict[int, float]:
    return {m["step"]: m["eval_nll"] for m in metrics(run) if "eval_nll" in m}


def words_of(tiny: Tiny, out: Path) -> list[str]:
    return ["run", *tiny.options, *SINGLE, *HOT, *STOPPING, "--callbacks.patience", "2", "--out", str(out)]


@pytest.fixture(scope="module")
def early(finished, tmp_path_factory) -> Path:
    """A run that stops early and keeps its best weights."""
    out = tmp_path_factory.mktemp("early") / "run"
    done = in_this_process(*words_of(finished.tiny, out), "--checkpoint.keep_best", "true", cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


def stopped(run: Path) -> int:
    """The step at which the run has stopped, as its evaluations demand."""
    found = evaluations(run)
    last = 2 * (stops_at(list(found.values()), 2) or 0)
    assert list(found) == list(range(2, last + 1, 2))
    assert len(metrics(run)) == last
    return last


def test_a_run_stops_early_and_says_where(early, tmp_path, sftmix):
    run, found = early, evaluations(early)
    last = stopped(run)
    assert 4 <= last < 12
    summary = read_json(run / "summary.json")
    assert f"EarlyStopping stopped the training early, after step {last} of 12." in summary["remarks"]
    best = min(found, key=found.__getitem__)
    assert [path.name for path in (run / "train" / "best").iterdir()] == [f"step-{best:08d}"]
    assert sftmix("export", str(run), "--best", "--to", str(tmp_path / "best")).code == 0


STOPS = """
import os, signal
from sftmix.components import Callback

class Interrupts(Callback):
    gives = frozenset()
    def __init__(self, *, step: int):
        self.step = step
    def on_step_end(self, state):
        if state.stage == "train" and state.step == self.step and state.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def interrupted(tmp_path: Path, tiny: Tiny, step: int, ranks: int = 1) -> Path:
    """The same run, stopped by a signal after a step and continued."""
    (tmp_path / "parts.py").write_text(STOPS)
    words = words_of(tiny, tmp_path / "run")
    first = command(
        *words, "--callbacks+", "parts.Interrupts", "--callbacks.step", str(step), cwd=tmp_path, ranks=ranks
    )
    assert first.returncode == (143 if ranks == 1 else 1), first.stderr
    assert len(metrics(tmp_path / "run")) == step
    again = command(*words, cwd=tmp_path, ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {step}" in again.stdout
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4])
def test_what_was_seen_before_a_resume_counts(early, finished, tmp_path, step):
    """Stopped between the best evaluation and the end: a count that began anew would train on."""
    run = interrupted(tmp_path, finished.tiny, step)
    for key in ("eval_nll", "loss", "tokens_total", "examples_total"):
        assert [m.get(key) for m in metrics(run)] == [m.get(key) for m in metrics(early)]


@pytest.mark.slow
def test_all_ranks_stop_alike(finished, tmp_path):
    """By the evaluations of both parts; dropout is another one on two ranks, so they are not those of one rank."""
    stopped(interrupted(tmp_path, finished.tiny, 3, ranks=2))


@pytest.mark.slow
def test_a_reference_is_trained_without_it(tiny, made):
    """It has no held-out rows: one that was made before is read back by a run that stops early."""
    words = [*tiny.options, "--training.max_steps", "2"]
    manifest = made("reference", *words) / "reference" / "MANIFEST.json"
    before = manifest.stat().st_mtime_ns
    made("run", *words, "--callbacks+", "EarlyStopping")
    assert manifest.stat().st_mtime_ns == before


class Budget(Callback):
    """Stops after so many steps, as it counts them itself."""

    def __init__(self, *, steps: int) -> None:
        self.steps, self.made, self.by_stage = steps, 0, {}

    def on_step_end(self, state):
        self.made += 1
        self.by_stage[state.stage] = self.by_stage.get(state.stage, 0) + 1
        self.last = state.step
        return CallbackResult(stop=self.made >= self.steps)


def test_each_stage_begins_with_the_callback_as_it_was_built(tiny, tmp_path):
    """As where each stage is made by a process of its own, or after a resume."""
    training = TrainingOptions(learning_rate=0.01, global_batch_size=8, epochs=2.0)
    budget = Budget(steps=10)
    config = RunConfig(
        out=str(tmp_path / "run"),
        model=ModelOptions(path=str(tiny.model)),
        data=DataOptions(train=str(tiny.train)),
        reference=TrainedReference(checkpoints=1),
        with_baseline=True,
        training=training,
        callbacks=[budget],
    )
    run(config)
    assert [len(metrics(tmp_path / "run", stage)) for stage in ("reference", "train", "baseline")] == [8, 8, 8]
    assert (budget.made, budget.by_stage, budget.last) == (8, {"baseline": 8}, 8)
