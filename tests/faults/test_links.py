"""Links inside a run directory, which may be from anyone: nothing is written, read or uploaded where they lead."""

import shutil
from pathlib import Path

import pytest

from tests.tiny import contents

COMMANDS = {
    "report": ["report", "RUN", "--map", "0"],
    "suspects": ["suspects", "RUN"],
    "run": ["WORDS", "--out", "RUN"],
    "generate": ["generate", "RUN", "--max_new_tokens", "1", "--to", "TO"],
    "export": ["export", "RUN", "--to", "TO"],
}


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished.path, tmp_path / "run")


@pytest.mark.parametrize("name", ["report", "suspects", "train/metrics.jsonl", "train/model/vocab.txt", "split"])
def test_no_link_of_a_run_is_followed(name, run, finished, sftmix, tmp_path):
    outside, place = tmp_path / "outside", run / name
    if place.exists():
        place.rename(outside)
    elif place.suffix:
        outside.write_text("a secret")
    else:
        outside.mkdir()
        (outside / "mine.txt").write_text("mine")
    place.symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else contents(outside)
    for words in COMMANDS.values():
        given = [part for word in words for part in (finished.words if word == "WORDS" else [word])]
        ended = sftmix(*({"RUN": str(run), "TO": str(tmp_path / "to")}.get(word, word) for word in given))
        assert ended.code == 2, ended.err
        assert f"{name} is a link" in ended.err
    assert (outside.read_bytes() if outside.is_file() else contents(outside)) == before
    assert not (tmp_path / "to").exists()
