"""What a stage is made from: all that decides its result is among its inputs, so that nothing is reused wrongly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sftmix import RunConfig
from sftmix.components import NTP, ConfidenceGapPairs, FromCheckpoints, Linear, PairSampler, RandomPairs, SFTMix
from sftmix.components.reference import FromFile
from sftmix.errors import ConfigError
from sftmix.export import export_run
from sftmix.model_files import fingerprint
from sftmix.options import CheckpointOptions, DataOptions, ModelOptions, TrainingOptions
from sftmix.pipeline import run
from sftmix.store import read_dynamics, write_dynamics
from tests.tiny import Tiny, groups, metrics, table


def config(tiny: Tiny, out: Path, *, precision: str = "fp32", every: int = 0, **rest) -> RunConfig:
    return RunConfig(
        out=str(out),
        model=ModelOptions(path=str(tiny.model)),
        data=DataOptions(train=str(tiny.train), eval=str(tiny.eval)),
        training=TrainingOptions(
            global_batch_size=8, micro_batch_size=4, max_steps=4, learning_rate=1e-2, precision=precision
        ),
        checkpoint=CheckpointOptions(every=every),
        **rest,
    )


def losses(run_directory: Path) -> list[float]:
    return [m["loss"] for m in metrics(run_directory)]


@pytest.fixture
def two_rankings(finished, tmp_path) -> list[Path]:
    """Two files of dynamics with the same halves and another order inside them."""
    dynamics = read_dynamics(finished.path / "confidence" / "dynamics.parquet")
    half = groups(finished.path)
    rng, nll = np.random.default_rng(0), dynamics.nll_sum.copy()
    for name in ("confident", "unconfident"):
        rows = np.array([i for i, example in enumerate(dynamics.ids) if half[example] == name])
        mean = dynamics.nll_sum[rows] / dynamics.n_tokens[rows, None]
        nll[rows] = rng.permutation(mean) * dynamics.n_tokens[rows, None]
    found = [tmp_path / "one.parquet", tmp_path / "other.parquet"]
    for path, sums in zip(found, (dynamics.nll_sum, nll), strict=True):
        write_dynamics(path, replace(dynamics, nll_sum=sums, token_nll=None))
    return found


def test_pairs_by_confidence_are_not_those_of_another_confidence(finished, two_rankings, tmp_path):
    """The halves are the same, the pairs are not: a sibling's training is no stand-in."""
    made = []
    for number, dynamics in enumerate(two_rankings):
        for name, pool in (("alone", []), ("beside", [tmp_path / "beside-0"])):
            out = tmp_path / f"{name}-{number}"
            reference = FromFile(path=str(dynamics))
            run(config(finished.tiny, out, reference=reference, pairing=ConfidenceGapPairs()), pool=pool)
            made.append(out)
    assert groups(made[0]) == groups(made[2])
    assert losses(made[0]) != losses(made[2])
    assert losses(made[2]) == losses(made[3])


def test_models_on_disk_are_scored_again_in_another_precision(finished, tmp_path):
    scored = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        reference = FromCheckpoints(paths=[str(finished.tiny.model)])
        made = config(finished.tiny, out, precision=precision, reference=reference)
        run(made, until="split", pool=[tmp_path / "fp32"])
        scored.append(table(out / "confidence" / "dynamics.parquet")["nll_sum"])
    assert scored[0] != scored[1]


class FromAFile(PairSampler):
    """Pairs that depend on a file."""

    def __init__(self, *, path: str):
        self.path = path

    def files(self):
        return [self.path]

    def pairs(self, split, scores, *, epoch, seed):
        return RandomPairs().pairs(split, scores, epoch=epoch, seed=int(Path(self.path).read_text()))


class WithFile(Linear):
    def __init__(self, *, path: str):
        super().__init__(start=0.0, end=0.4)
        self.path = path

    def files(self):
        return [self.path]


@pytest.mark.parametrize("place", ["pairing", "schedule"])
def test_a_changed_file_of_any_component_is_refused(finished, tmp_path, place):
    """Also of a component inside another one's options."""
    file = tmp_path / "numbers.txt"
    file.write_text("1")
    chosen = {
        "pairing": {"pairing": FromAFile(path=str(file))},
        "schedule": {"objective": SFTMix(mu=WithFile(path=str(file)))},
    }[place]
    run(config(finished.tiny, tmp_path / "run", **chosen))
    file.write_text("2")
    with pytest.raises(ConfigError, match=r"numbers\.txt"):
        run(config(finished.tiny, tmp_path / "run", **chosen))


def test_a_model_is_another_one_with_another_template(finished, tmp_path):
    model = shutil.copytree(finished.tiny.model, tmp_path / "model")
    before = fingerprint(str(model))
    template = model / "chat_template.jinja"
    template.write_text((template.read_text() if template.exists() else "") + " ")
    assert fingerprint(str(model)) != before


def test_a_summary_written_again_names_what_trained_the_model(finished, tmp_path, monkeypatch):
    """A finished run that is read back after an update, or on another number of ranks, was not made by that."""
    made = config(finished.tiny, tmp_path / "run", objective=NTP())
    first = run(made)
    monkeypatch.setattr("sftmix.summary.git_revision", lambda: "a later revision")
    again = run(made)
    assert [again[key] for key in ("git_revision", "version", "world_size")] == [
        first[key] for key in ("git_revision", "version", "world_size")
    ]
    assert again["git_revision"] != "a later revision"


def test_an_adopted_run_tells_its_configuration_and_is_exported(finished, tmp_path):
    """Equal runs side by side: the second makes nothing, and is a run directory all the same."""
    for name in ("first", "second"):
        run(config(finished.tiny, tmp_path / name, every=2), pool=[tmp_path / "first"])
    assert (tmp_path / "second" / "train" / "adopted.json").exists()
    assert RunConfig.read(tmp_path / "second" / "config.yaml").out == str(tmp_path / "second")
    exported = [export_run(tmp_path / name, tmp_path / f"model-{name}") for name in ("first", "second")]
    weights = [(path / "model.safetensors").read_bytes() for path in exported]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("mean", ["own", "ntp"])
def test_mu_effective_of_a_run_with_a_schedule_that_ends_at_zero(finished, tmp_path, mean):
    """The mean of mu over what was mixed; times N_ntp / N_mix of the steps that mixed where Mixup has its own mean."""
    made = config(finished.tiny, tmp_path / "run", objective=SFTMix(mu=Linear(start=0.4, end=0.0), mixup_mean=mean))
    summary = run(made)
    steps = metrics(tmp_path / "run")
    mus = [0.4 * (1 - k / 3) for k in range(4)]
    mixed = [m["mixup_tokens"] for m in steps]
    assert mixed[-1] == 0
    expected = sum(mu * n for mu, n in zip(mus, mixed, strict=True)) / sum(mixed)
    if mean == "own":
        expected *= sum(m["ntp_tokens"] for m in steps if m["mixup_tokens"]) / sum(mixed)
    assert summary["mu_effective"] == pytest.approx(expected, rel=1e-6)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mu_effective"] == summary["mu_effective"]
