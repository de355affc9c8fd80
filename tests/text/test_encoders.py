"""What the encoder finds out about a tokenizer and a template, for real and for awkward ones."""

import copy
import inspect

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from sftmix.options import DataOptions
from sftmix.text.encoder import encoder_for
from sftmix.types import Message
from sftmix.words.errors import ConfigError
from tests.text.small_tokenizers import NO_END, byte_level, chatml_tokenizer, make_encoder

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]

NO_GENERATION_PROMPT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}"""


def appends_end(encoder):
    return any("writes no end-of-turn token" in notice for notice in encoder.notices)


def test_end_of_turn_of_real_tokenizers(shared):
    from transformers import AutoTokenizer

    def found(path):
        encoder = make_encoder(AutoTokenizer.from_pretrained(shared / path))
        return encoder.name, encoder.end_of_turn_id, encoder.stop_ids, appends_end(encoder)

    assert found("tokenizers/mistral-7b-v0.3") == ("tokenizer", 2, (2,), False)
    assert found("tokenizers/qwen2") == ("tokenizer", 151645, (151645,), False)
    assert found("models/base-7m") == ("tokenizer", 4, (4, 2), False)
    assert found("tokenizers/gpt2_phi") == ("alpaca", 50256, (50256,), False)
    assert found("models/stories260K") == ("alpaca", 2, (2,), False)


def test_a_tokenizer_that_reads_no_text_is_one_line():
    """`"model_max_length": "x"` of tokenizer_config.json is compared with the number of tokens."""
    tokenizer = chatml_tokenizer()
    tokenizer.model_max_length = "x"
    for options in (DataOptions(train="rows.jsonl"), DataOptions(train="rows.jsonl", format="text")):
        with pytest.raises(ConfigError, match=r"^model\.path: its tokenizer reads no text: TypeError: "):
            encoder_for(tokenizer, options)


def test_a_base_model_gets_alpaca_and_says_so(small_tokenizers):
    encoder = make_encoder(small_tokenizers["bos"])
    assert encoder.name == "alpaca"
    assert any("no chat template" in notice for notice in encoder.notices)
    assert encoder.renderer.render(CHAT, prompt=True) == (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYo</s>\n\n### Instruction:\nBye\n\n### Response:\n"
    )
    own = make_encoder(small_tokenizers["chatml"])
    assert own.notices == []
    assert own.stop_ids == (own.end_of_turn_id, small_tokenizers["chatml"].eos_token_id) == (2, 0)


@pytest.mark.parametrize("name", ["enable_thinkng", "add_generation_prompt"])
def test_an_option_that_the_template_does_not_read_is_refused(name, small_tokenizers):
    """One that is written there has the effect that the template gives it."""
    tokenizer = copy.deepcopy(small_tokenizers["chatml"])
    tokenizer.chat_template = "{% if enable_thinking %}{{ 'Think. ' }}{% endif %}" + tokenizer.chat_template
    encoder = make_encoder(tokenizer, variables={"enable_thinking": True})
    assert encoder.renderer.render(CHAT[1:2], prompt=True).startswith("Think. ")
    with pytest.raises(ConfigError, match=f"data.template_options names {name}, which the template"):
        make_encoder(tokenizer, variables={"enable_thinking": True, name: True})


def test_the_options_of_templates_and_thoughts_reach_the_encoder(small_tokenizers, options):
    tokenizer = copy.deepcopy(small_tokenizers["chatml"])
    tokenizer.chat_template = "{% if style %}{{ style }}{% endif %}" + tokenizer.chat_template
    encoder = encoder_for(tokenizer, options("rows.jsonl", template_options={"style": "Short. "}, thoughts="drop"))
    assert encoder.renderer.render(CHAT[1:2], prompt=True).startswith("Short. ")
    assert encoder.renderer.thoughts == "drop"


def test_what_transformers_gives_a_template_is_no_option():
    """What it passes to every template, and the tokens of the tokenizer's roles."""
    given = {*inspect.signature(render_jinja_template).parameters} - {"kwargs"}
    given |= {"messages", "bos_token", "eos_token", "image_token"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<s>", "<|end|>", "<image>"]),
        bos_token="<s>",
        eos_token="<|end|>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template="{# " + " ".join(given) + " #}" + NO_END,
    )
    for name in given:
        with pytest.raises(ConfigError, match=f"data.template_options names {name}, which the template"):
            make_encoder(tokenizer, variables={name: "x"})


def test_one_bos_in_training_and_chat(tokenizer):
    """Exactly one where the tokenizer writes one, and none where it writes none (plain templates)."""
    for template in (None, "alpaca", "chatml"):
        encoder = make_encoder(tokenizer, template)
        ids = encoder.renderer.prompt([Message("user", "Hi")])
        writes_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        if encoder.name != "tokenizer":
            assert (ids[0] == tokenizer.bos_token_id) == writes_bos
        if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id):
            assert ids.count(tokenizer.bos_token_id) <= 1


def test_a_jinja_file(small_tokenizers, write):
    path = write("mine.jinja", NO_GENERATION_PROMPT)
    encoder = make_encoder(small_tokenizers["chatml"], path)
    assert encoder.name == path
    # It has no generation prompt: the header that comes before every response is trained.
    assert encoder.renderer.render(CHAT[:2], prompt=True).endswith("Hi<|im_end|>\n")
    assert encoder.renderer.layout.answer_lead == "<|im_start|>assistant\n"
    (notice,) = encoder.notices
    assert "no generation prompt: '<|im_start|>assistant\\n' is trained before each answer" in notice
    assert "data.template chatml" in notice


def test_a_byte_order_mark_is_no_part_of_a_template(small_tokenizers, write):
    path = write("mine.jinja", NO_GENERATION_PROMPT)
    encoders = [
        make_encoder(small_tokenizers["chatml"], path),
        make_encoder(small_tokenizers["chatml"], windows(write, NO_GENERATION_PROMPT)),
    ]
    assert len({encoder.chat_template for encoder in encoders}) == 1
    assert len({encoder.renderer.render(CHAT[:2], prompt=True) for encoder in encoders}) == 1
    wide = write("wide.jinja", NO_GENERATION_PROMPT.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"it is in UTF-16; save it as UTF-8"):
        make_encoder(small_tokenizers["chatml"], wide)


def windows(write, text: str) -> str:
    """The path of a file of this text as editors on Windows save it."""
    return write("windows.jinja", text.replace("\n", "\r\n").encode("utf-8-sig"))


def test_a_header_without_a_generation_prompt_is_the_response_s():
    source = (
        "{% for m in messages %}{{ {'user': 'Q:', 'assistant': 'A:'}[m.role] + ' ' + m.content }}"
        "{{ '<|end|>' if m.role == 'assistant' }}{{ '\\n' }}{% endfor %}"
    )
    encoder = make_encoder(chatml_tokenizer(source))
    assert encoder.renderer.render(CHAT[1:2], prompt=True) == "Q: Hi\n"
    assert (encoder.renderer.layout.answer_lead, encoder.renderer.layout.ending) == ("A: ", "<|end|>")
    assert any("no generation prompt: 'A: ' is trained" in notice for notice in encoder.notices)


def test_a_template_without_end_of_turn_gets_eos():
    encoder = make_encoder(chatml_tokenizer(NO_END))
    assert appends_end(encoder)
    assert encoder.end_of_turn_id == encoder.tokenizer.eos_token_id
    assert any("no end-of-turn token" in notice for notice in encoder.notices)


def test_no_stop_token_at_all_is_refused():
    tokenizer = chatml_tokenizer(NO_END)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="would never stop"):
        make_encoder(tokenizer)
    with pytest.raises(ConfigError, match="no eos token"):
        make_encoder(tokenizer, "alpaca")
    assert make_encoder(tokenizer, "chatml").stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in %}", "cannot render"),
        ("{{ raise_exception('only system turns') }}", "only system turns"),
        ("{{ messages.__class__.__mro__ }}", "cannot render"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write the content"),
        ("{{ '<s><s>' }}{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}", "BOS token twice"),
    ],
)
def test_unusable_templates_are_refused(source, reason, small_tokenizers, write):
    with pytest.raises(ConfigError, match=reason):
        make_encoder(small_tokenizers["bos"], write("bad.jinja", source))


def test_named_templates_without_a_default_are_refused_until_one_is_chosen():
    """Several may belong to a tokenizer; the one called default is what transformers takes."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = {"rag": NO_END, "tool_use": NO_GENERATION_PROMPT}
    refusal = r"data\.template: .*no default.*\['rag', 'tool_use'\].*name that file, or choose chatml or alpaca"
    with pytest.raises(ConfigError, match=refusal):
        make_encoder(tokenizer)
    assert make_encoder(tokenizer, "chatml").name == "chatml"
    tokenizer.chat_template["default"] = tokenizer.chat_template["rag"]
    assert appends_end(make_encoder(tokenizer))


def test_the_date_does_not_change_prompts():
    encoder = make_encoder(chatml_tokenizer("{{ strftime_now('%d %b %Y') }}" + NO_GENERATION_PROMPT))
    assert encoder.renderer.render(CHAT[:2], prompt=True).startswith("26 Jul 2024")
    assert any("date" in notice for notice in encoder.notices)


def test_fingerprint_follows_tokenizer_and_template(small_tokenizers):
    base = make_encoder(small_tokenizers["chatml"]).fingerprint
    encoder = make_encoder(chatml_tokenizer())
    encoder.tokenizer("a b c d e", truncation=True, max_length=2)
    assert encoder.fingerprint == base  # truncation is how a tokenizer was called last, not what it is
    changed = chatml_tokenizer()
    changed.add_tokens(["zebra"])
    assert make_encoder(changed).fingerprint != base
