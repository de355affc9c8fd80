"""The files of official tools, field by field, and questions that are none."""

from __future__ import annotations

import itertools
import json

import pytest

from sftmix.common.errors import DataError
from sftmix.pipeline.finished import finished_models
from sftmix.tools.answers.formats import TOOLS, write_answers
from sftmix.tools.answers.generate import _label, generate
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.answers.questions import read_questions

QUESTIONS = {
    "alpaca_eval": {"instruction": "Q?", "output": "A", "generator": "g", "dataset": "d"},
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["Q?", "More?"]},
    "ifeval": {"key": 1000, "prompt": "Q?", "instruction_id_list": [], "kwargs": []},
    "arena_hard": {"uid": "u1", "category": "hard_prompt", "prompt": "Q?"},
}
LINES = {
    "alpaca_eval": {"instruction": "Q?", "output": "one", "generator": "first-target", "dataset": "d"},
    "mt_bench": {"question_id": 81, "model_id": "first-target", "choices": [{"index": 0, "turns": ["one", "two"]}]},
    "ifeval": {"prompt": "Q?", "response": "one"},
    "arena_hard": {
        "uid": "u1",
        "model": "first-target",
        "messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": {"answer": "one"}}],
    },
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_line_has_the_fields_of_the_tool(name):
    question = TOOLS[name].question(QUESTIONS[name])
    assert question.messages == ({"role": "user", "content": "Q?"},)
    assert LINES[name].items() <= TOOLS[name].line(question, ["one", "two"], "first-target").items()


def test_ifeval_finds_each_answer_by_its_prompt(tmp_path):
    """Its evaluation_lib.py looks an answer up by the whole prompt: not a space of it may be lost."""
    prompts = ["Q?", " Q?", "Q?  \n", "one\u2028two\r\nthree", 'say "<<title>>"', "caf\u00e9"]
    file = tmp_path / "input_data.jsonl"
    rows = [{**QUESTIONS["ifeval"], "key": key, "prompt": prompt} for key, prompt in enumerate(prompts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, written = read_questions([str(file)], TOOLS["ifeval"].question), tmp_path / "first-target.jsonl"
    write_answers(written, TOOLS["ifeval"], questions, [[str(key)] for key in range(len(prompts))])
    with open(written, encoding="utf-8") as lines:
        found = {line["prompt"]: line["response"] for line in map(json.loads, lines)}
    assert found == {prompt: str(key) for key, prompt in enumerate(prompts)}


@pytest.mark.parametrize("name", QUESTIONS)
def test_another_tools_question_is_named(name, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"what": 1}')
    with pytest.raises(DataError, match=r"questions.jsonl:1: not a question of this format: it has no '\w+'"):
        read_questions([str(file)], TOOLS[name].question)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mt_bench", {"turns": "What is 2+2?"}, r"turns is 'What is 2\+2\?'; expected a list of texts"),
        ("mt_bench", {"turns": []}, r"turns is \[\]; expected a list"),
        ("mt_bench", {"turns": ["Q?", None]}, r"turns\[1\] must be a string, found null"),
        ("mt_bench", {"question_id": None}, "question_id must be a string, found null"),
        ("alpaca_eval", {"instruction": None}, "instruction must be a string, found null"),
        ("alpaca_eval", {"instruction": " "}, "instruction is empty"),
        ("ifeval", {"prompt": "a\ud800"}, "prompt contains a lone surrogate"),
        ("ifeval", {"key": 1.5}, "key must be a string, found a number"),
        ("arena_hard", {"prompt": "a\0"}, "prompt contains a NUL"),
        ("arena_hard", {"uid": "\x1b]0;t\7"}, r"uid contains the control character '\\x1b'"),
    ],
)
def test_values_are_checked_as_those_of_rows(name, change, reason, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (QUESTIONS[name], QUESTIONS[name] | change)))
    with pytest.raises(DataError, match=rf"questions.jsonl:2: {reason}"):
        read_questions([str(file)], TOOLS[name].question)


@pytest.mark.parametrize("name", QUESTIONS)
def test_repeated_questions_and_empty_files_are_refused(name, tmp_path):
    """Answers are kept by id: of two questions with one id, both would get the answer to the second."""
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{json.dumps(QUESTIONS[name])}\n" * 2)
    with pytest.raises(DataError, match=r"questions.jsonl:2: the id '\w+' is taken by an earlier row"):
        read_questions([str(file)], TOOLS[name].question)
    none = tmp_path / "none.json"
    none.write_text("[]")
    with pytest.raises(DataError, match=r"none.json.* no row"):
        read_questions([str(none)], TOOLS[name].question)


@pytest.mark.parametrize("category", ["writing", "roleplay", "extraction", "math", "stem", "other"])
def test_the_category_decides_the_temperature(category):
    question = TOOLS["mt_bench"].question({**QUESTIONS["mt_bench"], "category": category})
    expected = {"extraction": 0.0, "math": 0.0, "stem": 0.1}.get(category, 0.7)
    assert question.temperature == expected
    assert question.follow_ups == ("More?",)


def test_a_model_in_the_working_directory_has_the_name_of_its_directory(finished, monkeypatch):
    monkeypatch.chdir(finished.tiny.model)
    assert _label(finished_models(".")[0]) == finished.tiny.model.name


@pytest.mark.slow
def test_files_lie_where_the_tools_look(finished, tmp_path):
    for name, question in QUESTIONS.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(question))
        models = ["target", "base"] if name == "mt_bench" else ["target"]

        def answer(name=name, models=models, file=file):
            to, options = tmp_path / name, AnswerOptions(max_new_tokens=2)
            return generate(str(finished.path), to, models=models, prompts=[str(file)], form=name, options=options)

        files, _ = answer()
        suffix = "json" if name == "alpaca_eval" else "jsonl"
        folder = "model_answer/" if name in ("mt_bench", "arena_hard") else ""
        of_each = [(f"answers-run-{model}.jsonl", f"{folder}run-{model}.{suffix}") for model in models]
        assert [path.relative_to(tmp_path / name).as_posix() for path in files] == list(itertools.chain(*of_each))
        before = [path.read_bytes() for path in files]
        assert [path.read_bytes() for path in answer()[0]] == before
    outputs = json.loads((tmp_path / "alpaca_eval" / "run-target.json").read_text())
    assert [row["generator"] for row in outputs] == ["run-target"]
    line = json.loads((tmp_path / "mt_bench" / "answers-run-base.jsonl").read_text())
    assert len(line["answers"]["base"]) == len(line["finish"]["base"]) == 2
