"""Pages of the repository's root in the site, and links to what is not in it: the hook that mkdocs.yml names.

The pages link as readers of the repository need it. In the site the front page is README.md, with the cards of
docs/index.md behind its first screen, and the neighbours of README.md are pages as well. A link to any other file
outside the site becomes a link into `repo_url` if the configuration has one. Else it becomes its text, which shows the
file's path in the repository to a pointer.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
FRONT = "index.md"
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Pages at the root of the repository beside README.md, by their names in the site."""
PLACES = {**ROOT_PAGES, "README.md": FRONT}
FIRST_SCREEN = "<!-- end of the first screen -->"
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    if uri == FRONT:
        first, rest = (ROOT / "README.md").read_text(encoding="utf-8").split(FIRST_SCREEN)
        cards = markdown[markdown.index("<div") : markdown.index("</div>")] + "</div>"
        parts = [(first, ""), (cards, "docs"), (rest, "")]
        return "".join(linked(text, folder, uri, config, files) for text, folder in parts)
    names = {site: name for name, site in ROOT_PAGES.items()}
    return linked(markdown, posixpath.dirname(names.get(uri, f"docs/{uri}")), uri, config, files)


def linked(markdown: str, folder: str, uri: str, config: MkDocsConfig, files: Files) -> str:
    """Return the text of a file in a folder of the repository, with links as the page at uri needs them."""

    def in_site(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        there = PLACES.get(path, path.removeprefix("docs/"))
        page_file = files.get_file_from_path(there)
        if page_file and page_file.inclusion.is_included():
            place = posixpath.relpath(there, posixpath.dirname(uri) or ".")
            return link[0].replace(f"]({target}", f"]({place}")
        if not (ROOT / path).exists():
            return link[0]  # an address, or a link to nowhere, which a strict build refuses
        if config.repo_url:
            return f"[{text}]({config.repo_url}/blob/HEAD/{path}{anchor})"
        named = link[0].startswith("!") or text.strip("`") == path  # a picture, or the path itself
        return text if named else f'<abbr title="{path}">{text}</abbr>'

    return LINK.sub(in_site, markdown)
