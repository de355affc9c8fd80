"""Run directories that are damaged, or from anyone: one line of error, no hang, no code, nothing for the terminal."""

import io
import shutil
import sys
from pathlib import Path

import pytest

from sftmix.common.files import write_json
from sftmix.components import SFTMix
from sftmix.config.read import from_plain, read_config, read_finished

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
DEEP = "[" * 100_000
NOT_SO = "is not as a run writes it"
TRACK, EXPORT, REPORT = ["track", "--to", "tensorboard"], ["export", "--to", "TO"], ["report", "--map", "0"]
RUN, STATUS, VERIFY = ["run", "--config", "CONFIG", "--out"], ["status"], ["verify"]


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished.path, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "code", "words", "commands"),
    [
        ("config.yaml", BOMB, 2, "over 100,000 values", [TRACK, EXPORT, REPORT, ["chat"], RUN]),
        ("config.yaml", "&a {b: *a}", 2, "over 100,000 values", [EXPORT]),
        ("config.yaml", f"a: {DEEP}", 2, "maximum recursion depth exceeded", [TRACK, REPORT, ["chat"], RUN]),
        ("config.yaml", f"? *a\n: {BOMB}", 2, "cannot read the configuration", [EXPORT]),
        ("config.yaml", "? [a, b]\n: 1\n", 2, "found unhashable key", [EXPORT]),
        ("config.yaml", "seed: 1" + ":59" * 200 + ".5\n", 2, "cannot read the configuration", [EXPORT]),
        (
            "train/metrics.jsonl",
            '{"step": 1, "time": 1.0}\n{oops}\n',
            4,
            NOT_SO,
            [STATUS, TRACK, VERIFY],
        ),
        ("train/metrics.jsonl", '{"step": 1, "time": 1.0}\noops\n{"step": 2}\n', 4, "line 2", [VERIFY]),
        ("train/inputs.json", "", 4, NOT_SO, [RUN, VERIFY, REPORT]),
        ("train/inputs.json", "{}", 4, "data is missing", [REPORT]),
        ("train/MANIFEST.json", "{}", 4, "files is missing", [RUN, VERIFY]),
        ("STATUS.json", DEEP, 4, NOT_SO, [STATUS]),
        (
            "STATUS.json",
            '{"stage": "train", "exit_code": null, "pid": 9000000000000000000000}',
            4,
            NOT_SO,
            [STATUS],
        ),
        (
            "STATUS.json",
            '{"stage": "train", "exit_code": 1, "message": "\\u001b]52;c;aGk=\\u0007"}',
            0,
            "",
            [STATUS],
        ),
        ("config.yaml", 'model: {path: "\\e]52;c;aGk=\\a/x"}\n', 2, r"\x1b]52;c;aGk=\x07/x", [EXPORT, ["chat"]]),
    ],
)
def test_one_line_of_error(name, content, code, words, commands, run, sftmix, tmp_path):
    (run / name).write_text(content)
    places = {"TO": str(tmp_path / "to"), "CONFIG": str(run / "config.yaml")}
    for command in commands:
        first, *more = (places.get(word, word) for word in command)
        words_given = [first, *more, str(run)] if command is RUN else [first, str(run), *more]
        ended = sftmix(*words_given)
        assert ended.code == code, (command, ended.err)
        assert words in ended.err + ended.out
        assert len([line for line in ended.err.splitlines() if line.startswith("error: ")]) == (code != 0)
        assert not {"\x1b", "\x07"} & {*ended.out, *ended.err}


def test_what_only_reads_a_run_imports_none_of_its_classes(run, sftmix, tmp_path, monkeypatch):
    """A splitter, a callback, and a schedule inside the shipped objective, of a module in the working directory."""
    (tmp_path / "of_someone.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    was = read_config(run / "config.yaml")
    given = was.plain()
    mine = {"class_path": "of_someone.Mine", "init_args": {"size": 3}}
    objective = {**given["objective"], "init_args": {**given["objective"]["init_args"], "mu": mine}}
    given |= {"splitter": mine, "callbacks": [mine], "objective": objective}
    write_json(run / "config.yaml", given)
    found = read_finished(run)
    assert found.plain() == given
    assert (found.model, type(found.splitter).__name__) == (was.model, "Mine")
    for words in (["report", str(run)], ["export", str(run), "--to", "to"], ["chat", str(run)]):
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        ended = sftmix(*words)
        assert ended.code == 0, ended.err
    assert "of_someone.Mine" in (run / "report" / "report.html").read_text()
    assert "of_someone" not in sys.modules
    assert from_plain({"objective": "SFTMix"}).objective.spec() == SFTMix().spec()  # its name is still its own


READ = {
    "status": ["RUN"],
    "verify": ["RUN", "--from", "0", "--steps", "1"],
    "report": ["RUN", "--map", "0"],
    "suspects": ["RUN", "--top", "0"],
    "export": ["RUN", "--to", "TO"],
    "generate": ["RUN", "--models", "target,baseline,base", "--max_new_tokens", "1", "--to", "TO"],
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("command", READ)
def test_no_file_that_was_removed_ends_in_a_traceback(command, finished, sftmix, tmp_path):
    """Each file of the run and its stages, one at a time; and without a table of a finished stage nothing is read."""
    for file in sorted([*finished.path.glob("*.*"), *finished.path.glob("*/*.*")]):
        part, place = file.relative_to(finished.path), tmp_path / "run"
        shutil.copytree(finished.path, place)
        (place / part).unlink()
        words = [{"RUN": str(place), "TO": str(tmp_path / "to")}.get(word, word) for word in READ[command]]
        done = sftmix(command, *words)
        assert done.code in (0, 2, 3, 4), (part, done.err)
        if command not in ("status", "generate") and part.suffix == ".parquet":
            assert done.code == 4, (part, done.err)
            assert part.name in done.err + done.out
        for left in tmp_path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
