"""Signals by rules, on texts with a fault and on texts that look like one."""

import codecs
import time

import pytest

from sftmix.tools.suspects import texts
from sftmix.tools.suspects.rows import SuspectRows


def scores(kind: type[texts.Signal], *pairs: tuple[str, str]) -> list[float]:
    prompts, responses = zip(*pairs, strict=True)
    return kind().score(SuspectRows(prompts, responses)).tolist()


EUROPE = ["it’s", "“so” it is", "café", "Größe", "niño", "5 – 6", "naïve …", "€ 5", "😀 so", "Привет"]
READ_AS = {"cp1252": EUROPE, "mac_roman": EUROPE, "cp437": EUROPE, "cp1251": ["it’s", "“so” it is", "5 – 6", "Привет"]}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, of in READ_AS.items() for text in of])
def test_what_another_encoding_makes_of_a_text_is_found_and_the_text_itself_is_not(encoding, text):
    each = (codecs.decode(bytes([byte]), encoding, "replace").replace("\ufffd", chr(byte)) for byte in text.encode())
    read = "".join(each)
    assert scores(texts.BrokenEncoding, ("a", text)) == [0]
    assert min(scores(texts.BrokenEncoding, ("a", read), (read, "a"))) >= 1


@pytest.mark.parametrize(
    "text",
    ["CAFÉ…", "„MENÜ“", "Il est né…”", "« MARCHÉ»", "СССР В» 5", "√2 ≈ 1.4", "Ñandú", "ÅÄÖ", "Ελλάδα", "日本語", "é…”"],
)
def test_marks_behind_capital_letters_are_no_broken_encoding(text):
    assert scores(texts.BrokenEncoding, (text, text)) == [0]


def test_what_is_lost_is_found():
    assert scores(texts.BrokenEncoding, ("a", "Don\ufffdt"), ("a", "IÂ\x80m"), ("a", "ï¿½")) == [1, 1, 1]


@pytest.mark.parametrize("text", ["N/A", " n/a.", "...", "-", "None.", "[no answer]", "<nooutput>", "I don't know"])
def test_an_empty_answer(text):
    assert scores(texts.EmptyAnswer, ("Name a colour.", text)) == [1]


@pytest.mark.parametrize("text", ["7", "Yes", "No", "Nobody", "None of them is.", "Testing is good.", "A"])
def test_a_short_answer_is_not_empty(text):
    assert scores(texts.EmptyAnswer, ("Name a colour.", text)) == [0]


def test_refusals_are_found_but_where_the_prompt_is_about_them():
    said = "I'm sorry, but I cannot help with that."
    assert scores(texts.Refusal, ("Name a colour.", said), (f"Say it nicely: {said}", said)) == [1, 0]
    for fine in ("I'm sorry to hear that.", "I can't believe it!", "Blue."):
        assert scores(texts.Refusal, ("Name a colour.", fine)) == [0]


WHOLE = [
    "The lion is the king of the animals.",
    "red, blue, green, white, black, yellow, pink, brown, grey, gold",
    "1. Cash\n2. Keys\n3. Phone",
    "SELECT name FROM users;",
    "def f(x):\n    return x + 1\n\nprint(f(2))",
    "Unlocking the Potential: Exploring the Possibilities of Technology in the Future",
    "A great day for all! Come and see us. #sun #fun",
    "See https://example.com/a/page/of/the/book",
    "Four",
]
CUT = [
    "The lion is the king of the",
    "He came home. Then he opened the old door",
    "1. It is cheap.\n2. It is fast.\n3. It never",
    "The answer is (as was said",
    "There are three colours, which are red,",
    "Use this:\n```python\nprint(1)",
    "the capital of the country is a city in the north that people like",
]


def test_responses_that_end_inside_a_sentence():
    assert scores(texts.CutShort, *[("a", text) for text in WHOLE]) == [0] * len(WHOLE)
    assert min(scores(texts.CutShort, *[("a", text) for text in CUT])) > 0


def test_another_language_is_another_than_most_and_than_the_prompt():
    english = ("What is it?", "It is the house of the man that you have seen.")
    french = "Il est dans la maison que vous avez vue avec les enfants."
    found = scores(
        texts.OtherLanguage,
        *[english] * 3,
        ("What is it?", french),
        ("Translate it.", french),
        ("Que dit-il dans la lettre que vous avez ? Il est dans la maison.", french),
        ("What is it?", "На этот вопрос нет ответа"),
        ("What is it?", "Paris"),
    )
    assert found == [0, 0, 0, 1, 0, 0, 1, 0]


def test_wrong_sums():
    found = scores(
        texts.AlteredNumbers,
        ("It cost 12,500.", "It cost 13,500 then."),
        ("Add.", "12 + 7 = 19, 3 x 4 = 13 and 10 / 3 = 3.33"),
        ("Add.", "2 + 3 + 4 = 9, x^2 = 4 and 3^2 + 6 = 15"),
        ("Divide.", "5 / 0 = 7"),
    )
    assert found == [0, 1, 0, 0]


@pytest.mark.parametrize("unit", [" ", "#", "(", "1", "a ", "It is. So then "])
def test_no_rule_takes_long_for_a_long_text(unit):
    """A quadratic expression needs ten seconds to some minutes, a linear one hundredths of a second."""
    long = unit * (200_000 // len(unit))
    pairs = [("a", f"{long} abc def"), ("a", f"a b c d {long} ~"), ("a", f"a b c d {long}) ~"), (long, "a")]
    kinds = (texts.BrokenEncoding, texts.EmptyAnswer, texts.Refusal, texts.CutShort)
    began = time.process_time()
    for kind in (*kinds, texts.OtherLanguage, texts.AlteredNumbers):
        scores(kind, *pairs)
    assert time.process_time() - began < 5
