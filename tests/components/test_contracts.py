"""Components that break their contract stop a run with one line: the name, the answer, and what is allowed."""

import json
import re
import shutil
from pathlib import Path

import pytest

from sftmix.components.confidence import LEAST
from tests.tiny import SHORT, in_this_process, metrics, table
from tests.tiny import sftmix as in_a_process

pytestmark = pytest.mark.long

MODULE = """
import dataclasses
import os
import numpy as np
import torch
from sftmix.common.errors import ConfigError
from sftmix.components import *
from sftmix.components.base import *
from sftmix.components.reference import TrainedReference

class Listed(Median):
    def split(self, scores, *, seed):
        return [0] * len(scores)

class Floats(Median):
    def split(self, scores, *, seed):
        found = super().split(scores, seed=seed)
        return dataclasses.replace(found, group=found.group.astype(np.float64))

class Endless(Perplexity):
    def estimate(self, dynamics):
        found = super().estimate(dynamics)
        found[0] = -np.inf
        return found

class Single(RandomPairs):
    def pairs(self, split, scores, *, epoch, seed):
        return super().pairs(split, scores, epoch=epoch, seed=seed)[:, 0]

class Selfish(RandomPairs):
    def pairs(self, split, scores, *, epoch, seed):
        found = super().pairs(split, scores, epoch=epoch, seed=seed)
        found[3, 1] = found[3, 0]
        return found

class TakesAll(RandomPairs):
    def pairs(self, split, scores, *, epoch, seed):
        found = super().pairs(split, scores, epoch=epoch, seed=seed)
        found[2, 0] = split.unpaired[0]
        return found

class SelfishLater(Selfish):
    def pairs(self, split, scores, *, epoch, seed):
        return (super() if epoch == 2 else RandomPairs()).pairs(split, scores, epoch=epoch, seed=seed)

class Planned(SFTMix):
    def plan(self, batch, *, step, total_steps, seed):
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        return self.changed(plan) if step == 1 else plan

class AtOnce(SFTMix):
    def plan(self, batch, *, step, total_steps, seed):
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        return dataclasses.replace(plan, lam=plan.lam + 1)

class Beyond(Planned): changed = lambda self, plan: dataclasses.replace(plan, lam=plan.lam + 1)
class NoNumber(Planned): changed = lambda self, plan: dataclasses.replace(plan, lam=plan.lam * float("nan"))
class Infinite(Planned): changed = lambda self, plan: dataclasses.replace(plan, row_weight=plan.row_weight / 0)
class NoPlan(Planned): changed = lambda self, plan: {"lam": plan.lam}

class SecondRank(Planned):
    def changed(self, plan):
        return Beyond.changed(self, plan) if os.environ.get("RANK") == "1" else plan

class FarPairs(Planned): changed = lambda self, plan: dataclasses.replace(plan, pairs=plan.pairs + 1000)
class Counted(Planned): changed = lambda self, plan: dataclasses.replace(plan, ntp_count=plan.row_weight.sum())
class Uncounted(Planned): changed = lambda self, plan: dataclasses.replace(plan, mixup_count=0.0)
class UncountedNTP(Planned): changed = lambda self, plan: dataclasses.replace(plan, ntp_count=0)

class Lost(NTP):
    changes = {}

    def loss(self, view, batch, plan):
        out = super().loss(view, batch, plan)
        return out._replace(**{name: change(getattr(out, name)) for name, change in self.changes.items()})

class Vector(Lost): changes = {"loss": lambda loss: loss[None]}
class Graphless(Lost): changes = {"loss": lambda loss: loss.detach()}
class Keeper(Lost): changes = {"nll": lambda nll: nll.clone().requires_grad_()}
class Stunted(Lost): changes = {"nll": lambda nll: nll[1:]}

class Bare(NTP):
    def loss(self, view, batch, plan):
        return super().loss(view, batch, plan).loss

class Wide(Perturbation):
    def embeddings(self, e, mask, *, ids, step, seed):
        return torch.cat([e, e], dim=1)

class Says(Callback):
    def on_step_end(self, state):
        return {"stop": True}

class Half(TrainedReference):
    def collect(self, context):
        found = super().collect(context)
        return dataclasses.replace(found, nll_sum=found.nll_sum[:, :1])

class Numbers(TrainedReference):
    def collect(self, context):
        found = super().collect(context)
        self.change(found)
        return found

class Spoilt(Numbers):
    def change(self, found):
        found.nll_sum[3, 1] = np.nan

class Gaining(Numbers):
    def change(self, found):
        found.nll_sum[0, 0] = -0.5

class Owing(Numbers):
    def change(self, found):
        found.n_tokens[2] = -1

class Perfect(Numbers):
    def change(self, found):
        found.n_correct[1, 1] = found.n_tokens[1] + 1

class Never(TrainedReference):
    def collect(self, context):
        found = super().collect(context)
        nothing = {name: getattr(found, name)[:, :0] for name in ("nll_sum", "n_correct")}
        return dataclasses.replace(found, steps=found.steps[:0], **nothing)

"""

BROKEN = [
    ("--splitter=broken_parts.Listed", r"splitter Listed returned list; allowed: sftmix\.types\.Split"),
    ("--splitter=broken_parts.Floats", r"group float64\[29\]; allowed: whole numbers \[29\]"),
    ("--confidence=broken_parts.Endless", r"returned confidence of \w+: -inf \(one of 1\); allowed: a finite number"),
    ("--pairing=broken_parts.Single", r"pairing Single returned rows int64\[14\]; allowed: whole numbers \[-1, 2\]"),
    ("--pairing=broken_parts.Selfish", r"Selfish returned pair 3: \[ *(\d+) +\1\] \(one of 1\); allowed: two"),
    ("--pairing=broken_parts.TakesAll", r"TakesAll returned pair 2: \[ *\d+ +\d+\] \(one of 1\); allowed: two"),
    ("--objective=broken_parts.AtOnce", r"objective AtOnce returned lam 1\.\d+ to [12]\.\d+; allowed: 0 to 1"),
    ("--objective=broken_parts.Beyond", r"objective Beyond returned lam 1\.\d+ to [12]\.\d+; allowed: 0 to 1"),
    ("--objective=broken_parts.NoNumber", r"objective NoNumber returned lam nan to nan; allowed: 0 to 1"),
    ("--objective=broken_parts.Infinite", r"returned row_weight inf to inf; allowed: -3\.4\S+ to 3\.4"),
    ("--objective=broken_parts.NoPlan", r"objective NoPlan returned dict; allowed: sftmix\.types\.Plan"),
    ("--objective=broken_parts.FarPairs", r"returned pairs 1\d+ to \d+; allowed: 0 to"),
    ("--objective=broken_parts.Counted", r"objective Counted returned ntp_count tensor\(.*; allowed: a finite number"),
    ("--objective=broken_parts.Uncounted", r"objective Uncounted returned mixup_count 0 for pairs with a weight; allo"),
    ("--objective=broken_parts.UncountedNTP", r"objective UncountedNTP returned ntp_count 0 for tokens with a weight;"),
    (
        "--objective=broken_parts.Vector",
        r"returned loss float32\[1\], requires_grad True; allowed: a tensor \[\], requires_grad True",
    ),
    (
        "--objective=broken_parts.Graphless",
        r"Graphless returned loss float32\[\], requires_grad False; allowed: a tensor",
    ),
    (
        "--objective=broken_parts.Keeper",
        r"returned nll float32\[\d+\], requires_grad True; allowed: .*, requires_grad False",
    ),
    (
        "--objective=broken_parts.Stunted",
        r"objective Stunted returned nll float32\[\d+\], requires_grad False; allowed: a tensor",
    ),
    ("--objective=broken_parts.Bare", r"objective Bare returned float32\[\]; allowed: sftmix\.functional\.SFTLoss"),
    ("--perturbation=broken_parts.Wide", r"perturbation Wide returned float32\[.*\]; allowed: embeddings float32\["),
    (
        "--callbacks+=broken_parts.Says",
        r"callbacks Says returned dict; allowed: sftmix\.components\.base\.Call",
    ),
    ("--reference=broken_parts.Half", r"reference Half returned nll_sum float64\[29, 1\]; allowed: numbers \[29, 2\]"),
    (
        "--reference=broken_parts.Spoilt",
        r"returned nll_sum of \w+: \[.*nan\] \(one of 1\); allowed: finite numbers from 0",
    ),
    (
        "--reference=broken_parts.Gaining",
        r"returned nll_sum of \w+: \[-0.5.*\] \(one of 1\); allowed: finite numbers from",
    ),
    (
        "--reference=broken_parts.Owing",
        r"reference Owing returned n_tokens of \w+: -1 \(one of 1\); allowed: 0 \(not scored\) and",
    ),
    (
        "--reference=broken_parts.Perfect",
        r"Perfect returned n_correct of \w+: \[.*\] \(one of 1\); allowed: 0 to n_tokens, or -1",
    ),
]

AFTERWARDS = ("--objective", "--confidence", "--splitter", "--pairing")


@pytest.fixture(scope="module")
def reference(finished, tmp_path_factory):
    """A run of two steps that has its reference, and no more."""
    place = tmp_path_factory.mktemp("reference")
    assert in_this_process("reference", *finished.tiny.options, *SHORT, "--out", "run", cwd=place).returncode == 0
    return place / "run"


@pytest.mark.parametrize(("option", "message"), BROKEN, ids=[option.rpartition(".")[2] for option, _ in BROKEN])
def test_a_run_ends_with_one_line(option, message, finished, reference, tmp_path, monkeypatch, sftmix):
    Path(tmp_path / "broken_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    if option.startswith(AFTERWARDS):  # the reference does not depend on it
        shutil.copytree(reference, tmp_path / "run")
    ended = sftmix("run", *finished.tiny.options, *SHORT, option, "--out", str(tmp_path / "run"))
    said = [line for line in ended.err.splitlines() if line.startswith("error")]
    assert ended.code == 2
    assert len(said) == 1
    assert re.search(message, said[0])
    assert not (tmp_path / "run" / "train" / "model").exists()


def test_the_pairs_of_each_epoch_of_a_single_run_are_looked_at(tiny, tmp_path, monkeypatch, sftmix):
    Path(tmp_path / "broken_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    place = tiny.options.index("--reference.checkpoints")
    words = [*tiny.options[:place], *tiny.options[place + 2 :], "--reference=Online", "--out", str(tmp_path / "run")]
    ended = sftmix("run", *words, "--pairing=broken_parts.SelfishLater")
    assert ended.code == 2
    assert re.search(r"error: pairing SelfishLater returned pair 3: \[ *(\d+) +\1\] \(one of 1\)", ended.err)
    assert {line["epoch"] for line in metrics(tmp_path / "run")} == {0, 1}


def test_dynamics_that_cannot_be_read_back_are_no_finished_stage(tiny, tmp_path, monkeypatch, sftmix):
    Path(tmp_path / "broken_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("split", *tiny.options, *SHORT, "--reference=broken_parts.Never", "--out", str(tmp_path / "run"))
    for _ in range(2):  # a rerun does not find it done, either
        ended = sftmix(*words)
        assert (ended.code, "dynamics.parquet: it holds no example" in ended.err) == (3, True)
        assert not (tmp_path / "run" / "reference" / "MANIFEST.json").exists()


NUMBERS = """
import dataclasses
import numpy as np
from sftmix.components import Callback, CallbackResult, Median

class Numpy(Callback):
    gives = frozenset()
    def on_step_end(self, state):
        return CallbackResult(metrics={"mine": np.float32(1.5), "count": np.int64(3)})

class AsList(Median):
    def split(self, scores, *, seed):
        found = super().split(scores, seed=seed)
        return dataclasses.replace(found, group=found.group.tolist())
"""


def test_numbers_of_numpy_and_groups_in_a_list_are_taken(tiny, tmp_path, monkeypatch, sftmix):
    Path(tmp_path / "numpy_parts.py").write_text(NUMBERS)
    monkeypatch.syspath_prepend(tmp_path)
    parts = ("--callbacks+=numpy_parts.Numpy", "--splitter=numpy_parts.AsList", "--reference=Online")
    ended = sftmix("run", *tiny.bare, *parts, "--training.max_steps", "8", "--out", str(tmp_path / "run"))
    assert ended.code == 0, ended.err
    lines = metrics(tmp_path / "run")
    assert all((line["mine"], line["count"]) == (1.5, 3) for line in lines)
    assert lines[-1]["mixup_tokens"] > 0


def test_examples_that_were_never_learned_rank_last_and_are_in_no_mean(tiny, tmp_path, sftmix):
    rate = [*tiny.options, *SHORT]
    rate[rate.index("0.01")] = "5"  # the perplexity of some examples rises
    out, checkpoints = tmp_path / "run", ("--reference.checkpoints", "[0,0.5,1]")
    place = rate.index("--reference.checkpoints")
    words = [*rate[:place], *rate[place + 2 :], *checkpoints, "--confidence", "LearningPercentage"]
    assert sftmix("split", *words, "--out", str(out)).code == 0
    values = table(out / "confidence" / "confidence.parquet")["confidence"]
    assert min(values) == LEAST
    summary = json.loads((out / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    means = [group.get("confidence_mean") for group in summary["confidence"].values()]
    assert all(mean is None or abs(mean) < 1e6 for mean in means)


@pytest.mark.slow
def test_what_one_rank_returned_ends_all_ranks_alike(tiny, tmp_path):
    Path(tmp_path / "broken_parts.py").write_text(MODULE)
    words = ("run", *tiny.options, *SHORT, "--objective=broken_parts.SecondRank", "--out", str(tmp_path / "run"))
    ended = in_a_process(*words, ranks=2, cwd=tmp_path)
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: objective")]
    assert len(said) == 1
    assert re.search(r"objective SecondRank returned lam 1\.\d+ to [12]\.\d+; allowed: 0 to 1", said[0])
    assert '"exit_code": 2' in (tmp_path / "run" / "STATUS.json").read_text()
