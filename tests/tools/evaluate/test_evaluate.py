"""The table of an evaluation: accuracy against plain forward passes, differences against the formula, resumption."""

import json
import math
import shutil
import statistics

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.cli import main
from sftmix.disk.files import read_json, write_json
from sftmix.tools.evaluate.table import difference, write_tables
from tests.tools.evaluate.bench import BENCHMARKS, HEAD, asked, write_rows

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
        return sftmix("evaluate", str(place / "run"), *words, "--include_path", str(place / "rows"))

    return call


def plain_answers(model_path, tokenizer, name, rows):
    """1.0 where the right letter is the likeliest after the prompt, by one forward pass for each letter."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    right = []
    for row in rows:
        prompt, losses = HEAD + asked(row), []
        for letter in "ABCDE"[: BENCHMARKS[name]]:
            ids = torch.tensor([tokenizer(prompt + letter).input_ids])
            before = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                logits = model(ids).logits[0].double()
            losses.append(float(cross_entropy(logits[before - 1 : -1], ids[0, before:], reduction="sum")))
        right.append(float(losses.index(min(losses)) == row["answer"]))
    return right


@pytest.mark.slow
def test_accuracy_differences_and_files(evaluate, place, finished):
    done = evaluate(*ASKED)
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(finished.tiny.model)
    models = {"base": finished.tiny.model}
    models |= {name: finished.path / stage / "model" for name, stage in (("baseline", "baseline"), ("target", "train"))}
    folder = place / "run" / "evaluation"
    found = read_json(folder / "table.json")
    assert found["table"][0] == ["task", "settings", "metric", "questions", "base", "baseline", "target"]
    right = {}
    for name in ("medqa_4options", "pubmedqa"):
        rows = [json.loads(row) for row in (place / "rows" / f"{name}.jsonl").read_text().splitlines()]
        right |= {(name, model): plain_answers(path, tokenizer, name, rows) for model, path in models.items()}
    entries = [read_json(file) for file in folder.glob("*.*.????????????.json")]
    scores = {(entry["task"], entry["model"]): score for entry in entries for score in entry["scores"].values()}
    assert (scores.keys(), len(found["sentences"])) == (right.keys(), 5)
    for (name, model), score in scores.items():
        each = right[name, model]
        assert score["value"] == pytest.approx(statistics.mean(each), abs=1e-12)
        assert score["stderr"] == pytest.approx(statistics.stdev(each) / math.sqrt(QUESTIONS), abs=1e-12)
        assert (score["n"], score["values"]) == (QUESTIONS, each)
        each = [a - b for a, b in zip(right[name, "target"], each, strict=True)]
        told = difference(scores[name, "target"], score)
        assert (model == "target") != ({"task": name, "left": "target", "right": model, **told} in found["differences"])
        assert told["value"] == pytest.approx(statistics.mean(each), abs=1e-12)
        assert told["stderr"] == pytest.approx(statistics.stdev(each) / math.sqrt(QUESTIONS), abs=1e-12)
    assert done.out == (folder / "table.md").read_text()


@pytest.mark.slow
def test_what_is_there_is_not_done_again_and_other_settings_are_another_line(evaluate, place, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(place, copied)
    assert evaluate(*ASKED, "--models", "base", place=copied).code == 0
    folder = copied / "run" / "evaluation"
    before = {file.name: file.read_bytes() for file in folder.glob("*.*.????????????.json")}
    again = evaluate(*ASKED, "--models", "base", place=copied)
    assert again.err.count("there already") == 2
    more = evaluate(*ASKED[:2], "--models", "base", "--limit", "5", "--apply_chat_template", place=copied)
    assert "there already" not in more.err
    after = {file.name: file.read_bytes() for file in folder.glob("*.*.????????????.json")}
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    lines = [row[:2] for row in read_json(folder / "table.json")["table"][1:]]
    assert ["pubmedqa", "3-shot, first 5, seed 1234, chat template"] in lines
    assert ["pubmedqa", "0-shot, seed 1234"] in lines
    same = ("--to", f"{copied}/run/train/../evaluation")  # by another name
    assert evaluate(*ASKED, "--models", "target", *same, place=copied).code == 0
    assert {"base", "target"} <= {*read_json(folder / "table.json")["table"][0][4:]}
    assert "(paired" in (copied / "run" / "train" / "model" / "README.md").read_text()


@pytest.mark.slow
def test_a_directory_that_runs_share_compares_no_models_of_two(place, finished, sftmix, tmp_path):
    """The second run has no baseline; a model by itself, later, does not bring that of the first one back."""
    second, to = tmp_path / "second", tmp_path / "results"
    shutil.copytree(finished.path, second, ignore=shutil.ignore_patterns("baseline"))
    words = ("--tasks", "pubmedqa", "--num_fewshot", "0", "--include_path", str(place / "rows"), "--to", str(to))
    heads = []
    for of in ([finished.path], [second], [finished.tiny.model], [finished.path, "--models", "baseline,target"]):
        done = sftmix("evaluate", *map(str, of), *words)
        assert done.code == 0, done.err
        heads.append((read_json(to / "table.json")["table"][0][4:], done.out.count("(paired")))
    mine = str(finished.tiny.model)
    assert heads == [
        (["base", "baseline", "target"], 2),
        (["base", "target"], 1),
        (["base", "target", mine], 1),
        (["baseline", "target", mine], 1),
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "required: --tasks"),
        (["--tasks", "medqa_4options", "--convert", "pubmedqa"], "unrecognized arguments: --convert pubmedqa"),
        (["--tasks", "medqa_4options", "--data_dir", "rows"], "unrecognized arguments: --data_dir rows"),
        (["--tasks", "medqa_4options", "--limit", "0"], "--limit is 0; allowed: 1 and above"),
        (["--tasks", ""], "no task is named in ''"),
        (["--tasks", "medqa_4options", "--to", __file__], "cannot be written"),
    ],
)
def test_wrong_options_are_refused(finished, sftmix, words, told):
    done = sftmix("evaluate", str(finished.path), *words)
    assert (done.code, told in done.err) == (2, True), done.err


def test_rows_that_cannot_be_fetched_are_told_before_a_model_is_loaded(finished, sftmix, tmp_path):
    model, tasks = shutil.copytree(finished.tiny.model, tmp_path / "model"), tmp_path / "tasks"
    (model / "model.safetensors").write_bytes(b"no weights")
    tasks.mkdir()
    spec = "task: mine\ndataset_path: sftmix/nothing\noutput_type: multiple_choice\ntest_split: test\n"
    (tasks / "mine.yaml").write_text(spec + "doc_to_text: a\ndoc_to_target: b\ndoc_to_choice: c\n")
    done = sftmix("evaluate", str(model), "--tasks", "mine", "--include_path", str(tasks), "--to", str(tmp_path / "to"))
    (told,) = [line for line in done.err.splitlines() if "error: " in line]
    assert (done.code, "Traceback" in done.err) == (3, False), done.err
    assert "error: --tasks: lm-eval cannot load mine or its rows" in told
    assert "sftmix/nothing" in told


def test_a_package_that_a_task_needs_is_named(finished, sftmix, tmp_path):
    (tmp_path / "utils.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\ndoc_to_text: !function utils.text\n")
    words = ("--tasks", "mine", "--include_path", str(tmp_path), "--to", str(tmp_path / "to"))
    done = sftmix("evaluate", str(finished.tiny.model), *words)
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    assert "error: --tasks mine: No module named 'nothing_of_this_name'" in done.err


MINE = """task: {0}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {1}, train: {1}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
{2}metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_a_task_beside_its_group_and_the_shots_that_each_had(finished, capfd, tmp_path, monkeypatch):
    """lm-eval asks a task whose file says 0 shots without any, whatever --num_fewshot is.

    git, which it starts, is in no checkout, and says nothing of it.
    """
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, "pubmedqa", 4)
    for name, own in (("zero", "num_fewshot: 0\n"), ("free", "")):
        (tmp_path / f"{name}.yaml").write_text(MINE.format(name, tmp_path / "pubmedqa.jsonl", own))
    (tmp_path / "both.yaml").write_text("group: both\ntask: [zero, free]\naggregate_metric_list: [{metric: acc}]\n")
    words = ("--tasks", "both,zero,free", "--include_path", str(tmp_path), "--to", str(tmp_path / "to"))
    code, said = main(["evaluate", str(finished.tiny.model), *words, "--num_fewshot", "2"]), capfd.readouterr().err
    assert (code, "fatal" in said) == (0, False), said
    lines = [row[:2] for row in read_json(tmp_path / "to" / "table.json")["table"][1:]]
    assert lines == [
        ["both", "up to 2-shot, seed 1234"],
        ["free", "2-shot, seed 1234"],
        ["zero", "0-shot, seed 1234"],
    ]


def score(values, questions="ab", value=None, metric="acc"):
    mean = statistics.mean(values) if value is None else value
    return {"metric": metric, "value": mean, "stderr": None, "n": 2, "questions": list(questions), "values": values}


def test_a_difference_needs_the_same_questions_and_a_mean_over_them():
    """A perplexity is exp(-mean): the mean of the questions' values has another unit, and the other sign."""
    one, other = score([-1.0, -2.0]), score([-1.0, -3.0])
    assert difference(one, other) == {"value": 0.5, "stderr": pytest.approx(0.5, rel=1e-12), "n": 2}
    assert difference(one, score([-1.0, -3.0], "ac")) is None
    left, right = (score(each["values"], value=math.exp(-each["value"]), metric="perplexity") for each in (one, other))
    assert difference(left, right) is None


def test_results_of_weights_that_are_no_more_are_left_out_and_other_settings_are_other_lines(tmp_path):
    settings = {"num_fewshot": 0, "limit": None, "seed": 1, "chat_template": False, "dtype": "auto"}
    results = [(task, model, "old", "1") for task in ("first", "second") for model in ("baseline", "target")]
    results += [("first", "target", "new", version) for version in ("1", "2")]
    for number, (task, model, identity, version) in enumerate(results):
        entry = {"task": task, "model": model, "identity": identity, "settings": {**settings, "lm_eval": version}}
        file = tmp_path / f"{task}.{model}.{number:012}.json"
        write_json(file, {**entry, "scores": {task: score([0.0, 1.0])}, "finished": 1.0})
    write_tables(tmp_path, {"target": "new"})
    written = read_json(tmp_path / "table.json")
    head, *lines = [[row[0], *row[4:]] for row in written["table"]]
    assert head == ["task", "baseline", "target"]
    assert sorted(lines) == [["first", "", "0.5000"], ["first", "0.5000", "0.5000"], ["second", "0.5000", ""]]
    assert written["sentences"][0] == "first: target - baseline = +0.0000 ± 0.0000 (paired, 2 questions)"
    assert len(written["sentences"]) == 2
