"""Links inside a run directory, which may be from anyone: nothing is written, read or uploaded where they lead."""

import pytest

from tests.tiny import contents

COMMANDS = {
    "report": ["report", "RUN", "--map", "0"],
    "suspects": ["suspects", "RUN"],
    "run": ["WORDS", "--out", "RUN"],
    "generate": ["generate", "RUN", "--max_new_tokens", "1", "--to", "TO"],
    "export": ["export", "RUN", "--to", "TO"],
}


OPENED = {
    "report": ["report"],
    "suspects": ["suspects"],
    "train/metrics.jsonl": [*COMMANDS],
    "train/model/vocab.txt": ["generate", "export"],
    "train/model/model.safetensors": ["run", "generate", "export"],
    "split": ["report", "suspects", "run", "export"],
    "config.yaml": ["report", "suspects", "generate", "export"],
}
"""Names in a run, and the commands that open what is there, or write through it."""


@pytest.mark.parametrize("name", OPENED)
def test_no_link_of_a_run_is_followed(name, copied, finished, sftmix, tmp_path):
    outside, place = tmp_path / "outside", copied / name
    if place.exists():
        place.rename(outside)
    elif place.suffix:
        outside.write_text("a secret")
    else:
        outside.mkdir()
        (outside / "mine.txt").write_text("mine")
    place.symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else contents(outside)
    for command in OPENED[name]:
        given = [part for word in COMMANDS[command] for part in (finished.words if word == "WORDS" else [word])]
        ended = sftmix(*({"RUN": str(copied), "TO": str(tmp_path / "to")}.get(word, word) for word in given))
        assert ended.code == 2, (command, ended.err)
        assert f"{name} is a link" in ended.err
    assert (outside.read_bytes() if outside.is_file() else contents(outside)) == before
    assert not (tmp_path / "to").exists()


def test_links_that_nobody_opens_do_no_harm(copied, sftmix, tmp_path):
    """As W&B leaves them (0.31): to a directory and a file in it, and from there to its logs."""
    made = copied / "trackers" / "wandb" / "offline-run-1"
    made.mkdir(parents=True)
    (made.parent / "latest-run").symlink_to("offline-run-1")
    (made / "debug-core.log").symlink_to(tmp_path / "core.log")
    for words in (["export", str(copied), "--to", str(tmp_path / "to")], ["verify", str(copied)]):
        ended = sftmix(*words)
        assert ended.code == 0, ended.err


def test_the_lock_of_a_run_is_no_link(copied, finished, sftmix, tmp_path):
    """It is opened for writing, and some releases of filelock follow the link and cut the file."""
    (tmp_path / "mine").write_text("mine")
    (copied / ".lock").unlink(missing_ok=True)
    (copied / ".lock").symlink_to(tmp_path / "mine")
    ended = sftmix(*finished.words, "--out", str(copied))
    assert (ended.code, ".lock is a link" in ended.err) == (2, True)
    assert (tmp_path / "mine").read_text() == "mine"
