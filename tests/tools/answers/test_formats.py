"""The files of official tools, field by field."""

import json

import pytest

from sftmix.common.errors import DataError
from sftmix.pipeline.finished import finished_models
from sftmix.tools.answers.formats import of_mt_bench, write_answers
from sftmix.tools.answers.generate import _label, generate
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.answers.questions import read_questions

QUESTIONS = {
    "alpaca_eval": {"instruction": "Q?", "output": "A", "generator": "g", "dataset": "d"},
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["Q?", "More?"]},
}
LINES = {
    "alpaca_eval": {"instruction": "Q?", "output": "one", "generator": "first-target", "dataset": "d"},
    "mt_bench": {"question_id": 81, "model_id": "first-target", "choices": [{"index": 0, "turns": ["one", "two"]}]},
}


def read(tmp_path, name, *rows):
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_questions([str(tmp_path / "questions.jsonl")], None, of_mt_bench if name == "mt_bench" else None)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_line_has_the_fields_of_the_tool(name, tmp_path):
    (question,) = read(tmp_path, name, QUESTIONS[name])
    assert question.messages == ({"role": "user", "content": "Q?"},)
    found = json.loads(write_answers(name, tmp_path, "first-target", [question], [["one", "two"]]).read_text())
    assert found == ([LINES[name]] if name == "alpaca_eval" else LINES[name])


def test_turns_that_are_no_texts_are_refused(tmp_path):
    for turns in ("What is 2+2?", ["Q?", None]):
        with pytest.raises(DataError, match=r"questions.jsonl:1: turns is .*; expected a list of texts"):
            read(tmp_path, "mt_bench", QUESTIONS["mt_bench"] | {"turns": turns})
    with pytest.raises(DataError, match=r"questions.jsonl:2: it has no 'turns'"):
        read(tmp_path, "mt_bench", QUESTIONS["mt_bench"], {"what": 1})


@pytest.mark.parametrize(("category", "expected"), [("writing", 0.7), ("math", 0.0), ("stem", 0.1), ("other", 0.7)])
def test_the_category_decides_the_temperature(category, expected, tmp_path):
    (question,) = read(tmp_path, "mt_bench", {**QUESTIONS["mt_bench"], "category": category})
    assert (question.temperature, question.follow_ups) == (expected, ("More?",))


def test_a_model_in_the_working_directory_has_the_name_of_its_directory(finished, monkeypatch):
    monkeypatch.chdir(finished.tiny.model)
    assert _label(finished_models(".")[0]) == finished.tiny.model.name


def test_files_lie_where_the_tool_looks(finished, tmp_path):
    file, to = tmp_path / "questions.jsonl", tmp_path / "to"
    file.write_text(json.dumps(QUESTIONS["alpaca_eval"]))
    words = {"models": ["target"], "prompts": [str(file)], "form": "alpaca_eval"}
    answers, outputs = generate(str(finished.path), to, options=AnswerOptions(max_new_tokens=2), **words)
    assert (answers, outputs) == (to / "answers-run-target.jsonl", to / "run-target.json")
    assert json.loads(answers.read_text())["answers"]["target"] == json.loads(outputs.read_text())[0]["output"]
