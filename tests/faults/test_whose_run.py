"""Runs that this user did not start: nothing outside them is opened, whatever their configurations name."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from sftmix.cli import main
from sftmix.config.read import read_yaml
from sftmix.disk.files import file_entry, hashed, read_json, write_json
from sftmix.pipeline.signature import is_own, write_start
from tests.tiny import ROOT, SHORT, contents

READ = {
    "status": ["status", "RUN"],
    "report": ["report", "RUN", "--map", "0"],
    "suspects": ["suspects", "RUN", "--top", "1"],
    "generate": ["generate", "RUN", "--to", "TO", "--max_new_tokens", "1"],
    "answer": ["generate", "RUN", "--to", "TO", "--max_new_tokens", "1", "--prompts", "PROMPTS"],
    "base": ["generate", "RUN", "--to", "TO", "--max_new_tokens", "1", "--prompts", "PROMPTS", "--models", "base"],
    "chat": ["chat", "RUN"],
    "export": ["export", "RUN", "--to", "TO"],
    "verify": ["verify", "RUN", "--stage", "reference"],
    "run": ["run", "--config", "RUN/config.yaml", "--out", "TO", *SHORT],
    "track": ["track", "RUN", "--to", "tensorboard"],
}
ALONE = ("status", "answer", "chat", "track")
"""What needs nothing outside of a run that exported whole weights."""
TRACED = [
    name if name in ("report", "answer", "export", "run") else pytest.param(name, marks=pytest.mark.long)
    for name in READ
]


@pytest.fixture
def strange(copied, tmp_path, monkeypatch) -> Path:
    """Return a run that is as another user made it."""
    assert is_own(copied)
    monkeypatch.setenv("SFTMIX_STATE", str(tmp_path / "state"))
    assert not is_own(copied)
    return copied


def words_of(command: str, copied: Path, finished) -> list[str]:
    places = {"RUN": copied, "TO": copied.parent / "made" / "to", "PROMPTS": finished.tiny.eval}
    (copied.parent / "made").mkdir(exist_ok=True)
    return [str(places.get(word, word)).replace("RUN/", f"{copied}/") for word in READ[command]]


def given(finished) -> list[str]:
    tiny = finished.tiny
    return ["--model.path", str(tiny.model), "--data.train", str(tiny.train), "--data.eval", str(tiny.eval)]


@pytest.mark.parametrize("command", READ)
def test_names_of_a_stranger_lead_nowhere(command, strange, finished, sftmix, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    words = words_of(command, strange, finished)
    before = contents(strange)
    ended = sftmix(*words)
    if command in ALONE:
        assert ended.code == 0, ended.err
        return
    assert (ended.code, ended.err.count("error: ")) == (2, 1), ended.err
    assert f"is not in {strange}, which is not a run of yours" in ended.err
    assert "--data.train" in ended.err
    assert "SFTMIX_STATE" in ended.err
    assert contents(strange) == before
    for more in (given(finished), ["--trust"]):
        ended = sftmix(*words, *more)
        assert ended.code == 0, ended.err
        shutil.rmtree(strange.parent / "made", ignore_errors=True)
        (strange.parent / "made").mkdir()


SECRET = "a line of somebody's own"


@pytest.fixture
def hostile(strange, finished, tmp_path) -> Path:
    """Return a stranger's run whose files name a reader's own, in every option that takes a place."""
    own = tmp_path / "home"
    shutil.copytree(finished.path, own / "runs" / "mine")
    for name in ("rows.jsonl", "exclude.txt", "template.jinja", "dynamics.parquet"):
        (own / name).write_text(SECRET)
    values = read_yaml(strange / "config.yaml")
    values["data"] |= {"train": [str(own / "rows.jsonl")], "exclude": str(own / "exclude.txt")}
    values["data"] |= {"template": str(own / "template.jinja"), "cache_dir": str(own / "cache")}
    paths = [str(own / "runs" / "*" / "train" / "model")]  # looked for as soon as the options are read
    values |= {"reference": {"class_path": "FromCheckpoints", "init_args": {"paths": paths}}}
    values["out"] = str(own / "out")
    (strange / "config.yaml").write_text(yaml.safe_dump(values))
    started = {"directory": str(own), "relative": os.path.relpath(own, strange), "id": "0", "signatures": []}
    write_json(strange / "started.json", started)
    there = os.path.relpath(own / "runs" / "mine" / "train", strange / "train")
    write_json(strange / "train" / "adopted.json", {"from": there})
    shutil.rmtree(strange / "train" / "checkpoints")
    return strange


@pytest.mark.parametrize("command", [name for name in READ if name != "track"])
def test_nothing_of_the_reader_is_opened_or_written(command, hostile, finished, sftmix, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    before = contents(tmp_path / "home")
    for more in ([], given(finished)) if command not in ALONE else ([],):
        ended = sftmix(*words_of(command, hostile, finished), *more)
        assert ended.code == (0 if command in ALONE or (command == "base" and more) else 2), ended.err
        assert SECRET not in ended.out + ended.err
    assert contents(tmp_path / "home") == before


def test_a_run_from_a_strangers_configuration_writes_where_the_command_says(hostile, finished, sftmix):
    words = ["run", "--config", str(hostile / "config.yaml"), *given(finished)]
    ended = sftmix(*words)
    assert (ended.code, "out is missing" in ended.err) == (2, True), ended.err
    (hostile / "config.yaml").write_text("base: ../home/rows.jsonl\n")
    ended = sftmix(*words, "--out", str(hostile.parent / "to"))
    assert (ended.code, "home/rows.jsonl' is not in" in ended.err) == (2, True), ended.err


OPEN = re.compile(r'open(?:at)?2?\(.*?"((?:[^"\\]|\\.)*)"')
"""A call in the log of strace, with the path that it opens: openat(AT_FDCWD, "/etc/hosts", O_RDONLY) = 3."""


def opened_by(words: list[str], log: Path, cwd: Path, **variables: str) -> set[Path]:
    """Return what the processes of a command open, there or not, as resolved paths; the command may fail."""
    trace = ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "4096", "-e", "trace=open,openat,openat2", "-o", str(log)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    command = [*trace, sys.executable, "-m", "sftmix", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, input="Hello\n", capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stderr
    # A name behind a directory's descriptor has no directory here: fts and scandir open those one by one, by paths.
    return {(cwd / path).resolve() for path in OPEN.findall(log.read_text(errors="replace"))}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("command", TRACED)
def test_no_process_opens_a_file_outside_a_strangers_run(command, hostile, finished, tmp_path):
    """Neither Python nor safetensors, tokenizers and pyarrow, whose files an audit hook would not see."""
    mine = {name: tmp_path / "mine" / name for name in ("cwd", "tmp", "cache", "hf", "home")}
    for place in mine.values():
        place.mkdir(parents=True)
    variables = {"TMPDIR": mine["tmp"], "SFTMIX_CACHE": mine["cache"], "HF_HOME": mine["hf"], "HOME": mine["home"]}
    told = words_of(command, hostile, finished)
    opened = opened_by(told, tmp_path / "log", mine["cwd"], **{name: str(place) for name, place in variables.items()})
    assert hostile / "started.json" in opened or command in ("status", "track")  # the log is read as it should be
    allowed = [hostile, tmp_path / "mine", tmp_path / "made", tmp_path / "state", Path(os.environ["SFTMIX_STATE"])]
    allowed += [finished.tiny.eval] if "--prompts" in told else []
    system = [*map(Path, ("/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", "/run", "/var")), ROOT]
    libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *filter(None, sys.path)}
    system += [Path(place).resolve() for place in libraries]
    places = [place.resolve() for place in (*allowed, *system)]
    strange = {path for path in opened if not any(path.is_relative_to(place) for place in places)}
    # What holds the places above: Python and libraries look at directories on the way.
    strange -= {parent for place in places for parent in place.parents}
    assert strange == set()


# ------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapted(finished, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapted") / "run"
    assert main(["run", *finished.tiny.options, "--model.lora.r", "2", "--out", str(path)]) == 0
    return path


@pytest.fixture
def strange_adapters(adapted, tmp_path, monkeypatch) -> Path:
    """Return a stranger's run with adapters, whose base model, by all its files, is one of the reader's own."""
    run = shutil.copytree(adapted, tmp_path / "run")
    monkeypatch.setenv("SFTMIX_STATE", str(tmp_path / "state"))
    own = tmp_path / "home" / "model"
    own.mkdir(parents=True)
    (own / "config.json").write_text(SECRET)
    values = read_yaml(run / "config.yaml")
    values["model"]["path"] = str(own)
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    adapters, manifest = run / "train/model/adapter_config.json", run / "train/MANIFEST.json"
    adapters.write_text(json.dumps(json.loads(adapters.read_text()) | {"base_model_name_or_path": str(own)}))
    files = read_json(manifest)["files"]
    write_json(manifest, hashed({"files": files | {"model/adapter_config.json": file_entry(adapters)}}))
    return run


ON_A_BASE = ("answer", "chat", "export")


@pytest.mark.parametrize("command", ON_A_BASE)
def test_adapters_of_a_stranger_are_put_onto_the_model_that_the_command_names(
    command, strange_adapters, finished, sftmix, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    words = words_of(command, strange_adapters, finished)
    ended = sftmix(*words)
    assert (ended.code, ended.err.count("error: ")) == (2, 1), ended.err
    assert "--model.path" in ended.err
    assert SECRET not in ended.out + ended.err
    ended = sftmix(*words, "--model.path", str(finished.tiny.model))
    assert ended.code == 0, ended.err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("command", ON_A_BASE)
def test_no_process_opens_the_base_that_a_strangers_adapters_name(command, strange_adapters, finished, tmp_path):
    (tmp_path / "cwd").mkdir()
    words = words_of(command, strange_adapters, finished)
    opened = opened_by(words, tmp_path / "log", tmp_path / "cwd", SFTMIX_CACHE=str(tmp_path / "cache"))
    assert strange_adapters / "started.json" in opened
    assert [path for path in opened if path.is_relative_to(tmp_path / "home")] == []


# ------------------------------------------------------------------------------------------------ signatures


def test_a_run_is_own_wherever_it_is(copied, tmp_path):
    moved = copied.rename(tmp_path / "elsewhere")
    assert is_own(moved)
    started = read_json(moved / "started.json")
    write_json(moved / "started.json", started | {"relative": "../.."})
    assert not is_own(moved)
    write_json(moved / "started.json", started)
    (moved / "config.yaml").write_text((moved / "config.yaml").read_text() + "seed: 3\n")
    assert not is_own(moved)
    write_json(moved / "started.json", {name: x for name, x in started.items() if name != "signatures"})
    assert not is_own(moved)


def test_what_is_continued_keeps_its_owner(strange, finished, sftmix, monkeypatch, tmp_path):
    """A stage is made again, with another configuration: config.yaml and started.json are written."""
    again = [*finished.words, "--checkpoint.keep", "7", "--out", str(strange)]
    for state, own in ((tmp_path / "state", False), (os.environ["SFTMIX_STATE"], False)):
        shutil.rmtree(strange / "base")
        monkeypatch.setenv("SFTMIX_STATE", str(state))
        assert sftmix(*again).code == 0
        assert "keep: 7" in (strange / "config.yaml").read_text()
        assert is_own(strange) == own
    (strange / "config.yaml").unlink()
    shutil.rmtree(strange / "base")
    assert sftmix(*again).code == 0
    assert is_own(strange)
    shutil.rmtree(strange / "base")
    assert sftmix(*again[:-4], "--checkpoint.keep", "5", "--out", str(strange)).code == 0
    assert is_own(strange)


def test_a_run_that_goes_on_elsewhere_unchanged_stays_own(copied, monkeypatch, tmp_path):
    """As in a container, whose home has another key."""
    started, text = read_json(copied / "started.json"), (copied / "config.yaml").read_text()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SFTMIX_STATE", str(tmp_path / "state"))
        write_start(copied, {name: started[name] for name in ("directory", "relative")}, text)
        assert not is_own(copied)
    assert is_own(copied)


def test_a_kill_between_the_two_files_leaves_a_run_own(copied, monkeypatch):
    from sftmix.pipeline import signature

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(signature, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        signature.write_start(copied, {"directory": "/new", "relative": ".."}, "seed: 9\n")
    assert read_json(copied / "started.json")["directory"] == "/new"
    assert is_own(copied)
    (copied / "config.yaml").write_text("seed: 9\n")
    assert is_own(copied)


def test_the_key_is_for_its_user_alone(tmp_path, monkeypatch, small, sftmix):
    monkeypatch.setenv("SFTMIX_STATE", "")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    words = ["confidence", *small.options, *SHORT]
    assert sftmix(*words, "--out", str(tmp_path / "signed")).code == 0
    key = tmp_path / "xdg" / "sftmix" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch("[0-9a-f]{64}", key.read_text())
    assert is_own(tmp_path / "signed")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFTMIX_STATE", str(tmp_path / "file" / "below"))  # as a home that cannot be written
    ended = sftmix(*words, "--out", str(tmp_path / "unsigned"))
    assert ended.code == 0
    assert ended.err.count("the run is not signed") == 1
    assert not is_own(tmp_path / "unsigned")
    assert sftmix("status", str(tmp_path / "unsigned")).code == 0


# ------------------------------------------------------------------------------------------------ files of a run


@pytest.mark.parametrize("name", ["/etc/passwd", "../../outside.json", "../reference/../../outside.json"])
def test_a_manifest_names_files_of_its_run(name, copied, sftmix):
    (copied.parent / "outside.json").write_text(SECRET)
    file = copied / "split" / "MANIFEST.json"
    files = read_json(file)["files"]
    entry = file_entry(copied / "split" / name) if (copied / "split" / name).exists() else {"bytes": 1, "sha256": ""}
    write_json(file, hashed({"files": files | {name: entry}}))
    ended = sftmix("report", str(copied), "--map", "0")
    assert (ended.code, f"{name} is elsewhere" in ended.err) == (4, True), ended.err


def test_a_pipe_of_a_run_is_not_waited_for(copied, strange, sftmix):
    for name in ("summary.json", "train/metrics.jsonl", "started.json"):
        (copied / name).unlink()
        os.mkfifo(copied / name)
        for words in (["status", str(copied)], ["report", str(copied), "--map", "0"], ["verify", str(copied)]):
            ended = sftmix(*words)
            assert (ended.code in (0, 2, 4), "Traceback" in ended.err) == (True, False), ended.err
