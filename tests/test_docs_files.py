"""The files that the documentation names exist: scripts, tests, results; and each recipe has a card."""

import re

import pytest

from sftmix.config.read import recipes
from tests.test_docs import FOLDERS, PAGES, ROOT, blocks, name_of, prose

OF_OTHERS = {"convert_hf_to_gguf.py"}
"""Scripts of other projects (llama.cpp)."""


@pytest.fixture(scope="module")
def files() -> str:
    """Each file of the repository as a line of its path, with the files that Python blocks of the pages begin with."""
    there = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    made = [name for page in PAGES for body in blocks(page, "python") for name in re.findall(r"\A# (\w+\.py)\n", body)]
    return "".join(f"/{name}\n" for name in [*map(name_of, [*there, *ROOT.glob("*.py")]), *made])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_tests_and_results_that_are_named_exist(page, files):
    """In prose, commands, tables and links: Python files by the end of their path, dated results, modules of -m."""
    text = page.read_text(encoding="utf-8")
    named = {name.removeprefix("../") for name in re.findall(r"(?:\.\./|[\w/])[\w/-]*\.py\b", text)} - OF_OTHERS
    named |= set(re.findall(r"\b20\d\d-\d\d-\d\d?[\w….*-]*\.(?:json|md)\b", text))
    named |= {f"{name.replace('.', '/')}.py" for name in re.findall(r"-m ((?:benchmarks|docs|tests)\.[\w.]+)", text)}
    patterns = {name: re.escape(name).replace("…", ".*").replace(r"\*", ".*") for name in named}
    assert [name for name, pattern in patterns.items() if not re.search(f"/{pattern}\n", files)] == []


def test_every_recipe_has_a_card():
    """docs/make_recipes.py writes the table, in minutes; small/ and two others are laid over recipes."""
    cards = prose(ROOT / "docs" / "performance.md").partition("<!-- recipes")[2].partition("<!-- /recipes")[0]
    made = re.findall(r"`([\w.-]+)` \(\d+: ", cards)
    assert sorted(made) == [name for name in recipes() if "/" not in name and name not in ("quickstart", "small")]
