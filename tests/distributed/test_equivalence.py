"""Runs that must be equal, through the real command line.

The split is flips-on-a-hair at its median (T32), so runs at different world sizes are compared given the same
reference, confidence and split: their directories are copied, which is what the stages' manifests are for.
"""

import shutil
from pathlib import Path

import pytest
import torch

from tests.forked import SIGKILLED, done, ended
from tests.tiny import STAGES, Tiny, in_this_process, make_tiny, metrics, weights


def command(*words: str, cwd: Path, ranks: int = 1) -> None:
    """A command line that must succeed; of one rank in this process, which has the imports behind it."""
    if ranks > 1:
        done(words, cwd=cwd, ranks=ranks)
    else:
        assert in_this_process(*words, cwd=cwd).returncode == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory) -> Path:
    """One process, uninterrupted: what all the others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "one"
    command("run", *tiny.options, "--out", str(out), cwd=out.parent)
    return out


@pytest.fixture
def run(tiny, one, tmp_path):
    """Train again from the same split, with other options."""

    def again(name: str, *words: str, ranks: int = 1) -> Path:
        out = tmp_path / name
        if not out.exists():
            for stage in STAGES:
                shutil.copytree(one / stage, out / stage)
        command("run", *tiny.options, "--out", str(out), *words, cwd=tmp_path, ranks=ranks)
        return out

    return again


def losses(run: Path) -> list[float]:
    return [m["loss"] for m in metrics(run)]


def assert_equal(a: Path, b: Path) -> None:
    """Bit for bit: every loss and every weight."""
    assert losses(a) == losses(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


def assert_close(a: Path, b: Path) -> None:
    """Within float32 rounding of sums in another order (12 steps of AdamW at 1e-3, which amplifies it)."""
    assert losses(a) == pytest.approx(losses(b), abs=3e-6)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert max(float((left[k] - right[k]).abs().max()) for k in left) < 1e-5
    for x, y in zip(metrics(a), metrics(b), strict=True):
        for count in ("ntp_tokens", "mixup_tokens", "tokens"):
            assert x[count] == y[count]


SLOW = ("--training.learning_rate", "0.001")


@pytest.fixture(scope="module")
def plain(tiny, one, tmp_path_factory) -> Tiny:
    """The tiny model without dropout, whose masks depend on ranks and micro-batches."""
    return Tiny(make_tiny(tmp_path_factory.mktemp("plain"), dropout=0.0).model, tiny.train, tiny.eval)


@pytest.fixture(scope="module")
def base(plain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "base"
    command("run", *plain.options, *SLOW, "--out", str(out), cwd=out.parent)
    return out


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        pytest.param(("--training.parallel", "ddp"), 2, marks=pytest.mark.slow),
        pytest.param(("--training.parallel", "fsdp"), 2, marks=pytest.mark.slow),
        pytest.param(("--training.parallel", "hsdp", "--training.shard_group_size", "2"), 4, marks=pytest.mark.slow),
        (("--training.micro_batch_size", "8"), 1),
        (("--training.micro_batch_size", "2", "--training.length_groups", "1"), 1),
        pytest.param(
            ("--training.micro_batch_size", "null", "--training.micro_batch_tokens", "150"), 2, marks=pytest.mark.slow
        ),
        (("--training.padding_free", "true"), 1),
        (("--training.activation_checkpointing", "true"), 1),
        (("--training.chunk_size", "5"), 1),
    ],
    ids=[
        *("ddp", "fsdp", "hsdp", "one big batch", "accumulation", "token budget", "padding-free"),
        *("recomputed activations", "small chunks"),
    ],
)
def test_same_run_computed_in_another_way(plain, base, tmp_path, words, ranks):
    out = tmp_path / "other"
    for stage in STAGES:
        shutil.copytree(base / stage, out / stage)
    command("run", *plain.options, *SLOW, "--out", str(out), *words, cwd=tmp_path, ranks=ranks)
    assert_close(base, out)


def test_mu_zero_is_ntp_in_the_same_order(run):
    zero = run("zero", "--objective.mu", "0")
    ntp = run("ntp", "--objective", "NTP", "--pairing", "RandomPairs")
    assert_equal(zero, ntp)
    assert all(m["mixup_tokens"] == 0 and m["mixup"] == 0 for m in metrics(zero))


def test_baseline_is_ntp_in_the_same_order(run):
    both = run("both", "--with_baseline")
    ntp = run("ntp", "--objective", "NTP", "--pairing", "RandomPairs")
    left, right = weights(both, "baseline"), weights(ntp)
    assert all(torch.equal(left[k], right[k]) for k in right)
    assert losses(ntp) == [m["loss"] for m in metrics(both, "baseline")]


KILL = '''
import os, signal
from pathlib import Path
from sftmix.components import Callback

class KillOnce(Callback):
    """Sends this process a signal at one step, the first time it gets there."""
    gives = frozenset()
    def __init__(self, *, stage: str, step: int, signal: int):
        self.stage, self.step, self.signal = stage, step, signal
    def on_step_end(self, state):
        marker = Path(f"killed-{os.environ.get('RANK', 0)}")
        if (state.stage, state.step) == (self.stage, self.step) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), self.signal)
'''


def killed(place: Path, *words: str, ranks: int = 1) -> list[int | None]:
    """The exit codes of a command with the callback above, in processes of its own; a second command lives on."""
    (place / "killing.py").write_text(KILL)
    it = ended(words, cwd=place, faults=[None] * ranks)
    assert len(list(place.glob("killed-*"))) == ranks, it.printed
    return it.codes


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, from which modules are imported, in this process, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("ranks", "step"),
    [(1, 7), (1, 8), (2, 6)],
    ids=["mid epoch", "end of epoch", "fsdp"],
)
@pytest.mark.slow
def test_a_run_continued_after_kill_is_the_uninterrupted_run(tiny, run, one, here, ranks, step):
    words = ["--checkpoint.every", "4", "--callbacks+", "killing.KillOnce"]
    words += ["--callbacks.stage", "train", "--callbacks.step", str(step), "--callbacks.signal", "9"]
    words += ["--training.parallel", "fsdp"] if ranks > 1 else []
    whole = run("whole", "--checkpoint.every", "4", *words[-2:], ranks=ranks) if ranks > 1 else one
    out = here / "killed"
    for stage in STAGES:
        shutil.copytree(one / stage, out / stage)
    assert killed(here, "run", *tiny.options, "--out", str(out), *words, ranks=ranks) == [SIGKILLED] * ranks
    assert not (out / "train" / "model").exists()
    assert [m["step"] for m in metrics(out)][-1] < 12
    resumed = run("killed", *words, ranks=ranks)
    assert_equal(whole, resumed)


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_loses_no_step(tiny, run, one, here):
    out = here / "stopped"
    for stage in STAGES:
        shutil.copytree(one / stage, out / stage)
    words = ["--callbacks+", "killing.KillOnce", "--callbacks.stage", "train"]
    words += ["--callbacks.step", "5", "--callbacks.signal", "15"]
    assert killed(here, "run", *tiny.options, "--out", str(out), *words) == [143]
    assert (out / "train" / "checkpoints" / "step-00000005" / "MANIFEST.json").exists()
    resumed = run("stopped", *words)
    assert_equal(one, resumed)


@pytest.mark.slow
def test_a_kill_while_the_reference_is_trained_and_scored(tiny, one, here):
    out = here / "killed"
    words = ["run", *tiny.options, "--out", str(out), "--checkpoint.every", "4", "--callbacks+", "killing.KillOnce"]
    words += ["--callbacks.stage", "reference", "--callbacks.step", "7", "--callbacks.signal", "9"]
    assert killed(here, *words) == [SIGKILLED]
    command(*words, cwd=here)
    same = "confidence/dynamics.parquet"
    assert (out / same).read_bytes() == (one / same).read_bytes()
    assert_equal(one, out)
