"""The keys of the cache follow the code between a file of rows and the ids that are stored of it."""

import shutil
from pathlib import Path

from sftmix.disk import cache
from tests.test_architecture import PACKAGE, SOURCES, imported, module_of, running, tree_of

DECIDE_NOTHING = {
    "sftmix": "the version and lazy names",
    "sftmix.components": "lazy names",
    "sftmix.components.component": "what an option is; its class is in the key by its source",
    "sftmix.disk": "no code",
    "sftmix.disk.cache": "stores what it is given",
    "sftmix.disk.decisions": "which rows are left out, once they are read; the chosen ones are in the key",
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
