"""Broken rows end a command with file, line and reason, before a model is loaded; none ends it with a traceback."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.common.errors import DataError
from sftmix.data.rows import Prepared, prepare
from sftmix.options import DataOptions
from tests.data.test_rows import BAD_LINES, GOOD, reply, turns
from tests.tiny import make_tiny

FINE = {"blank line": b"  ", "CRLF": GOOD.strip() + b"\r", "extra key": GOOD.strip()[:-1] + b', "score": 1}'}


@pytest.fixture
def no_model(tmp_path) -> str:
    """A directory that is no model: a command that loads it ends with exit code 2."""
    directory = tmp_path / "no-model"
    directory.mkdir()
    return str(directory)


def rows_file(tmp_path: Path, *lines: bytes) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def command(model: str, rows: str, tmp_path: Path, *more: str) -> list[str]:
    return ["run", "--model.path", model, "--data.train", rows, "--out", str(tmp_path / "run"), *more]


def test_every_bad_line_is_named_before_a_model_is_loaded(no_model, tmp_path, sftmix, record_property):
    """Good and bad lines in turn: each bad line is told with its reason, as long as there are at most twenty."""
    kinds = [*BAD_LINES.items(), ("last line cut off", (GOOD[:-9], "not valid JSON"))]
    for at in range(0, len(kinds), 20):
        part = kinds[at : at + 20]
        path = rows_file(tmp_path, GOOD.strip(), *(line for _, (found, _) in part for line in (found, GOOD.strip())))
        done = sftmix(*command(no_model, path, tmp_path))
        assert done.code == 3
        assert "Traceback" not in done.err
        told = done.err.split("error: ")[1].splitlines()
        assert told[0].startswith(f"{len(part)} bad row")
        for number, (kind, (_, reason)) in enumerate(part):
            assert told[number + 1].startswith(f"{path}:{2 * number + 2}: "), kind
            assert reason in told[number + 1], kind
    record_property(
        "F9", f"{len(kinds)}/{len(kinds)} kinds of bad lines: exit 3 with file, line and reason, no model read"
    )


def test_all_bad_lines_are_counted(no_model, tmp_path, sftmix, record_property):
    bad = [line for line, _ in BAD_LINES.values()]
    path = rows_file(tmp_path, *FINE.values(), *bad)
    done = sftmix(*command(no_model, path, tmp_path))
    assert done.code == 3
    assert len(done.err.split("error: ")[1].splitlines()) == 22
    assert f"... and {len(bad) - 20} more" in done.err
    prepared = prepare(DataOptions(train=path, skip_bad=True), 0, progress=False)
    assert prepared.report.counts == {"bad_row": len(bad), "duplicate": 1}
    assert len(prepared.train.records) == 2
    record_property("F9", f"{len(bad)} bad lines in one file: 20 named, all counted, all dropped by data.skip_bad")


def test_files_that_cannot_be_read(no_model, tmp_path, sftmix, record_property):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "rows.jsonl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "wide.jsonl").write_bytes(GOOD.decode().encode("utf-16"))
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    closed = tmp_path / "closed.jsonl"
    closed.write_bytes(GOOD)
    closed.chmod(0)
    names = ["folder.jsonl", "empty.jsonl", "rows.jsonl.gz", "wide.jsonl", "loop.jsonl", "missing.jsonl"]
    names += ["closed.jsonl"] if os.geteuid() else []
    for name in names:
        done = sftmix(*command(no_model, str(tmp_path / name), tmp_path))
        assert done.code == 3, name
        assert name in done.err
        assert "Traceback" not in done.err
    record_property("F9", f"{len(names)}/{len(names)} files that cannot be read: exit 3 with the name")


def test_dropped_examples_are_counted_and_a_run_without_any_is_refused(tmp_path, sftmix, record_property):
    """An empty response and one beyond the length are no mistakes, unless nothing is left."""
    model = str(make_tiny(tmp_path).model)
    long = turns(("user", "Hi " * 40), ("assistant", "Yo"))
    fine, none = rows_file(tmp_path, GOOD.strip(), reply(" \n"), long), tmp_path / "none.jsonl"
    done = sftmix("preview", "--model.path", model, "--data.train", fine, "--data.max_length", "30")
    assert done.code == 0
    assert "1 empty response dropped" in done.out
    assert "1 example dropped: no response token left within data.max_length = 30" in done.out
    for line in (reply(""), long):
        none.write_bytes(line)
        done = sftmix("preview", "--model.path", model, "--data.train", str(none), "--data.max_length", "30")
        assert done.code == 3
        assert "Traceback" not in done.err
    record_property("F9", "an empty response, no target within the length: dropped and counted; nothing left: exit 3")


# ----------------------------------------------------------------------------------------- random damage


ROWS = [
    {"messages": [{"role": "user", "content": "Say ü"}, {"role": "assistant", "content": "ü\\n"}], "n": 1.5e3},
    {"instruction": "Name a colour", "input": "", "output": "Blue", "system": "Be short", "id": "a"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]},
    {"instruction": "u", "output": "a", "history": [["q", "r"], ["s", "t"]], "ok": None},
]
VALID = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
BITS = st.sampled_from(
    [b"", b"\0", b"\xff", b'"', b"\\", b"{", b"]", b",", b":", b"null", b"NaN", b"1", b"\n", b"\xed\xa0\x80"]
)
DAMAGE = st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), BITS), min_size=1, max_size=4)


def read(options: DataOptions) -> Prepared | DataError:
    try:
        return prepare(options, 0, progress=False)
    except DataError as error:
        return error


@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_damaged_bytes_are_refused_or_read(name, skip_bad, examples, tmp_path, record_property):
    """Any cut, replacement or insertion in valid rows ends in a DataError that names the file, or in rows.

    No row is lost without a word: each line of JSONL is a record, a bad row, or a row with an empty response.
    """
    path, ends = tmp_path / name, Counter[str]()
    array = b"[" + VALID.strip().replace(b"}\n{", b"},\n{") + b"]\n"

    @settings(max_examples=examples)
    @given(DAMAGE)
    def hold(damage):
        content = bytearray(array if name.endswith(".json") else VALID)
        for place, length, bits in damage:
            content[place : place + length] = bits
        path.write_bytes(content)
        options = DataOptions(train=str(path), skip_bad=skip_bad, cache_dir=str(tmp_path / "cache"))
        found = read(options)
        ends["refused" if isinstance(found, DataError) else "read"] += 1
        if isinstance(found, DataError):
            assert str(path) in str(found)
            return
        counts, rows = found.report.counts, found.report.rows
        kept, empty = len(found.train.records) + counts.get("bad_row", 0), counts.get("empty_response", 0)
        assert kept <= rows <= kept + empty  # of several responses in a row, one may be empty and the row kept
        assert name.endswith(".json") or rows == sum(bool(line.strip()) for line in content.split(b"\n"))
        assert skip_bad or not counts.get("bad_row")

    hold()
    seen = f"{ends['refused']:,} refused by name, of {ends['read']:,} each row is kept, bad or empty, and counted"
    record_property("F9", f"{sum(ends.values()):,} damaged {name}{' with data.skip_bad' * skip_bad}: {seen}")


@pytest.mark.slow
@pytest.mark.long
def test_a_hundred_thousand_rows_take_seconds_and_little_memory(tmp_path, record_property):
    """Rows of 10 KB, a gigabyte in all, are checked in bounded memory; short ones within ten seconds of one core."""
    text = "One two three four. " * 500
    for content, seconds, rows in (("Yo", 10, 100_000), (text, 120, 100_000)):
        path = tmp_path / "rows.jsonl"
        with open(path, "w") as file:
            for number in range(rows):
                file.write(json.dumps({"instruction": f"Say {number}", "output": content}) + "\n")
        program = (
            "import re, time; from sftmix.data.rows import prepare; from sftmix.options import DataOptions; "
            f"prepare(DataOptions(train={str(path)!r}, cache_dir={str(tmp_path / 'cache')!r}), 0, progress=False); "
            # Not ru_maxrss: it is never less than the memory of the process that started this one.
            "print(time.process_time(), re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        used, kilobytes = map(float, done.stdout.split())
        assert used < seconds
        assert kilobytes < 300 * 1024
        size = path.stat().st_size / 1e6
        record_property("F9", f"{rows:,} rows, {size:,.0f} MB: {used:.1f} s of one core, {kilobytes / 1024:.0f} MB")
