"""A finished run is read by the files that it was made from: from another directory, after a move, or not at all."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from sftmix.disk.files import read_json
from sftmix.disk.places import place_of
from sftmix.tools.quickstart import CHAT_TEMPLATE
from tests.tiny import SHORT, Tiny, contents, in_this_process, sftmix, sign

pytestmark = pytest.mark.slow

READERS = {
    "export": ("export", "RUN", "--merge", "--to", "TO"),
    "generate": ("generate", "RUN", "--max_new_tokens", "3", "--models", "target,base", "--to", "TO"),
    "report": ("report", "RUN", "--map", "0", "--score", "--to", "TO"),
    "suspects": ("suspects", "RUN", "--out", "TO"),
    "verify": ("verify", "RUN", "--from", "0", "--steps", "1"),
}
OF_MODELS = ("export", "generate", "report")


def other_weights(model: Path) -> None:
    """Write weights of the same shapes into a model directory, in place."""
    stored = load_file(model / "model.safetensors")
    save_file({name: x + 0.05 for name, x in stored.items()}, model / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def project(small, tmp_path_factory) -> Path:
    """Model, rows and files of options with a run of adapters on them, all of them named by relative paths."""
    place = tmp_path_factory.mktemp("projects") / "first"
    shutil.copytree(small.model, place / "my" / "model")
    for file in (small.train, small.eval):
        shutil.copy(file, place)
    (place / "chat.jinja").write_text(CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}Hello."))
    (place / "left_out.txt").write_text("./train.jsonl:3\n")
    relative = Tiny(Path("my/model"), Path("./train.jsonl"), Path("eval.jsonl"))
    words = [*relative.options, "--data.train", "./train.jsonl", "--data.template", "chat.jinja"]
    words += ["--data.exclude", "left_out.txt", *SHORT, "--model.lora.r", "2", "--reference.token_nll", "true"]
    words.remove("train.jsonl")
    words.remove("--data.train")
    done = in_this_process("run", *words, "--out", "runs/lora", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def moved(project, tmp_path) -> Path:
    """The whole project in another place, to be changed; the first one is as if it were not there any more."""
    place = Path(shutil.copytree(project, tmp_path / "moved"))
    record = place / "runs" / "lora" / "started.json"
    record.write_text(record.read_text().replace(str(project), str(tmp_path / "gone")))
    sign(record.parent)
    return place


@pytest.fixture
def decoy(project, tmp_path) -> Path:
    """Another directory with another model of that shape, and other rows, under the same names."""
    place = Path(shutil.copytree(project, tmp_path / "decoy", ignore=shutil.ignore_patterns("runs")))
    other_weights(place / "my" / "model")
    for name in ("train.jsonl", "eval.jsonl"):
        rows = (place / name).read_text().splitlines(keepends=True)
        (place / name).write_text("".join(rows[::-1][:9]))
    (place / "chat.jinja").write_text(CHAT_TEMPLATE)
    return place


def read(kind: str, run: Path, to: Path, cwd: Path) -> tuple[int, str, dict[str, bytes]]:
    """Let a command read a run from a directory: exit code, what it printed, and what it wrote."""
    (cwd / to.parent).mkdir(exist_ok=True)
    words = [{"RUN": str(run), "TO": str(to)}.get(word, word) for word in READERS[kind]]
    done = in_this_process(*words, cwd=cwd)
    printed = (done.stdout + done.stderr).replace(str(run), "RUN").replace(str(to), "TO")
    return done.returncode, printed, contents(cwd / to.parent)


@pytest.mark.parametrize("kind", READERS)
def test_what_is_read_does_not_depend_on_the_working_directory(kind, project, moved, decoy, tmp_path):
    run = moved / "runs" / "lora"
    here = read(kind, Path("runs/lora"), tmp_path / "a" / "to", cwd=moved)
    elsewhere = read(kind, run, tmp_path / "b" / "to", cwd=decoy)
    assert here[0] == elsewhere[0] == 0, (here[1], elsewhere[1])
    assert here[2] == elsewhere[2]
    assert read(kind, Path(os.path.relpath(run, decoy)), tmp_path / "c" / "to", cwd=decoy)[2] == here[2]


@pytest.mark.parametrize("kind", READERS)
def test_a_relative_run_is_not_another_one_of_the_directory_where_it_was_started(kind, project, tmp_path):
    """From PLACE/sub `../runs/lora` is a run that was started in PLACE, where that name is another run."""
    place = Path(shutil.copytree(project, tmp_path / "place"))
    record = place / "runs" / "lora" / "started.json"
    record.write_text(record.read_text().replace(str(project), str(place)))
    sign(record.parent)
    other = Path(shutil.copytree(place / "runs" / "lora", tmp_path / "runs" / "lora"))
    (other / "train/model/chat_template.jinja").write_text(CHAT_TEMPLATE)
    (place / "sub").mkdir()
    whole = read(kind, place / "runs" / "lora", tmp_path / "a" / "to", cwd=tmp_path)
    relative = read(kind, Path("../runs/lora"), Path("../to/to"), cwd=place / "sub")
    assert whole[0] == relative[0] == 0, (whole[1], relative[1])
    assert relative[2] == whole[2]
    assert "cannot be read" not in relative[1]


def test_a_merged_model_is_that_base_with_its_adapters(moved, decoy, tmp_path):
    """Independently of PEFT: W + (alpha / r) B A."""
    assert read("export", moved / "runs" / "lora", tmp_path / "x" / "to", cwd=decoy)[0] == 0
    merged, base = (load_file(d / "model.safetensors") for d in (tmp_path / "x" / "to", moved / "my" / "model"))
    adapters = load_file(moved / "runs/lora/train/model/adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert b.abs().max() > 0
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 16 / 2 * b @ a, rtol=1e-6, atol=1e-7)
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def gone(place: Path) -> None:
    shutil.rmtree(place / "my" / "model")


CHANGES: dict[str, Callable[[Path], None]] = {
    "overwritten in place": lambda place: other_weights(place / "my" / "model"),
    "gone": gone,
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("kind", OF_MODELS)
def test_another_base_is_refused_by_name(kind, what, moved, decoy, tmp_path):
    CHANGES[what](moved)
    code, printed, written = read(kind, moved / "runs" / "lora", tmp_path / "x" / "to", cwd=decoy)
    assert code == 2, printed
    assert "is not the model that RUN was made from" in printed
    assert "name its place: --model.path PLACE" in printed
    assert not [name for name in written if not name.endswith("inputs.json")]


@pytest.mark.parametrize("beside", [(), ("--beside", "base")])
def test_nobody_talks_to_another_base(beside, moved, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    other_weights(moved / "my" / "model")
    done = in_this_process("chat", "runs/lora", *beside, cwd=moved)
    assert done.returncode == 2
    run, model = moved / "runs" / "lora", moved / "my" / "model"
    assert f"my/model ({model}) is not the model that {run} was made from" in done.stderr


def test_a_base_that_lies_elsewhere_now_is_named_by_an_option(moved, decoy, tmp_path, monkeypatch):
    """Here by a path with ~, which no file of a model may hold: PEFT would not find its base."""
    run, before = moved / "runs" / "lora", tmp_path / "before"
    assert in_this_process("export", str(run), "--merge", "--to", str(before), cwd=decoy).returncode == 0
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (moved / "my" / "model").rename(tmp_path / "home" / "base")
    after = tmp_path / "after"
    words = ["export", str(run), "--merge", "--to", str(after), "--model.path", "~/base"]
    assert in_this_process(*words, cwd=decoy).returncode == 0
    assert contents(after, but=["README.md"]) == contents(before, but=["README.md"])


def test_a_home_is_written_out_for_peft(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(small.model, tmp_path / "base")
    words = [*small.options, *SHORT, "--model.path", "~/base", "--model.lora.r", "2", "--objective", "NTP"]
    del words[:2]
    done = in_this_process("run", *words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "run/train/model/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tmp_path / "base")
    assert "path: ~/base" in (tmp_path / "run/config.yaml").read_text()


def of_two_commits(model: Path, hub: Path) -> tuple[Path, tuple[str, str]]:
    """Put two commits of some/base, with other weights, into a cache of the hub; return its repository, and both."""
    repository, commits = hub / "models--some--base", ("a" * 40, "b" * 40)
    for commit in commits:
        shutil.copytree(model, repository / "snapshots" / commit)
    other_weights(repository / "snapshots" / commits[1])
    (repository / "refs").mkdir()
    return repository, commits


def test_a_hub_id_means_the_commit_that_was_recorded(small, tmp_path, monkeypatch):
    """The hub moves on, or only its README: the run keeps its base."""
    repository, commits = of_two_commits(small.model, tmp_path / "hub")
    (repository / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    words = [*small.options, *SHORT, "--model.path", "some/base", "--model.lora.r", "2", "--objective", "NTP"]
    done = in_this_process("run", *words[2:], "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = []
    for number, commit in enumerate(commits):
        (repository / "refs" / "main").write_text(commit)
        to = tmp_path / f"{number}" / "to"
        for kind in ("export", "generate"):
            code, printed, written = read(kind, tmp_path / "run", to, cwd=tmp_path)
            assert code == 0, printed
            answers.append({name: text for name, text in written.items() if not name.endswith("inputs.json")})
            shutil.rmtree(to.parent)
    assert answers[:2] == answers[2:]


@pytest.mark.slow
def test_a_run_that_was_begun_goes_on_with_its_commit_of_the_hub(small, tmp_path, monkeypatch):
    repository, commits = of_two_commits(small.model, tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    words = [*small.options[2:], *SHORT, "--model.path", "some/base", "--out", "run"]
    for command, commit in (("confidence", commits[0]), ("run", commits[1])):
        (repository / "refs" / "main").write_text(commit)
        done = sftmix(command, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run/train/inputs.json")["model"] == f"some/base@{commits[0]}"


def test_the_same_command_goes_on_from_the_same_directory(moved):
    """It reads back what is there; nothing is made again, and nothing is written but STATUS.json and the card."""
    before = contents(moved, but=["STATUS.json", ".lock"])
    words = ["--config", "runs/lora/config.yaml", "--out", "runs/lora"]
    assert in_this_process("run", *words, cwd=moved).returncode == 0
    assert contents(moved, but=["STATUS.json", ".lock"]) == before


@pytest.mark.parametrize("name", ["~", "~/x", "~no_such_user/x", "a/../b", "", "x" * 5000, "a\0b"])
def test_any_name_has_a_place(name):
    assert str(place_of(name)) == str(Path(os.path.expanduser(name)))
