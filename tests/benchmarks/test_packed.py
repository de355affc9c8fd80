"""What is kept of a study in one file: its files come out of it again with the same bytes."""

import json

import numpy as np
import pytest

from benchmarks.evidence import packed
from benchmarks.evidence.losses import _write as write_parquet
from tests.tiny import contents


def test_what_is_packed_is_unpacked_with_the_same_bytes(tmp_path):
    """Scores stay where they are, and a run that was kept later is beside the packed ones."""
    folder = tmp_path / "study"
    for kind in ("runs", "losses", "scores"):
        (folder / kind).mkdir(parents=True)
    (folder / "pilot.json").write_text('{\n "é": 1\n}\n')
    (folder / "runs/a-seed-1.json").write_text(json.dumps({"nll": 0.1 + 0.2, "of": [1, None]}))
    write_parquet(folder / "losses/a-seed-1.parquet", nll_sum=np.array([0.1, np.nan, 3], np.float32))
    write_parquet(folder / "losses/rows.parquet", id=["ä", "b"], n_tokens=np.array([3, 4], np.int32))
    write_parquet(folder / "scores/seed-1.parquet", id=["a"])
    before = contents(folder)
    assert packed.whole(folder) == folder
    packed.whole.cache_clear()

    packed.pack(folder)
    assert sorted(contents(folder)) == ["files.parquet", "scores/seed-1.parquet"]
    (folder / "runs").mkdir()
    (folder / "runs/a-seed-2.json").write_text("{}")
    assert contents(packed.whole(folder)) == before | {"runs/a-seed-2.json": b"{}"}
    with pytest.raises(SystemExit, match="unpack it first"):
        packed.pack(folder)
    assert sorted(contents(folder)) == ["files.parquet", "runs/a-seed-2.json", "scores/seed-1.parquet"]
