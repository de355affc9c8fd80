"""Qwen2.5-Coder-0.5B-Instruct: biases in the attention, an untied head, a vocabulary of 151,936, ChatML with tools."""

import json

import pandas as pd
import pytest
from transformers import AutoTokenizer

from tests.forked import done
from tests.real.conftest import QUESTIONS
from tests.real.formulas import assert_near, ours, rows_of, theirs

pytestmark = [pytest.mark.real, pytest.mark.slow]
TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}


def test_a_pair_is_that_of_the_formula_on_plain_transformers(qwen, questions):
    """Loss and NLL; the gradients of 630 million weights in float64 are left to the smaller models."""
    data = rows_of(qwen, questions)
    found, lam = ours(qwen, data)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"} < found.keys()
    expected = theirs(qwen, data, float(lam[0]), backward=False)
    assert_near({name: found[name] for name in expected}, expected, rtol=1e-4)


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": TOOL}]], ids=["no tools", "tools"])
def test_prompts_and_responses_with_tools_and_without(tools, qwen, tmp_path):
    asked = {"role": "user", "content": "How is the weather in Paris?"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    chat = [asked, call if tools else {"role": "assistant", "content": "Mild."}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": chat} | ({"tools": tools} if tools else {})) + "\n")
    (row,) = rows_of(qwen, file, max_length=512)
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    prompt = tokenizer.apply_chat_template([asked], tools=tools, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row.input_ids[~row.target]) == prompt
    assert ('"name": "weather"' in prompt) == bool(tools)
    response = tokenizer.decode(row.input_ids[row.target])
    said = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>" if tools else "Mild."
    assert response.rstrip("\n") == f"{said}<|im_end|>"


def test_suspects_begin_with_two_rows_whose_answers_were_exchanged(qwen, tmp_path):
    answers = [*QUESTIONS.values()]
    answers[0], answers[3] = answers[3], answers[0]
    rows = [{"id": f"{k}", "instruction": asked, "output": answers[k]} for k, asked in enumerate(QUESTIONS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["suspects", "rows.jsonl", "--model", str(qwen), "--embedding", "tfidf", "--out", "out"]
    done([*words, "--signals", "Information"], cwd=tmp_path)
    table = pd.read_parquet(tmp_path / "out" / "suspects.parquet")
    assert {*table["id"][:2]} == {"0", "3"}
