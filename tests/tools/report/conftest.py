"""One finished run with its report, for all tests of the room, and a reader of pages."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.tiny import in_this_process, make_tiny
from tests.tools.evaluate.bench import write_result

NASTY = "</script><script>window.broken=1</script><img src=x onerror=window.broken=2> <b>bold</b> &amp;"
"""A response that would run, if it were not escaped."""
TURNED = "to Eve \u202e001 eroY\u202c and \u2066more\u2069"
"""A response that would be read in another direction than it is written in."""


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


@pytest.fixture(scope="package")
def reported(tmp_path_factory) -> Path:
    """A finished run of rows with labels, scores and a hostile response, with its report."""
    place = tmp_path_factory.mktemp("report")
    tiny = make_tiny(place, dropout=0.0)
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"quality": "high" if number % 2 else "low", "score": number / 4, "group": f"g{number % 3}"}
        row |= {"x": number, "mixed": number or "zero"}
    held_out = [json.loads(line) for line in tiny.eval.read_text().splitlines()]
    tiny.eval.write_text("".join(json.dumps({**row, "group": "own", "confidence": "high"}) + "\n" for row in held_out))
    rows[3]["output"] = NASTY
    rows[4]["output"] = TURNED
    tiny.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["run", *tiny.options, "--data.label_field", "quality", "--with_baseline", "--out", "run"]
    done = in_this_process(*words, cwd=place)
    assert done.returncode == 0, done.stderr
    write_result(place / "run", "medqa", [0.0, 1.0])
    done = in_this_process("report", "run", "--score", "--map", "20", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["run/report/report.html", "run/report/examples.parquet"]
    return place / "run"


@pytest.fixture(scope="package")
def examples(reported):
    import pandas as pd

    return pd.read_parquet(reported / "report" / "examples.parquet").set_index("id")
