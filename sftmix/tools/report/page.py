"""The page as one HTML file that needs no network: plotly's script, style, figures and rows stand in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.io
import plotly.offline
from markupsafe import Markup

import sftmix
from sftmix.common.figures import short
from sftmix.common.files import write_text

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plot:
    """A figure of the page; one that is higher than others is as wide as the page."""

    id: str
    title: str
    caption: str
    figure: go.Figure

    @property
    def json(self) -> Markup:
        """The figure as JSON that cannot end the script element that holds it."""
        return Markup(plotly.io.to_json(self.figure, engine="json").replace("<", "\\u003c"))


@dataclass(frozen=True)
class Section:
    """A section of the page; parts that are empty are left out, and a section without any.

    sentences  a list
    tables     plain tables, their heads first
    rows       rows of the table of examples, for the searchable one, which stands once on a page
    pre        text that is long, folded
    """

    id: str
    title: str
    text: str = ""
    sentences: Sequence[str] = ()
    tables: Sequence[Sequence[Sequence[str]]] = ()
    plots: Sequence[Plot] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    pre: str = ""

    @property
    def parts(self) -> list[Any]:
        return [self.sentences, self.tables, self.plots, self.rows, self.pre]


def write_page(path: Path, title: str, about: str, sections: Sequence[Section]) -> None:
    """Write the page; all text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = short
    environment.filters["js"] = lambda value: str(value).replace("inf", "Infinity")
    html = environment.get_template("page.html").render(
        title=title,
        about=about,
        sections=[section for section in sections if any(section.parts)],
        version=sftmix.__version__,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        js=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
