"""Pages of reports, read back."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path


class Text(HTMLParser):
    """Text and scripts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.plots, self.tags, self.text, self._plot = {}, [], "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._plot = dict(attrs).get("data-plot")

    def handle_endtag(self, tag):
        self._plot = None

    def handle_data(self, data):
        if self._plot:
            self.plots[self._plot] = json.loads(data)
        else:
            self.text += data
