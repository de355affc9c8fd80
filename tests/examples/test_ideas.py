"""Each file of docs/examples/ideas is short, keeps the contract of its kind, and trains two steps by its command."""

import ast
import importlib
import io
import re
import shlex
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sftmix import testing
from sftmix.components import Objective, Order, PairSampler, Selector, Splitter, catalogue
from sftmix.disk.tables import write_dynamics
from sftmix.testing.objectives import _DATA
from sftmix.types import TrainingDynamics
from tests.tiny import ROOT, SHORT, in_this_process, metrics

catalogue()  # as a command does: the shipped classes are there first
IDEAS = ROOT / "docs" / "examples" / "ideas"
FILES = sorted(IDEAS.glob("*.py"))
CHECKS = {
    Objective: testing.check_objective,
    Order: testing.check_order,
    PairSampler: testing.check_pair_sampler,
    Selector: testing.check_selector,
    Splitter: testing.check_splitter,
}
DETACHED = {"info_sft", "proximal_sft", "ss_token"}
"""Their losses have detached factors, whose gradient finite differences do not find."""
MOST_LINES = 25
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def about(file: Path) -> str:
    """Return the docstring of a file."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def command(file: Path) -> list[str]:
    """Return the options that choose an idea, from the docstring of its file."""
    return shlex.split(re.findall(r"`(--[^`]+)`", about(file))[0])


def class_of(file: Path) -> str:
    """Return `module.Class`, as the command of the file names it."""
    return next(word for word in command(file) if word.startswith(f"{file.stem}."))


def lines_of_code(file: Path) -> int:
    """Return the number of lines without docstrings, comments, blank lines and imports."""
    source = file.read_text(encoding="utf-8")
    nodes = [*ast.walk(ast.parse(source))]
    left_out = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    bodies = [node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    left_out += [node.body[0] for node in bodies if ast.get_docstring(node) is not None]
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in nothing]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - {line for node in left_out for line in range(node.lineno, node.end_lineno + 1)})


def test_the_page_has_each_idea_with_its_paper_and_lines():
    page = (IDEAS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| \[`(\w+\.\w+)`\]\((\w+\.py)\) \| \[([\d.]+)\]\(\S+\) \| (\d+) \|", page, re.MULTILINE)
    papers = [re.findall(r"arXiv (\d{4}\.\d{5})", about(file))[0] for file in FILES]
    there = [(class_of(file), file.name, of, str(lines_of_code(file))) for file, of in zip(FILES, papers, strict=True)]
    assert sorted(rows) == sorted(there)


@each_file
def test_an_idea_is_short(file):
    assert lines_of_code(file) <= MOST_LINES


# ------------------------------------------------------------------------------------------------------- contracts


@pytest.fixture(scope="module")
def for_checks(tmp_path_factory, plain) -> dict[str, dict[str, str]]:
    """The options without a default: a reference of the rows that the checks make up, and a model of their tokens."""
    directory = tmp_path_factory.mktemp("for-checks")
    ids = [*_DATA.ids, *(f"id-{number}" for number in range(40))]
    n_tokens = np.array([*(int(row.target[1:].sum()) for row in _DATA), *[3] * 40])
    rng = np.random.default_rng(0)
    token_nll = [rng.gamma(2.0, 1.0, (2, size)).astype(np.float32) for size in n_tokens]
    nll = np.array([of_row.sum(axis=1, dtype=np.float64) for of_row in token_nll])
    stored = TrainingDynamics(
        ids=ids,
        steps=np.array([0, 10]),
        nll_sum=nll,
        n_tokens=n_tokens,
        n_correct=np.zeros(nll.shape, dtype=np.int64),
        token_nll=token_nll,
        alone_nll_sum=nll * rng.uniform(0.8, 1.5, nll.shape),
    )
    write_dynamics(directory / "dynamics.parquet", stored)
    with torch.random.fork_rng(devices=[]):
        config = GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
        GPT2LMHeadModel(config).double().save_pretrained(directory)
    dynamics = {"dynamics": str(directory / "dynamics.parquet")}
    return {
        "ss_token": dynamics,
        "teacher_smoothing": {"teacher": str(directory)},
        "less_lite": {"model": str(plain.model), "about": "Question 3"},
    }


@each_file
def test_an_idea_keeps_the_contract_of_its_kind(file, for_checks, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(IDEAS)])
    module, _, name = class_of(file).rpartition(".")
    idea = getattr(importlib.import_module(module), name)(**for_checks.get(file.stem, {}))
    check = next(check for base, check in CHECKS.items() if isinstance(idea, base))
    check(idea, **({"finite_differences": False} if file.stem in DETACHED else {}))


# ------------------------------------------------------------------------------------------------------- two steps


@pytest.fixture(scope="module")
def reference(tmp_path_factory, plain) -> str:
    """The dynamics that all runs share."""
    out = tmp_path_factory.mktemp("reference")
    more = "--reference.token_nll true --reference.response_alone true --reference.checkpoints [0,1]"
    done = in_this_process("confidence", *plain.bare, *SHORT, *more.split(), "--out", str(out), cwd=out)
    assert done.returncode == 0, done.stderr
    return str(out / "confidence" / "dynamics.parquet")


@each_file
def test_an_idea_trains_two_steps(file, plain, reference, tmp_path):
    words = command(file)
    if "--reference.response_alone" in words:  # the shared reference has it
        at = words.index("--reference.response_alone")
        del words[at : at + 2]
    given = {
        "ss_token": ["--objective.dynamics", reference],
        "superfiltering": ["--selector.share", "0.5"],
        "teacher_smoothing": ["--objective.teacher", str(plain.model)],
        "cherry": ["--selector.share", "0.5"],
        "less_lite": ["--selector.model", str(plain.model), "--selector.about", "a"],
    }
    stored = ["--reference", "FromFile", "--reference.path", reference]
    out = ["--out", str(tmp_path / "run")]
    done = in_this_process("run", *plain.bare, *SHORT, *stored, *words, *given.get(file.stem, []), *out, cwd=IDEAS)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


# ----------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("table", ["recipe:ideas-smollm2", "stored.yaml"])
def test_a_table_of_ideas_is_listed_in_their_directory(table, tmp_path):
    done = in_this_process("compare", "--config", table, "--out", str(tmp_path), "--list", cwd=IDEAS)
    assert done.returncode == 0, done.stderr
    assert "NTP: objective: NTP()" in done.stdout


def test_each_idea_is_in_a_table():
    recipe = (ROOT / "sftmix" / "recipes" / "ideas-smollm2.yaml").read_text(encoding="utf-8")
    named = recipe + (IDEAS / "stored.yaml").read_text(encoding="utf-8")
    assert [file.name for file in FILES if f": {class_of(file)}\n" not in named] == []
