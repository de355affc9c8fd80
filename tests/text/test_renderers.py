"""Renderers: ours and those of others put what is trained behind the prompt that is served."""

from dataclasses import replace

import pytest

from sftmix.components import Renderer
from sftmix.testing import check_renderer
from sftmix.text import ChatTemplate, encode
from sftmix.text.encoder import encoder_for
from sftmix.text.windows import Documents
from sftmix.types import Example, Message, RenderedTurn
from sftmix.words.errors import ConfigError, ContractError
from tests.text.small_tokenizers import QWEN3, SMALL, chatml_tokenizer

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


class Undefined(Light):
    def answer(self, message):
        return [(ids, float("nan")) for ids, _ in super().answer(message)]


class Heavy(Light):
    def answer(self, message):
        return [(ids, 1.001e18) for ids, _ in super().answer(message)]


class Unweighted(Light):
    def answer(self, message):
        return [(ids, 0.0) for ids, _ in super().answer(message)]


class Unbatched(Light):
    """It renders other turns one by one than together."""

    def batch(self, examples):
        halved = replace(TURNS[2], weight=0.5)
        return [super(Unbatched, self).turns(replace(example, messages=(TURNS[1], halved))) for example in examples]


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
        (Negative, "a turn for each trained one, .* weights are from 0 to"),
        (Counting, "depend on those before it"),
        (Unweighted, "all its weights are 0"),
        (Unbatched, "training calls `batch`, and `turns` returns something else"),
    ],
)
def test_what_breaks_the_contract_is_caught(cls, words):
    with pytest.raises(AssertionError, match=words):
        check_renderer(cls(), SMALL["bos"](), EXAMPLES)


@pytest.mark.parametrize("weights", [{"weight": 0.0}, {"parts": (("The salmon.", 0.0),)}])
def test_a_turn_that_its_row_gives_no_weight_keeps_the_contract(weights):
    check_renderer(Light(), SMALL["bos"](), [Example("zero", (TURNS[1], replace(TURNS[2], **weights)))])


def quarter(turns):
    return [turn._replace(parts=[(ids, weight / 4) for ids, weight in turn.parts]) for turn in turns]


def test_a_chat_template_of_ones_own_trains_what_its_batch_returns(write, options, load, small_tokenizers):
    class Quarter(ChatTemplate):
        def batch(self, examples):
            return [quarter(turns) for turns in super().batch(examples)]

    path = write("rows.jsonl", [{"prompt": "Hi", "completion": "Yo"}] * 2)
    (example, _) = load(encoder_for(small_tokenizers["chatml"], options(path), Quarter()), path, max_length=200).train
    assert example.weight[example.target].tolist() == [0.25] * example.target.sum()
    check_renderer(Quarter(), small_tokenizers["chatml"], EXAMPLES)


OWN = {
    "answer": lambda self, message: [(ids, 0.0) for ids, _ in ChatTemplate.answer(self, message)],
    "turns": lambda self, example: quarter(ChatTemplate.turns(self, example)),
    "prompt": lambda self, messages, tools=(): [4, *ChatTemplate.prompt(self, messages, tools)],
    "template": Light.template,
}


@pytest.mark.parametrize("name", OWN)
def test_a_chat_template_with_a_method_that_training_does_not_call_is_refused_by_name(small_tokenizers, name):
    cls = type("Own", (ChatTemplate,), {name: OWN[name]})
    row = {"prompt": "Hi", "completion": "Yo"}
    with pytest.raises(ConfigError, match=f"renderer Own has its own {name}, but training calls `batch`"):
        encode(row, small_tokenizers["chatml"], renderer=cls())
    with pytest.raises(ConfigError, match="or `render` for prompts"):
        check_renderer(cls(), small_tokenizers["chatml"], EXAMPLES)


def test_its_parts_are_trained_by_their_weights(write, options, load, small_tokenizers):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    row["messages"][1]["reasoning_content"] = "Greet."
    path, trained = write("rows.jsonl", [row]), {}
    for share in (0.0, 0.25):
        encoder = encoder_for(small_tokenizers["bos"], options(path), Light(share=share))
        (example,) = load(encoder, path, max_length=200).train
        trained[share] = encoder.decode(example.input_ids[example.target])
        assert encoder.decode(example.input_ids).endswith("assistant: <think>Greet.</think>Yo</s>")
        assert (encoder.name, encoder.chat_template) == ("Light", Light.template)
        assert encoder.renderer.text_of(example.input_ids[-3:]) in ("Yo", ">Yo")
    assert trained == {0.0: "Yo</s>", 0.25: "<think>Greet.</think>Yo</s>"}


def test_what_its_template_refuses_is_counted(write, options, load, small_tokenizers):
    class Strict(Light):
        template = "{{ raise_exception(messages[0].content) if messages[0].content[:2] == 'Hi' }}" + Light.template

    rows = [{"prompt": word, "completion": "Yo"} for word in ("Hi" * 50, *"abcdefghijklmnopqrstu")]
    path = write("rows.jsonl", rows)
    data = load(encoder_for(small_tokenizers["bos"], options(path), Strict()), path, max_length=200)
    assert data.report.counts == {"template_refused": 1}
    (first,) = data.report.first["template_refused"]
    assert str(first).endswith(f": TemplateError: {'Hi' * 31}...")  # 80 characters of a row, in a file that is shared
    assert len(data.train) == 21


@pytest.mark.parametrize("cls", [Negative, Undefined, Heavy])
def test_a_weight_out_of_range_ends_the_run(cls, write, options, load, small_tokenizers):
    path = write("rows.jsonl", [{"prompt": "Hi", "completion": "Yo"}] * 2)
    with pytest.raises(ConfigError, match=rf"renderer {cls.__name__} returned .*weights are from 0 to 1e\+18"):
        load(encoder_for(small_tokenizers["bos"], options(path), cls()), path, max_length=200)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        None,
        7,
        [4, 2],
        [([], 1.0)],
        [(None, 1.0)],
        [([4.5, 2], 1.0)],
        [([True, 2], 1.0)],
        [([-4, 2], 1.0)],
        [([4, 2], None)],
    ],
)
@pytest.mark.parametrize("served", [[], [4]])
def test_an_answer_that_is_no_ids_of_the_tokenizer_ends_the_run_with_its_class(
    write, options, load, small_tokenizers, parts, served
):
    class Odd(Light):
        def prompt(self, messages, tools=()):
            return served

        def answer(self, message):
            return parts

    path = write("rows.jsonl", [{"prompt": "Hi", "completion": "Yo"}] * 2)
    with pytest.raises(ContractError, match=r"renderer Odd returned .*; allowed: "):
        load(encoder_for(small_tokenizers["bos"], options(path), Odd()), path, max_length=200)


@pytest.mark.parametrize("turns", [None, [], [RenderedTurn([4], [])]])
def test_turns_that_are_not_those_of_the_row_end_the_run(write, options, load, small_tokenizers, turns):
    class Odd(Light):
        def turns(self, example):
            return turns

    path = write("rows.jsonl", [{"prompt": "Hi", "completion": "Yo"}] * 2)
    with pytest.raises(ContractError, match=r"renderer Odd returned .* for \w+; allowed: a turn for each"):
        load(encoder_for(small_tokenizers["bos"], options(path), Odd()), path, max_length=200)


@pytest.mark.slow
def test_the_ends_of_a_class_of_its_own_are_those_at_which_the_exported_model_stops(small_tokenizers, options):
    class Own(ChatTemplate):
        ends = (5,)

    encoder = encoder_for(small_tokenizers["chatml"], options("rows.jsonl"), Own())
    assert encoder.stop_ids == (5, encoder.tokenizer.eos_token_id)


@pytest.mark.parametrize("count", [0, 2])
def test_a_batch_of_other_conversations_is_refused(count, write, options, load, small_tokenizers):
    class Miscounted(Light):
        def batch(self, examples):
            return super().batch(examples) * count

    encoder = encoder_for(small_tokenizers["bos"], options(), Miscounted())
    words = rf"Miscounted: batch returned turns of {count} conversations; it was given 1, and must return a list for"
    with pytest.raises(ContractError, match=words):
        load(encoder, write("rows.jsonl", [{"prompt": "p", "completion": "c"}]))


class Tales(Documents):
    """Documents of one's own."""


@pytest.mark.parametrize(("renderer", "form"), [(Light(), "text"), (Documents(), "auto"), (Tales(), "alpaca")])
def test_a_renderer_of_the_other_kind_of_rows_is_refused(renderer, form, small_tokenizers, options):
    with pytest.raises(ConfigError, match=rf"renderer {renderer} and data\.format {form} exclude each other"):
        encoder_for(small_tokenizers["bos"], options(format=form), renderer)
    assert encoder_for(small_tokenizers["bos"], options(format="text"), Tales()).renderer.packs


def test_a_tokenizer_that_splits_special_tokens_is_refused(options):
    tokenizer = SMALL["chatml"]()
    tokenizer.split_special_tokens = True
    with pytest.raises(ConfigError, match=r"has split_special_tokens: true, .*: remove the line"):
        encoder_for(tokenizer, options(template="chatml"))
