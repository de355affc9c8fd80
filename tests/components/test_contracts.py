"""Components that break their contract stop a run with one line: the name, the answer, and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny import SHORT
from tests.tiny import sftmix as in_a_process

MODULE = """
import dataclasses
import os
import numpy as np
import torch
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

class Planned(SFTMix):
    def plan(self, batch, *, step, total_steps, seed):
        plan = super().plan(batch, step=step, total_steps=total_steps, seed=seed)
        return self.changed(plan) if step == 1 else plan

class Beyond(Planned):
    def changed(self, plan):
        return dataclasses.replace(plan, lam=plan.lam + 1)

class NoNumber(Planned):
    def changed(self, plan):
        return dataclasses.replace(plan, lam=plan.lam * float("nan"))

class Infinite(Planned):
    def changed(self, plan):
        return dataclasses.replace(plan, row_weight=plan.row_weight / 0)

class Short(Planned):
    def changed(self, plan):
        return dataclasses.replace(plan, lam=plan.lam[:-1])

class NoPlan(Planned):
    def changed(self, plan):
        return {"lam": plan.lam}

class SecondRank(Planned):
    def changed(self, plan):
        return Beyond.changed(self, plan) if os.environ.get("RANK") == "1" else plan

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
"""

BROKEN = [
    (
        "--splitter=broken_parts.Listed",
        r"splitter Listed returned list of 29; allowed: split\(\) returns sftmix.types.Split",
    ),
    (
        "--splitter=broken_parts.Floats",
        r"splitter Floats returned groups of type float64; allowed: .* -1 \(unpaired\), or 0 to 1",
    ),
    (
        "--confidence=broken_parts.Endless",
        r"confidence Endless returned -inf for .* and 0 other examples; allowed: a finite number",
    ),
    ("--pairing=broken_parts.Single", r"pairing Single returned int64\[14\]; allowed: i64\[P, 2\], rows"),
    ("--objective=broken_parts.Beyond", r"objective Beyond returned lam 1\.\d+; allowed: 0 to 1"),
    ("--objective=broken_parts.NoNumber", r"objective NoNumber returned lam nan; allowed: 0 to 1"),
    ("--objective=broken_parts.Infinite", r"objective Infinite returned row_weight inf; allowed: finite numbers"),
    ("--objective=broken_parts.Short", r"objective Short returned lam \[\d+\]; allowed: \[\d+\], one for each pair"),
    (
        "--objective=broken_parts.NoPlan",
        r"objective NoPlan returned dict of 1; allowed: plan\(\) returns sftmix.types.Plan",
    ),
    ("--perturbation=broken_parts.Wide", r"perturbation Wide returned float32\[.*\]; allowed: embeddings float32\["),
    (
        "--callbacks+=broken_parts.Says",
        r"callbacks Says returned dict of 1; allowed: on_step_end\(\) returns sftmix.components",
    ),
    ("--reference=broken_parts.Half", r"reference Half returned nll_sum of shape \[29, 1\]; allowed: \[29, 2\]"),
]


@pytest.mark.parametrize(("option", "message"), BROKEN, ids=[option.rpartition(".")[2] for option, _ in BROKEN])
def test_a_run_ends_with_one_line(option, message, tiny, tmp_path, monkeypatch, sftmix):
    Path(tmp_path / "broken_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    ended = sftmix("run", *tiny.options, *SHORT, option, "--out", str(tmp_path / "run"))
    said = [line for line in ended.err.splitlines() if line.startswith("error")]
    assert ended.code == 2
    assert len(said) == 1
    assert re.search(message, said[0])
    assert not (tmp_path / "run" / "train" / "model").exists()


@pytest.mark.slow
def test_what_one_rank_returned_ends_all_ranks_alike(tiny, tmp_path):
    Path(tmp_path / "broken_parts.py").write_text(MODULE)
    option = "--objective=broken_parts.SecondRank"
    ended = in_a_process("run", *tiny.options, *SHORT, option, "--out", str(tmp_path / "run"), ranks=2, cwd=tmp_path)
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: objective")]
    assert len(said) == 1
    assert re.search(r"objective SecondRank returned lam 1\.\d+; allowed: 0 to 1", said[0])
    assert '"exit_code": 2' in (tmp_path / "run" / "STATUS.json").read_text()
