"""The page as one HTML file that needs no network: plotly's script, style, figures and rows stand in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.io
import plotly.offline
from markupsafe import Markup, escape

import sftmix
from sftmix.common.figures import short
from sftmix.common.files import write_text
from sftmix.tools.report.tokens import MixedPair, Response

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plot:
    """A figure of the page; `wide`: over both columns; height in pixels."""

    id: str
    title: str
    caption: str
    figure: go.Figure
    wide: bool = False
    height: int = 340

    @property
    def json(self) -> Markup:
        """The figure as JSON that cannot end the script element that holds it."""
        return Markup(plotly.io.to_json(self.figure, engine="json").replace("<", "\\u003c"))


@dataclass(frozen=True)
class Section:
    """A section of the page; parts that are empty are left out.

    rows       rows of the table of examples, for the searchable one, which stands once on a page
    responses  name -> responses, token by token
    pairs      mixed pairs
    table      a plain table, its head first
    notes      sentences below it
    pre        summary and text of something long, folded
    """

    id: str
    title: str
    text: str = ""
    plots: Sequence[Plot] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    responses: Mapping[str, Sequence[Response]] = field(default_factory=dict)
    pairs: Sequence[MixedPair] = ()
    table: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    pre: tuple[str, str] | None = None

    @property
    def empty(self) -> bool:
        return not any((self.plots, self.rows, self.responses, self.pairs, self.table, self.pre))


@dataclass(frozen=True)
class Page:
    """A whole page. sentences: what happened; cards: name and value of the figures at the top."""

    title: str
    about: str
    sections: Sequence[Section]
    sentences: Sequence[str] = ()
    cards: Sequence[tuple[str, str]] = ()


def with_code(text: str) -> Markup:
    """Return a sentence, escaped, whose commands are code, and whose options no line breaks apart."""
    code = re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"--\w[\w.]*", r"<span>\g<0></span>", code))


def write_page(path: Path, page: Page) -> None:
    """Write the page; all text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = short
    environment.filters["code"] = with_code
    environment.filters["js"] = lambda value: str(value).replace("inf", "Infinity")
    html = environment.get_template("page.html").render(
        title=page.title,
        about=page.about,
        sentences=page.sentences,
        cards=page.cards,
        sections=[section for section in page.sections if not section.empty],
        version=sftmix.__version__,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        js=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
