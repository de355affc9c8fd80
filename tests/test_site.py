"""The site of the documentation: complete without a network, and readable where a page is made from docstrings.

`mkdocs build --strict` itself finds links to nowhere, pages outside the navigation and names that are not in the code.
"""

import importlib.util
import json
import logging
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("mkdocstrings", reason="needs the extra docs")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def loaded(name: str) -> ModuleType:
    """A file of docs/site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tags(HTMLParser):
    """What a browser fetches for a page, what a reader can go to, and the cells of its tables."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.fetched.append(str(given["src"]))
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(str(given["href"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site):
    pages = [page for page in sorted(site.rglob("*.html")) if page.name not in moved()]
    assert len(pages) > 30
    for page in pages:
        fetched = Tags(page).fetched
        assert len(fetched) > 3, page
        for address in fetched:
            assert page.name == "404.html" or (page.parent / address.split("?")[0]).is_file(), (page, address)
            assert "//" not in address, (page, address)
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), "the theme fetches its script from the net"
    assert not [style for style in site.rglob("*.css") if re.search(r"url\(['\"]?https?:|@import", style.read_text())]


def moved() -> dict[str, str]:
    """Old addresses of the site and the new ones, as mkdocs.yml has them."""
    section = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("  moved:")[1].split("\n\n")[0]
    return dict(re.findall(r"^    (\S+): (\S+)$", section, re.M))


def test_old_addresses_lead_to_new_ones(site):
    assert {"quickstart.html", "overview.html"} <= set(moved())
    for old, new in moved().items():
        page, _, anchor = new.partition("#")
        assert Tags(site / old).links == [new]
        assert not anchor or f'id="{anchor}"' in (site / page).read_text(encoding="utf-8"), new


def test_an_address_that_leads_nowhere_fails_a_strict_build(tmp_path):
    """A strict build counts the warnings: a missing heading, a missing page, and a page that is still there."""
    from mkdocs.utils import CountHandler

    (tmp_path / "there.html").write_text('<h2 id="here">', encoding="utf-8")
    addresses = {
        "a.html": "there.html#here",
        "b.html": "there.html#gone",
        "c.html": "gone.html",
        "there.html": "a.html",
    }
    counted = CountHandler()
    logging.getLogger("mkdocs").addHandler(counted)
    loaded("moved").on_post_build(SimpleNamespace(site_dir=str(tmp_path), extra={"moved": addresses}))
    logging.getLogger("mkdocs").removeHandler(counted)
    assert counted.get_counts() == [("WARNING", 3)]
    assert 'id="here"' in (tmp_path / "there.html").read_text(encoding="utf-8")


def test_links_of_the_repository_lead_to_pages(site):
    """README.md links docs/tutorial.md, and its neighbours link README.md; sources are text."""
    assert {"tutorial.html", "own-loop.html", "changelog.html"} <= {*Tags(site / "index.html").links}
    assert "index.html#set-up" in Tags(site / "contributing.html").links
    architecture = (site / "architecture.html").read_text(encoding="utf-8")
    assert "in <code>sftmix/pipeline/recipe.py</code>: from rows" in architecture
    place = 'title="benchmarks/results/2026-11-30-busy-cpu.md"'
    assert f"<abbr {place}>figures</abbr>" in (site / "faq.html").read_text(encoding="utf-8")
    assert not [link for page in site.rglob("*.html") for link in Tags(page).links if link.endswith((".py", ".md"))]


def test_the_front_page_is_readme_with_four_cards_behind_its_first_screen(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    places = [text.index(part) for part in ('id="set-up"', 'class="grid cards"', 'id="how-it-works"')]
    assert places == sorted(places)
    cards = text[places[1] : places[2]]
    assert re.findall(r"<p><strong>([\w ]+)</strong></p>", cards) == ["Start", "How to", "Reference", "Research"]
    assert 'href="glossary.html"' in cards


def test_sources_are_linked_where_the_repository_has_an_address():
    from mkdocs.config import load_config
    from mkdocs.structure.files import get_files
    from mkdocs.structure.pages import Page

    config = load_config(str(ROOT / "mkdocs.yml"), repo_url="https://example.org/sftmix")
    files = config.plugins.on_files(get_files(config), config=config)
    file = files.get_file_from_path("decisions/0001-mixup-mean.md")
    assert file is not None
    text = "[a [b]](../../cli.py#L3), [c](../../README.md#set-up), [d](https://example.org/e), ![e](../images/x.svg)"
    assert config.plugins.on_page_markdown(text, page=Page(None, file, config), config=config, files=files) == (
        "[a [b]](https://example.org/sftmix/blob/HEAD/cli.py#L3), [c](../index.md#set-up), "
        "[d](https://example.org/e), ![e](../images/x.svg)"
    )


def test_search_finds_docstrings_without_a_server(site):
    script = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    entries = json.loads(script.removeprefix("var __index = "))["docs"]
    assert "api/testing.html#sftmix.testing.check_splitter" in {entry["location"] for entry in entries}
    assert "iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


def test_names_and_meanings_become_a_table():
    text = "Do it.\n\nids   N of\n      them\nstep  a | b\nMore.\n\n    x  = 1\n"
    assert loaded("docstrings").as_markdown(text).splitlines() == [
        *("Do it.", "", "", "| | |", "|---|---|"),
        *("| `ids` | N of them |", "| `step` | a \\| b |", "", "More.", "", "    x  = 1"),
    ]


def test_the_built_page_has_that_table(site):
    rows = Tags(site / "api" / "functional.html").rows
    assert ["lam", "[M], share of column 0: a floating dtype, in [0, 1], which is not checked"] in rows
    starts = next(row for row in Tags(site / "api" / "types.html").rows if row[:1] == ["starts"])
    assert starts[1].endswith("must not attend to each other, and positions count from each start")
