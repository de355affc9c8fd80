"""The official tools take our files: alpaca_eval and FastChat, each by its own Python, against a judge on this machine.

ALPACA_EVAL_PYTHON and FASTCHAT_PYTHON name these Pythons; docs/evaluation.md says how they are made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sftmix.cli import main
from tests.tools.answers.stub import judge

pytestmark = pytest.mark.slow


def python_of(variable: str) -> str:
    """The Python that an environment variable names; skip the test without one."""
    python = os.environ.get(variable, "")
    if not Path(python).is_file():
        pytest.skip(f"{variable} names no Python with the package")
    return python


def run(*words: str, cwd: Path, text: str | None = None, **environment: str) -> str:
    """Run a command, and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # One thread: each of these tools would take all cores for arrays of no size.
    everything = {**kept, "OPENAI_API_KEY": "x", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, cwd=cwd, env=everything, input=text, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_alpaca_eval_drops_none_of_805(shared, tmp_path):
    python = python_of("ALPACA_EVAL_PYTHON")
    reference = shared / "data/eval/alpaca_eval/gpt4_1106_preview.model_outputs.json"
    words = ["generate", str(shared / "models/base-7m"), "--prompts", str(reference), "--format", "alpaca_eval"]
    assert main([*words, "--max_new_tokens", "16", "--batch_size", "32", "--to", str(tmp_path)]) == 0
    with judge() as (url, asked):
        (tmp_path / "clients.yaml").write_text(json.dumps({"default": [{"api_key": "x", "base_url": url}]}))
        evaluate = [python, "-m", "alpaca_eval.main", "evaluate", "--model_outputs", "base-7m.json"]
        evaluate += ["--reference_outputs", str(reference)]
        options = ["--fn_metric", "get_winrate", "--sort_by", "win_rate", "--seed", "1", "--caching_path", "cache.json"]
        where = {"OPENAI_CLIENT_CONFIG_PATH": "clients.yaml", "IS_ALPACA_EVAL_2": "True"}
        printed = run(*evaluate, *options, "--output_path", "judged", cwd=tmp_path, **where)
        assert len(asked) == 805
    judged = json.loads(next(tmp_path.glob("judged/*/annotations.json")).read_text())
    assert len(judged) == 805
    assert all(row["preference"] is not None for row in judged)
    answers = {row["instruction"]: row["output"] for row in json.loads((tmp_path / "base-7m.json").read_text())}
    assert all(row["output_2"] == answers[row["instruction"]] for row in judged)
    assert re.search(r"^base-7m\s.*\s805\s", printed, re.M)


def test_fastchat_judges_both_turns_of_80_questions(shared, tmp_path):
    python, bench = python_of("FASTCHAT_PYTHON"), tmp_path / "data" / "mt_bench"
    files = shared / "data/eval/mt_bench"
    (bench / "reference_answer").mkdir(parents=True)
    shutil.copy(files / "question.jsonl", bench)
    shutil.copy(files / "reference_gpt-4.jsonl", bench / "reference_answer" / "gpt-4.jsonl")
    shutil.copy(files / "judge_prompts.jsonl", tmp_path / "data")
    words = ["generate", str(shared / "models/base-7m"), "--prompts", str(bench / "question.jsonl")]
    assert main([*words, "--format", "mt_bench", "--max_new_tokens", "16", "--to", str(bench)]) == 0
    with judge() as (url, asked):
        grade = [python, "-m", "fastchat.llm_judge.gen_judgment", "--model-list", "base-7m", "--parallel", "4"]
        run(*grade, "--judge-file", "data/judge_prompts.jsonl", cwd=tmp_path, text="\n", OPENAI_API_BASE=url)
        assert len(asked) == 160
    lines = (bench / "model_judgment" / "gpt-4_single.jsonl").read_text().splitlines()
    judged = {(row["question_id"], row["turn"]): row["score"] for row in map(json.loads, lines)}
    assert judged.keys() == {(question, turn) for question in range(81, 161) for turn in (1, 2)}
    assert all(1 <= score <= 10 for score in judged.values())
    ours = map(json.loads, (bench / "answers-base-7m.jsonl").read_text().splitlines())
    second = [turns[1] for line in ours for turns in line["answers"].values()]
    prompts = ["\n".join(message["content"] for message in one["messages"]) for one in asked]
    assert all(any(answer in prompt for prompt in prompts) for answer in second)
    shown = run(python, "-m", "fastchat.llm_judge.show_result", "--model-list", "base-7m", cwd=tmp_path)
    assert "########## Average ##########" in shown
