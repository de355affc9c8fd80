"""Broken rows end a command with file, line and reason, before a model is loaded; none ends it with a traceback."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.data.sides import prepare
from sftmix.options import DataOptions
from sftmix.words.errors import DataError
from tests.data.test_rows import BAD_LINES, GOOD
from tests.faults.runs import long

FINE = {"blank line": b"  ", "CRLF": GOOD.strip() + b"\r", "extra key": GOOD.strip()[:-1] + b', "score": 1}'}


def test_every_bad_line_is_named_or_counted_before_a_model_is_loaded(tmp_path, sftmix):
    """Good and bad lines in turn: each bad line is told with its reason, as long as there are at most twenty.

    The model is an empty directory: a command that loads it ends with exit code 2.
    """
    path, model = tmp_path / "rows.jsonl", tmp_path / "model"
    model.mkdir()
    kinds = [*BAD_LINES.items(), ("last line cut off", (GOOD[:-9], "not valid JSON"))]
    for part in (kinds[:20], kinds[20:], kinds):
        lines = [line for _, (bad, _) in part for line in (GOOD.strip(), bad)]
        path.write_bytes(b"\n".join([*FINE.values(), *lines]) + b"\n")
        words = ("--model.path", str(model), "--data.train", str(path), "--out", str(tmp_path / "run"))
        done = sftmix("run", *words)
        assert done.code == 3
        assert "Traceback" not in done.err
        first, *told = done.err.split("error: ")[1].splitlines()
        assert first.startswith(f"{len(part)} bad row")
        for number, (line, (kind, (_, reason))) in enumerate(zip(told[:20], part, strict=False)):
            assert line.startswith(f"{path}:{2 * number + len(FINE) + 2}: "), kind
            assert reason in line, kind
    assert not any(str(path) in line for line in told[20:])
    prepared = prepare(DataOptions(train=path, skip_bad=True), 0)
    assert prepared.report.counts["bad_row"] == len(kinds)


# ----------------------------------------------------------------------------------------- random damage


ROWS = [
    {"messages": [{"role": "user", "content": "Say ü"}, {"role": "assistant", "content": "ü\\n"}], "n": 1.5e3},
    {"instruction": "Name a colour", "input": "", "output": "Blue", "system": "Be short", "id": "a"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]},
    {"instruction": "u", "output": "a", "history": [], "ok": None},
]
VALID = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
BITS = st.sampled_from(
    [b"", b"\0", b"\xff", b'"', b"\\", b"{", b"]", b",", b":", b"null", b"NaN", b"1", b"\n", b"\xed\xa0\x80"]
)
DAMAGE = st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), BITS), min_size=1, max_size=4)


@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.long])])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_damaged_bytes_are_refused_or_read(name, skip_bad, examples, tmp_path):
    """Any cut, replacement or insertion in valid rows ends in a DataError that names the file, or in rows.

    No row is lost without a word: each line of JSONL is a record, a bad row, or a row with an empty response.
    """
    path, named = tmp_path / name, list[bool]()
    array = b"[" + VALID.strip().replace(b"}\n{", b"},\n{") + b"]\n"

    @settings(max_examples=examples)
    @given(DAMAGE)
    def hold(damage):
        content = bytearray(array if name.endswith(".json") else VALID)
        for place, length, bits in damage:
            content[place : place + length] = bits
        path.write_bytes(content)
        options = DataOptions(train=str(path), skip_bad=skip_bad, cache_dir=str(tmp_path / "cache"))
        try:
            found = prepare(options, 0)
        except DataError as error:
            named.append(str(path) in str(error))
            return
        counts, rows = found.report.counts, found.report.rows
        kept, empty = len(found.train.records) + counts.get("bad_row", 0), counts.get("empty_response", 0)
        assert kept <= rows <= kept + empty  # of several responses in a row, one may be empty and the row kept
        assert name.endswith(".json") or rows == sum(bool(line.strip()) for line in content.split(b"\n"))
        assert skip_bad or not counts.get("bad_row")

    hold()
    assert all(named)


@long
def test_a_hundred_thousand_rows_take_seconds_and_little_memory(tmp_path):
    """Rows of 10 KB, a gigabyte in all, are checked in bounded memory; short ones within ten seconds of one core."""
    text = "One two three four. " * 500
    for content, seconds in (("Yo", 10), (text, 120)):
        path = tmp_path / "rows.jsonl"
        with open(path, "w") as file:
            for number in range(100_000):
                file.write(json.dumps({"instruction": f"Say {number}", "output": content}) + "\n")
        program = (
            "import re, time; from sftmix.data.sides import prepare; from sftmix.options import DataOptions; "
            f"prepare(DataOptions(train={str(path)!r}, cache_dir={str(tmp_path / 'cache')!r}), 0); "
            # Not ru_maxrss: it is never less than the memory of the process that started this one.
            "print(time.process_time(), re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        used, kilobytes = map(float, done.stdout.split())
        assert used < seconds
        assert kilobytes < 300 * 1024
