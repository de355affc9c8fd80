"""Topics of both ends of the confidence: words, their counts, and how the page shows them."""

import math
from pathlib import Path

import pytest

jinja2 = pytest.importorskip("jinja2")
pytest.importorskip("sklearn")
from sftmix.tools.report import write  # noqa: E402
from sftmix.tools.report.topics import PRIOR, topics  # noqa: E402

LEAST = ["Classify the sentence <b>"] * 12 + ["Name the capital of Peru"] * 8
MOST = ["Write a story about the sea"] * 15 + ["Name the capital of France"] * 5


def test_words_counts_and_order_are_those_of_the_texts():
    """The formula, written naively for every word."""
    sides = [[{*text.lower().replace("<b>", "b").split()} for text in side] for side in (LEAST, MOST)]
    expected = []
    for word in set().union(*sides[0], *sides[1]) - {"the", "of", "a", "about"}:
        has = [sum(word in words for words in side) for side in sides]
        by = math.log((has[0] + PRIOR) / (20 - has[0] + PRIOR)) - math.log((has[1] + PRIOR) / (20 - has[1] + PRIOR))
        expected.append((by, word, *has))
    for sign, end in zip((1, -1), topics([*LEAST, *MOST]), strict=True):
        wanted = sorted((one for one in expected if sign * one[0] > 0.5), key=lambda one: (-sign * one[0], one[1]))
        assert [(word["word"], word["least"], word["most"]) for word in end] == [one[1:] for one in wanted]
        assert [word["by"] for word in end] == pytest.approx([one[0] for one in wanted], rel=1e-12)


def test_what_is_asked_for_is_a_topic_and_how_it_is_said_is_not():
    least, most = topics(["Describe how to do it: boil"] * 9 + ["Give a name to an isle"] * 9)
    assert [word["word"] for word in least] == ["boil", "describe"]
    assert [word["word"] for word in most] == ["give", "isle", "name"]


@pytest.mark.parametrize("texts", [["これはペンです。"] * 4, [], [""], ["? ! ?", "! ? !"], ["how to do it"] * 4])
def test_no_words_without_spaces(texts):
    assert topics(texts) == []


def page_of(found):
    """The page of a run that has these topics, and one example."""
    folder = jinja2.FileSystemLoader(Path(write.__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.ChainableUndefined)
    environment.filters["figure"] = str
    return environment.get_template("page.html").render(topics=found, examples=[{"id": "a", "source": "a:1"}], plots={})


def test_the_page_shows_them_or_says_why_not():
    assert "The least confident:</b> b (12, 0), classify (12, 0), sentence (12, 0), peru (8, 0)" in page_of(
        topics([*LEAST, *MOST])
    )
    assert "The most confident:</b> none" in page_of(topics(["Name the sea"] * 8))
    none = "No topics: the instructions hardly have spaces, or only function words."
    assert none in page_of(topics(["これはペンです。"] * 4))
    assert none in page_of(topics(["how to do it"] * 4))
    assert "&lt;i&gt; (3, 0)" in page_of([[{"word": "<i>", "least": 3, "most": 0}], []])
