"""Files of docs/examples to copy: a packing renderer and a callback that writes pairs, in one run of two steps."""

import json

import pyarrow.parquet as pq
import pytest

from tests.tiny import ROOT, SHORT, in_this_process, make_tiny, metrics


@pytest.mark.parametrize("length", ["64", "96"])
def test_rows_are_packed_and_pairs_written(length, tmp_path):
    """Windows hold several rows, no more tokens than data.max_length, and each row once; pairs are of their ids."""
    tiny = make_tiny(tmp_path / "tiny", dropout=0.0)
    words = ["--renderer", "packing.Packed", "--callbacks+", "watch_pairs.WatchPairs", "--data.max_length", length]
    out = tmp_path / "run"
    more = ["--splitter", "RandomSplit", "--training.global_batch_size", "4"]
    done = in_this_process("run", *tiny.bare, *SHORT, *words, *more, "--out", str(out), cwd=ROOT / "docs" / "examples")
    assert done.returncode == 0, done.stderr
    windows = pq.read_table(out / "split" / "split.parquet").to_pydict()["id"]
    packed = [name for window in windows for name in window.split("+")]
    assert len(windows) < len(packed) == len({*packed}) == 29
    lines = [json.loads(line) for line in (out / "train" / "pairs.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    mixed = {name for line in lines for a, b, _ in line["pairs"] for name in (a, b)}
    assert mixed <= {*windows}
    assert len(mixed) > 4
    assert all(0 <= lam <= 1 for line in lines for *_, lam in line["pairs"])
    assert all(line["tokens"] <= 4 * int(length) for line in metrics(out))
