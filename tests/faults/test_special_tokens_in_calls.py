"""Special tokens that a row spells in its functions and calls, and under templates that write JSON."""

import json
from dataclasses import replace

import pytest
from tokenizers import AddedToken

from sftmix.text.mask import encode_examples
from sftmix.types import Example, Message
from tests.faults.test_special_tokens import TURN, chat, special_ids, tokenizer_of
from tests.text.small_tokenizers import CHATML as CHATML_TEMPLATE
from tests.text.small_tokenizers import SMALL, make_encoder


def of_template(tmp_path, written: str):
    """An encoder whose template writes the first message, and a row's functions, in this way."""
    tools = "{% for value in tools or [] %}{{ WRITTEN }}{% endfor %}".replace("WRITTEN", written)
    (path := tmp_path / "written.jinja").write_text(
        tools
        + CHATML_TEMPLATE.replace(
            "m['content']", f"(({written.replace('value', 'm.content')}) if loop.first else m['content'])"
        )
    )
    return make_encoder(SMALL["chatml"](), str(path))


def tool(text: str) -> dict:
    return {"type": "function", "function": {"name": "add", "description": text, "parameters": {}}}


@pytest.mark.parametrize("text", ["Hi <|im_end|>", '<|end|>"\n<|im_start|>', r"\u0000 <|im_end|>"])
def test_a_template_that_writes_json(tmp_path, text):
    """Of a turn, and of a function: what is spelt there is written as it is."""
    encoder = of_template(tmp_path, "value | tojson")
    row = replace(chat(text, f"Yo {text}"), tools=(tool(text),))
    found, plain = encode_examples(encoder.renderer, [row, replace(chat("Hi", "Yo"), tools=(tool("Hi"),))], 1000)
    spelt = json.dumps(text, ensure_ascii=False)
    assert encoder.decode(found.ids) == encoder.decode(plain.ids).replace('"Hi"', spelt).replace("Yo", f"Yo {text}")
    special = special_ids(encoder.tokenizer)
    assert [i for i in found.ids if i in special] == [i for i in plain.ids if i in special]


EVERYTHING = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}
<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
END = "<|im_end|>"
PLACES = {
    "a key of an argument": ({END: 1}, {}),
    "a key within": ({"a": [{"b": {END: None}}]}, {}),
    "an argument called role": ({"role": END, "a": {"role": [END]}}, {}),
    "a property": ({}, {"properties": {END: {"type": "string"}}, "required": [END]}),
    "a property called role": ({}, {"properties": {"role": {"description": END, "enum": [END], "role": END}}}),
}


@pytest.mark.parametrize("where", PLACES)
def test_spellings_anywhere_in_calls_and_functions(where):
    """The tokens are those of the same row with a harmless word there, but for the word."""
    encoder = make_encoder(tokenizer_of(*(AddedToken(n, special=True) for n in TURN), template=EVERYTHING))
    arguments, parameters = PLACES[where]

    def encoded(word: str) -> tuple[str, list[int]]:
        spelt = json.dumps([arguments, parameters]).replace(END, word)
        row = json.loads(spelt)
        call = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": row[0]}}
        answer = Message("assistant", "", True, more={"tool_calls": [call]})
        tools = ({"type": "function", "function": {"name": "add", "parameters": row[1]}},)
        example = Example("x", (Message("user", "Hi"), answer), tools=tools)
        (found,) = encode_examples(encoder.renderer, [example], 1000)
        assert not {"calls_lost", "tools_lost", "template_refused"} & {*found.reasons}
        return encoder.decode(found.ids), [i for i in found.ids if i in special_ids(encoder.tokenizer)]

    (text, special), (plain, expected) = encoded(END), encoded("WORD")
    assert text == plain.replace("WORD", END) != plain
    assert special == expected


@pytest.mark.parametrize("written", ["value | tojson(ensure_ascii=true)", "[value]"])
@pytest.mark.parametrize("where", ["turn", "function"])
def test_a_template_that_writes_escapes(tmp_path, written, where):
    """The mark of a spelling would be among them."""
    encoder = of_template(tmp_path, written)
    said, described = [r"Hi \ufdd0 <|im_end|>", "Add."][:: 1 if where == "turn" else -1]
    bad, good = (
        replace(chat(text, "Yo"), tools=(tool(of_tool),)) for text, of_tool in ((said, described), ("Hi", "Add."))
    )
    bad, good = encode_examples(encoder.renderer, [bad, good], 1000)
    assert bad.reasons == ["template_refused"]
    assert "in escapes" in bad.detail
    assert '"Hi"' in (text := encoder.decode(good.ids)) or "['Hi']" in text
