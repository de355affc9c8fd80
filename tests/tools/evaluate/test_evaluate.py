"""The table of an evaluation: accuracy against plain forward passes, differences against the formula, resumption."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.common.errors import ConfigError
from sftmix.pipeline.finished import FinishedModel
from sftmix.tools.evaluate.entries import Entry, Score, check_run, run_of, write_entry
from sftmix.tools.evaluate.table import Line, Table, difference, sentences_of, table_from, table_of
from sftmix.tools.report.benchmarks import benchmarks
from tests.tools.evaluate.bench import HEAD, OPTIONS, asked, write_rows

QUESTIONS = 12
ASKED = ("--tasks", "medqa_4options,pubmedqa", "--num_fewshot", "0")


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    """A copy of the finished run with rows beside it; base, baseline and target are evaluated on them."""
    directory = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(finished.path, directory / "run")
    for name in ("medqa_4options", "pubmedqa"):
        write_rows(directory / "rows", name, QUESTIONS)
    return directory


@pytest.fixture
def evaluate(place, sftmix):
    def call(*words, place=place):
        return sftmix("evaluate", str(place / "run"), *words, "--data_dir", str(place / "rows"))

    return call


def plain_answers(model_path, tokenizer, name, rows):
    """1.0 where the right letter is the likeliest after the prompt, by one forward pass for each letter."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    right = []
    for row in rows:
        prompt, scores = HEAD + asked(row), []
        for letter in "ABCDE"[: OPTIONS[name]]:
            ids = torch.tensor([tokenizer(prompt + letter).input_ids])
            before = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                log_p = model(ids).logits[0].double().log_softmax(-1)
            scores.append(sum(float(log_p[at - 1, ids[0, at]]) for at in range(before, ids.shape[1])))
        right.append(float(max(range(len(scores)), key=scores.__getitem__) == row["answer"]))
    return right


@pytest.mark.slow
def test_accuracy_differences_and_files(evaluate, place, finished):
    done = evaluate(*ASKED)
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(finished.tiny.model)
    models = {"base": finished.tiny.model}
    models |= {name: finished.path / stage / "model" for name, stage in (("baseline", "baseline"), ("target", "train"))}
    found = json.loads((place / "run" / "evaluation" / "table.json").read_text())
    assert found["table"][0] == ["task", "settings", "metric", "questions", "base", "baseline", "target"]
    for line in found["lines"]:
        name = line["task"]
        rows = [json.loads(row) for row in (place / "rows" / f"{name}.jsonl").read_text().splitlines()]
        right = {model: plain_answers(path, tokenizer, name, rows) for model, path in models.items()}
        for model, each in right.items():
            score = line["scores"][model]
            assert score["value"] == pytest.approx(statistics.mean(each), abs=1e-12)
            assert score["stderr"] == pytest.approx(statistics.stdev(each) / math.sqrt(QUESTIONS), abs=1e-12)
            assert score["n"] == QUESTIONS
        for told in line["differences"]:
            each = [a - b for a, b in zip(right[told["left"]], right[told["right"]], strict=True)]
            assert told["value"] == pytest.approx(statistics.mean(each), abs=1e-12)
            assert told["stderr"] == pytest.approx(statistics.stdev(each) / math.sqrt(QUESTIONS), abs=1e-12)
        assert [(d["left"], d["right"]) for d in line["differences"]] == [("target", "base"), ("target", "baseline")]
    assert "target - baseline" in done.out
    assert (
        "| medqa_4options | 0-shot, seed 1234 | acc | 12 |" in (place / "run" / "evaluation" / "table.md").read_text()
    )
    (section,) = benchmarks(place / "run")
    assert (section.table, len(section.table)) == (found["table"], 3)


@pytest.mark.slow
def test_what_is_there_is_not_done_again_and_other_settings_are_another_line(evaluate, place, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(place, copied)
    assert evaluate(*ASKED, "--models", "base", place=copied).code == 0
    folder = copied / "run" / "evaluation"
    before = {file.name: file.read_bytes() for file in folder.glob("*.*.????????????.json")}
    again = evaluate(*ASKED, "--models", "base", place=copied)
    assert again.err.count("there already") == 2
    more = evaluate(*ASKED, "--models", "base", "--limit", "5", place=copied)
    assert "there already" not in more.err
    after = {file.name: file.read_bytes() for file in folder.glob("*.*.????????????.json")}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    lines = [row[:2] for row in json.loads((folder / "table.json").read_text())["table"][1:]]
    assert ["pubmedqa", "0-shot, first 5, seed 1234"] in lines
    assert ["pubmedqa", "0-shot, seed 1234"] in lines


@pytest.mark.slow
def test_rows_that_cannot_be_had_are_told_before_a_model_is_loaded(finished, tmp_path, sftmix):
    model = shutil.copytree(finished.tiny.model, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: no/such\noutput_type: multiple_choice\n")
    place = ("--to", str(tmp_path / "to"), "--include_path", str(tmp_path))
    done = sftmix("evaluate", str(model), "--tasks", "mine", *place)
    assert (done.code, "error: --tasks: mine: lm-eval cannot load the task or its rows: " in done.err) == (3, True)


@pytest.mark.slow
def test_prompts_that_do_not_fit_are_counted(evaluate, place, tmp_path):
    """The tiny model reads 128 tokens; three solved questions are more."""
    copied = tmp_path / "copied"
    shutil.copytree(place, copied)
    done = evaluate("--tasks", "pubmedqa", "--models", "base", "--limit", "4", place=copied)
    assert "pubmedqa: 4 prompts are longer than the context and lost their beginning (base)." in done.out


@pytest.mark.slow
@pytest.mark.long
def test_with_the_chat_template_it_is_another_line(evaluate, place, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(place, copied)
    asked = ("--tasks", "pubmedqa", "--num_fewshot", "0", "--models", "target", "--limit", "6")
    assert evaluate(*asked, place=copied).code == 0
    done = evaluate(*asked, "--apply_chat_template", place=copied)
    assert done.code == 0, done.err
    assert "there already" not in done.err
    table = json.loads((copied / "run" / "evaluation" / "table.json").read_text())["table"]
    settings = [line[1] for line in table[1:] if "first 6" in line[1]]
    assert settings == ["0-shot, first 6, seed 1234", "0-shot, first 6, seed 1234, chat template"]


@pytest.mark.slow
@pytest.mark.long
def test_a_model_directory_and_a_task_file_of_the_user(place, finished, tmp_path, sftmix):
    write_rows(tmp_path, "medmcqa", questions=3)
    spec = f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'medmcqa.jsonl'}\n"
    spec += 'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{question}}"\ndoc_to_target: answer\n'
    spec += 'doc_to_choice: "{{options}}"\nmetric_list:\n  - metric: acc\n'
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.yaml").write_text(spec)
    words = ["evaluate", str(finished.tiny.model), "--tasks", "mine", "--include_path", str(tmp_path / "mine")]
    done = sftmix(*words, "--to", str(tmp_path / "results"))
    assert done.code == 0, done.err
    assert "its own shots, seed 1234" in done.out
    assert "is a model" in sftmix(*words).err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--tasks is missing"),
        (["--tasks", "medqa_4options"], "give --data_dir"),
        (["--tasks", "arc_easy", "--limit", "0"], "--limit is 0"),
        (["--tasks", "arc_easy", "--num_fewshot", "-1"], "--num_fewshot is -1"),
        (["--tasks", "arc_easy", "--models", "best"], "kept no best weights"),
        (["--tasks", "arc_easy", "--include_path", "nowhere"], "--include_path nowhere is not a directory"),
        (["--tasks", "arc_easy", "--shots", "x"], "belongs to --convert"),
        (["--convert", "medqa_4options"], "--to is missing"),
        (["--convert", "pubmedqa", "--to", "x", "--limit", "3"], "--convert and --limit (3) exclude each other"),
        (["--convert", "pubmedqa", "--to", "x", "--apply_chat_template"], "--convert and --apply_chat_template (True)"),
    ],
)
def test_wrong_options_are_refused(finished, sftmix, words, told):
    done = sftmix("evaluate", str(finished.path), *words)
    assert (done.code, told in done.err) == (2, True), done.err


def test_rows_that_cannot_be_fetched_are_told_in_a_line_and_end_as_bad_data(finished, sftmix, tmp_path):
    spec = "task: mine\ndataset_path: sftmix/nothing\noutput_type: multiple_choice\ntest_split: test\n"
    (tmp_path / "mine.yaml").write_text(spec + "doc_to_text: a\ndoc_to_target: b\ndoc_to_choice: c\n")
    words = ("--tasks", "mine", "--include_path", str(tmp_path), "--to", str(tmp_path / "results"))
    done = sftmix("evaluate", str(finished.tiny.model), *words)
    (told,) = [line for line in done.err.splitlines() if "error: " in line]
    assert (done.code, "Traceback" in done.err) == (3, False), done.err
    for word in ("error: --tasks: mine: ", "sftmix/nothing", "network", "--include_path"):
        assert word in told


def test_no_difference_of_other_questions():
    score = Score("acc", 0.5, 0.5, 2, ["a", "b"], [0.0, 1.0])
    other = Score("acc", 0.5, 0.5, 2, ["a", "c"], [0.0, 1.0])
    assert difference("task", ("target", score), ("base", other)) is None
    assert difference("task", ("target", score), ("base", score)).value == 0


def test_no_difference_of_a_metric_that_is_not_the_mean_over_questions():
    """A perplexity is exp(-mean): the mean of the questions' values has another unit, and the other sign."""
    one, other = ([-1.0, -2.0], [-1.0, -3.0])
    left, right = (Score("perplexity", math.exp(-statistics.mean(v)), None, 2, ["a", "b"], v) for v in (one, other))
    assert difference("task", ("target", left), ("base", right)) is None
    left, right = (Score("acc", statistics.mean(v), None, 2, ["a", "b"], v) for v in (one, other))
    assert difference("task", ("target", left), ("base", right)).value == 0.5


def entry(task, model, identity, finished, run=None):
    settings = {"num_fewshot": 0, "limit": None, "seed": 1, "chat_template": False}
    score = Score("acc", 0.5, None, 2, ["a", "b"], [0.0, 1.0])
    return Entry(task, model, "path", identity, settings, {task: score}, {}, 0, 1.0, finished, run)


def test_results_of_weights_that_are_no_more_are_left_out():
    old = [entry(task, model, "old", 1.0) for task in ("first", "second") for model in ("baseline", "target")]
    table = table_from([*old, entry("first", "target", "new", 2.0)], {"target": "new"})
    assert {line.task: list(line.cells) for line in table.lines} == {
        "first": ["baseline", "target"],
        "second": ["baseline"],
    }
    (told,) = sentences_of(table)[-1:]
    assert told.startswith("second: what was measured of target is left out")
    assert [text for text in sentences_of(table) if text.startswith("first: what")] == []


def test_a_metric_under_two_filters_has_the_name_of_its_own():
    """As gsm8k's exact_match, strict and flexible: the two differ by much."""
    one = entry("task", "target", "new", 1.0)
    alone = {"task": {"alias": "task", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.2}}
    two = {"task": {"acc,strict-match": 0.5, "acc_stderr,strict-match": 0.1, "acc,flexible-extract": 0.7}}
    for values, shown in ((alone, "acc"), (two, "acc (strict-match)")):
        table = table_from([replace(one, all=values)], {})
        assert [row[2] for row in table_of(table)] == ["metric", shown]


def test_one_prompt_is_no_prompts():
    lines = [Line("task", {}, {}, {"base": 1, "target": 2}, [])]
    assert sentences_of(Table(lines)) == [
        "task: 1 prompt is longer than the context and lost its beginning (base).",
        "task: 2 prompts are longer than the context and lost their beginning (target).",
    ]


def test_a_directory_takes_the_results_of_one_run(tmp_path):
    one, other = (FinishedModel("target", "path", tmp_path / name) for name in ("one", "other"))
    place = tmp_path / "results"
    write_entry(place, entry("task", "target", "id", 1.0, run_of(place, one)))
    write_entry(place, entry("task", "gpt2", "id", 1.0, run_of(place, FinishedModel("gpt2", "gpt2", None))))
    check_run(place, [one, FinishedModel(str(tmp_path / "other"), "path", tmp_path / "other")])
    with pytest.raises(ConfigError, match=r"results of the run .*one, and .*other; .*--to DIR"):
        check_run(place, [other])
