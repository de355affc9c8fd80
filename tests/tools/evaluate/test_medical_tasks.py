"""The example of medical tasks: raw files become rows; no question that is measured is among the shots."""

import json

import pytest

from tests.tools.evaluate.bench import MEDICAL

SHOTS = MEDICAL["SHOTS"]
convert = MEDICAL["convert"]

FOUR = ["one", "two", "three", "four"]
LETTERED = {"question": "Which?", "options": {"B": "two", "A": "one", "C": "three", "D": "four"}, "answer_idx": "C"}
FIVE = {**LETTERED, "options": {**LETTERED["options"], "E": "five"}, "answer_idx": "E"}
HUB = {"id": "x", "question": "Which?", "opa": "one", "opb": "two", "opc": "three", "opd": "four", "cop": 2}
AUTHORS = {**HUB, "cop": 3}
PUBMED = {"QUESTION": "Which?", "CONTEXTS": ["First part.", "Second."], "final_decision": "maybe"}


def converted(name, raw, to, **files):
    """The measured rows and the shots that come out."""
    convert(name, raw, to, **files)
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (to / f"{name}.jsonl", to / f"{name}.shots.jsonl")
    )


def numbered(raw, n):
    key = "QUESTION" if "QUESTION" in raw else "question"
    return [{**raw, key: f"Which {i}?"} for i in range(n)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "raw", "also", "context", "options", "answer"),
    [
        ("medqa_4options", LETTERED, [], "", FOUR, 2),
        ("medqa_5options", FIVE, [], "", [*FOUR, "five"], 4),
        ("medmcqa", HUB, [{**HUB, "cop": 0, "question": "Zero?"}], "", FOUR, 2),
        ("medmcqa", AUTHORS, [{**HUB, "cop": 4, "question": "Four?"}], "", FOUR, 2),
        ("pubmedqa", PUBMED, [], "First part. Second.", ["yes", "no", "maybe"], 2),
    ],
)
def test_rows_of_each_raw_format(tmp_path, name, raw, also, context, options, answer):
    file = write(tmp_path / "raw.jsonl", [*numbered(raw, SHOTS + 5), *also])
    measured, shots = converted(name, file, tmp_path / "rows")
    assert len(shots) == SHOTS
    assert len(measured) == 5 + len(also)
    questions = [row["question"] for row in (*measured, *shots)]
    assert len(set(questions)) == len(questions)
    row = next(row for row in (*measured, *shots) if row["question"] == "Which 7?")
    assert (row["context"], row["options"], row["answer"]) == (context, options, answer)


def test_shots_of_a_file_of_their_own_lose_the_measured_questions(tmp_path):
    test = write(tmp_path / "test.jsonl", [*numbered(LETTERED, 3), *numbered(LETTERED, 1)])
    train = write(tmp_path / "train.jsonl", numbered({**LETTERED, "answer_idx": "A"}, 6))
    measured, shots = converted("medqa_4options", test, tmp_path / "rows", shots=train)
    assert [row["question"] for row in measured] == ["Which 0?", "Which 1?", "Which 2?"]
    assert [row["question"] for row in shots] == ["Which 3?", "Which 4?", "Which 5?"]


@pytest.mark.parametrize(("row", "cop"), [(HUB, 0), (AUTHORS, 4)])
def test_both_files_say_where_the_cop_of_medmcqa_begins(tmp_path, row, cop):
    """Of the smaller file alone it could not be seen."""
    large = write(tmp_path / "large.jsonl", [*numbered(row, 3), {**row, "cop": cop}])
    small = write(tmp_path / "small.jsonl", [{**row, "question": question} for question in ("One?", "Two?")])
    for raw, shots in ((large, small), (small, large)):
        found = [line for part in converted("medmcqa", raw, tmp_path / "rows", shots=shots) for line in part]
        assert {line["answer"] for line in found if line["question"] != "Which?"} == {2}


def test_pubmedqa_is_divided_by_its_test_ids(tmp_path):
    raw = tmp_path / "ori_pqal.json"
    raw.write_text(json.dumps({str(i): {**PUBMED, "QUESTION": f"Which {i}?"} for i in range(6)}))
    ids = tmp_path / "ground_truth.json"
    ids.write_text(json.dumps({"1": "maybe", "4": "maybe"}))
    measured, shots = converted("pubmedqa", raw, tmp_path / "rows", test=ids)
    assert ([row["id"] for row in measured], len(shots)) == (["1", "4"], 4)
    ids.write_text('["1", "99"]')
    with pytest.raises(SystemExit, match=r"of its 2 ids, 1 are of questions"):
        convert("pubmedqa", raw, tmp_path / "rows", test=ids)


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("medqa_4options", [FIVE], "a row is not one of medqa_4options .*: each row needs a question and 4 options"),
        ("medqa_4options", [{**LETTERED, "answer_idx": "F"}], "a row is not one"),
        ("medqa_4options", [LETTERED], "0 questions are left"),
        ("medmcqa", [{**HUB, "cop": 0}, {**HUB, "cop": -1}], "a row is not one"),
        ("medmcqa", [AUTHORS], "no row has 0 or 4 as its cop, .*; give more rows"),
        ("pubmedqa", [{**PUBMED, "final_decision": "Yes"}], "a row is not one"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, rows, words):
    file = write(tmp_path / "raw.jsonl", rows * 2)
    with pytest.raises(SystemExit, match=rf"raw\.jsonl: .*{words}"):
        convert(name, file, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
    file.write_bytes("Größe".encode("latin-1"))
    for path in (file, tmp_path / "missing.json"):
        with pytest.raises(SystemExit, match=rf"{path.name}.*JSON or JSONL"):
            convert(name, path, tmp_path / "rows")


@pytest.mark.parametrize("name", ["lines.json", "list.json"])
def test_lines_with_other_ends_and_lists_over_many_lines(tmp_path, name):
    rows = [json.dumps({**row, "note": "one\u2028two"}, ensure_ascii=False) for row in numbered(LETTERED, SHOTS + 2)]
    text = "[\n" + ",\n".join(rows) + "\n]" if name == "list.json" else "\n".join(rows)
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    measured, shots = converted("medqa_4options", tmp_path / name, tmp_path / "rows")
    assert (len(measured), len(shots)) == (2, SHOTS)


@pytest.mark.parametrize(
    ("name", "file", "test", "questions"),
    [
        ("medqa_4options", "medqa_4options_test_800.jsonl", None, 780),
        ("medqa_5options", "medqa_5options_test_800.jsonl", None, 780),
        ("medmcqa", "medmcqa_2000.jsonl", None, 1980),
        ("pubmedqa", "pubmedqa_ori_pqal.json", "pubmedqa_test_ground_truth.json", 500),
    ],
)
def test_the_public_files(tmp_path, shared, name, file, test, questions):
    medical = shared / "data" / "medical"
    measured, shots = converted(name, medical / file, tmp_path, test=medical / test if test else None)
    assert len(measured) == questions
    assert not {row["question"] for row in measured} & {row["question"] for row in shots}
