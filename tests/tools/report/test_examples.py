"""The table of all examples against the run's own files and transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftmix.data.dataset import instruction_and_response
from sftmix.disk.tables import read_dynamics
from sftmix.tools.report.run import RunView
from sftmix.types import NOT_COUNTED, Example, Message, TrainingDynamics
from sftmix.words.errors import ConfigError
from tests.tiny import groups, sftmix, table
from tests.tools.report.conftest import Text

pytestmark = pytest.mark.long

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
write_report = pytest.importorskip("sftmix.tools.report.write").write_report


@pytest.mark.slow
def test_the_table_has_every_example_with_its_text_and_columns(reported, examples):
    rows = [json.loads(line) for line in (reported.parent / "train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (reported.parent / "eval.jsonl").read_text().splitlines()]
    assert examples.held_out.tolist() == [False] * len(rows) + [True] * len(held_out)
    train, held = examples[~examples.held_out], examples[examples.held_out]
    # The table has columns `group` and `x` of its own.
    names = {"response": "output", "label": "quality", "score": "score", "row_group": "group", "row_x": "x"}
    for column, name in names.items():
        assert train[column].tolist() == [row[name] for row in rows]
    assert train.mixed.tolist() == [str(row["mixed"]) for row in rows]  # values of several types are text
    assert train.group.to_dict() == groups(reported)
    assert held.response.tolist() == [row["output"] for row in held_out]
    assert (held.row_group == "own").all()
    assert (held.row_confidence == "high").all()
    assert held[["group", "mixed"]].isna().all(axis=None)


def test_the_table_has_what_the_reference_saw(reported, examples):
    found = pd.DataFrame(table(reported / "confidence" / "dynamics.parquet"))
    assert sorted(found.step.unique()) == [6, 12]
    for step, part in found.groupby("step"):
        expected = np.exp(part.nll_sum / part.n_tokens).to_numpy()
        assert examples.loc[part.id, f"perplexity_step_{step}"].to_numpy() == pytest.approx(expected, rel=1e-12)
    share = found.groupby("id", sort=False).apply(lambda part: (part.n_correct / part.n_tokens).mean())
    assert examples.loc[share.index, "correctness"].to_numpy() == pytest.approx(share.to_numpy(), rel=1e-12)
    confidence = pd.DataFrame(table(reported / "confidence" / "confidence.parquet")).set_index("id")
    for name in ("confidence", "variability"):
        assert examples.loc[confidence.index, name].tolist() == confidence[name].tolist()
    assert examples[examples.held_out].confidence.isna().all()


@torch.no_grad()
def loss_of(model, tokenizer, instruction: str, response: str) -> float:
    """Mean NLL of the response tokens, by transformers' own loss."""
    turns = [{"role": "user", "content": instruction}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
    ids = tokenizer(whole.rstrip("\n"), add_special_tokens=False, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt, add_special_tokens=False).input_ids)] = -100
    return float(model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize(
    ("column", "model"),
    [("loss_before", "../model"), ("loss_after", "train/model"), ("loss_after_baseline", "baseline/model")],
)
def test_losses_are_those_of_transformers(reported, examples, column, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(reported / model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(reported / "train" / "model")
    assert examples[~examples.held_out][column].notna().all()
    some = [*examples[~examples.held_out].index[[0, 3, 17]], *examples[examples.held_out].index[:2]]
    for _, row in examples.loc[some].iterrows():
        assert row[column] == pytest.approx(loss_of(loaded, tokenizer, row.instruction, row.response), rel=2e-5)


def test_both_ends_have_a_place_on_the_map(examples):
    placed = examples[examples.x.notna()]
    ordered = examples[~examples.held_out].confidence.sort_values(kind="stable").index
    assert set(placed.index) == {*ordered[:10], *ordered[-10:]}
    assert placed.y.notna().all()
    assert len(placed[["x", "y"]].drop_duplicates()) == 20


def test_a_run_whose_rows_have_changed_is_not_reported(reported):
    file = reported.parent / "eval.jsonl"
    text = file.read_text()
    file.write_text(text.replace('"output": "', '"output": "more ', 1))
    try:
        with pytest.raises(ConfigError, match="run was made from other rows"):
            write_report(reported, reported.parent / "none.html", map_size=0)
    finally:
        file.write_text(text)


@pytest.mark.slow
def test_adapters_and_a_single_checkpoint_are_reported(reported, monkeypatch):
    """The loss after training is that of the merged model; without variability, the data map has a plain axis."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["--config", str(reported / "config.yaml"), "--model.lora.r", "2", "--reference.checkpoints", "1"]
    done = sftmix(
        "run", *words, "--with_baseline", "false", "--training.max_steps", "3", "--out", "lora", cwd=reported.parent
    )
    assert done.returncode == 0, done.stderr
    done = sftmix("export", "lora", "--merge", "--to", "merged", cwd=reported.parent)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(reported.parent)
    write_report(Path("lora"), map_size=20, score_all=True)
    examples = pd.read_parquet("lora/report/examples.parquet").set_index("id")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    for _, row in examples[~examples.held_out].iloc[[0, 3]].iterrows():
        expected = loss_of(model, tokenizer, row.instruction, row.response)
        assert row.loss_after == pytest.approx(expected, rel=2e-5)
    sample = read_dynamics(Path("lora/train/sample.parquet"))
    write_report(Path("lora"), map_size=0)  # without --score: of the sample alone
    again = pd.read_parquet("lora/report/examples.parquet").set_index("id").loc[list(sample.ids)]
    assert again.loss_after.tolist() == pytest.approx(sample.nll_sum[:, -1] / sample.n_tokens)
    page = Text(Path("lora/report/report.html"))
    assert page.plots["data-map"]["layout"]["xaxis"].get("type") != "log"


def test_correctness_is_of_rows_that_every_checkpoint_counted():
    correct, n_tokens = np.array([[1, 4], [NOT_COUNTED, 2], [0, 0]]), np.array([5, 4, 0])
    dynamics = TrainingDynamics(["a", "b", "c"], np.arange(2), np.ones((3, 2)), n_tokens, correct)
    nothing: list[Any] = [None] * 6
    assert RunView(*nothing, dynamics).correctness.tolist() == pytest.approx([0.5, np.nan, np.nan], nan_ok=True)


def test_the_text_of_an_example_names_roles_where_there_are_several():
    user, answer = Message("user", "Hi"), Message("assistant", "Hello", trained=True)
    assert instruction_and_response(Example("a", (user, answer))) == ("Hi", "Hello")
    system = Message("system", "Be kind")
    assert instruction_and_response(Example("a", (system, user, answer))) == ("system: Be kind\n\nuser: Hi", "Hello")
    assert instruction_and_response(Example("a", (Message("text", "A window", trained=True),))) == ("", "A window")
