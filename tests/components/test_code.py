"""The source of a user's classes, and the files they read: a changed one is another component."""

import linecache
import warnings
from typing import Any

import pytest
import torch

from sftmix.components import Linear, Median, Need, SFTMix
from sftmix.components.component import Component, code_of, files_of
from sftmix.components.contracts import read_only
from sftmix.words.errors import ConfigError
from tests.components.tables import scores


class WithFile(Linear):
    def __init__(self, *, path: str):
        super().__init__(start=0.0, end=0.4)
        self.path = path

    def files(self):
        return [self.path]


def test_classes_of_the_package_have_no_code_and_parts_among_options_have():
    assert code_of(SFTMix(mu=Linear(start=0.0, end=0.4))) == {}
    assert [*code_of(SFTMix(mu=WithFile(path="none")))] == [f"{__name__}.WithFile"]


class Shared:
    """No component, but a part of one."""


class Several(Shared, Median):
    def __init__(self, *, parts: list[Linear], named: dict[str, Any] | None = None):
        self.parts, self.named = parts, named


def test_classes_that_are_no_components_and_parts_in_lists_have_code_and_files():
    several = Several(parts=[WithFile(path="one")], named={"of": [WithFile(path="two")]})
    assert {*code_of(several)} == {f"{__name__}.{name}" for name in ("Several", "Shared", "WithFile")}
    assert files_of(several) == ["one", "two"]


CELL = """
class Own(Median):
    def split(self, scores, *, seed):
        return super().split(scores, seed=seed + 1)

print("another line of the cell")
"""


def of_cell(number: int, text: str) -> Component:
    """A component of a notebook's cell, made as IPython makes it: its code is in linecache alone."""
    name, space = f"<ipython-input-{number}>", {"__name__": "__main__", "Median": Median}
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    exec(compile(text, name, "exec"), space)
    return space["Own"]()


def test_a_class_of_a_notebook_is_known_by_its_source():
    first, again = code_of(of_cell(1, CELL)), code_of(of_cell(2, CELL.replace("another", "one more")))
    assert first == again
    assert first.keys() == {"__main__.Own"}
    assert code_of(of_cell(3, CELL.replace("seed + 1", "seed + 2"))) != first


def test_a_class_without_any_source_is_like_itself_alone():
    bare, other = (type("Bare", (Median,), {"__module__": "__main__"})() for _ in range(2))
    assert code_of(bare) == code_of(bare) != code_of(other)


class Attributes(Median):
    """A splitter with an attribute that every component has."""

    def __init__(self, *, name: str, value: Any):
        setattr(self, name, value)


class WithState(Median):
    def state_dict(self):
        return {}


@pytest.mark.parametrize("name", ["needs", "gives"])
@pytest.mark.parametrize("value", [Need.CONFIDENCE, [Need.CONFIDENCE], {"confidence"}, "confidence"])
def test_needs_are_a_set_of_needs(name, value):
    with pytest.raises(ConfigError, match=rf"^Attributes\.{name} is .*frozenset\({{Need\.TEXTS}}\)"):
        Attributes(name=name, value=value)
    assert Attributes(name=name, value={Need.CONFIDENCE})


@pytest.mark.parametrize("name", ["files", "spec", "split"])
def test_an_attribute_hides_no_method(name):
    with pytest.raises(
        ConfigError, match=rf"^Attributes\.{name} is \['a'\], and hides the method {name}\(\); call it my_"
    ):
        Attributes(name=name, value=["a"])


def test_a_state_can_be_given_back():
    with pytest.raises(ConfigError, match=r"^WithState has state_dict\(\), and no load_state_dict\(state\)"):
        WithState()


def test_what_a_component_is_given_stays_as_it_is():
    """Also where torch shares the memory, which knows no array that is read-only."""
    table = scores([3, 5], confidence=[0.5, 0.2])
    given = read_only(table)
    with warnings.catch_warnings(action="ignore"):  # of torch, that the array is read-only
        torch.from_numpy(given.confidence).mul_(-1)
    assert table.confidence.tolist() == [0.5, 0.2]
    with pytest.raises(ValueError, match="read-only"):
        given.confidence[0] = 1
