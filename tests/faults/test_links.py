"""Links inside a run directory, which may be from anyone: nothing is written, read or uploaded where they lead."""

import os
import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sftmix.disk.files import fresh_directory
from sftmix.disk.regular import keep_within
from sftmix.model.export import export_model
from sftmix.tools.runs.adapters import stored_config
from sftmix.tools.sharing.cards import write_scores
from sftmix.tools.trackers import WandB
from sftmix.words.errors import ConfigError
from tests.tiny import contents

COMMANDS = {
    "report": ["report", "RUN", "--map", "0"],
    "suspects": ["suspects", "RUN"],
    "run": ["WORDS", "--out", "RUN"],
    "generate": ["generate", "RUN", "--max_new_tokens", "1", "--to", "TO"],
    "export": ["export", "RUN", "--to", "TO"],
    "track": ["track", "RUN", "--to", "tensorboard"],
}


OPENED = {
    "report": ["report"],
    "suspects": ["suspects"],
    "suspects/suspects.csv": ["suspects"],
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
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else contents(outside)
    for command in OPENED[name]:
        given = [part for word in COMMANDS[command] for part in (finished.words if word == "WORDS" else [word])]
        ended = sftmix(*({"RUN": str(copied), "TO": str(tmp_path / "to")}.get(word, word) for word in given))
        assert ended.code == 2, (command, ended.err)
        assert f"{name} is a link" in ended.err
    assert (outside.read_bytes() if outside.is_file() else contents(outside)) == before
    assert not (tmp_path / "to").exists()


def exported(base, to):
    model = LlamaForCausalLM.from_pretrained(base)
    export_model(model, AutoTokenizer.from_pretrained(base), to, dtype=torch.float32, base=str(base))


def identity(folder):
    tracker = WandB()
    tracker.folder = folder
    tracker.identity()


READERS = {
    "confidence/confidence.parquet": lambda run, to: write_scores(run, to),
    "base/preprocessor_config.json": lambda run, to: exported(run / "base", to),
    "train/model/adapter_config.json": lambda run, to: stored_config(run / "train/model"),
    "trackers/wandb/id": lambda run, to: identity(run / "trackers/wandb"),
}
"""Names in a run, and functions that read what is there, or copy it."""


@pytest.mark.parametrize("name", READERS)
def test_no_function_reads_or_copies_what_a_link_leads_to(name, copied, small, tmp_path):
    (tmp_path / "secret").write_text("a secret")
    shutil.copytree(small.model, copied / "base", dirs_exist_ok=True)  # the base model, as a stranger may send it
    place = copied / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "secret")
    keep_within(copied)
    with pytest.raises(ConfigError, match=f"{name} is a link"):
        READERS[name](copied, tmp_path / "to")
    assert not [file for file in (tmp_path / "to").rglob("*") if "secret" in file.read_text("latin-1")]


@pytest.mark.parametrize("name", ["report.html", "examples.parquet"])
def test_nothing_is_written_through_a_link_that_has_the_name_of_a_staged_file(name, copied, sftmix, tmp_path):
    (tmp_path / "mine").write_text("mine")
    staged = copied / "report" / f".tmp-{name}.{os.getpid()}"
    staged.parent.mkdir()
    staged.symlink_to(tmp_path / "mine")
    ended = sftmix("report", str(copied), "--map", "0")
    assert ended.code == 0, ended.err
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_link_in_the_place_of_a_staged_directory_is_taken_away(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / f".tmp-step-1.{os.getpid()}").symlink_to("mine")
    (fresh_directory(tmp_path / "step-1") / "state.json").write_text("{}")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_table_of_decisions_is_kept_beside_the_run_s_and_not_where_a_link_leads(copied, sftmix, tmp_path):
    folder = copied / "suspects"
    folder.mkdir()
    (folder / "suspects.csv").write_text("id,source,decision\ngone,x.jsonl:1,drop\n")
    (folder / "suspects.before-1.csv").symlink_to(tmp_path / "mine")
    ended = sftmix("suspects", str(copied))
    assert (ended.code, "suspects.before-1.csv is a link" in ended.err) == (2, True), ended.err
    assert not (tmp_path / "mine").exists()


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
