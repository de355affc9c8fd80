"""Tasks, models and scores as lm-eval has them: what is asked, in which prompts, where answers end, what came out."""

import shutil

import pytest
import torch
import yaml

from sftmix.text.templates import ALPACA
from sftmix.tools.evaluate.harness import find_tasks, harness_of, scores_of
from sftmix.tools.runs.loaded import load_finished
from sftmix.tools.runs.models import FinishedModel
from sftmix.words.errors import ConfigError
from tests.tiny import sign
from tests.tools.evaluate.bench import BENCHMARKS, HEAD, asked, question, write_rows

WRITTEN = "Text 1. \n **Question:** Is it 1? \n (A) red 1 \n (B) two 1 \n (C) the 1 \n **Answer:**("
"""The second question of PubMedQA, by hand."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    for name in BENCHMARKS:
        write_rows(directory, name, questions=4, shots=1)
    manager, _ = find_tasks(list(BENCHMARKS), directory)
    return manager.load(list(BENCHMARKS))["tasks"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_and_right_answers_are_those_of_labrak_et_al(tasks, name):
    """Against ones written by hand."""
    task, letters = tasks[name], "ABCDE"[: BENCHMARKS[name]]
    task.set_fewshot_seed(seed=3)
    row = list(task.test_docs())[1]
    bare, full = (task.fewshot_context(row, shots) for shots in (0, 1))
    assert bare == HEAD + asked(question(name, 1))
    assert name != "pubmedqa" or bare == HEAD + WRITTEN
    solved = question(name, 4)  # the only one of the shots
    assert full == f"{HEAD}{asked(solved, letters[solved['answer']])} \n {asked(question(name, 1))}"
    assert (task.doc_to_target(row), task.config.num_fewshot) == (1, 3)
    asks = task.construct_requests(row, bare, doc_id=0, metadata=(name, 0, 1))
    assert [ask.args for ask in asks] == [(bare, letter) for letter in letters]


def test_a_result_depends_on_task_files_and_rows(tmp_path):
    write_rows(tmp_path, "medmcqa", questions=2)
    manager, files = find_tasks(["medmcqa"], tmp_path)
    assert {file.name for file in files} == {"medmcqa.yaml", "medmcqa.jsonl", "medmcqa.shots.jsonl"}
    assert manager.all_tasks == ["medmcqa"]  # lm-eval's own are not read


@pytest.mark.slow
def test_a_task_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no task medqa_7options; there are those of lm-eval"):
        find_tasks(["medqa_7options"], None)


@pytest.fixture(scope="module")
def alpaca(finished, tmp_path_factory):
    """The tiny model in a run with another template than the one that its tokenizer has."""
    run = tmp_path_factory.mktemp("alpaca")
    config = yaml.safe_load((finished.path / "config.yaml").read_text())
    config["data"]["template"] = "alpaca"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(finished.path / "started.json", run)
    sign(run)
    return load_finished(FinishedModel("target", str(finished.path / "train" / "model"), run))


@pytest.fixture
def harness(alpaca):
    return harness_of(alpaca, batch_size=2, chat=True)


def test_the_prompt_is_that_of_the_training(alpaca, harness):
    turns = [{"role": "user", "content": "Name two."}]
    prompt = harness.apply_chat_template(turns)
    assert alpaca.encoder.chat_template.endswith(ALPACA.rpartition("{% endfor %}")[2])
    assert prompt.endswith("### Instruction:\nName two.\n\n### Response:\n")
    assert harness.tok_encode(prompt) == alpaca.render(turns)
    begun = [*turns, {"role": "assistant", "content": "red"}]
    assert harness.apply_chat_template(begun, add_generation_prompt=False) == prompt + "red"
    two = harness.tok_batch_encode([prompt, prompt + "red"])[0]
    assert two[1].tolist() == harness.tok_encode(prompt + "red")


def test_an_answer_ends_with_the_turn(alpaca, harness):
    """The id that the model says first, of all ids, is made the end of a turn: nothing may follow it."""
    prompt = harness.apply_chat_template([{"role": "user", "content": "Name two."}])
    ids = torch.tensor([harness.tok_encode(prompt)])
    with torch.no_grad():
        first = int(alpaca.model(ids).logits[0, -1].argmax())
    options = {"context": ids, "max_length": ids.shape[1] + 8, "stop": [], "attention_mask": torch.ones_like(ids)}
    ended = harness_of(alpaca._replace(stop_ids=(first,)), 2, chat=True)
    assert ended._model_generate(**options)[0, ids.shape[1] :].tolist() == [first]


def test_a_metric_under_a_filter_has_its_name():
    """As gsm8k's exact_match, strict and flexible: the two differ by much."""
    samples = [{"doc_id": n, "doc_hash": str(n), "filter": "strict", "acc": float(n)} for n in (0, 1)]
    samples += [{**sample, "filter": "flexible", "acc": 1.0} for sample in samples]
    results = {"alias": "task", "acc,strict": 0.5, "acc_stderr,strict": 0.1, "acc,flexible": 1.0, "sample_len": 2}
    evaluated = {"results": {"task": results}, "samples": {"task": samples}, "n-shot": {"task": 0}}
    (found,) = scores_of("task", evaluated).values()
    assert (found["metric"], found["value"], found["stderr"], found["n"]) == ("acc (strict)", 0.5, 0.1, 2)
    assert (found["questions"], found["values"]) == (["0", "1"], [0.0, 1.0])
