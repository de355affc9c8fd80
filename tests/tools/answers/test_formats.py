"""The files of official tools, field by field, and questions that are none."""

from __future__ import annotations

import json
from itertools import chain

import pytest

from sftmix.common.errors import DataError
from sftmix.pipeline.finished import finished_models
from sftmix.tools.answers.formats import TOOLS
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


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_line_has_the_fields_of_the_tool(name):
    question = TOOLS[name].question(QUESTIONS[name])
    assert question.messages == ({"role": "user", "content": "Q?"},)
    assert LINES[name].items() <= TOOLS[name].line(question.row, ["one", "two"], "first-target").items()


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mt_bench", {"turns": "What is 2+2?"}, r"turns is 'What is 2\+2\?'; expected a list of texts"),
        ("mt_bench", {"turns": ["Q?", None]}, r"turns\[1\] must be a string, found null"),
        ("mt_bench", {"question_id": None}, "question_id must be a string, found null"),
        ("alpaca_eval", {"instruction": "a\0"}, "instruction contains a NUL"),
    ],
)
def test_values_are_checked_as_those_of_rows(name, change, reason, tmp_path):
    file = tmp_path / "questions.jsonl"
    for other, words in ((QUESTIONS[name] | change, reason), ({"what": 1}, "it has no '")):
        file.write_text("\n".join(json.dumps(row) for row in (QUESTIONS[name], other)))
        with pytest.raises(DataError, match=rf"questions.jsonl:2: {words}"):
            read_questions([str(file)], TOOLS[name].question)


@pytest.mark.parametrize(("category", "expected"), [("writing", 0.7), ("math", 0.0), ("stem", 0.1), ("other", 0.7)])
def test_the_category_decides_the_temperature(category, expected):
    question = TOOLS["mt_bench"].question({**QUESTIONS["mt_bench"], "category": category})
    assert question.temperature == expected
    assert question.follow_ups == ("More?",)


def test_a_model_in_the_working_directory_has_the_name_of_its_directory(finished, monkeypatch):
    monkeypatch.chdir(finished.tiny.model)
    assert _label(finished_models(".")[0]) == finished.tiny.model.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "models", "files"),
    [
        ("alpaca_eval", ["target"], ["run-target.json"]),
        ("mt_bench", ["target", "base"], ["model_answer/run-target.jsonl", "model_answer/run-base.jsonl"]),
    ],
)
def test_files_lie_where_the_tools_look(finished, tmp_path, name, models, files):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(QUESTIONS[name]))
    options = {"models": models, "prompts": [str(file)], "form": name}
    made = generate(str(finished.path), tmp_path / "to", options=AnswerOptions(max_new_tokens=2), **options)
    answers = [f"answers-run-{model}.jsonl" for model in models]
    assert [str(path.relative_to(tmp_path / "to")) for path in made] == list(chain(*zip(answers, files, strict=True)))
    line = json.loads((tmp_path / "to" / answers[-1]).read_text())
    turns = line["answers"][models[-1]]
    assert len(turns) == 2 if name == "mt_bench" else isinstance(turns, str)
