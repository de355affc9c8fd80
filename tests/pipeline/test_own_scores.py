"""`--confidence FromFile`: scores of one's own divide the examples, and no reference is trained."""

from pathlib import Path

import pandas as pd
import pytest

from tests.tiny import groups, metrics, table


def written(path: Path, ids: list[str]) -> dict[str, float]:
    """Write a score for each id, and return them; those of ids in the list's order rise and fall."""
    scores = {name: float((7 * place) % len(ids)) for place, name in enumerate(ids)}
    frame = pd.DataFrame({"id": list(scores), "score": list(scores.values())})
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return scores


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_scores_of_ones_own_divide_the_rows(name, tiny, finished, tmp_path, made):
    ids = list(groups(finished.path))
    scores = written(tmp_path / name, [*ids, "another"])
    run = made("run", *tiny.bare, "--confidence", "FromFile", "--confidence.path", str(tmp_path / name))
    assert not (run / "reference").exists()
    stored = table(run / "confidence" / "confidence.parquet")
    assert dict(zip(stored["id"], stored["confidence"], strict=True)) == {name: scores[name] for name in ids}
    ranked, found = sorted(ids, key=lambda name: -scores[name]), groups(run)
    assert {found[name] for name in ranked[:14]} == {"confident"}
    assert {found[name] for name in ranked[-14:]} == {"unconfident"}
    assert metrics(run)[0]["mixup_tokens"] > 0


def test_a_missing_score_is_named(tiny, finished, tmp_path, refused):
    ids = list(groups(finished.path))
    written(tmp_path / "scores.csv", ids[1:])
    words = ("confidence", *tiny.options, "--confidence", "FromFile", "--confidence.path")
    told = refused(*words, str(tmp_path / "scores.csv"), code=3)
    assert f"no score of 1 of {len(ids)} examples, first {ids[0]}" in told
    assert "confidence.path: nowhere.csv: there is no such file" in refused(*words, "nowhere.csv", code=3)
