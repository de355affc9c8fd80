"""The source of a user's classes, and the files they read: a changed one is another component."""

import linecache
from typing import Any

from sftmix.components import Linear, Median, SFTMix
from sftmix.components.component import Component, code_of, files_of


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
