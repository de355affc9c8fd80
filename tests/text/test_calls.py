"""Calls of functions from the file to the tokens: in the preview of a run's data, and in the prompt of a question."""

import json

from transformers import AutoTokenizer

from sftmix.text.encoder import make_encoder
from sftmix.tools.answers.generate import read_questions
from sftmix.tools.preview.text import render_preview
from tests.text.test_turns import CALL, RESULT, TOOL, answer, turns

TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_calls_are_trained_and_results_are_not(write, load, shared):
    """The preview of a run's data, and the prompt of a question from the same row, through the model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/base-7m")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    row = turns(
        answer(content=None, tool_calls=[CALL], reasoning_content="Sum it."), RESULT, answer(content="It is 2."),
        tools=json.dumps([TOOL]),
    )  # fmt: skip
    encoder = make_encoder(tokenizer, thinks=True)
    data = load(encoder, write("rows.jsonl", [row]), max_length=512)
    assert not data.report.counts.keys() & {"composed", "calls_lost", "tools_lost"}
    plain = [{"role": turn["role"], "content": turn.get("content") or "", **turn} for turn in row["messages"]]
    plain[1]["content"] = ""
    first, second = ([encoder.decode(e.input_ids[e.target]), encoder.decode(e.input_ids)] for e in data.train)
    assert (
        first[0]
        == '<think>\nSum it.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    )
    assert second[0] == "It is 2.<|im_end|>"
    whole = tokenizer.apply_chat_template(plain, tools=[TOOL], tokenize=False)
    assert second[1] == whole.removesuffix("\n")
    shown = render_preview(data, encoder, [1], color=False)
    assert "[[It is 2.<|im_end|>]]" in shown
    assert '"description": "Adds."' in shown
    asked = {**row, "messages": row["messages"][:-1]}
    (question,) = read_questions([write("asked.jsonl", [asked])])
    ids = encoder.prompt(question.messages, question.tools)
    assert ids == data.train[1].input_ids[~data.train[1].target].tolist()
    assert question.as_dict()["tools"] == [TOOL]
