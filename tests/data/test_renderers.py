"""Renderers: ours and those of others put what is trained behind the prompt that is served."""

import json
from dataclasses import replace

import pytest

from sftmix.common.errors import ConfigError
from sftmix.components import Renderer
from sftmix.config.read import from_plain
from sftmix.data import ChatTemplate
from sftmix.data.encoder import encoder_for
from sftmix.options import DataOptions
from sftmix.testing import check_renderer
from sftmix.types import Example, Message
from tests.data.small_tokenizers import QWEN3, SMALL, chatml_tokenizer

TURNS = (
    Message("system", "Be kind."),
    Message("user", "Which fish swims upstream?"),
    Message("assistant", "The salmon.", True),
    Message("user", "And which one flies?"),
    Message("assistant", "A flying fish.", True, 0.5),
)
EXAMPLES = [Example("whole", TURNS), Example("short", TURNS[1:3])]


class Light(Renderer):
    """Thoughts count less than answers."""

    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )

    def __init__(self, *, share: float = 0.0):
        self.share = share

    def answer(self, message):
        thought = f"<think>{message.thought}</think>" if message.thought else ""
        said = [*self.ids(message.content), self.tokenizer.eos_token_id]
        return [(self.ids(thought), self.share * message.weight), (said, message.weight)]


class Elsewhere(Light):
    def prompt(self, messages, tools=()):
        return [*super().prompt(messages, tools), 1]


class Endless(Light):
    def answer(self, message):
        return [(self.ids(message.content), 1.0)]


class Twice(Light):
    def answer(self, message):
        return super().answer(message) * 2


class Silent(Light):
    def answer(self, message):
        return [([self.tokenizer.eos_token_id], 1.0)]


class Negative(Light):
    def answer(self, message):
        return [(ids, -1.0) for ids, _ in super().answer(message)]


class Counting(Light):
    def answer(self, message):
        self.seen = getattr(self, "seen", 0) + 1
        return [(self.ids("." * self.seen), 1.0), *super().answer(message)]


@pytest.mark.parametrize("template", [None, "alpaca", "chatml"])
def test_ours_keeps_the_contract(tokenizer, template):
    check_renderer(ChatTemplate(template=template), tokenizer, [EXAMPLES[1]])


@pytest.mark.parametrize("thinks", [False, True])
def test_ours_keeps_it_with_thoughts_and_several_turns(thinks):
    thought = replace(TURNS[2], thought="Rivers are cold." * thinks)
    check_renderer(
        ChatTemplate(), chatml_tokenizer(QWEN3), [*EXAMPLES, Example("t", (TURNS[1], thought))], thinks=thinks
    )


@pytest.mark.parametrize("name", SMALL)
def test_another_keeps_it(name):
    thinking = replace(TURNS[2], thought="Rivers are cold.")
    check_renderer(Light(share=0.5), SMALL[name](), [*EXAMPLES, Example("t", (TURNS[1], thinking))])


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Elsewhere, "not the served prompt"),
        (Endless, "its last id is none of"),
        (Twice, "an id that ends a turn is inside it"),
        (Silent, "'The salmon.' is not once in"),
        (Negative, "a weight is below 0"),
        (Counting, "depend on those before it"),
    ],
)
def test_what_breaks_the_contract_is_caught(cls, words):
    with pytest.raises(AssertionError, match=words):
        check_renderer(cls(), SMALL["bos"](), EXAMPLES)


def test_its_parts_are_trained_by_their_weights(write, options, load, small):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    row["messages"][1]["reasoning_content"] = "Greet."
    path, trained = write("rows.jsonl", [row]), {}
    for share in (0.0, 0.25):
        encoder = encoder_for(small["bos"], options(path, renderer=Light(share=share)))
        (example,) = load(encoder, path, max_length=200).train
        trained[share] = encoder.decode(example.input_ids[example.target])
        assert encoder.decode(example.input_ids).endswith("assistant: <think>Greet.</think>Yo</s>")
        assert (encoder.name, encoder.chat_template) == ("Light", Light.template)
        assert encoder.renderer.text_of(example.input_ids[-3:]) in ("Yo", ">Yo")
    assert trained == {0.0: "Yo</s>", 0.25: "<think>Greet.</think>Yo</s>"}


def test_what_its_template_refuses_is_counted(write, options, load, small):
    class Strict(Light):
        template = "{{ raise_exception('no ' + messages[0].content) if messages[0].content == 'Hi' }}" + Light.template

    rows = [{"prompt": word, "completion": "Yo"} for word in ("Hi", *"abcdefghijklmnopqrstu")]
    path = write("rows.jsonl", rows)
    data = load(encoder_for(small["bos"], options(path, renderer=Strict())), path, max_length=200)
    assert data.report.counts == {"template_refused": 1}
    assert len(data.train) == 21


def test_a_weight_below_0_ends_the_run(write, options, load, small):
    path = write("rows.jsonl", [{"prompt": "Hi", "completion": "Yo"}] * 2)
    with pytest.raises(ConfigError, match=r"data\.renderer Negative returned the weight -1\.0; allowed: numbers"):
        load(encoder_for(small["bos"], options(path, renderer=Negative())), path, max_length=200)


def test_it_is_known_by_its_class_and_options(small, options):
    def known(renderer):
        return encoder_for(small["bos"], options("rows.jsonl", renderer=renderer)).fingerprint

    assert known(Light()) == known(Light(share=0.0)) != known(Light(share=1.0))
    assert known(Light()) != known(Twice())
    assert known(ChatTemplate()) == known(None) != known(ChatTemplate(thoughts="drop"))


def test_it_is_chosen_with_its_options_and_stored_like_any_component():
    path = f"{Light.__module__}.Light"
    config = from_plain({"data.renderer": path, "data.renderer.share": 0.5})
    assert config.plain()["data"]["renderer"] == {"class_path": path, "init_args": {"share": 0.5}}
    assert from_plain(json.loads(json.dumps(config.plain()))) == config
    assert from_plain({"data": config.plain()["data"], "data.renderer": None}).data.renderer is None


@pytest.mark.parametrize("other", [{"template": "chatml"}, {"thoughts": "drop"}, {"special_tokens": "tokens"}])
def test_options_of_the_chat_template_beside_it_are_refused(other):
    problems = [*DataOptions(train="rows.jsonl", renderer=Light(), **other).problems()]
    assert any(f"data.renderer and data.{next(iter(other))} exclude each other" in problem for problem in problems)


def test_plain_text_has_none(write, read):
    with pytest.raises(
        ConfigError, match=r"data\.renderer \(Light\) and data.format text exclude each other: leave it out$"
    ):
        read(write("rows.jsonl", [{"text": "a"}]), format="text", renderer=Light())


def test_plain_text_has_labels_without_packing_alone(write, read):
    path = write("rows.jsonl", [{"text": "a", "label": "good"}])
    with pytest.raises(ConfigError, match=r"^data.label_field \(label\) .* set data.packing to false$"):
        read(path, format="text", label_field="label")
    assert read(path, format="text", label_field="label", packing=False).train.values("label") == ["good"]
