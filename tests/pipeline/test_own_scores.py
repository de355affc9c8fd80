"""`--confidence FromFile`: scores of one's own divide the examples, and no reference is trained."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import metrics, table


def written(path: Path, ids: list[str]) -> dict[str, float]:
    """Write a score for each id, and return them; those of ids in the list's order rise and fall."""
    scores = {name: float((7 * place) % len(ids)) for place, name in enumerate(ids)}
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "score"), *scores.items()])
    else:
        pq.write_table(pa.table({"id": list(scores), "score": list(scores.values())}), path)
    return scores


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_scores_of_ones_own_divide_the_rows(name, tiny, finished, tmp_path, sftmix):
    ids = table(finished.path / "split" / "split.parquet")["id"]
    scores = written(tmp_path / name, [*ids, "another"])
    words = ("--confidence", "FromFile", "--confidence.path", str(tmp_path / name), "--out", str(tmp_path / "run"))
    place = tiny.options.index("--reference.checkpoints")
    ended = sftmix("run", *tiny.options[:place], *tiny.options[place + 2 :], *words)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "run" / "reference").exists()
    stored = table(tmp_path / "run" / "confidence" / "confidence.parquet")
    assert dict(zip(stored["id"], stored["confidence"], strict=True)) == {name: scores[name] for name in ids}
    groups = table(tmp_path / "run" / "split" / "split.parquet")
    ranked = sorted(ids, key=lambda name: -scores[name])
    half = len(ids) // 2
    expected = {"confident": set(ranked[:half]), "unconfident": set(ranked[-half:])}
    for group, members in expected.items():
        assert {i for i, g in zip(groups["id"], groups["group"], strict=True) if g == group} == members
    assert metrics(tmp_path / "run")[0]["mixup_tokens"] > 0


def test_a_missing_score_is_named(tiny, finished, tmp_path, sftmix):
    ids = table(finished.path / "split" / "split.parquet")["id"]
    written(tmp_path / "scores.csv", ids[1:])
    words = ("--confidence", "FromFile", "--confidence.path", str(tmp_path / "scores.csv"))
    ended = sftmix("confidence", *tiny.options, *words, "--out", str(tmp_path / "run"))
    assert ended.code == 3
    assert f"no score of 1 of {len(ids)} examples, first {ids[0]}" in ended.err
    ended = sftmix("confidence", *tiny.options, *words[:3], "nowhere.csv", "--out", str(tmp_path / "run"))
    assert (ended.code, "confidence.path: nowhere.csv: there is no such file" in ended.err) == (3, True)
