"""Questions from rows of any format and of official judges, and what is refused: other inputs than before."""

import json
import shutil
import sys

import pytest
import yaml

from sftmix.components import RowFormat
from sftmix.config import RunConfig
from sftmix.options import DataOptions
from sftmix.pipeline.validity import differences
from sftmix.text import encode
from sftmix.tools.answers.generate import inputs_of, read_questions
from sftmix.tools.answers.options import AnswerOptions, Question
from sftmix.tools.runs.models import finished_models
from sftmix.types import Message
from sftmix.words.errors import ConfigError, ContractError, DataError
from tests.text.small_tokenizers import chatml_tokenizer, make_encoder
from tests.text.test_turns import CALL, RESULT, TOOL, answer, turns
from tests.tiny import sign

ALPACA_EVAL = {"instruction": "Q?", "output": "A", "generator": "g", "dataset": "d"}
MT_BENCH = {"question_id": 81, "turns": ["Q?", "More?"], "category": "writing"}
ASKED = ({"role": "user", "content": "Q?"},)


# ------------------------------------------------------------------------------------------- questions


@pytest.fixture
def read(tmp_path):
    """Function: the questions of lines, which are rows or texts."""

    def questions(*lines, **more):
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return read_questions([str(file)], **more)

    return questions


def test_each_question_has_an_id_of_its_own(read):
    ids = ["a", "a", "a#2", "a", "b"]
    found = [question.id for question in read(*({"id": name, "prompt": f"Q{k}?"} for k, name in enumerate(ids)))]
    assert found == ["a", "a#2", "a#2#2", "a#3", "b"]


WITH_TOOLS = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_question_with_functions_has_the_prompt_that_its_row_is_trained_behind(read):
    tokenizer = chatml_tokenizer(WITH_TOOLS)
    row = turns(answer(content="", tool_calls=[CALL]), RESULT, answer(content="It is 2."), tools=json.dumps([TOOL]))
    *_, found = encode(row, tokenizer)
    (question,) = read({**row, "messages": row["messages"][:-1]})
    assert question.as_dict()["tools"] == [TOOL]
    ids = make_encoder(tokenizer).prompt(question.messages, question.tools)
    assert (ids, found.reasons) == (found.ids[: found.spans[-1][0]], [])
    assert '"description": "Adds."' in tokenizer.decode(ids)


@pytest.mark.parametrize(("category", "expected"), [("writing", 0.7), ("math", 0.0), ("stem", 0.1), ("other", 0.7)])
def test_the_category_decides_the_temperature(read, category, expected):
    (question,) = read({**MT_BENCH, "category": category}, mt_bench=True)
    assert (question.temperature, question.follow_ups) == (expected, ("More?",))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q?", "output": "A", "id": "own"},
        {"instruction": "Q?"},
        {"prompt": [{"role": "user", "content": "Q?"}]},
        {"messages": [{"role": "user", "content": "Q?"}]},
        {"conversations": [{"from": "human", "value": "Q?"}]},
        {"messages": [{"role": "user", "content": "Q?"}], "tools": []},
    ],
    ids=str,
)
def test_prompts_are_rows_of_any_format_with_or_without_answer(read, row):
    first, second = read(row, row)
    assert (first.messages, first.reference) == (ASKED, row.get("output"))
    assert second.id == f"{first.id}#2"


@pytest.mark.parametrize(
    "more", [{"prompt": "Q?"}, {"instruction": "Q?"}, {"prompt": "Q?", "completion": "B"}], ids=str
)
@pytest.mark.parametrize("written", [list, json.dumps], ids=["a list", "JSON text"])
@pytest.mark.parametrize("reference", [None, "C"])
def test_a_conversation_is_asked_by_its_messages_whatever_field_repeats_its_first_turn(read, more, written, reference):
    """HuggingFaceH4/ultrachat_200k has both; its tables may hold the turns as JSON text."""
    asked = (*ASKED, {"role": "assistant", "content": "A"}, {"role": "user", "content": "More?"})
    answer = [{"role": "assistant", "content": reference}] if reference else []
    (question,) = read({**more, "messages": written([*asked, *answer])})
    assert (question.messages, question.reference) == (asked, reference)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "completion": "A", "label": False},
        {"prompt": "Q?", "completion": "A", "weight": 0},
        {"instruction": "Q?", "output": "A", "loss_weight": 0},
        {"messages": [*ASKED, {"role": "assistant", "content": "A", "weight": 0}]},
        {"messages": [*ASKED, {"role": "assistant", "content": "A", "train": False}]},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A", "loss": False}]},
    ],
    ids=str,
)
def test_a_question_needs_no_answer_that_is_trained(read, row):
    (question,) = read(row)
    (plain,) = read({"prompt": "Q?", "completion": "A"})
    assert (question.messages, question.reference, question.id) == (ASKED, "A", plain.id)


@pytest.mark.parametrize(
    ("row", "columns", "asked", "reference"),
    [
        ({"prompt": "Q?", "output": "B"}, None, "Q?", None),
        ({"prompt": "Q?", "input": "I"}, None, "Q?", None),
        ({"prompt": "Q?", "completion": "A", "instruction": "Else?"}, None, "Q?", "A"),
        ({"prompt": "Else?", "instruction": "Q?"}, None, "Q?", None),
        ({"text": "Q?", "messages": [{"role": "user", "content": "Else?"}]}, {"prompt": "text"}, "Q?", None),
    ],
    ids=str,
)
def test_the_field_that_asks_names_the_format_where_an_answer_is_missing(read, row, columns, asked, reference):
    (question,) = read(row, config=RunConfig(data=DataOptions(columns=columns)))
    assert (question.messages, question.reference) == (({"role": "user", "content": asked},), reference)


class Exam(RowFormat):
    """A question of an exam, and an answer or none, in fields that another format has as well."""

    fields = ("prompt", "solution")

    def read(self, row, *, roles):
        answer = [Message("assistant", row["solution"], True)] if "solution" in row else []
        return [Message("user", f"{row['prompt']} Explain."), *answer]


class Empty(Exam):
    """It reads no turn."""

    def read(self, row, *, roles):
        return []


@pytest.mark.parametrize(
    ("form", "row", "asked", "reference"),
    [
        (Exam(), {"prompt": "Q?"}, "Q? Explain.", None),
        (Exam(), {"prompt": "Q?", "solution": "A", "messages": ASKED}, "Q? Explain.", "A"),
        (Exam(), {"instruction": "Q?"}, "Q?", None),
        ("prompt_completion", {"prompt": "Q?", "messages": [{"role": "user", "content": "Else?"}]}, "Q?", None),
        ("alpaca", {"messages": ASKED}, "Q?", None),
        ("text", {"prompt": "Q?", "text": "Long ago."}, "Q?", None),
    ],
    ids=str,
)
def test_a_row_with_fields_of_the_runs_format_is_read_by_it_and_any_other_by_its_own(read, form, row, asked, reference):
    chosen = {"data": DataOptions(format=form)} if isinstance(form, str) else {"row_format": form}
    (question,) = read(row, config=RunConfig(**chosen))
    assert (question.messages[-1]["content"], question.reference) == (asked, reference)


def test_a_run_has_its_prompts_read_by_its_format(moved, tmp_path, sftmix, monkeypatch):
    """Of a class of its own, which is imported if it is trusted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "exam_rows.py").write_text(
        f"from {Exam.__module__} import Exam as Base\n\n\nclass Exam(Base):\n    pass\n"
    )
    change(moved, row_format="exam_rows.Exam")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Q?", "completion": "B", "solution": "A"}))
    words = ("generate", str(moved), "--prompts", "rows.jsonl", "--to", "to.jsonl", "--max_new_tokens", "2")
    done = sftmix(*words)
    assert (done.code, "exam_rows.Exam is no component of this package" in done.err) == (2, True), done.err
    done = sftmix(*words, "--trust")
    assert done.code == 0, done.err
    line = json.loads((tmp_path / "to.jsonl").read_text())
    assert (line["messages"], line["reference"]) == ([{"role": "user", "content": "Q? Explain."}], "A")


def test_documents_ask_nothing_and_a_format_that_reads_no_turn_is_named(read):
    with pytest.raises(DataError, match=r"rows.jsonl:1: format not recognised from the fields 'text'"):
        read({"text": "Long ago."}, config=RunConfig(data=DataOptions(format="text")))
    with pytest.raises(ContractError, match=r"row_format Empty returned \[\]"):
        read({"prompt": "Q?"}, config=RunConfig(row_format=Empty()))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ""),
        ("5", "expected an object"),
        ('{"text": "long ago"}', "format not recognised from the fields 'text'"),
        ('{"instruction": "a\\u0000"}', "instruction contains a NUL"),
        ('{"input": "a"}', "field 'instruction' is missing or null; there are 'input' "),
        ('{"messages": [{"role": "system", "content": "S"}]}', "no assistant turn to train on"),
    ],
)
def test_a_bad_row_is_named(read, line, words):
    with pytest.raises(DataError, match=f"rows.jsonl:2: {words}"):
        read({"instruction": "Q", "id": "a"}, line)
    with pytest.raises(DataError, match=r"rows.jsonl:2: it has no 'turns'"):
        read(MT_BENCH, {"what": 1}, mt_bench=True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"category": ["math"]}, r"category must be a string, found \['math'\]"),
        ({"turns": [5]}, r"turns\[0\] must be a string, found 5"),
        ({"turns": ["Q?", {"role": "user", "content": "More?"}]}, r"turns\[1\] must be a string, found \{"),
        ({"turns": "Q?"}, "turns must be a list of texts"),
    ],
    ids=str,
)
def test_a_row_of_mt_bench_has_texts(read, values, reason):
    with pytest.raises(DataError, match=f"--prompts: .*rows.jsonl:2: {reason}"):
        read(MT_BENCH, {**MT_BENCH, **values}, mt_bench=True)


# ---------------------------------------------------------------------------------- inputs, and the files of judges


@pytest.fixture
def moved(finished, tmp_path):
    """A copy of the finished run with a model directory of its own."""
    shutil.copytree(finished.path, tmp_path / "first")
    shutil.copytree(finished.tiny.model, tmp_path / "model")
    change(tmp_path / "first", "model", path=str(tmp_path / "model"))
    return tmp_path / "first"


def change(run, part: str = "", **options) -> None:
    """Change options of one part of a run's config, or of no part."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (config[part] if part else config).update(options)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    sign(run)


def inputs(models):
    return inputs_of("rows", [Question("q", ASKED)], models, AnswerOptions())


def test_what_special_tokens_become_is_an_input(moved):
    """The template is that of train/model, whose files are inputs as they are."""
    models, seen = finished_models(moved), []
    for special in ("text", "tokens"):
        change(moved, "data", special_tokens=special)
        seen.append(inputs(models))
    (found,) = differences(*seen)
    assert found.startswith("models.target.encoder: ")


def test_the_weights_of_a_model_from_elsewhere_are_inputs(moved, tmp_path):
    models = finished_models(tmp_path / "model")
    before = inputs(models)
    with (tmp_path / "model" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert inputs(models)["models"] != before["models"]


def test_held_out_text_asks_for_prompts(moved, generate, tmp_path, monkeypatch):
    train, held_out = tmp_path / "train.txt", tmp_path / "eval.txt"
    train.write_text("Long ago.")
    held_out.write_text("Not long ago.")
    change(moved, "data", train=str(train), eval=str(held_out))
    with pytest.raises(ConfigError, match="was made from other rows"):
        generate(moved, tmp_path / "answers.jsonl")
    # as if these rows were those of the run
    monkeypatch.setattr("sftmix.tools.runs.rows.made_from", lambda run: {"data": {}, "model": ""})
    with pytest.raises(ConfigError, match=r"--prompts is not given, and target has no held-out conversations"):
        generate(moved, tmp_path / "answers.jsonl")


def test_the_files_of_judges_have_their_fields_and_stand_side_by_side(moved, finished, generate, tmp_path, monkeypatch):
    """Those of two runs, and of a model under the name of its directory; none replaces another."""
    prompts, to, words = tmp_path / "rows.jsonl", tmp_path / "to", ("--max_new_tokens", "2", "--prompts")
    prompts.write_text(json.dumps(ALPACA_EVAL))
    monkeypatch.chdir(finished.tiny.model)
    generate(".", to, *words, prompts, "--format", "alpaca_eval")
    answers, judged = (json.loads((to / name).read_text()) for name in ("answers-model.jsonl", "model.json"))
    assert judged == [{**ALPACA_EVAL, "output": answers["answers"]["."], "generator": "model"}]
    prompts.write_text(json.dumps(MT_BENCH))
    words = (*words, prompts, "--format", "mt_bench")
    generate(moved, to, *words)
    generate(finished.path, to, *words)
    (answers, first), (_, second) = (
        (to / f"answers-{name}-target.jsonl", to / "model_answer" / f"{name}-target.jsonl") for name in ("first", "run")
    )
    choices = [{"index": 0, "turns": json.loads(answers.read_text())["answers"]["target"]}]
    before = first.read_bytes()
    assert json.loads(before) == {"question_id": 81, "model_id": "first-target", "choices": choices}
    assert json.loads(second.read_text())["model_id"] == "run-target"
    twin = shutil.copytree(finished.tiny.model, tmp_path / "twin" / "model")
    with pytest.raises(ConfigError, match=r"--models: the files of two models would have one name: model, model"):
        generate(finished.tiny.model, to, *words, "--models", f"{finished.tiny.model},{twin}")
    with pytest.raises(ConfigError, match=r"to is a directory; with --format rows it names a file"):
        generate(moved, to)
    with pytest.raises(ConfigError, match=r"--format mt_bench needs --prompts"):
        generate(moved, to, "--format", "mt_bench")
    with pytest.raises(ConfigError, match=r"answers-first-target.* temperature: None -> 0\.5; prompts: "):
        generate(moved, to, *words, "--models", "target,base", "--temperature", "0.5")
    assert first.read_bytes() == before
