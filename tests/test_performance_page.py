"""The page on performance is what the results say, and the tables do not lose what they are given."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        return importlib.import_module("make_performance")


@pytest.fixture(scope="module")
def tables(maker) -> ModuleType:
    return importlib.import_module("performance_tables")


def quartiles(numbers: list[float]) -> dict:
    """As the benchmarks keep several values."""
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "n": len(numbers)}


def test_the_page_is_current(maker):
    assert (maker.DOCS / "performance.md").read_text(encoding="utf-8") == maker.page(), "run docs/make_performance.py"


def test_every_newest_result_is_named_with_its_command(maker):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in ("step", "loss", "startup", "lora", "compare"):
        found = maker.latest(name)
        assert found
        for variant, (file, result) in found.items():
            label = f"{name}-{variant}" if variant else name
            assert file == max(path.name for path in RESULTS if path.name[11:] == f"{label}-cpu.json")
            assert file in page
            assert f"`{maker.command(name, result)}`" in page


def test_commands_name_scripts_and_options_that_exist(maker):
    results = [(name, found) for name in maker.PARTS for _, found in maker.latest(name).values()]
    # Made from the settings of those that do not keep what was typed; the options of older ones may be gone.
    made_up = {maker.command(name, found) for name, found in results if "command" not in found}
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    typed = set(re.findall(r"`(python benchmarks/[^`]+)`", page)) - made_up
    assert typed > {found["command"] for _, found in results if "command" in found}
    for words in map(str.split, typed):
        script = (ROOT / words[1]).read_text(encoding="utf-8") + (ROOT / "benchmarks" / "report.py").read_text()
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in script, (words, option)


def test_results_are_json_with_date_device_and_setting():
    for path in RESULTS:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert path.name.startswith(result["date"]), path.name
        assert result["device"], path.name
        assert {"setting", "command"} & set(result), path.name


def test_bars_are_as_long_as_their_values(tables):
    drawn = list(tables.bars("seconds", {"a": 1.0, "long": 4.0, "c": 2.01}))
    assert drawn[:3] == ["```text", "seconds", ""]
    assert drawn[3:6] == [f"a     {'█' * 12} 1.00", f"long  {'█' * 48} 4.00", f"c     {'█' * 24}▏ 2.01"]
    assert tables.bar(0.5 + 7 / 8 / 48) == "█" * 24 + "▉"
    assert tables.bar(0) == ""


def test_four_values_and_more_are_their_median_with_the_quartiles(tables):
    assert tables.spread(quartiles([1.0, 2.0, 3.0, 4.0, 5.0]), 1) == "3.0 (2.0 to 4.0)"
    assert tables.spread({"median": 2.0, "q1": 1.5, "q3": 2.5, "n": 4}, 1) == "2.0 (1.5 to 2.5)"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_values_are_all_given_as_they_were_measured(tables, count):
    measured = [1234.5, 1300.25, 2000.75][:count]
    found = quartiles(measured) if count > 1 else {"median": 1234.5, "q1": 1234.5, "q3": 1234.5, "n": 1}
    assert tables.spread(found, 2) == ", ".join(["1,234.50", "1,300.25", "2,000.75"][:count])
    del found["n"]  # as older results keep them
    assert tables.spread(found, 2, count) == ", ".join(["1,234.50", "1,300.25", "2,000.75"][:count])


def test_a_number_has_its_decimals_and_commas_and_no_minus_before_a_zero(tables):
    assert [tables.number(x, 2) for x in (0.5, -0.004, -0.006, 1234567)] == ["0.50", "0.00", "-0.01", "1,234,567.00"]
    assert [tables.number(x) for x in (-0.164, 838.348, 8192)] == ["0", "838", "8,192"]
    assert [tables.number(x, 1, sign="+") for x in (0.25, -3, 0.04)] == ["+0.2", "-3.0", "0.0"]


def test_numbers_of_a_column_have_the_same_decimals(maker):
    """Of the first number of each cell; shares of the column are not mixed with counts."""
    columns = 0
    for block in re.findall(r"(?:^\|.*\n)+", maker.page(), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()]
        for column in zip(*rows[2:], strict=True):
            numbers = [re.match(r"[+-]?[\d,]+(?:\.(\d+))?(?![\w.])", cell) for cell in column]
            if all(numbers):
                columns += 1
                assert len({len(found[1] or "") for found in numbers}) == 1, column
                assert not any(re.search(r"\d{4}", found[0].split(".")[0]) for found in numbers), column
    assert columns > 50


def test_results_that_differ_in_their_setting_have_headings_in_words(maker):
    for name, part in maker.PARTS.items():
        headings = [part.heading(result["setting"]) for _, result in maker.latest(name).values()]
        assert len(set(headings)) == len(headings), headings
        assert len(headings) == 1 or all(" " in each and "_" not in each.split("`")[0] for each in headings), headings


def test_variants_are_in_the_order_of_their_numbers(maker):
    steps = [result["setting"]["steps"] for _, result in maker.latest("compare").values()]
    assert steps == sorted(steps)
    assert sorted(["a-128", "", "a-16", "b-2"], key=maker._natural) == ["", "a-16", "a-128", "b-2"]


def test_what_is_in_several_results_is_listed_with_most_steps_first(maker):
    def made(steps: int, *layouts: str) -> dict:
        ratio = {each: {"median": steps / 10, "q1": 0, "q3": 9} for each in layouts}
        setting = {"layouts": list(layouts), "steps": steps}
        return {"setting": setting, "load_average": 1.5, "commit": "c", "sftmix / ntp, step by step": ratio}

    few, many = made(6, "padded", "length groups"), made(48, "length groups")
    part = maker.PARTS["step"]
    rows = [line for line in maker.trusted(part, [few, many]) if line.startswith("| length")]
    assert [row.split(" | ")[2:] for row in rows] == [
        ["48", "1.50", "c", "4.800 (0.000 to 9.000) |"],
        ["6", "1.50", "c", "0.600 (0.000 to 9.000) |"],
    ]
    told = " Other tables, of 48 steps, have *length groups*, too: [which to trust](#which-steps-to-trust)."
    assert maker.see_also(part, few, [few, many]) == told
    assert maker.see_also(part, made(2, "padding-free"), [few, many]) == ""
    assert maker.trusted(part, [few]) == []


def test_only_contestants_of_the_results_are_explained(maker):
    part = maker.PARTS["trl_compare"]
    told = "\n".join(maker._opening(part, [{"contestants": {"ours_ntp": 0}}, {"contestants": {"trl_best": 0}}]))
    assert re.findall(r"^- `(\w+)`", told, re.MULTILINE) == ["trl_best", "ours_ntp"]
    with pytest.raises(ValueError, match="unknown"):  # and all of them are
        maker._opening(part, [{"contestants": {"unknown": 0}}])
