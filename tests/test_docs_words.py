"""What can be counted of how pages are written: README's lines, pages, long sentences, and habits of the table in
CONTRIBUTING.md.

The limits only fall. Counts are no aim: a sentence that is cut in two and must still be read twice is no gain.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.test_docs import FENCE, PAGES, ROOT, blocks, name_of

MOST_WORDS = 41
MOST_LONG = 10
"""Sentences of more words, on all pages that are read."""
READ = [page for page in PAGES if page.name not in ("CHANGELOG.md", "configuration.md")]
"""All pages but a record and a generated one."""
HABITS = {
    "Of X, ...": re.compile(r"(?:^|(?<=[.:;] ))Of (?!course)", re.M),
    "told, tells": re.compile(r"\b(?:told|tells)\b(?! apart| from)"),
    "stands, lies": re.compile(r"\b(?:stands?|lies?) (?:on|at|there|here|between|with?in|before|behind|in (?!\[|for))"),
    "that of": re.compile(r"\bthat of\b"),
    ", too": re.compile(r", too(?=[.,;:)])"),
    "Who has": re.compile(r"(?:^|(?<=[.:;] ))Who \w+", re.M),
}
"""The rows of CONTRIBUTING's table that a pattern can find; whether "where" means "if" cannot be counted."""
ON_PAGES = {"Of X, ...": 6, "that of": 3}
IN_CODE = {"Of X, ...": 3, "told, tells": 2, "stands, lies": 3, "that of": 8, ", too": 1}
"""How often a habit is left, on pages and in comments and strings of sftmix/; all others are gone."""
ITEM = re.compile(r" *(?:[-*]|(\d+)\.) ")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and items of a page: no code, tables, headings, pictures, markers or numbered steps."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    found = [""]
    for line in re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text).splitlines():
        item = ITEM.match(line)
        if item or not line.strip() or line.lstrip().startswith(("#", "|", "<")):
            found.append("")
        if not line.lstrip().startswith(("#", "|", "<")):
            step = item is not None and item[1]
            found[-1] += "1. " if step else " " + (line[item.end() :] if item else line.strip())
    return (paragraph.strip() for paragraph in found if not paragraph.startswith("1. "))


def sentences(text: str) -> list[str]:
    """The sentences of a page, links without their addresses; a colon ends one before a capital."""
    plain = (re.sub(r"\]\([^)]*\)", "]", paragraph).replace("**", "") for paragraph in paragraphs(text))
    return [part for paragraph in plain for part in re.split(r"(?<=[.!?]) +|(?<=:) +(?=[A-Z`])| · ", paragraph) if part]


def said(source: str) -> str:
    """Comments and strings of a Python file, without the names of its variables."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    parts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return "\n".join(
        " ".join(part.split()) for part in [*parts, *(text for text in constants if isinstance(text, str))]
    )


def habits(text: str) -> Counter[str]:
    return Counter({name: len(pattern.findall(text)) for name, pattern in HABITS.items() if pattern.search(text)})


def test_sentences_are_counted_as_they_are_read():
    long = " ".join(["word"] * 50)
    page = f"# {long}\n\n| {long} |\n\n1. {long}\n   {long}\n\n```\n{long}\n```\n\n![{long}](x.png)\n\n"
    page += f"- One. τ is two: {long}\n"
    assert [len(sentence.split()) for sentence in sentences(page)] == [1, 53]
    assert sentences("See [a\npage](b.md#c). It says: Yes.\n") == ["See [a page].", "It says:", "Yes."]


@pytest.mark.parametrize(
    ("not_so", "but"),
    [
        ("Of two columns with one name the last counts.", "If two columns have the same name, the last one wins."),
        ("the rows are told with their reason", "the two are not told apart"),
        ("what stands in front of the answer lies there", "a mask stands in for the kernel; rows lie in [0, 4)"),
        ("the template is that of the model", "it is the model's template"),
        ("held-out rows are read, too.", "too small"),
        ("Who has a GPU and an hour", "If you have a GPU and an hour"),
    ],
)
def test_habits_are_found(not_so, but):
    assert habits(not_so)
    assert not habits(but)


def test_few_sentences_are_long():
    """Outside code, tables and numbered steps."""
    long = {
        f"{name_of(page)}: {sentence}"
        for page in READ
        for sentence in sentences(page.read_text(encoding="utf-8"))
        if len(sentence.split()) > MOST_WORDS
    }
    assert len(long) <= MOST_LONG, "\n".join(sorted(long))


def test_pages_lose_their_habits():
    """CONTRIBUTING.md shows them in a table."""
    found = sum((habits("\n".join(sentences(page.read_text(encoding="utf-8")))) for page in READ), Counter())
    assert {name: number for name, number in found.items() if number > ON_PAGES.get(name, 0)} == {}


def test_code_loses_its_habits():
    found = sum((habits(said(path.read_text(encoding="utf-8"))) for path in (ROOT / "sftmix").rglob("*.py")), Counter())
    assert {name: number for name, number in found.items() if number > IN_CODE.get(name, 0)} == {}


def test_readme_has_two_set_up_commands():
    installs = [body.strip() for body in blocks(ROOT / "README.md", "bash") if body.startswith("pip install -c")]
    first, second = installs
    assert re.fullmatch(r"pip install [^&\n]+ && sftmix quickstart", first)
    assert re.fullmatch(r"pip install [^&\n]+ && pytest", second)


def test_readme_is_short():
    """Its first screen as well, with code for a terminal of 80 columns; the site shows the cards behind it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split("<!-- end of the first screen -->")[0].splitlines()) <= 60
    assert max(len(line) for _, body in FENCE.findall(text) for line in body.splitlines()) <= 80


def test_there_are_few_pages():
    """A new page replaces or joins others; decisions and the API are lists, whose pages are short."""
    assert len(list((ROOT / "docs").glob("*.md"))) <= 27
