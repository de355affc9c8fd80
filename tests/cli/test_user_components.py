"""What the command line says of components in a user's own file, and that every name it offers works."""

import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from sftmix.config.schema import component_bases, known_components, options_of
from sftmix.types import Plan
from tests.fast import some_fast
from tests.forked import done, ended
from tests.tiny import ROOT
from tests.tiny import sftmix as process

PARTS = '''
from typing import Any

import numpy as np

from sftmix.components import Splitter
from sftmix.types import Split


class Base(Splitter):
    def split(self, scores, *, seed):
        raise AssertionError


class Tails(Base):
    """The ends of the ranking."""

    def __init__(self, *, share: float = 0.3, untyped=3, what: Any = None):
        self.share, self.untyped, self.what = share, untyped, what


class Needs(Base):
    def __init__(self, *, untyped):
        self.untyped = untyped


class NeedsAny(Base):
    def __init__(self, *, what: Any):
        self.what = what


class Array(Base):
    def __init__(self, *, a: np.ndarray):
        self.a = a


class Unknown(Base):
    def __init__(self, *, a: "Nowhere" = 3):
        self.a = a


class Half(Splitter):
    """It has no method."""


class NotOne:
    """It is no component."""
'''
PAIRS = '''
import numpy as np

from sftmix.components.pairing import RandomPairs


class Lazy(RandomPairs):
    """Its first call imports a library that draws when it is imported."""

    def pairs(self, split, scores, *, epoch, seed):
        import sklearn.neighbors

        return super().pairs(split, scores, epoch=epoch, seed=seed)


class Drawn(RandomPairs):
    def pairs(self, split, scores, *, epoch, seed):
        np.random.rand()
        return super().pairs(split, scores, epoch=epoch, seed=seed)


class Own(RandomPairs):
    def __init__(self, *, needed: int):
        self.needed = needed


class Broken(RandomPairs):
    def pairs(self, split, scores, *, epoch, seed):
        return 1 / 0
'''
TAIL = "'my_parts.Tail': module 'my_parts' has no attribute 'Tail'. Did you mean my_parts.Tails? There are "
SUBCLASS = "error: splitter: my_parts.NotOne is no subclass of sftmix.components.Splitter\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A directory with a user's file."""
    made = tmp_path_factory.mktemp("mine")
    (made / "my_parts.py").write_text(PARTS)
    (made / "my_draft.py").write_text("import os\nclass Half(:\n")
    (made / "selectors.py").write_text(PARTS)
    return made


@pytest.mark.parametrize(
    ("words", "said"),
    some_fast([
        ("components my_parts.Tail", f"no Component {TAIL}"),
        ("components no_such.Thing", "no Component 'no_such.Thing': No module named 'no_such'."),
        ("components my_parts.Unknown", "the types in my_parts.Unknown.__init__ cannot be read"),
        ("run --splitter my_parts.Tail", f"splitter: no Splitter {TAIL}"),
        ("run --objective my_parts.Rho", "has no attribute 'Rho'. Did you mean Rho1? There are NTP, SFTMix, "),
        ("run --splitter no_such.Medin", "No module named 'no_such'. Did you mean Median? There are Median, "),
        ("run --splitter my_parts.NotOne", SUBCLASS),
        ("run --splitter my_draft.Half", "no Splitter 'my_draft.Half': invalid syntax (my_draft.py, line 2)"),
        ("run --splitter selectors.Tails", "selectors.py is not looked at: Python has a module of that name, "),
        ("run --splitter my_parts.Half", "my_parts.Half is abstract: it lacks split"),
        ("run --splitter my_parts.Needs", "splitter: Needs needs splitter.untyped"),
        ("run --splitter my_parts.Array --splitter.a 3", "splitter.a: '3' is not allowed; allowed: <class 'numpy"),
    ], every=2),
)  # fmt: skip
def test_a_wrong_name_or_class_ends_with_one_sentence(directory, words, said):
    it = ended(shlex.split(words), cwd=directory)
    assert it.code == 2
    assert said in it.printed
    for leaked in ("Traceback", "fail_untyped", "Parser key", "of another kind", "dot import path"):
        assert leaked not in it.printed
    assert len(it.printed.splitlines()) == 1


def test_the_recommended_command_finds_the_users_class(directory):
    first, *rest = done(["components", "my_parts.Tails"], cwd=directory).splitlines()
    assert first == "Tails  (my_parts.Tails), chosen by --splitter my_parts.Tails"
    assert "  --splitter.untyped VALUE  [3]" in rest
    recommended = first.partition("chosen by ")[2].split()
    printed = done(["run", *recommended, "--splitter.untyped", "x", "--print_config"], cwd=directory)
    assert "class_path: my_parts.Tails" in printed
    assert "untyped: x" in printed


@pytest.mark.slow
def test_checks_are_run_by_the_command(directory):
    """On classes that keep their contract, which may import a library that draws, and on those that do not."""
    (directory / "my_pairs.py").write_text(PAIRS)
    kept = process("components", "my_pairs.Lazy", "--check", cwd=directory)  # nothing is imported before
    assert kept.returncode == 0, kept.stderr
    assert "Lazy keeps the contract of PairSampler (sftmix.testing.check_pair_sampler)" in kept.stdout
    for name, said in (("Drawn", "it touched a global random state"), ("Own", "not all options have one")):
        it = ended(["components", f"my_pairs.{name}", "--check"], cwd=directory)
        assert (it.code, said in it.printed) == (2, True), it.printed


@pytest.mark.slow
def test_an_error_of_ones_own_class_names_it(finished, directory, sftmix, tmp_path, monkeypatch):
    (directory / "my_pairs.py").write_text(PAIRS)
    monkeypatch.syspath_prepend(directory)
    with pytest.raises(ZeroDivisionError) as raised:
        sftmix("run", *finished.tiny.options, "--pairing", "my_pairs.Broken", "--out", str(tmp_path / "run"))
    (note,) = raised.value.__notes__
    assert note.startswith("pairing Broken raised this; what is done before it is kept")


def test_a_class_is_offered_by_a_name_that_works(directory):
    """One of the user's by its import path: its short name means nothing to a process that has not imported it."""
    (directory / "tails.yaml").write_text("splitter: my_parts.Tails")
    wrong = ended(["run", "--config", "tails.yaml", "--splitter", "Medin"], cwd=directory).printed
    offered = wrong.partition("There are ")[2].partition(", or the import path")[0].split(", ")
    assert {"Median", "FromFile", "my_parts.Tails", "my_parts.Needs"} <= set(offered)
    assert "Tails" not in offered
    again = ended(["run", "--splitter", "my_parts.Tails", "--splitter.share", "x"], cwd=directory).printed
    assert "splitter.share: 'x' is not allowed; allowed: a number." in again
    done(["run", "--splitter", "my_parts.NeedsAny", "--splitter.what", "x", "--print_config"], cwd=directory)


def test_the_page_of_records_explains_every_field_of_a_plan():
    explained = re.findall(r"^(\w+)  ", inspect.getdoc(Plan), re.M)
    assert sorted(explained) == sorted(f.name for f in fields(Plan))
    page = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
    assert "When you rank rows, break ties by id" in page


REQUIRED = {
    "path": "file",
    "paths": "[dir]",
    "url": "http://127.0.0.1:8000/v1",
    "field": "score",
    "high": "High",
    "low": "Low",
    "labels": "[High]",
    "shares": "{a: 1.0}",
}


@pytest.mark.slow
@pytest.mark.parametrize("field", component_bases())
def test_every_short_name_that_is_offered_works(sftmix, field):
    for name, cls in known_components(component_bases()[field]).items():
        if not cls.__module__.startswith("sftmix.components."):
            continue  # of another test in this process
        needed = [k for k, p in options_of(cls).items() if p.default is inspect.Parameter.empty]
        options = [word for k in needed for word in (f"--{field}.{k}", REQUIRED.get(k, "3"))]
        shown = sftmix("run", f"--{field}", name, *options, "--print_config")
        assert shown.code == 0, shown.err
        assert f"{cls.__name__}\n" in shown.out


def test_a_single_callback_is_a_list_of_one(sftmix, tmp_path):
    (tmp_path / "one.yaml").write_text("callbacks: Evaluate")
    for words in (["--callbacks", "Evaluate"], ["--callbacks", "[Evaluate]"], ["--config", str(tmp_path / "one.yaml")]):
        printed = sftmix("run", *words, "--callbacks.every", "5", "--print_config").out
        assert printed.endswith(
            "callbacks:\n- class_path: sftmix.components.callbacks.Evaluate\n  init_args:\n    every: 5\n"
        )
