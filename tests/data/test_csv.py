"""Rows of CSV: cells, separators, and quotes that are open."""

import pytest


def test_a_long_cell_of_csv_is_a_bad_row(write, refused):
    cell = b'"' + (b"a" * 999_999 + b"\n") * 17 + b'"'
    path = write("rows.csv", b"instruction,output\na,b\n" + cell + b"\nc,d\n")
    (line,) = [line for line in refused(path) if line.startswith(f"{path}:3: ")]
    assert "field larger than field limit" in line


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_with_another_separator_is_named_as_such(write, refused, mark):
    path = write("rows.csv", f"instruction{mark}output\na{mark}b\n")
    (message,) = refused(path)
    assert message.startswith(f"{path}:1: the only column is {f'instruction{mark}output'!r}: ")
    assert message.endswith(f": fields are separated by commas, not by {mark!r}; save the file anew")


def test_csv_rows(write, refused):
    path = write("rows.csv", b'instruction,input,output,score\n"Say\nhi",,Hi,3\nA,B\n"q,",x,\xff,1\nq,x,y,\xff\n"open')
    lines = refused(path)[1:]
    assert lines[0].startswith(f"{path}:4: 2 fields, but the header (line 1) has 4; put quotes around a cell with a ")
    assert lines[1].startswith(f"{path}:5: output contains a lone surrogate or bytes that are not UTF-8")
    assert lines[2].startswith(f"{path}:6: field 'score' contains a lone surrogate or bytes that are not UTF-8")
    assert lines[3].startswith(f"{path}:7: not valid CSV")


@pytest.mark.parametrize(
    ("broken", "bad"),
    [
        (['"He said "hi" and left.', 'Then, he came back.",x'], [1, 2]),
        (['q,"Say ""a"" and "b" in', "", "one, or", 'two, lines"'], [1, 2, 3, 4]),
        (['q,"He said "hi" and left."'], [1]),  # it is closed in its line
        (['"a"b"",c'], [1]),
        (['"a" b,"c', 'd, e",f', 'q,"g" h'], [1, 2, 3]),
    ],
)
def test_pieces_of_a_cell_with_a_broken_quote_are_no_rows(broken, bad, write, read):
    """Its lines may well have as many fields as the header."""
    lines = ["", "instruction,output", "q0,a0", *broken, "q1,a1"]
    prepared = read(path := write("rows.csv", "\n".join(lines)), skip_bad=True)
    assert prepared.train.values("source") == [f"{path}:3", f"{path}:{len(lines)}"]
    found = [line.removeprefix(f"{path}:").partition(": ") for line in prepared.report.first["bad_row"]]
    assert [int(place) - 3 for place, _, _ in found] == bad
    assert prepared.report.counts["bad_row"] == len(bad)
    assert found[0][2].startswith("not valid CSV (quotes inside a cell are doubled): ")
    behind = [problem for _, _, problem in found[1:] if not problem.startswith("not valid CSV")]
    assert {*behind} <= {"behind the broken quote of line 4, perhaps of the same cell"}


def test_the_lines_that_an_open_quote_takes_in_are_named(write, read, refused):
    lines = ["instruction,output", *(f"q{i},a{i}" for i in range(200))]
    lines[100] = 'q99,"a99'
    assert refused(write("open.csv", "\n".join(lines)))[1].endswith("unexpected end of data (lines 101 to 201)")
    lines[180] = 'q179,"a179'
    (place, problem) = refused(write("fields.csv", "\n".join(lines)))[1].split(": ", 1)
    assert (place.endswith(":101"), problem.endswith(" (lines 101 to 181)")) == (True, True)
    for last, count in ((149, 0), (150, 1)):
        lines[100:201] = ['q99,"a99', *(f"q{i},a{i}" for i in range(100, last - 1)), f'q{last - 1},5"', "q,a"]
        prepared = read(path := write("inch.csv", "\n".join(lines)))
        assert prepared.report.counts.get("many_lines", 0) == count, last
    assert prepared.report.first["many_lines"] == [f"{path}:101"]
    assert len(prepared.train.records) == 101
    said = "1 row of CSV over more than 50 lines (an open quote makes the rows behind it one answer): "
    assert f"{said}{path}:101" in prepared.report.lines()


def test_empty_cells_of_csv_are_spelt_alike_in_all_columns(write, read):
    rows = "".join(
        f"I{place},{cell},O{place},{cell}\n" for place, cell in enumerate(["", "NaN", "nan", "NULL", "null"])
    )
    prepared = read(write("rows.csv", f"instruction,input,output,id\n{rows}I5,1,NULL,a\nI6,None,O6,NaN\n"))
    told = [[turn.content for turn in example.messages] for example in prepared.train.examples(whole=True)]
    assert told == [[f"I{place}", f"O{place}"] for place in range(5)] + [["I6\nNone", "O6"]]
    assert prepared.report.counts == {"empty_response": 1}
