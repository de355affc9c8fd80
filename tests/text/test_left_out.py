"""What a template leaves out of a prompt, though other words of the prompt say the same."""

from dataclasses import replace

import pytest

from sftmix.types import Message
from tests.text.small_tokenizers import make_encoder
from tests.text.test_structures import CALL, CALLS, EACH_CALL, FIELD, TOOL, chatml, encoded, tokenizer_of

NAMED = Message("user", "Ask weather about Oslo. Is it 21 degrees?")
RESULT, YES = Message("tool", "21 degrees", more={"tool_call_id": "call00000"}), Message("assistant", "Yes.", True)
EARLIER = Message("assistant", "", more={"tool_calls": [CALL]})
UNSWITCHED = chatml().replace("else %}{{ m.content", "else %}{{ m.content.replace('/no_think', '').replace('/no', '')")
NO_RESULTS = CALLS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")


@pytest.mark.parametrize(
    ("template", "messages", "tools", "reasons"),
    [
        (chatml(FIELD + EACH_CALL), [NAMED, YES], (TOOL,), ["tools_lost"]),
        (chatml(), [NAMED, EARLIER, RESULT, YES], (), ["calls_lost"]),
        (NO_RESULTS, [NAMED, EARLIER, RESULT, YES], (TOOL,), ["tools_lost"]),
        (NO_RESULTS, [Message("user", "Hi"), EARLIER, replace(RESULT, content="Oslo"), YES], (TOOL,), ["tools_lost"]),
        (
            chatml().replace("messages %}", "messages[-3:] %}"),
            [NAMED, Message("assistant", "No."), NAMED, Message("assistant", "No."), NAMED, YES],
            (),
            ["turn_lost"],
        ),
        (UNSWITCHED, [Message("system", "Ask. /no_think Ask weather."), NAMED, YES], (), []),
        (UNSWITCHED, [Message("system", "/no_think"), NAMED, YES], (), []),
        (UNSWITCHED, [Message("system", "Be brief. /no_thought"), NAMED, YES], (), ["turn_lost"]),
        (chatml(), [Message("system", "Ask. /no_think Ask weather."), NAMED, YES], (), []),
        (CALLS, [NAMED, EARLIER, RESULT, YES], (TOOL,), []),
        (CALLS, [NAMED, replace(EARLIER, trained=True), RESULT, YES, NAMED, YES], (TOOL,), []),
    ],
)
def test_what_a_template_cannot_write_is_named_if_another_turn_has_its_words(template, messages, tools, reasons):
    encoder = make_encoder(tokenizer_of("chatml", template))
    assert {*encoded(encoder, *messages, tools=tools)[2]} - {"composed"} == {*reasons}


RESULTS = "{% for m in messages if m.tool_call_id == call.id %}{{ m.content }};{% endfor %}"
BETWEEN = NO_RESULTS.replace(EACH_CALL, EACH_CALL.removesuffix("{% endfor %}") + RESULTS + "{% endfor %}")
"""Each result is behind its own call."""


def test_results_may_be_in_another_order_and_between_calls():
    second = {**CALL, "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Rome", "warm": True}}}
    results = [Message("tool", f"{n}: True", more={"tool_call_id": f"call0000{n}"}) for n in (1, 0)]
    chat = Message("user", "Hi"), Message("assistant", "", more={"tool_calls": [CALL, second]}), *results, YES
    text, _, reasons = encoded(make_encoder(tokenizer_of("chatml", BETWEEN)), *chat, tools=(TOOL,))
    assert 'Oslo"}</tool_call>0: True;<tool_call>weather {"city": "Rome", "warm": true}</tool_call>1: True;' in text
    assert {*reasons} <= {"composed"}
