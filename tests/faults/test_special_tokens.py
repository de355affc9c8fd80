"""Special tokens that a row spells become text: no row ends a turn, begins another, or changes what is trained."""

import base64
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from sftmix.data import encode_dataset, prepare
from sftmix.options import DataOptions
from sftmix.text.encoder import encoder_for
from sftmix.text.mask import encode_examples
from sftmix.text.values import MARK
from sftmix.types import Example, Message
from sftmix.words.errors import ConfigError
from tests.data.conftest import options, write  # noqa: F401, fixtures
from tests.text.small_tokenizers import CHATML as CHATML_TEMPLATE
from tests.text.small_tokenizers import REAL, SMALL, THINKING, byte_level, make_encoder

# ------------------------------------- Llama 3's tokenizer from its tiktoken file, by transformers' own converter

LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3_TEMPLATE = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


class Converter(TikTokenConverter):
    """It reads the file without the package tiktoken."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url):
        lines = map(str.split, Path(tiktoken_url).read_text().splitlines())
        return {base64.b64decode(piece): int(rank) for piece, rank in lines}


def llama3_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    backend = Converter(vocab_file=path, extra_special_tokens=LLAMA3_SPECIAL).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=LLAMA3_SPECIAL[0], eos_token="<|eot_id|>", chat_template=LLAMA3_TEMPLATE
    )


QUICK = (*SMALL, "base-7m", "stories260K")
SLOW = ("mistral", "qwen2", "gpt2", "llama3")
CHATML = ("chatml", "base-7m", "qwen2")
"""Tokenizers that have the special tokens of ChatML."""
RARE = (pytest.mark.slow, pytest.mark.long)


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(name, marks=RARE) for name in SLOW)])
def named(request):
    """A tokenizer with its name."""
    name = request.param
    if name in SMALL:
        return name, SMALL[name]()
    shared = request.getfixturevalue("shared")
    if name == "llama3":
        return name, llama3_tokenizer(shared / "tokenizers/llama3/tokenizer.model")
    return name, AutoTokenizer.from_pretrained(shared / REAL[name])


DROPPED = 0.01
"""Largest share of the rows that an encoder may drop because it cannot find where a response begins."""


def chat(question: str, answer: str, system: str | None = None) -> Example:
    first = () if system is None else (Message("system", system),)
    return Example("x", (*first, Message("user", question), Message("assistant", answer, True)))


def special_ids(tokenizer) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0" + MARK), min_size=1, max_size=6),
    st.sampled_from(["\n", " ", "assistant\n", "<", "|", ">", "</", "<|im_", "end|>", "[", "Hello"]),
    st.integers(0, 10_000),
)
"""Pieces of a content; a number stands for one of the tokenizer's special tokens."""
PIECES = st.tuples(*[st.lists(WORDS, min_size=1, max_size=8)] * 3)


def contents(tokenizer, pieces) -> list[str]:
    """Return a question, an answer and a system message that are not blank."""
    names = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    texts = ["".join(p if isinstance(p, str) else names[p % len(names)] for p in part) for part in pieces]
    return [text if text.strip() else "Hi" for text in texts]


def check(encoder, question: str, answer: str, system: str) -> bool:
    """Hold ids and mask of a chat against those of a harmless one, and what they say against the content.

    Returns False for a row that is dropped.
    """
    tokenizer, special = encoder.tokenizer, special_ids(encoder.tokenizer)
    found, plain = encode_examples(encoder.renderer, [chat(question, answer, system), chat("Hi", "Yo", "Now")], 100_000)
    if not found.ids:
        assert found.reasons == ["prefix_mismatch"]
        return False
    ((start, end),), ((plain_start, _),) = found.spans, plain.spans
    assert end == len(found.ids)
    assert found.ids[-1] == encoder.end_of_turn_id
    # The mask begins where it does in the harmless chat: behind the same header.
    prompt, header = encoder.decode(found.ids[:start]), encoder.decode(plain.ids[:plain_start]).rpartition("Hi")[2]
    assert prompt.endswith(header)
    assert sum(i in special for i in found.ids[:start]) == sum(i in special for i in plain.ids[:plain_start])
    # Only the template made special tokens, none of them in the response.
    assert [i for i in found.ids if i in special] == [i for i in plain.ids if i in special]
    assert special & set(found.ids[start:]) == {encoder.end_of_turn_id}
    texts, normal = (question, answer, system), tokenizer.backend_tokenizer.normalizer
    if normal:
        texts = [normal.normalize_str(text).replace("▁", " ") for text in texts]
    asked, said, told = (text.strip() for text in texts)
    assert encoder.decode(found.ids[start:-1]).strip() == said
    assert asked in prompt
    assert told in prompt or "Now" not in encoder.decode(plain.ids)  # a template may leave the system turn out
    return True


def by_hand(tokenizer, question: str, answer: str, system: str | None = None, *, apart: bool = False) -> list[int]:
    """Return the ids of a ChatML conversation, put together from pieces that hold no special token.

    apart  the answer is tokenised apart from its header
    """
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    first = [] if system is None else [start, *ids(f"system\n{system}"), end, *ids("\n")]
    said = ids("assistant\n") + ids(answer) if apart else ids(f"assistant\n{answer}")
    return [*first, start, *ids(f"user\n{question}"), end, *ids("\n"), start, *said, end]


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=RARE)])
def test_no_row_makes_a_special_token(named, examples):
    name, tokenizer = named
    own, chatml, kept = make_encoder(tokenizer), make_encoder(tokenizer, "chatml"), list[bool]()

    @settings(max_examples=examples, phases=[Phase.generate])
    @given(PIECES)
    def each(pieces):
        texts = contents(tokenizer, pieces)
        kept.append(check(own, *texts))
        if name in CHATML:
            (found,) = encode_examples(chatml.renderer, [chat(*texts)], 100_000)
            assert found.ids == by_hand(tokenizer, *texts, apart="boundary" in found.reasons)

    each()
    assert kept.count(False) <= DROPPED * len(kept)


def test_other_rows_keep_their_ids(named):
    """Both ways of encoding give the same ids to a text that spells nothing special."""
    _, tokenizer = named
    encoder = make_encoder(tokenizer)
    rows = [chat("Hi", " Yo \n"), chat("1 < 2\n\n", "`a</b>` [x] é😀\n\n1. Plum"), chat("Bonjour", "ＡＢＣ  ﬁ")]
    turns = [[{"role": turn.role, "content": turn.content} for turn in row.messages] for row in rows]
    rendered = [encoder.renderer.render(chat, prompt=False) for chat in turns]
    assert [encoder.renderer.spellings._by_twin(text) for text in rendered] == encoder.renderer.spellings.tokenize(
        rendered
    )


def test_tokens_are_meant_by_those_who_say_so(named):
    _, tokenizer = named
    text, meant = make_encoder(tokenizer), make_encoder(tokenizer, special_tokens="tokens")
    end = tokenizer.convert_ids_to_tokens(text.end_of_turn_id)
    row = chat("Hi", f"Yo{end}you")
    (as_text,), (as_tokens,) = encode_examples(text.renderer, [row], 1000), encode_examples(meant.renderer, [row], 1000)
    assert as_text.ids.count(text.end_of_turn_id) == as_tokens.ids.count(text.end_of_turn_id) - 1
    assert as_text.reasons == ["spelt_special"]
    assert as_tokens.reasons == []
    assert text.fingerprint != meant.fingerprint


TRIMMING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_that_trims(tmp_path):
    """What a row spells stays text where the template changes the content around it."""
    tokenizer = SMALL["chatml"]()
    (path := tmp_path / "trim.jinja").write_text(TRIMMING)
    encoder = make_encoder(tokenizer, str(path))
    row = chat("<|im_end|> Hi <|end|>\n ", " \n<|im_start|><|im_end|>\n")
    (found,) = encode_examples(encoder.renderer, [row], 1000)
    assert found.ids == by_hand(tokenizer, "<|im_end|> Hi <|end|>", "<|im_start|><|im_end|>")


def with_special(*names: str):
    tokenizer = SMALL["chatml"]()
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    return tokenizer, make_encoder(tokenizer)


def test_spellings_that_overlap():
    """Every spelling in a content is broken, and the longest one stands for the template's token."""
    tokenizer, encoder = with_special("<|x|>", "|>y", "<|x|>y")
    (found,) = encode_examples(encoder.renderer, [chat("<|x|>y <|x|>y", "<|x|>y|>y")], 1000)
    assert found.ids == by_hand(tokenizer, "<|x|>y <|x|>y", "<|x|>y|>y")
    long = tokenizer.convert_tokens_to_ids("<|x|>y")
    assert encoder.renderer.spellings._by_twin("<|x|>y") == [long]


# --------------------------------------------------------------------------------------------- plain text


def test_documents_do_not_end_in_their_middle(named, write, options):  # noqa: F811
    _, tokenizer = named
    eos = tokenizer.eos_token
    path = write("rows.jsonl", [{"text": f"One.{eos}{eos}\nTwo."}, {"text": "Three."}])
    text, meant = (
        encode_dataset(prepare(options(path, format="text"), 0), encoder, max_length=64)
        for special in ("text", "tokens")
        for encoder in [encoder_for(tokenizer, DataOptions(format="text", special_tokens=special))]
    )
    ends = [data.train[0].input_ids.tolist().count(tokenizer.eos_token_id) for data in (text, meant)]
    assert ends == [2, 4]
    assert text.report.counts == {"spelt_in_document": 1}
    assert text.report.lines()[-1].endswith(f" ({path}:1)")


# ------------------------------------------------------------------------------------------ what is told


def test_a_special_token_that_merges_spell():
    """Without the merges that make it, its text is written in smaller pieces."""
    tokenizer, encoder = with_special("re")
    (found,) = encode_examples(encoder.renderer, [chat("Hi", "green")], 100)
    assert tokenizer.convert_tokens_to_ids("re") not in found.ids
    assert encoder.decode(found.ids).count("green") == 1


def test_a_tokenizer_that_cannot_be_copied_says_so():
    encoder = make_encoder(ByT5Tokenizer())
    with pytest.raises(ConfigError, match=r"data.special_tokens is text.*not a fast tokenizer.*to tokens"):
        encode_examples(encoder.renderer, [chat("Hi", "Yo</s>")], 100)
    (found,) = encode_examples(encoder.renderer, [chat("Hi", "Yo")], 100)
    assert found.ids


# ------------------------------------------------------------------------- tokenizers that are made otherwise


def tokenizer_of(*tokens: AddedToken, normalizer=None, template=CHATML_TEMPLATE):
    """A byte-level tokenizer with these added tokens; the last one is eos."""
    backend = byte_level(["<unused>"])
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(tokens))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=str(tokens[-1]), chat_template=template)


def counts(encoder, question: str, answer: str, token: str) -> tuple[int, int]:
    """Count a token in a chat, and in a harmless one."""
    number = encoder.tokenizer.convert_tokens_to_ids(token)
    found, plain = encode_examples(encoder.renderer, [chat(question, answer), chat("Hi", "Yo")], 1000)
    return found.ids.count(number), plain.ids.count(number)


FORMS = {
    "small letters": (normalizers.Lowercase(), "<|IM_END|>"),
    "wide letters": (normalizers.NFKC(), "＜|im_end|＞"),
    "without NUL": (normalizers.BertNormalizer(), "<|im_end|>"),
    "without control characters": (normalizers.BertNormalizer(), "<|\1im_END|>"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_spellings_that_a_normaliser_makes(kind):
    normalizer, spelling = FORMS[kind]
    tokens = [AddedToken(name, special=True, normalized=True) for name in ("<|im_start|>", "<|im_end|>")]
    encoder = make_encoder(tokenizer_of(*tokens, normalizer=normalizer))
    assert counts(encoder, f" {spelling}", f"a {spelling} b", "<|im_end|>") == (2, 2)
    (found,) = encode_examples(encoder.renderer, [chat("Hi", spelling)], 1000)
    assert found.reasons == ["spelt_special"]


SYSTEM_APART = """{% for m in messages %}{% if m.role == 'system' %}REFUSED<|system|>
{{ m.content }}<|over|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
HARMONY = """{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}\
<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
TURN, AROUND_SYSTEM, OF_HARMONY = ("<|im_start|>", "<|im_end|>"), ("<|system|>", "<|over|>"), ("<|message|>", "<|end|>")
WRITTEN = {
    "a thought": (THINKING, ("<think>", "</think>", *TURN), {*TURN}),
    "a system turn of its own": (SYSTEM_APART.replace("REFUSED", ""), (*AROUND_SYSTEM, *TURN), {*AROUND_SYSTEM, *TURN}),
    "no system turn": (
        SYSTEM_APART.replace("REFUSED", "{{ raise_exception('no system turn') }}"),
        (*AROUND_SYSTEM, *TURN),
        {*TURN},
    ),
    "a channel": (HARMONY, ("<|start|>", "<|channel|>", *OF_HARMONY), {"<|start|>", "<|channel|>", *OF_HARMONY}),
}
"""What a template writes: the template, the tokens that the tokenizer has, and those that count as special."""


@pytest.mark.parametrize("kind", WRITTEN)
def test_tokens_that_a_template_writes_are_special_though_they_are_not_marked_so(kind):
    """`<think>`, which only the header of a response holds, is not; a channel, which only a response has, is."""
    template, names, special = WRITTEN[kind]
    tokens = [AddedToken(name, special=False, normalized=False) for name in names]
    encoder = make_encoder(tokenizer_of(*tokens, template=template))
    assert set(encoder.renderer.spellings.ids) - {"<unused>"} == special
    for token in special:
        spelt, plain = counts(encoder, f"Hi{token}\nObey", f"Yo{token}\nObey", token)
        assert spelt == plain


def test_special_tokens_of_one_character_and_those_that_begin_with_another():
    template = CHATML_TEMPLATE.replace("<|im_end|>", "■")
    names = ("■x", "<|im_start|>", "<|im_start|>x", "■")
    tokenizer = tokenizer_of(*(AddedToken(n, special=True, normalized=False) for n in names), template=template)
    encoder = make_encoder(tokenizer)
    assert counts(encoder, "■", "a ■ b■x■", "■") == (2, 2)
    (found,) = encode_examples(encoder.renderer, [chat("■", "a ■ b■x■")], 1000)
    assert encoder.decode(found.ids).endswith("assistant\na ■ b■x■■")
    assert [encoder.renderer.spellings._by_twin("■x■")] == [tokenizer.convert_tokens_to_ids(["■x", "■"])]
