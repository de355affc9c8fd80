"""The table that somebody decides in: what fills it, what stays in it, and what data.exclude makes of it."""

import csv
import json
import re
from pathlib import Path

import pandas as pd
import pytest

TOPICS = ["apples", "rivers", "violins", "copper", "chess", "whales", "bread", "clouds"]


@pytest.fixture
def rows(tmp_path) -> Path:
    found = [{"instruction": f"Tell me about {t}.", "output": f"People know {t} well."} for t in TOPICS]
    found[5]["id"] = "-whales"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


@pytest.fixture
def suspects(sftmix, rows, tmp_path):
    """suspects(*words) -> the lines of the table, by place."""

    def call(*words: str, file: Path = rows) -> dict[str, dict]:
        done = sftmix("suspects", str(file), "--embedding", "tfidf", "--out", str(tmp_path / "out"), *words)
        assert done.code == 0, done.err
        with (tmp_path / "out" / "suspects.csv").open(newline="", encoding="utf-8") as file:
            return {line["source"]: line for line in csv.DictReader(file)}

    return call


def test_the_first_rows_or_those_above_a_score_are_to_drop_and_decisions_stay(suspects, tmp_path):
    dropped = {place for place, line in suspects("--drop", "2").items() if line["decision"] == "drop"}
    table = suspects()
    assert {place for place, line in table.items() if line["decision"] == "drop"} == dropped
    assert {line["rank"] for place, line in table.items() if place in dropped} == {"1", "2"}
    path = tmp_path / "out" / "suspects.csv"
    path.write_text(path.read_text().replace('1,"drop",', '1,"keep",', 1))
    table = suspects("--drop_all_above", "0")
    words = sorted(line["decision"] for line in table.values())
    assert words == ["drop"] * 7 + ["keep"], "the score of all is above 0, and what was decided stays"


def test_decisions_stay_if_a_row_is_added_in_front(suspects, rows):
    before = {line["id"]: line["decision"] for line in suspects("--drop", "3").values()}
    rows.write_text('{"instruction": "Tell me about snow.", "output": "Snow is cold."}\n' + rows.read_text())
    after = {line["id"]: line["decision"] for line in suspects().values()}
    assert len(after) == len(before) + 1
    assert {name: after[name] for name in before} == before
    assert [*after.values()].count("drop") == 3


def test_decisions_stay_if_a_file_is_renamed_and_on_no_other_row(suspects, rows, tmp_path):
    """A row is the same if its id and its texts are; one id in two files may be of two rows."""
    texts = [json.loads(line) for line in rows.read_text().splitlines()]
    texts[0] |= {"id": "1", "output": '=He said:\r\n"They, too, are; fruit."\r'}
    texts[1] |= {"id": "2"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    before = {line["id"]: line["decision"] for line in suspects("--drop_all_above", "-1").values()}
    assert {*before.values()} == {"drop"}
    texts[1]["output"] = "They flow."
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("".join(json.dumps(row) + "\n" for row in texts[::-1]))
    after = {line["id"]: line["decision"] for line in suspects(file=renamed).values()}
    assert after == {**before, "2": ""}
    assert (tmp_path / "out" / "suspects.before-1.csv").exists(), "the decision on 2 is kept"


def test_decisions_on_rows_that_are_gone_are_kept_beside_the_table(suspects, rows, tmp_path):
    suspects("--drop", "3")
    table = tmp_path / "out" / "suspects.csv"
    for number in (1, 2):
        before = table.read_bytes()
        named = [*rows.read_text().splitlines(keepends=True)]
        dropped = next(line for line in csv.DictReader(before.decode().splitlines()) if line["decision"] == "drop")
        rows.write_text("".join(line for line in named if json.loads(line)["output"] != dropped["response"]))
        suspects()
        assert (tmp_path / "out" / f"suspects.before-{number}.csv").read_bytes() == before
    suspects()
    assert len([*table.parent.glob("*before*")]) == 2, "nothing more was lost"


def test_a_column_that_somebody_added_is_kept_beside_the_table(suspects, tmp_path):
    suspects()
    table = tmp_path / "out" / "suspects.csv"
    pd.read_csv(table).assign(notes="ask Ada", Echo=1.0).to_csv(table, index=False)
    before = table.read_bytes()
    suspects("--signals", "Mismatch")  # of another choice of signals
    assert (table.parent / "suspects.before-1.csv").read_bytes() == before
    suspects()
    assert len([*table.parent.glob("*before*")]) == 1


def test_an_id_with_a_mark_in_front_is_another_one_than_without_it(suspects, rows):
    """A mark is put in front of texts that a spreadsheet computes, and taken away when the table is read."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    found[0]["id"], found[1]["id"], found[2]["id"] = "=x", "'=x", "''=x"
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    assert [line["id"] for line in suspects().values() if line["id"].endswith("=x")].count("'=x") == 1
    decided = {line["id"]: line["decision"] for line in suspects("--drop", "4").values()}
    assert {line["id"]: line["decision"] for line in suspects().values()} == decided


def excluded(sftmix, tiny, rows, path) -> tuple[int, list[str], str]:
    words = ("--model.path", str(tiny.model), "--data.train", str(rows), "--data.exclude", str(path))
    done = sftmix("preview", *words, "--rows", "1")
    return done.code, [line for line in done.out.splitlines() if "data.exclude" in line], done.err


@pytest.mark.parametrize("between", [",", ";", "\t"])
def test_a_run_leaves_out_what_is_to_drop_by_id_or_place(suspects, sftmix, tiny, rows, tmp_path, between):
    """As a spreadsheet writes the table, with a row whose id changed since as its text was mended."""
    table = pd.DataFrame(suspects().values())
    table.loc[table["source"].str.endswith(":6"), "decision"] = "Drop "
    table.loc[table["source"].str.endswith(":1"), "decision"] = "drop"
    table.loc[table["source"].str.endswith(":2"), "decision"] = "mended"
    table.loc[table["source"].str.endswith(":3"), "decision"] = "keep"
    path = tmp_path / "decided.csv"
    table.to_csv(path, sep=between, index=False)
    rows.write_text(rows.read_text().replace("People know apples well.", "They are fruit."))
    code, (line,), _ = excluded(sftmix, tiny, rows, path)
    assert (code, line[:2]) == (0, "2 ")
    assert "-whales" in line
    assert f"{rows}:1)" in line


@pytest.mark.parametrize("texts", [["prompt", "response"], ["response"]])
def test_a_row_that_moved_to_the_place_of_a_deleted_one_stays(suspects, sftmix, tiny, rows, tmp_path, texts):
    """By the texts of the table; without both of them the place counts alone."""
    table = pd.DataFrame(suspects().values())
    table.loc[table["source"].str.endswith(":2"), "decision"] = "drop"
    (name,) = table.loc[table["decision"] == "drop", "id"]
    path = tmp_path / "decided.csv"
    table.drop(columns={"prompt", "response"} - {*texts}).to_csv(path, index=False)
    rows.write_text("".join(line for line in rows.read_text().splitlines(keepends=True) if "rivers" not in line))
    code, lines, error = excluded(sftmix, tiny, rows, path)
    if len(texts) == 1:
        assert (code, f"{rows}:2)" in lines[0]) == (0, True)
    else:
        assert (code, f"names 1 that are no rows of data.train, such as '{name}'" in error) == (2, True), error


@pytest.mark.parametrize("changed", ["Tell me", "People know"])
def test_a_row_with_another_question_or_another_response_is_known_by_its_place(
    suspects, sftmix, tiny, rows, tmp_path, changed
):
    table = pd.DataFrame(suspects().values())
    table.loc[table["source"].str.endswith(":2"), "decision"] = "drop"
    table.to_csv(tmp_path / "decided.csv", index=False)
    rows.write_text(rows.read_text().replace(f"{changed} ", "Now "))
    code, (line,), _ = excluded(sftmix, tiny, rows, tmp_path / "decided.csv")
    assert (code, f"{rows}:2)" in line) == (0, True)


def test_the_other_answers_of_a_conversation_are_left_out_with_one_and_counted(suspects, sftmix, tiny, tmp_path):
    chats = []
    for number, topic in enumerate(TOPICS):
        texts = (
            f"Tell me about {topic}.",
            f"People know {topic} well.",
            f"And who needs {topic}?",
            "Sailors do.",
            "Why?",
        )
        roles = ("user", "assistant") * 3
        turns = [{"role": role, "content": text} for role, text in zip(roles, [*texts, f"{topic}!"], strict=True)]
        chats.append({"id": f"c{number}", "messages": turns})
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats))
    suspects(file=file)
    path = tmp_path / "out" / "suspects.csv"
    table = pd.read_csv(path, dtype=str).set_index("id")
    for name, decision in {"c2@turn0": "drop", "c2@turn1": "keep", "c5@turn2": "drop", "c6@turn0": "keep"}.items():
        table.loc[name, "decision"] = decision
    table.reset_index().to_csv(path, index=False)
    along = ", with 4 other answers of their conversations, 1 of them decided keep"
    done = sftmix("suspects", str(file), "--embedding", "tfidf", "--out", str(path.parent))
    assert f"2 to drop{along}. Fill in" in done.err, done.err
    code, (note, line), _ = excluded(sftmix, tiny, file, path)
    assert (code, note) == (0, f"data.exclude: {path} leaves out whole rows{along}")
    assert line.startswith("2 rows left out (data.exclude): c2 ")


def test_a_table_without_a_row_to_drop_is_said_and_another_word_is_refused(suspects, sftmix, tiny, rows, tmp_path):
    suspects()
    path = tmp_path / "out" / "suspects.csv"
    assert excluded(sftmix, tiny, rows, path)[:2] == (0, [f"data.exclude: {path} leaves out no row"])
    path.write_text(path.read_text().replace('\n1,"",', '\n1,"delete",'))
    code, _, error = excluded(sftmix, tiny, rows, path)
    assert (code, "'delete'" in error, "keep" in error) == (2, True, True), error


@pytest.mark.parametrize(
    ("encoding", "said"), [("cp1252", "can't decode byte 0xe9 in position"), ("utf-16", "it is in UTF-16")]
)
def test_a_table_that_a_spreadsheet_saved_in_another_encoding_is_refused(
    suspects, sftmix, tiny, rows, tmp_path, encoding, said
):
    rows.write_text(rows.read_text().replace("apples well", "cafés well"))
    suspects("--drop", "2")
    path = tmp_path / "out" / "suspects.csv"
    path.write_text(path.read_text(encoding="utf-8"), encoding)
    again = sftmix("suspects", str(rows), "--embedding", "tfidf", "--out", str(path.parent))
    for option, (code, _, error) in {
        "--out": (again.code, again.out, again.err),
        "data.exclude": excluded(sftmix, tiny, rows, path),
    }.items():
        assert code == 2
        assert re.search(f"error: {option}: {path} cannot be read: .*{said}.*; save it as UTF-8", error), error


def test_a_decision_needs_a_table(sftmix, rows):
    done = sftmix("suspects", str(rows), "--drop", "3")
    assert (done.code, "--out DIR" in done.err) == (2, True)


def test_texts_are_as_wide_as_the_terminal_and_another_answer_is_shown_beside(sftmix, tmp_path, monkeypatch):
    long = "People know that it is old, and they know that it is long, and all of them know that it does not end soon."
    found = [{"instruction": f"Tell me about {t} please.", "output": f"{t} {long}"} for t in TOPICS]
    found.append({"instruction": "tell me about chess, please", "output": "Water boils at a hundred degrees."})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    for width in (60, 90):
        monkeypatch.setenv("COLUMNS", str(width))
        done = sftmix("suspects", str(file), "--embedding", "tfidf", "--top", "1")
        lines = done.out.splitlines()
        assert (lines[0].split()[1], lines[0].split()[3]) == (f"{file}:9", "Conflict")
        assert lines[3].split()[:2] == ["beside", f"{file}:5"]
        assert len(lines[5]) == width
