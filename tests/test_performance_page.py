"""The page on performance is what the results say, and the tables do not lose what they are given."""

from __future__ import annotations

import json
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def maker() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "make_performance.py"))


def test_the_page_and_its_pictures_are_current(maker):
    made = maker["files"]()
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python docs/make_performance.py"
    pictures = set((ROOT / "docs" / "images").glob("performance-*.svg"))
    assert pictures == {path for path in made if path.suffix == ".svg"}


def test_every_newest_result_is_named_with_its_command(maker):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in ("step", "loss", "startup", "lora", "compare"):
        found = maker["latest"](name)
        assert found
        for variant, (file, result) in found.items():
            label = f"{name}-{variant}" if variant else name
            assert file == max(path.name for path in RESULTS if path.name[11:] == f"{label}-cpu.json")
            assert file in page
            assert f"`{maker['command'](name, result)}`" in page


def test_commands_name_scripts_and_options_that_exist(maker):
    for name in ("step", "loss", "pipeline", "trl_compare", "startup", "scale", "lora", "compare"):
        # Those that keep what was typed; the options of older ones may be gone.
        commands = [found["command"] for _, found in maker["latest"](name).values() if "command" in found]
        words = " ".join([f"python benchmarks/{name}.py", *commands]).split()
        script = (ROOT / words[1]).read_text(encoding="utf-8") + (ROOT / "benchmarks" / "report.py").read_text()
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in script, option


def test_results_are_json_with_date_device_and_setting():
    for path in RESULTS:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert path.name.startswith(result["date"]), path.name
        assert result["device"], path.name
        assert {"setting", "command"} & set(result), path.name


def test_bars_are_as_long_as_their_values(maker):
    drawn = ET.fromstring(maker["svg"]("seconds & more", {"<a>": 1.0, "b": 4.0, "c": 2.0}))
    bars = [float(e.attrib["width"]) for e in drawn if e.tag.endswith("rect") and e.attrib.get("fill") != "white"]
    assert bars == [105.0, 420.0, 210.0]
    assert "<a>" in [e.text for e in drawn if e.tag.endswith("text")]


def test_a_spread_is_its_median_with_the_quartiles(maker):
    assert maker["spread"]({"median": 2.0, "q1": 1.0, "q3": 3.0}, 1) == "2.0 (1.0 to 3.0)"
    assert maker["spread"]({"median": 2.0, "q1": 2.0, "q3": 2.0}) == "2.000"
    assert maker["spread"]({"median": 2.0, "q1": 1.5, "q3": 2.5, "n": 2}, 1) == "2.0 (1.5 to 2.5; 2)"
    assert maker["spread"]({"median": 2.0, "q1": 1.5, "q3": 2.5, "n": 4}, 1) == "2.0 (1.5 to 2.5)"
