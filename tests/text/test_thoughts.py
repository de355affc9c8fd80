"""Where a thought ends and its answer begins, in responses as models write them and people speak of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.text.thoughts import TAGS, closed_by, divided, opened_by
from sftmix.words.errors import DataError

CODE = 'Take the rest: text.split("</think>")[-1]'
SPOKEN = [
    CODE,
    "`</think>` ends it.",
    "Write </think> and go on.",
    "It ends with </think>.",
    "An <think> opens, and\n</think>\ncloses.",
    "Reasoning ends with the line\n</think>\nand the answer comes next.",
    "For instance:\r\n</think>\r\nThat is all.",
]


@pytest.mark.parametrize(("opening", "closing"), TAGS.items())
def test_a_thought_is_between_its_tags_or_before_the_closing_one(opening, closing):
    for space in ("", "\n"):
        assert divided(f"{opening}{space}r{space}{closing}{2 * space}a") == ("r", "a")
        assert divided(f"r{space}{closing}{2 * space}a") == ("r", "a")  # the prompt had opened it
    assert divided(f" {opening}\n\n{closing}\n\na") == ("", "a")
    assert divided(f"r\n{closing} \n\na") == ("r", "a")
    assert divided(f"r\n{closing}") == ("r", "")
    assert divided(f"r {closing}\na") == ("r", "a")
    assert divided(f"r\r\n{closing}\r\n\r\na") == ("r", "a")
    assert divided(f"{opening}\nWhat is {opening}?\n{closing}\n\nA tag.") == (f"What is {opening}?", "A tag.")


@pytest.mark.parametrize(("opening", "closing"), TAGS.items())
def test_a_thought_that_was_cut_off_has_no_answer(opening, closing):
    assert divided(f"{opening}\nOkay, so I") == ("Okay, so I", "")
    assert divided(opening) == ("", "")


@pytest.mark.parametrize("text", SPOKEN)
def test_a_tag_that_is_spoken_of_ends_no_thought(text):
    assert divided(text) == ("", text)
    assert divided(f"<think>r</think>{text}") == ("r", text)


def test_a_row_whose_thought_was_cut_off_is_an_empty_response(write, read):
    rows = [{"instruction": "a", "output": out} for out in ("<think>\nr\n</think>\n\nb", "<think>\nr, and then")]
    assert read(write("rows.jsonl", rows)).report.counts == {"thought": 1, "empty_response": 1}


def test_thoughts_that_no_row_has_cannot_be_left_out(write, read):
    rows = [{"instruction": "a", "output": out} for out in ("<thinking>r</thinking>b", CODE)]
    with pytest.raises(DataError, match=r"data\.thoughts is drop, and no row .*'reasoning_content'.*'<think>'"):
        read(write("rows.jsonl", rows), thoughts="drop")
    assert read(write("more.jsonl", [*rows, {"instruction": "a", "output": "r</think>b"}]), thoughts="drop").thinks


OPENING, CLOSING = (*TAGS, "<thinking>"), (*TAGS.values(), "</thinking>")


@given(st.lists(st.sampled_from([*OPENING, *CLOSING, " ", "\n", "a", "<", "[", ">", "<a>"]), max_size=5).map("".join))
def test_a_thought_is_opened_or_closed_by_what_a_text_ends_with(text):
    assert bool(opened_by(text)) == text.rstrip().endswith(OPENING)
    assert closed_by(text) == text.rstrip().endswith(CLOSING)
    assert text.endswith(opened_by(text))
