"""Templates of the kinds that others publish: what is trained is right, or the template is refused by name."""

from importlib.resources import files

import pytest
from transformers import AutoTokenizer
from transformers.utils import is_mistral_common_available

from benchmarks.templates import KINDS, outcome, tokenizer_of
from sftmix.text import ChatTemplate, RowEncoder, encode
from sftmix.types import Example, Message
from sftmix.words.errors import ConfigError, TemplateRefusal
from tests.fast import some_fast
from tests.text.small_tokenizers import chatml_tokenizer, make_encoder
from tests.text.test_structures import CALL, CALLS, EACH_CALL, FIELD, TOOL, chatml, encoded
from tests.text.test_structures import tokenizer_of as structured

ASKED = Message("user", "Is it warm?")
CALLED = Message("assistant", "", True, more={"tool_calls": [CALL]})
RESULT = Message("tool", "21 degrees", more={"tool_call_id": "call00000"})


def begun(template: str, *, thinks: bool | None = False, **options: bool) -> ChatTemplate:
    renderer = ChatTemplate(template_options=options)
    renderer.begin(structured("chatml", template), thinks=thinks)
    return renderer


def texts(renderer: ChatTemplate, *messages: Message, tools=()) -> list[str]:
    """The text that is trained for each turn."""
    turns = renderer.turns(Example("x", messages, tools=tools))
    return [renderer.tokenizer.decode(turn.ids[len(turn.prompt) :]) for turn in turns]


# ------------------------------------------------------------------------------------------ published templates

TRL = sorted((files("trl") / "chat_templates").iterdir(), key=str)
MISTRAL = ("tekken_240718.json", "tekken_240911.json")
LACKING = {"refused", "reported", "right"}
"""What becomes of rows: many templates know no functions, some no system turn."""


@pytest.mark.parametrize(
    "path", some_fast([path for path in TRL if path.suffix == ".jinja"], every=6), ids=lambda p: p.stem
)
@pytest.mark.parametrize("base", [False, True])
def test_templates_of_trl_are_right_with_rows_of_nine_kinds(path, base):
    """By the judge of benchmarks/templates.py, which reads tokens and the row."""
    tokenizer = tokenizer_of(path.read_text(), base=base)
    found = {kind: outcome(tokenizer, row) for kind, row in KINDS.items()}
    assert {kind: why for kind, (word, why) in found.items() if word not in LACKING} == {}
    assert found["plain"][0] == found["several turns"][0] == "right"


def test_mistrals_own_template_is_right_with_rows_of_nine_kinds(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/mistral-7b-v0.3")
    found = {kind: outcome(tokenizer, row) for kind, row in KINDS.items()}
    assert {kind: word for kind, word in found.items() if word[0] != "right"} == {}


@pytest.mark.slow
@pytest.mark.parametrize("file", MISTRAL)
def test_templates_of_mistral_common_are_right_with_rows_of_nine_kinds(file):
    """With its tokenizer; its templates are made from the tokenizer's file."""
    if not is_mistral_common_available():
        pytest.skip("mistral-common, whose tokenizer files these are, is not installed, or too old for transformers")
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    tokenizer = convert_tekken_tokenizer(str(files("mistral_common") / "data" / file))
    found = {kind: outcome(tokenizer, row) for kind, row in KINDS.items()}
    assert {kind: word for kind, word in found.items() if word[0] != "right"} == {}


# ------------------------------------------------------------------------------- a thought in a template's words

STEPS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and m.reasoning_content and loop.last %}{{ m.reasoning_content }}
[FINAL]
{% endif %}{{ m.content }}EACH_CALL{% if not loop.last %}<|im_end|>
{% endif %}{% endfor %}{% if messages[-1].role != 'assistant' %}<|im_end|>
<|im_start|>assistant
These are my steps:
{% endif %}"""
"""As Apriel 1.6: the prompt, which is always there, opens a thought in words, and no end is behind the last answer."""


@pytest.mark.parametrize(
    ("thought", "trained"),
    [("2 + 2", "2 + 2\n[FINAL]\nFour.<|end|>"), ("", "\n[FINAL]\nFour.<|end|>")],
    ids=["thinks", "does not"],
)
@pytest.mark.parametrize("in_tags", [False, True])
def test_a_thought_that_a_prompt_opens_in_words_is_closed_in_words(thought, trained, in_tags):
    renderer = begun(STEPS.replace("EACH_CALL", ""), thinks=bool(thought))
    answer = Message("assistant", "Four.", True, thought=thought)
    if in_tags and thought:
        answer = Message("assistant", f"<think>\n{thought}\n</think>\n\nFour.", True)
    assert texts(renderer, Message("user", "What is 2 + 2?"), answer) == [trained]
    assert renderer.turns(Example("x", (ASKED, answer)))[0].reasons == []
    assert not any("generation prompt" in notice for notice in renderer.notices)


@pytest.mark.parametrize("thought", ["Look outside.", ""])
def test_a_call_behind_such_a_thought(thought):
    call = "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    head = "{% if tools %}{{ tools | tojson }}{% endif %}"
    renderer = begun(head + STEPS.replace("EACH_CALL", call), thinks=bool(thought))
    (text,) = texts(renderer, ASKED, Message("assistant", "", True, 1.0, thought, CALLED.more), tools=(TOOL,))
    assert text == f'{thought}\n[FINAL]\n<tool_call>weather {{"city": "Oslo"}}<|end|>'


# ------------------------------------------------------------------------------------- thoughts beside calls

FUNCTIONS = "{% if tools %}{{ tools | tojson }}{% endif %}"
SPLIT = "{{ m.content.split('<channel|>')[-1] }}"
OPENS = "{% if messages[-1].role == 'tool' %}<|channel>thought\n{% endif %}"
AFTER_RESULT = FUNCTIONS + chatml(EACH_CALL + SPLIT, OPENS)
"""As Gemma 4 of unsloth: contents are behind calls, and the prompt opens a thought behind a function's result alone."""


def test_a_thought_is_in_one_form_in_front_of_calls_and_answers():
    renderer = begun(AFTER_RESULT, thinks=True)
    call = Message("assistant", "", True, 1.0, "Look outside.", CALLED.more)
    last = Message("assistant", "Yes.", True, thought="It is 21.")
    assert texts(renderer, ASKED, call, RESULT, last, tools=(TOOL,)) == [
        '<|channel>thought\nLook outside.\n<channel|><tool_call>weather {"city": "Oslo"}</tool_call><|im_end|>',
        "It is 21.\n<channel|>Yes.<|im_end|>",
    ]
    assert texts(renderer, ASKED, last) == ["<|channel>thought\nIt is 21.\n<channel|>Yes.<|im_end|>"]


def test_a_thought_in_the_content_is_in_front_of_the_call():
    """As Gemma 4 without thinking, whose template writes the content behind the calls."""
    plain = FUNCTIONS + chatml(EACH_CALL + "{{ m.content }}")
    call = Message("assistant", "", True, 1.0, "Look outside.", CALLED.more)
    (text,) = texts(begun(plain, thinks=True), ASKED, call, tools=(TOOL,))
    assert text.startswith("<think>\nLook outside.\n</think>\n\n<tool_call>")


def test_a_template_that_takes_no_content_beside_a_call_gets_the_thought_in_front_of_it():
    """As those of mistral-common."""
    refusing = (
        "{% for m in messages %}{% if m.tool_calls and m.content %}{{ raise_exception('both') }}{% endif %}{% endfor %}"
    )
    call = Message("assistant", "", True, 1.0, "Look outside.", CALLED.more)
    (text,) = texts(begun(refusing + CALLS.replace(FIELD, "{{ m.content }}"), thinks=True), ASKED, call, tools=(TOOL,))
    assert text == '<think>\nLook outside.\n</think>\n\n<tool_call>weather {"city": "Oslo"}</tool_call><|im_end|>'


# ------------------------------------------------------------------------------------------ tags in the content


@pytest.mark.parametrize("opening", ["<think>\n", "<think>\n\n"])
@pytest.mark.parametrize("space", ["", "\n", "\n\n"])
def test_a_tag_of_the_content_is_not_trained_behind_the_tag_of_the_prompt(opening, space):
    """As Nemotron Nano v2, which writes the tag of its prompt and then the content, whatever that begins with."""
    template = chatml(opening + "{{ m.content }}", opening)
    said = f"It is 21.{space}</think>{space}Yes."
    (thinking,) = texts(begun(template, thinks=True), ASKED, Message("assistant", f"<think>{space}{said}", True))
    assert thinking == f"{said}<|im_end|>"
    (empty,) = texts(begun(template), ASKED, Message("assistant", f"<think>{space}</think>{space}Yes.", True))
    assert empty == f"</think>{space}Yes.<|im_end|>"


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_a_closing_tag_alone_gets_an_opening_one_if_the_prompt_has_none(opening):
    """As rows of DeepSeek-R1, whose prompt had it."""
    renderer, said = begun(chatml(opening + "{{ m.content }}", opening), thinks=True), "It is 21.\n</think>\n\nYes."
    for content in (said, f"<think>\n{said}"):
        found = texts(renderer, ASKED, Message("assistant", content, True))
        assert found == [("" if opening else "<think>\n") + f"{said}<|im_end|>"]


SWITCHED = "{% set block = '' %}{% if enable_thinking is false or '/no_think' in messages[0].content %}"
SWITCHED += "{% set block = '<think>\n\n</think>\n' %}{% endif %}"
SWITCHED += chatml("{{ block }}{{ m.content }}", "{{ block }}").replace(
    "}}{% endif", ".replace('/no_think', '') }}{% endif"
)
"""As SmolLM3: thoughts are within the content, and a flag in the system turn closes them for this conversation."""

BLOCK = "<think>\n\n</think>\n\n"
FLAG = Message("system", "/no_think")


@pytest.mark.parametrize("block", ["", BLOCK, "<think></think>", "</think>\n\n"])
def test_a_rows_own_empty_block_is_not_trained_behind_the_block_of_the_prompt(block):
    answer = Message("assistant", f"{block}Yes.", True)
    assert texts(begun(SWITCHED), ASKED, answer) == [f"{block}Yes.<|im_end|>"]
    text, spans, _ = encoded(make_encoder(structured("chatml", SWITCHED)), FLAG, ASKED, answer)
    assert spans == [("Yes.<|im_end|>", 1.0)]
    assert text.count("</think>") == 1
    assert texts(begun(SWITCHED, enable_thinking=False), ASKED, answer) == ["Yes.<|im_end|>"]


def test_a_thought_behind_a_prompt_that_closes_it_is_refused_in_this_row_alone():
    encoder = make_encoder(structured("chatml", SWITCHED), thinks=True)
    answer = Message("assistant", "<think>\nIt is 21.\n</think>\n\nYes.", True)
    assert encoded(encoder, ASKED, answer)[1:] == ([(f"{answer.content}<|im_end|>", 1.0)], [])
    with pytest.raises(TemplateRefusal, match="its prompt closes the thought that the response has"):
        encoder.renderer.turns(Example("x", (FLAG, ASKED, answer)))
    assert encoded(encoder, FLAG, ASKED, answer)[2] == ["template_refused"]


# --------------------------------------------------------------------------------------- refused, or not any more

DEMANDING = (
    "{% for m in messages %}{% if m.role == 'assistant' and not m.reasoning_content %}{{ raise_exception('think') }}"
    "{% endif %}{% endfor %}" + chatml(FIELD)
)


def test_a_template_that_needs_a_thought_in_each_turn_takes_rows_that_have_them():
    renderer = begun(DEMANDING, thinks=True)
    thinking = Message("assistant", "Yes.", True, thought="It is 21.")
    assert texts(renderer, ASKED, thinking) == ["<think>\nIt is 21.\n</think>\n\nYes.<|im_end|>"]
    assert encoded(
        make_encoder(structured("chatml", DEMANDING), thinks=True), ASKED, Message("assistant", "Yes.", True)
    )[2] == ["template_refused"]
    with pytest.raises(ConfigError, match=r"cannot render a user and an assistant turn: TemplateError: think"):
        begun(DEMANDING, thinks=False)


INSTRUCTION = "A conversation between User and Assistant. "
ALIKE = {
    "no roles": f"{{% for m in messages %}}{INSTRUCTION}User: {{{{ m.content }}}}\nAssistant: <think>{{% endfor %}}",
    "roles": chatml().replace("{{ m.role }}\n", "{{ m.role }}\n" + INSTRUCTION),
}


@pytest.mark.parametrize("template", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("thinks", [False, True, None])
def test_words_of_the_users_turn_in_front_of_the_answer_are_refused(template, thinks):
    """They would be trained again in each answer."""
    with pytest.raises(ConfigError, match=r"writes '.*A conversation between User.*in front of a user's turn"):
        begun(template, thinks=thinks)


def test_a_template_that_leaves_out_the_question_is_refused():
    only = chatml().replace("{% for m in messages %}", "{% for m in messages if m.role == 'assistant' %}")
    with pytest.raises(ConfigError, match="does not write the content of a user turn"):
        begun(only)


# ------------------------------------------------------------------------------------------ a template for tools

NEEDS_TOOLS = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}\n  Call them.\n" + CALLS
DEFAULT = chatml() + "{# end #}\n"


def test_rows_with_functions_use_the_template_for_them_as_servers_do():
    tokenizer = structured("chatml", chatml())
    tokenizer.chat_template = {"default": DEFAULT, "tool_use": NEEDS_TOOLS, "rag": "{{ raise_exception('rag') }}"}
    try:
        renderer = ChatTemplate()
        renderer.begin(tokenizer)
        for chat, tools in (([ASKED], ()), ([ASKED], (TOOL,)), ([ASKED, CALLED, RESULT], (TOOL,))):
            theirs = {"tools": list(tools) or None, "add_generation_prompt": True, "return_dict": False}
            turns = [renderer.turn(message) for message in chat]
            served = tokenizer.apply_chat_template(turns, **theirs)
            assert renderer.prompt(chat, tools) == served
            assert tokenizer.apply_chat_template(turns, chat_template=renderer.template, **theirs) == served
        assert renderer.notices == [
            "The tokenizer has another template for functions: both are used, and exported as one."
        ]
        call = '<tool_call>weather {"city": "Oslo"}</tool_call><|im_end|>'
        assert texts(renderer, ASKED, CALLED, tools=(TOOL,)) == [call]
    finally:
        tokenizer.chat_template = chatml()


# -------------------------------------------------------------------------------------------- ids by chance


def test_a_tokenizer_that_gives_other_ids_each_time_is_refused_by_name():
    tokenizer = chatml_tokenizer()
    tokenizer.backend_tokenizer.model.dropout = 0.5
    row = {"prompt": "Hi", "completion": "Yo"}
    with pytest.raises(ConfigError, match=r"model\.dropout.*0\.5.*same ids"):
        encode(row, tokenizer)
    tokenizer.backend_tokenizer.model.dropout = 0.0
    assert RowEncoder(tokenizer)(row)[0].ids
