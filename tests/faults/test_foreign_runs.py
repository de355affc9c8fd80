"""Run directories that are damaged, or from anyone: one line of error, no hang, no code, nothing for the terminal."""

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from inspect import isabstract
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.components import SFTMix
from sftmix.components.component import import_path
from sftmix.config.read import from_dict
from sftmix.config.schema import component_bases, find_component, imported_classes, trusting
from sftmix.disk.files import file_entry, hashed, read_json, write_json
from sftmix.text import ChatTemplate
from sftmix.tools.runs.read import read_finished
from sftmix.tools.runs.results import names_own_classes
from sftmix.tools.trackers import TensorBoard
from sftmix.training.dynamics import ScoreAtCheckpoints
from sftmix.words.errors import ConfigError
from tests.configs import read_config

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
DEEP = "[" * 100_000
NOT_SO = "is not as a run writes it"
TRACK, EXPORT, REPORT = ["track", "--to", "tensorboard"], ["export", "--to", "TO"], ["report", "--map", "0"]
RUN, STATUS, VERIFY = ["run", "--config", "CONFIG", "--out"], ["status"], ["verify"]


@pytest.mark.parametrize(
    ("name", "content", "code", "words", "commands"),
    [
        ("config.yaml", BOMB, 2, "over 100,000 values", [TRACK, EXPORT, REPORT, ["chat"], RUN]),
        ("config.yaml", "&a {b: *a}", 2, "over 100 levels", [EXPORT]),
        pytest.param(
            *("config.yaml", f"a: {DEEP}", 2, "over 100 levels", [TRACK, REPORT, ["chat"], RUN]),
            marks=pytest.mark.slow,
        ),
        ("config.yaml", f"? *a\n: {BOMB}", 2, "cannot read the configuration", [EXPORT]),
        ("config.yaml", "? [a, b]\n: 1\n", 2, "found unhashable key", [EXPORT]),
        ("config.yaml", "seed: 1" + ":59" * 200 + ".5\n", 2, "is not allowed; allowed: a whole number", [EXPORT]),
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
        ("train/inputs.json", '{"data": {}, "model": ""}', 4, "model is empty", [REPORT, EXPORT]),
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
        ("STATUS.json", '{"stage": "train", "exit_code": 1, "message": {"a": 1}}', 0, "", [STATUS]),
        (
            "config.yaml",
            'model: {path: "\\e]52;c;aGk=\\a/x"}\n',
            2,
            r"\x1b]52;c;aGk=\x07/x",
            [EXPORT, [*EXPORT, "--trust"]],
        ),
    ],
)
def test_one_line_of_error(name, content, code, words, commands, copied, sftmix, tmp_path):
    (copied / name).write_text(content)
    places = {"TO": str(tmp_path / "to"), "CONFIG": str(copied / "config.yaml")}
    for command in commands:
        first, *more = (places.get(word, word) for word in command)
        words_given = [first, *more, str(copied)] if command is RUN else [first, str(copied), *more]
        ended = sftmix(*words_given)
        assert ended.code == code, (command, ended.err)
        assert words in ended.err + ended.out
        assert len([line for line in ended.err.splitlines() if line.startswith("error: ")]) == (code != 0)
        assert not {"\x1b", "\x07"} & {*ended.out, *ended.err}


def strange(table: pa.Table, name: str, values: object) -> pa.Table:
    others = table.drop_columns([name])
    return others if values is None else others.append_column(name, pa.array([values] * len(table)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [None, "x", pytest.param({"a": 1}, marks=pytest.mark.long), pytest.param([1], marks=pytest.mark.long)],
    ids=["gone", "text", "struct", "list"],
)
@pytest.mark.parametrize("name", ["id", "nll_sum", "n_tokens"])
def test_a_table_of_losses_with_other_columns_is_refused_by_name(name, values, copied, sftmix):
    """Its hash in the manifest is that of the file as it is, as anyone may write it."""
    file, manifest = copied / "base" / "eval.parquet", copied / "base" / "MANIFEST.json"
    pq.write_table(strange(pq.read_table(file), name, values), file)
    files = read_json(manifest)["files"]
    write_json(manifest, hashed({"files": files | {"eval.parquet": file_entry(file)}}))
    ended = sftmix("report", str(copied), "--map", "0")
    assert ended.code == 3, ended.err
    assert str(file) in ended.err.splitlines()[-1]


def test_a_stage_without_its_inputs_is_refused(copied, sftmix, tmp_path):
    """They have the hash of the base model, without which any model in its place would do."""
    (copied / "train/inputs.json").unlink()
    ended = sftmix("export", str(copied), "--to", str(tmp_path / "to"))
    assert (ended.code, f"train/inputs.json {NOT_SO}" in ended.err) == (4, True), ended.err


def test_a_file_of_a_run_has_a_largest_size(copied, sftmix):
    os.truncate(copied / "STATUS.json", (1 << 26) + 1)
    ended = sftmix("status", str(copied))
    assert (ended.code, "it is not a file of at most 67,108,864 bytes" in ended.err) == (4, True), ended.err


FOREIGN = ["of_someone.Mine", "this.Zen", "sftmix.pipeline.arm_order.Order", "sftmix.components.base.Splitter"]
"""A module of the working directory, an installed one, and entries of this package that are no components."""


def with_foreign(given: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Configurations that name a class: in full, as bare text, in a list, and for an option of a shipped component."""
    mine = {"class_path": name, "init_args": {"size": 3}}
    options = given["objective"]["init_args"]
    yield {**given, "splitter": mine, "callbacks": [mine], "selector": mine}
    yield {**given, "objective": name, "callbacks": [name]}
    for form in (name, mine):
        yield {**given, "row_format": form}
    for mu in (name, mine):
        yield {**given, "objective": {**given["objective"], "init_args": {**options, "mu": mu}}}


@pytest.fixture
def someone(tmp_path, monkeypatch) -> Path:
    """Return the working directory, which has a module that ends the program."""
    (tmp_path / "of_someone.py").write_text("raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", FOREIGN)
def test_what_only_reads_a_run_imports_none_of_its_classes(name, copied, someone):
    was = read_config(copied / "config.yaml")
    for given in with_foreign(was.as_dict(), name):
        write_json(copied / "config.yaml", given)
        found = read_finished(copied)
        assert found.model == was.model
        assert name in json.dumps(found.as_dict())
        with pytest.raises(ConfigError, match=f"{name} is no component of this package"):
            read_config(copied / "config.yaml")
    assert not {"of_someone", "this"} & sys.modules.keys()
    assert from_dict({"objective": "SFTMix"}).objective.spec() == SFTMix().spec()  # its name is still its own


def test_a_run_may_name_every_component_of_this_package(copied):
    """Those that no list shows as well: trackers, and what renders and reads rows if nothing is chosen."""
    given = read_config(copied / "config.yaml").as_dict()
    for base in component_bases().values():
        for cls in imported_classes(base):
            ours = cls.__module__.startswith("sftmix.") and "<locals>" not in cls.__qualname__
            if ours and not isabstract(cls) and cls is not ScoreAtCheckpoints:
                with trusting():
                    assert find_component(base, import_path(cls)) is cls
    named = {"renderer": import_path(ChatTemplate), "callbacks": [*given["callbacks"], import_path(TensorBoard)]}
    write_json(copied / "config.yaml", {**given, **named})
    assert not names_own_classes(named)
    config = read_config(copied / "config.yaml")
    assert (type(config.renderer), type(config.callbacks[-1])) == (ChatTemplate, TensorBoard)


def test_commands_that_read_a_run_import_none_of_its_classes(copied, someone, sftmix, monkeypatch, finished):
    tiny = finished.tiny
    rows = ["--model.path", str(tiny.model), "--data.train", str(tiny.train), "--data.eval", str(tiny.eval)]
    first, *others = with_foreign(read_config(copied / "config.yaml").as_dict(), "of_someone.Mine")
    for given in ({name: first[name] for name in first if name != "selector"}, others[0]):
        write_json(copied / "config.yaml", given)
        for words in (["report", str(copied)], ["export", str(copied), "--to", "to"], ["chat", str(copied)]):
            monkeypatch.setattr(sys, "stdin", io.StringIO())
            ended = sftmix(*words, *rows)
            assert ended.code == 0, ended.err
        assert "of_someone.Mine" in (copied / "report" / "report.html").read_text()
        shutil.rmtree("to")
    write_json(copied / "config.yaml", first)  # its rows cannot be known
    for words in (["report", str(copied)], ["suspects", str(copied)]):
        ended = sftmix(*words, *rows)
        assert (ended.code, ended.err.count("error: ")) == (2, 1), ended.err
        assert "of_someone.Mine is no component of this package, and what only reads" in ended.err
        assert "add --trust if you know it" in ended.err
    assert "of_someone" not in sys.modules
    for words in (["report", str(copied)], ["suspects", str(copied)]):
        assert sftmix(*words, "--trust").code == 9


def test_code_of_a_run_is_imported_if_it_is_trusted(copied, someone, sftmix):
    (given, *_) = with_foreign(read_config(copied / "config.yaml").as_dict(), "of_someone.Mine")
    write_json(copied / "config.yaml", {**given, "selector": None, "callbacks": []})
    again, check = ["run", "--config", str(copied / "config.yaml"), "--out", str(copied)], ["verify", str(copied)]
    for words in (again, check):
        ended = sftmix(*words)
        assert ended.code == 2
        assert "of_someone.Mine is no component" in ended.err
        assert "--trust" in ended.err
        assert sftmix(*words, "--trust").code == 9
    assert sftmix(*again, "--splitter", "of_someone.Mine").code == 9
    shutil.copy(copied / "config.yaml", someone / "my.yaml")  # a file of one's own may name any class
    with pytest.raises(SystemExit):
        read_config(someone / "my.yaml")


READ = {
    "status": ["RUN"],
    "verify": ["RUN", "--from", "0", "--steps", "1"],
    "report": ["RUN", "--map", "0"],
    "suspects": ["RUN", "--top", "1"],
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
