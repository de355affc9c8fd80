"""Questions from rows of any format and of official judges."""

import json

import pytest

from sftmix.common.errors import DataError
from sftmix.tools.answers.answering import read_questions

MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Q?", "More?"]}
ASKED = ({"role": "user", "content": "Q?"},)


@pytest.fixture
def read(tmp_path):
    """Function: the questions of lines, which are rows or texts."""

    def questions(*lines, mt_bench=False):
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return read_questions([str(file)], mt_bench=mt_bench)

    return questions


@pytest.mark.parametrize(("category", "expected"), [("writing", 0.7), ("math", 0.0), ("stem", 0.1), ("other", 0.7)])
def test_the_category_decides_the_temperature(read, category, expected):
    (question,) = read({**MT_BENCH, "category": category}, mt_bench=True)
    assert (question.temperature, question.follow_ups) == (expected, ("More?",))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q?", "output": "A", "id": "own"},
        {"instruction": "Q?"},
        {"prompt": [{"role": "user", "content": "Q?"}]},
        {"messages": [{"role": "user", "content": "Q?"}]},
        {"conversations": [{"from": "human", "value": "Q?"}]},
    ],
    ids=str,
)
def test_prompts_are_rows_of_any_format_with_or_without_answer(read, row):
    first, second = read(row, row)
    assert (first.messages, first.reference) == (ASKED, row.get("output"))
    assert second.id == f"{first.id}#2"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ""),
        ("5", "expected an object"),
        ('{"text": "long ago"}', "a text"),
        ('{"instruction": "a\\u0000"}', "instruction contains a NUL"),
    ],
)
def test_a_bad_row_is_named(read, line, words):
    with pytest.raises(DataError, match=f"rows.jsonl:2: {words}"):
        read({"instruction": "Q", "id": "a"}, line)
    with pytest.raises(DataError, match=r"rows.jsonl:2: it has no 'turns'"):
        read(MT_BENCH, {"what": 1}, mt_bench=True)
