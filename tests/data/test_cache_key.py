"""The keys of the cache follow the file of rows, and the code between the file and the ids that are stored of it."""

import shutil
from pathlib import Path

import pytest

from sftmix.data.reading import RowReader
from sftmix.disk import cache
from sftmix.words.errors import DataError
from tests.test_architecture import PACKAGE, SOURCES, imported, module_of, running, tree_of

DECIDE_NOTHING = {
    "sftmix": "the version and lazy names",
    "sftmix.components": "lazy names",
    "sftmix.components.component": "what an option is; its class is in the key by its source",
    "sftmix.disk": "no code",
    "sftmix.disk.cache": "stores what it is given",
    "sftmix.disk.files": "stores what it is given",
    "sftmix.disk.hashes": "the keys themselves",
    "sftmix.disk.known": "whether a file was changed while it was read",
    "sftmix.disk.places": "where files are",
    "sftmix.disk.regular": "which files are read",
    "sftmix.options": "options, which are in the key",
    "sftmix.options.data": "options, which are in the key",
    "sftmix.options.ranges": "options, which are in the key",
    "sftmix.ranks": "no code",
    "sftmix.ranks.rng": "which rows are held out; the chosen ones are in the key",
}


def test_every_module_between_rows_and_ids_is_in_the_key():
    files = {module_of(path): path for path in SOURCES}
    hashed = {path for name in cache.SOURCES for path in PACKAGE.glob(f"{name}.py")}
    seen, rest = set(), ["sftmix.data.reading", "sftmix.data.tokenise", "sftmix.text.encoder"]
    for name in rest:
        if name not in seen and name in files:
            seen.add(name)
            rest += [name.rpartition(".")[0], *imported(running(tree_of(files[name])), files[name])]
    others = {name for name in seen if files[name] not in hashed}
    assert others == DECIDE_NOTHING.keys()


def test_an_edit_there_makes_another_key(tmp_path, monkeypatch):
    copy = tmp_path / "sftmix"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "recipes"))
    monkeypatch.setattr(cache, "__file__", str(copy / "disk/cache.py"))
    keys = []
    for name in (None, "text/turns.py", "data/row_files.py", "components/renderer.py", "training/step.py"):
        if name:
            with Path(copy, name).open("a") as file:
                file.write("\n# another line\n")
        cache.code_version.cache_clear()
        keys.append(cache.key_of(rows="a"))
    monkeypatch.undo()
    cache.code_version.cache_clear()
    assert keys[0] == cache.key_of(rows="a") != cache.key_of(row="a")
    assert len({*keys[:4]}) == 4
    assert keys[3] == keys[4]


@pytest.mark.parametrize("limit", [None, 1])
def test_a_file_that_was_changed_while_it_was_read_is_refused_and_not_kept(write, read, options, tmp_path, limit):
    """The cache would give its rows for the file that it was before."""
    before, now = ([{"instruction": f"q{i}", "output": said} for i in range(3)] for said in ("old", "new"))
    path = write("rows.jsonl", before)
    reader = RowReader("data.train", options(path, limit=limit), "auto")
    write("rows.jsonl", now)
    with pytest.raises(DataError, match=r"rows.jsonl was changed while it was read; run again$"):
        reader.read()
    for rows in (before, now):
        write("rows.jsonl", rows)
        examples = read(path, limit=limit).train.examples(whole=True)
        assert {example.messages[-1].content for example in examples} == {rows[0]["output"]}
