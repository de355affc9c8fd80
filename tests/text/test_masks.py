"""Token ids and masks: the response and its end-of-turn token carry loss, whatever the text and the tokenizer."""

import pytest
from hypothesis import example as hypothesis_example
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from sftmix.components import Renderer
from sftmix.text.chat_template import MARK_IN_ESCAPES
from sftmix.text.mask import SPLIT, encode_examples
from sftmix.text.spellings import SpecialSpellings
from sftmix.text.values import MARK
from sftmix.types import Example, Message
from tests.text.small_tokenizers import QWEN3, QWEN3_THINKING, THINKING, chatml_tokenizer, make_encoder, prompt_ids


def example(*turns: str, system: str | None = None, whole: bool = False) -> Example:
    """User and assistant turns in alternation; the last one, or every assistant turn, is trained."""
    roles = ["user", "assistant"] * len(turns)
    messages = [
        Message(role, text, role == "assistant" and (whole or i == len(turns) - 1))
        for i, (role, text) in enumerate(zip(roles, turns, strict=False))
    ]
    return Example("x", tuple([Message("system", system)] * (system is not None) + messages))


def encode(encoder, *examples: Example, max_length: int = 10_000):
    return encode_examples(encoder.renderer, list(examples), max_length)


def pieces(encoder, found) -> list[str]:
    """Text of each trained span."""
    return [encoder.tokenizer.decode(found.ids[a:b]) for a, b in found.spans]


def test_every_tokenizer_trains_the_response_and_its_end(tokenizer):
    """The untrained part is what generation starts from, the last trained token stops it."""
    chats = [
        example("Name a colour.", "Blue"),
        example("What is 1 + 1?", " two", "And 2 + 2?", "Four.\n\n"),
        example("Hi", "1. Plum\n2. Pear", system=None),
        example("Write code.", "```python\nprint('é😀')\n```"),
    ]
    for template in (None, "alpaca", "chatml"):
        encoder = make_encoder(tokenizer, template)
        for chat, found in zip(chats, encode(encoder, *chats), strict=True):
            assert found.ids, (chat, found)
            ((start, end),) = found.spans
            assert end == len(found.ids)
            assert found.ids[-1] == encoder.end_of_turn_id
            assert encoder.end_of_turn_id in encoder.stop_ids
            assert found.ids[:start] == prompt_ids(encoder, chat.messages[:-1])
            said = tokenizer.decode(found.ids[start : end - 1], clean_up_tokenization_spaces=False)
            assert said.strip() == chat.messages[-1].content.strip()


def test_pad_equal_to_eos_is_still_trained(small_tokenizers):
    """The bos tokenizer pads with eos, so a mask by `id == pad_id` would hide the end of turn."""
    encoder = make_encoder(small_tokenizers["bos"])
    (found,) = encode(encoder, example("Hi", "Yo"))
    assert found.ids[-1] == small_tokenizers["bos"].eos_token_id == small_tokenizers["bos"].pad_token_id
    assert found.spans[0][1] == len(found.ids)


# Reading refuses a surrogate, NUL and MARK; here nothing is read.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0" + MARK), min_size=1, max_size=30)


@settings(max_examples=150)
@hypothesis_example(question="0", answer=MARK_IN_ESCAPES, name="chatml")
@given(question=TEXT, answer=TEXT, name=st.sampled_from(["chatml", "bos", "metaspace"]))
def test_any_text(small_tokenizers, question, answer, name):
    """The prompt's ids are generation's, and the whole decodes to the text that the template renders."""
    encoder = make_encoder(small_tokenizers[name])
    (found,) = encode(encoder, example(question, answer))
    chat = [Message("user", question), Message("assistant", answer)]
    if not found.ids:
        assert found.reasons == ["template_refused" if MARK_IN_ESCAPES in question + answer else "prefix_mismatch"]
        return
    ((start, _),) = found.spans
    assert found.ids[:start] == prompt_ids(encoder, chat[:1])
    assert found.ids[-1] == encoder.end_of_turn_id
    turns = [{"role": message.role, "content": message.content} for message in chat]
    text, _, _ = encoder.renderer.render(turns, prompt=False).rpartition(encoder.renderer.layout.ending)
    text += encoder.renderer.layout.ending
    whole = encoder.renderer.spellings.tokenize([text])[0]
    assert encoder.tokenizer.decode(found.ids) == encoder.tokenizer.decode(whole)
    if "boundary" not in found.reasons:
        assert found.ids == whole


def test_a_token_across_the_boundary_is_cut_apart(small_tokenizers):
    """Two newlines may be one token, of which the first is the prompt's: the prompt must stay generation's.

    One sequence cannot hold two such prompts: a whole conversation is split.
    """
    tokenizer = small_tokenizers["bos"]
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1  # the merge that makes the trouble
    encoder = make_encoder(tokenizer)
    found, *whole = encode(
        encoder,
        example("Hi", "\n\n1. Apple"),
        example("Hi", "\n\n1. Apple", "And?", "2. Pear", whole=True),
        example("Hi", "1. Apple", "And?", "2. Pear", whole=True),
    )
    assert [other.reasons for other in whole] == [[SPLIT], []]
    assert found.reasons == ["boundary"]
    ((start, _),) = found.spans
    assert found.ids[:start] == prompt_ids(encoder, [Message("user", "Hi")])
    assert pieces(encoder, found) == ["\n\n1. Apple</s>"]


# ------------------------------------------------------------------------------------------ multi-turn


def test_whole_conversations_train_every_response(tokenizer):
    chat = example("Hi", "Yo", "And?", "More", "Bye", "So long", whole=True)
    for template in (None, "alpaca", "chatml"):
        encoder = make_encoder(tokenizer, template)
        (found,) = encode(encoder, chat)
        assert [p.strip() for p in pieces(encoder, found)] == [
            f"{text}{tokenizer.decode([encoder.end_of_turn_id])}" for text in ("Yo", "More", "So long")
        ]
        for i, (start, _) in enumerate(found.spans):
            assert found.ids[:start] == prompt_ids(encoder, chat.messages[: 2 * i + 1])


def test_a_template_that_rewrites_turns_is_split():
    """Earlier turns lose their thinking block, so no one sequence holds every prompt."""
    thinking = make_encoder(chatml_tokenizer(THINKING))
    whole, turn = encode(thinking, example("Hi", "Yo", "And?", "More", whole=True), example("Hi", "Yo", "And?", "More"))
    assert whole.reasons == [SPLIT]
    assert pieces(thinking, turn) == ["<think>\n\n</think>\n\nMore<|im_end|>"]
    text = thinking.tokenizer.decode(turn.ids)
    assert text.count("<think>") == 1


THOUGHT = "<think>\n2+2\n</think>\n\nfour"


@pytest.mark.parametrize("template", [QWEN3, QWEN3_THINKING], ids=["qwen3", "thinking"])
def test_a_response_with_its_own_thinking_is_trained_as_the_template_writes_it(template):
    """One block, not an empty one and then another; what is expected is what transformers makes of the template."""
    tokenizer = chatml_tokenizer(template)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": THOUGHT}]

    def theirs(turns, **more):
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **more)

    prompt, whole = theirs(chat[:1], add_generation_prompt=True), theirs(chat)
    encoder = make_encoder(tokenizer)
    (plain,) = encode(encoder, example(chat[0]["content"], "four"))
    (thought,) = encode(make_encoder(tokenizer, thinks=True), example(chat[0]["content"], THOUGHT))
    assert thought.ids == whole[: whole.index(encoder.end_of_turn_id, len(prompt)) + 1]
    assert thought.spans == [(len(prompt), len(thought.ids))]
    assert thought.reasons == []

    # The exported template begins either kind of answer.
    exported = {"chat_template": encoder.chat_template, "add_generation_prompt": True}
    assert theirs(chat[:1], **exported, enable_thinking=True) == prompt
    ((start, _),) = plain.spans
    assert tokenizer.decode(plain.ids).endswith("assistant\n<think>\n\n</think>\n\nfour<|im_end|>")
    assert pieces(encoder, plain) == [("" if template == QWEN3 else "\n</think>\n\n") + "four<|im_end|>"]
    assert "composed" not in plain.reasons
    for more in ({}, {"enable_thinking": False}):
        assert theirs(chat[:1], **exported, **more) == plain.ids[:start]


EMPTY = "<think>\n\n</think>\n\n"
BEGUN = QWEN3.replace("enable_thinking is defined and enable_thinking is false", "enable_thinking is not true").replace(
    "{{- '<think>\\n\\n</think>\\n\\n' }}", "{{- '<think>\\n\\n</think>\\n\\n' }}{%- else %}{{- '<think>\\n' }}"
)
"""As newer templates of that family: an empty block unless thinking is enabled, and then the beginning of one."""


SET = "{%- set enable_thinking = enable_thinking | default(true) %}" + QWEN3
"""A template that gives the variable a value itself has the empty block in every prompt."""


@pytest.mark.parametrize(
    ("template", "rest"), [(None, THOUGHT), (BEGUN, THOUGHT.removeprefix("<think>\n")), (SET, None)]
)
def test_a_prompt_that_has_the_empty_block_already_is_cut_before_it(template, rest):
    """As the template of a model that was exported here is."""
    tokenizer = chatml_tokenizer(template or make_encoder(chatml_tokenizer(QWEN3)).chat_template)
    encoder = make_encoder(tokenizer)
    (plain,) = encode(encoder, example("2 + 2?", "four"))
    (thought,) = encode(make_encoder(tokenizer, thinks=True), example("2 + 2?", THOUGHT))
    ((start, _),) = plain.spans
    assert tokenizer.decode(plain.ids[:start]).endswith(EMPTY)
    assert pieces(encoder, plain) == ["four<|im_end|>"]
    if rest is not None:
        assert encoder.chat_template == tokenizer.chat_template
        assert (thought.reasons, pieces(encoder, thought)) == ([], [f"{rest}<|im_end|>"])
        assert tokenizer.decode(thought.ids).count("<think>") == 1
        assert "composed" not in plain.reasons


def test_a_whole_conversation_with_thinking_in_its_turns():
    """Under a template that keeps it in earlier turns."""
    template = QWEN3.replace("loop.index0 > ns.asked and (loop.last or reasoning_content)", "true")
    encoder = make_encoder(chatml_tokenizer(template), thinks=True)
    (found,) = encode(encoder, example("2 + 2?", THOUGHT, "And 3 + 1?", THOUGHT.replace("2+2", "3+1"), whole=True))
    assert found.reasons == []
    assert pieces(encoder, found) == [f"{THOUGHT}<|im_end|>", f"{THOUGHT.replace('2+2', '3+1')}<|im_end|>"]


def test_a_template_that_drops_the_system_turn_is_composed():
    """As Mistral v0.3: the system text stands in the last user turn, and only while that is the last turn."""
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "<|im_start|>{{ messages[0].content + '/' if loop.last and messages[0].role == 'system' }}"
        "{{ m.content }}<|im_end|>"
        "{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    encoder = make_encoder(chatml_tokenizer(template))
    assert encoder.renderer.layout.answer_lead == " "
    (found,) = encode(encoder, example("Hi", "Yo", system="Be brief."))
    assert found.reasons == ["composed"]
    assert encoder.tokenizer.decode(found.ids) == "<|im_start|>Be brief./Hi<|im_end|> Yo<|end|>"
    assert pieces(encoder, found) == [" Yo<|end|>"]


@pytest.mark.parametrize(
    ("after", "trained"),
    [("\\n", "Yo<|end|>"), ("\\n\\n", "Yo<|end|>"), ("\\n<|im_end|>\\n", "Yo\n<|im_end|>")],
)
def test_white_space_that_was_added_to_the_vocabulary_ends_no_turn(after, trained):
    """As Gemma's runs of newlines: text is full of them, so an answer would stop at its first line."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '" + after + "' }}{% endfor %}"
    tokenizer = chatml_tokenizer(template)
    tokenizer.add_tokens([AddedToken(run, special=False, normalized=False) for run in ("\n", "\n\n")])
    encoder = make_encoder(tokenizer)
    (found,) = encode(encoder, example("Hi", "Yo"))
    assert pieces(encoder, found) == [f"assistant: {trained}"]
    assert tokenizer.decode(encoder.stop_ids[0]) == trained[trained.index("<") :]


# ------------------------------------------------------------------------------------------ truncation


def test_truncation_keeps_the_beginning(small_tokenizers):
    """Without a response token left the example is dropped; a cut one has no end of turn and says so."""
    encoder = make_encoder(small_tokenizers["chatml"])
    chat = example("Name a colour.", "Blue is a colour, and so is green.")
    (full,) = encode(encoder, chat)
    start, end = full.spans[0]
    for length in range(2, end + 2):
        (found,) = encode(encoder, chat, max_length=length)
        if length <= start:
            assert (list(found.ids), found.reasons) == ([], ["no_response_token"])
            continue
        assert found.ids == full.ids[:length]
        assert found.spans == [(start, min(length, end))]
        assert found.reasons == (["truncated"] if length < end else [])


class Promptless(Renderer):
    template = "{{ messages[-1].content }}"

    def prompt(self, messages, tools=()):
        return []

    def answer(self, message):
        return [([*self.ids(message.content), self.tokenizer.eos_token_id], 1.0)]


def test_the_first_token_is_never_a_target():
    """Nothing predicts it; a renderer without any prompt would make it one."""
    renderer = Promptless()
    renderer.begin(chatml_tokenizer())
    (found,) = encode_examples(renderer, [example("Hi", "Yo")], 10)
    assert found.spans[0][0] == 1


# ----------------------------------------------------------------------------------------- texts that go on


def parting_tokenizer(**attributes):
    """With an end of a turn that has these attributes; a token that overlaps it is before it in "x<|stop#"."""
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens([AddedToken("<|stop#", special=True, **{"normalized": False, **attributes})])
    tokenizer.add_tokens([AddedToken("x<|stop", normalized=False)])
    return tokenizer


PARTING = {
    "alone": {},
    "takes the space behind it": {"rstrip": True},
    "takes the space before it": {"lstrip": True},
    "a word of its own": {"single_word": True},
    "normalised": {"normalized": True},
}


@pytest.mark.parametrize("kind", PARTING)
@given(said=st.lists(st.text("ab x\n<|!.1é", max_size=6), min_size=1, max_size=5))
@hypothesis_example(said=["x", "##", " b"])
@hypothesis_example(said=["a", "ab", "\n"])
def test_a_text_that_goes_on_from_another_has_the_ids_that_it_has_alone(kind, said):
    tokenizer = parting_tokenizer(**PARTING[kind])
    spellings = SpecialSpellings(tokenizer, [tokenizer.convert_tokens_to_ids("<|stop#")], "text")
    texts = [
        text for n in range(len(said)) for text in ("<|stop#".join(said[: n + 1]), "<|stop#".join([*said[:n], ""]))
    ]
    assert spellings.tokenize(texts) == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_a_conversation_of_many_turns_is_tokenised_about_once():
    """Each prompt holds the turns before it: together they have 40 times the characters of the last one."""
    counted = 0

    class Counting(SpecialSpellings):
        def _tokenized(self, texts):
            nonlocal counted
            counted += sum(map(len, texts))
            return super()._tokenized(texts)

    renderer = make_encoder(chatml_tokenizer()).renderer
    renderer.spellings = Counting(renderer.tokenizer, renderer.ends, "text")
    (found,) = encode_examples(renderer, [example(*["A turn of many words."] * 160, whole=True)], 10**6)
    assert len(found.spans) == 80
    assert counted < 3 * len(renderer.tokenizer.decode(found.ids))
