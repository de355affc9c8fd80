"""The task files ask as Labrak et al. 2024 ask: prompts and right answers against ones written by hand."""

import pytest

from sftmix.common.errors import ConfigError
from sftmix.tools.evaluate.harness import chosen_tasks, manager
from tests.tools.evaluate.bench import HEAD, OPTIONS, asked, question, write_rows

WRITTEN = "Text 1. \n **Question:** Is it 1? \n (A) red 1 \n (B) two 1 \n (C) the 1 \n **Answer:**("
"""The second question of PubMedQA, by hand."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    for name in OPTIONS:
        write_rows(directory, name, questions=4, shots=1)
    chosen = chosen_tasks(list(OPTIONS), directory, None)
    return manager(chosen, None).load([task.spec for task in chosen])["tasks"]


@pytest.mark.parametrize("name", OPTIONS)
def test_prompts_and_right_answers(tasks, name):
    task = tasks[name]
    task.set_fewshot_seed(seed=3)
    row = list(task.test_docs())[1]
    bare, full = (task.fewshot_context(row, shots) for shots in (0, 1))
    assert bare == HEAD + asked(question(name, 1))
    assert name != "pubmedqa" or bare == HEAD + WRITTEN
    solved = question(name, 4)  # the only one of the shots
    letter = "ABCDE"[solved["answer"]]
    assert full == f"{HEAD}{asked(solved, letter)} \n {asked(question(name, 1))}"
    assert task.doc_to_target(row) == 1 % OPTIONS[name]
    assert task.doc_to_choice(row) == list("ABCDE"[: OPTIONS[name]])
    assert task.config.num_fewshot == 3
    asks = task.construct_requests(row, bare, doc_id=0, metadata=(name, 0, 1))
    assert [ask.args for ask in asks] == [(bare, letter) for letter in "ABCDE"[: OPTIONS[name]]]


def test_rows_that_are_not_there_are_named(tmp_path):
    for directory in (None, tmp_path):
        with pytest.raises(ConfigError, match=r"medqa_4options\.jsonl .*--data_dir DIR.*--convert medqa_4options"):
            chosen_tasks(["medqa_4options"], directory, None)


def test_a_result_depends_on_task_files_and_rows(tmp_path):
    write_rows(tmp_path, "medmcqa", questions=2)
    own, other = chosen_tasks(["medmcqa", "mine"], tmp_path, tmp_path)
    rows = {"medmcqa.jsonl", "medmcqa.shots.jsonl"}
    assert {file.name for file in own.files} == {"_medical.yaml", "medmcqa.yaml", *rows}
    assert {file.name for file in other.files} == rows
