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


def test_links_of_a_tracker_within_its_folder_are_its_own(run, sftmix, tmp_path):
    """As W&B leaves them (0.31): to a directory and a file in it, and from there to its logs. Others are refused."""
    made = run / "trackers" / "wandb" / "offline-run-1"
    made.mkdir(parents=True)
    (made / "debug.log").write_text("log")
    (made.parent / "latest-run").symlink_to("offline-run-1")
    (made.parent / "debug.log").symlink_to("offline-run-1/debug.log")
    (made / "debug-core.log").symlink_to(tmp_path / "core.log")
    ended = sftmix("export", str(run), "--to", str(tmp_path / "to"))
    assert ended.code == 0, ended.err
    (made.parent / "id").symlink_to("../../train/metrics.jsonl")
    ended = sftmix("export", str(run), "--to", str(tmp_path / "again"))
    assert (ended.code, "trackers/wandb/id is a link" in ended.err) == (2, True)
    shutil.rmtree(run / "trackers")
    shutil.copytree(run / "train", tmp_path / "trackers")
    (run / "trackers").symlink_to(tmp_path / "trackers")
    ended = sftmix("export", str(run), "--to", str(tmp_path / "again"))
    assert (ended.code, "trackers is a link" in ended.err) == (2, True)
