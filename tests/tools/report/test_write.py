"""The pages of `sftmix report`: of a run, in a browser, and of a table."""

import json
import re
import shutil

import plotly.offline
import pytest

from sftmix.tools.compare.table import build_table
from sftmix.tools.compare.written import write_result
from sftmix.words.errors import ConfigError
from tests.tiny import contents, groups, in_this_process, metrics, table
from tests.tools.compare.tables import table_of
from tests.tools.report.conftest import NASTY, TURNED, Text

pytestmark = pytest.mark.long

pytest.importorskip("sklearn")
write_report = pytest.importorskip("sftmix.tools.report.write").write_report

PLOTS = {"losses", "difference", "mixup", "data-map", "histogram-groups", "histogram-labels", "hidden-map"}


@pytest.fixture(scope="module")
def page(reported) -> Text:
    return Text(reported / "report" / "report.html")


def test_plots_and_rows_are_those_of_the_run(reported, page, examples):
    assert set(page.plots) == PLOTS
    curves = {trace["name"]: trace["y"] for trace in page.plots["losses"]["data"]}
    lines = metrics(reported)
    assert curves["target, ntp"] == [line["ntp"] for line in lines]
    assert curves["NTP baseline, ntp"] == [line["ntp"] for line in metrics(reported, "baseline")]
    assert curves["target, held out"] == [line["eval_nll"] for line in lines if "eval_nll" in line]
    (gap,) = page.plots["difference"]["data"]
    ours, theirs = (
        {line["step"]: line["eval_nll"] for line in metrics(reported, stage) if "eval_nll" in line}
        for stage in ("train", "baseline")
    )
    assert dict(zip(gap["x"], gap["y"], strict=True)) == {step: ours[step] - theirs[step] for step in ours}
    assert page.plots["losses"]["data"][-1]["name"].startswith("target"), "drawn above the baseline"
    counts = page.plots["histogram-labels"]["data"]
    assert {trace["name"]: sum(trace["y"]) for trace in counts} == {"low": 15, "high": 14}
    html = (reported / "report" / "report.html").read_text(encoding="utf-8")
    ranked = examples[~examples.held_out].sort_values("confidence", kind="stable").source
    shown = re.findall(r'<td class="id">(.*?)</td>.*<td title="(.*?)">', html)
    assert shown == list(ranked.drop(ranked.index[14]).items())  # of 29: the one in the middle is at no end


def test_a_hostile_response_is_shown_and_not_part_of_the_page_which_needs_no_network(page):
    assert sum(tag == "script" for tag, _ in page.tags) == len(PLOTS) + 2
    assert NASTY in page.text
    for tag, attributes in page.tags:
        assert tag != "img"
        assert not {"src", "href"} & set(attributes) or attributes.get("href", "").startswith("#"), (tag, attributes)


def test_controls_of_direction_are_shown_as_such(reported, page, examples):
    assert r"to Eve \u202e001 eroY\u202c and \u2066more\u2069" in page.text
    dots = [text for trace in page.plots["data-map"]["data"] for text in trace.get("text", ())]
    assert any(r"to Eve \u202e001" in text for text in dots)
    written = (reported / "report" / "report.html").read_text(encoding="utf-8")
    assert not {"\u202e", "\u202c", "\u2066", "\u2069"} & set(written.replace(plotly.offline.get_plotlyjs(), ""))
    assert TURNED in set(examples.response)  # the table has the rows as they are


def test_the_page_has_the_figures_of_the_summary(reported, page):
    summary = json.loads((reported / "summary.json").read_text())
    baseline = summary["baseline"]
    figures = [summary["eval_nll_before"], summary["eval_nll_after"], baseline["eval_nll_after"]]
    for value in [*figures, baseline["calibration"]["ece"], summary["confidence_std"]["log_before"]]:
        assert f"{value:.4f}" in page.text
    assert "29 training examples, 11 held out" in page.text
    assert "medqa0-shot, seed 1acc20.5000" in page.text
    assert "Standard errors are over questions" in page.text


@pytest.mark.parametrize(
    ("ahead", "said"),
    [
        (0.0, "Target and NTP baseline are equal to four decimals after"),
        (4e-5, "Target and NTP baseline are equal to four decimals after"),
        (6e-5, "The target is ahead by 0.0001 nats per token after"),
        (-6e-5, "The NTP baseline is ahead by 0.0001 nats per token after"),
    ],
)
def test_arms_that_four_decimals_do_not_tell_apart_are_said_to_be_equal(reported, tmp_path, ahead, said):
    shutil.copytree(reported, tmp_path / "run")
    summary = json.loads((reported / "summary.json").read_text())
    summary["baseline"]["eval_nll_after"] = summary["eval_nll_after"] + ahead
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    write_report(tmp_path / "run", map_size=0)
    assert said in Text(tmp_path / "run" / "report" / "report.html").text


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.mark.slow
def test_the_page_works_in_a_browser(reported, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((reported / "report" / "report.html").as_uri())
    everywhere = {plot.get_attribute("id"): plot for plot in browser.find_elements(By.CSS_SELECTOR, ".plot")}
    assert set(everywhere) == PLOTS
    assert browser.find_elements(By.CSS_SELECTOR, "#hidden-map .main-svg") == []  # far below: not drawn yet
    for name, plot in everywhere.items():
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
        drawn = (By.CSS_SELECTOR, f"#{name} .main-svg")
        WebDriverWait(browser, 60).until(lambda b, drawn=drawn: b.find_elements(*drawn))
    assert browser.execute_script("return window.broken") is None
    # a hover shows the example of a point
    point = browser.find_element(By.CSS_SELECTOR, "#data-map .point")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser).move_to_element(point).perform()
    text = (By.CSS_SELECTOR, "#data-map .hoverlayer .hovertext")
    hover = WebDriverWait(browser, 20).until(lambda b: b.find_element(*text))
    assert "confidence" in hover.text
    assert "answer:" in hover.text
    # search filters, and a heading sorts
    rows = "#example-table tbody tr:not([hidden])"
    browser.find_element(By.ID, "search").send_keys("onerror")
    (only,) = browser.find_elements(By.CSS_SELECTOR, rows)
    assert "window.broken=2" in only.text
    browser.find_element(By.ID, "search").clear()
    browser.find_element(By.ID, "search").send_keys(" ")
    browser.find_element(By.XPATH, "//th/button[text()='confidence']").click()
    cells = browser.find_elements(By.CSS_SELECTOR, f"{rows} td:nth-child(3)")
    values = [float(cell.get_attribute("data-value")) for cell in cells]
    assert len(values) == 28
    assert values == sorted(values)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_what_cannot_be_reported_is_refused(reported, tmp_path):
    (tmp_path / "begun").mkdir()
    shutil.copy(reported / "config.yaml", tmp_path / "begun")
    with pytest.raises(ConfigError, match="is not finished"):
        write_report(tmp_path / "begun", map_size=0)
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(ConfigError, match="is no report of sftmix"):
        write_report(reported, tmp_path / "mine.html", map_size=0)
    assert (tmp_path / "mine.html").read_text() == "mine"
    (tmp_path / "a.examples.parquet").write_text("mine")
    with pytest.raises(ConfigError, match=r"a\.examples\.parquet exists"):
        write_report(reported, tmp_path / "a.html", map_size=0)
    assert (tmp_path / "a.examples.parquet").read_text() == "mine"
    assert not (tmp_path / "a.html").exists()


def test_a_run_that_cannot_be_written_has_its_page_and_table_elsewhere(reported, tmp_path, sftmix):
    """Nothing is written into it. Without a split the data map has no line, and its caption names none."""
    run = shutil.copytree(reported, tmp_path / "run", ignore=shutil.ignore_patterns("report", "split"))
    (run / "report").write_text("in the way")
    before, words = contents(run), ("report", str(run), "--map", "0")
    ended = sftmix(*words)
    assert (ended.code, f"{run / 'report'} cannot be written" in ended.err, "--to FILE" in ended.err) == (2, True, True)
    to, beside = tmp_path / "pages" / "a.html", tmp_path / "pages" / "a.examples.parquet"
    ended = sftmix(*words, "--to", str(to))
    assert (ended.code, ended.out.split()) == (0, [str(to), str(beside)]), ended.err
    assert contents(run) == before
    assert len(table(beside)["id"]) == len(table(reported / "report" / "examples.parquet")["id"])
    pages = [Text(page).text for page in (to, reported / "report" / "report.html")]
    assert ["the dashed line is the median confidence" in page for page in pages] == [False, True]
    names = ["all are in a.examples.parquet beside", "all are in examples.parquet beside"]
    assert [name in page for name, page in zip(names, pages, strict=True)] == [True, True]


def test_a_split_without_confidence_can_be_looked_at_before_a_training(small, tmp_path):
    done = in_this_process("split", *small.options, "--splitter", "RandomSplit", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = in_this_process("report", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    examples = table(tmp_path / "run" / "report" / "examples.parquet")
    shown = zip(examples["id"], examples["group"], examples["held_out"], strict=True)
    assert {name: group for name, group, held_out in shown if not held_out} == groups(tmp_path / "run")


def test_a_table_has_a_page_of_its_own(tmp_path, sftmix):
    """Each seed a dot, the interval and what does not matter; the tables of table.md below."""
    run = {"seed": 1, "run": "A/seed-1", "trained_in": "A/seed-1", "metrics": {"x": 1.0}}
    variants = {
        name: {"runs": [run], "metrics": {"x": {"seeds": 1, "mean": 1.0, "sd": None}}, "no_value": [], "options": {}}
        for name in ("A", "<b>")
    }
    contrast = {"ours": "<b>", "theirs": "A", "seeds": [1, 2], "differences": [0.25, 0.75], "mean": 0.5, "sd": 0.35}
    contrast |= {"interval": [-1.5, 2.5], "interval_over": "seeds", "p": 0.5, "p_holm": 0.5, "verdict": "not tested"}
    made = {"metric": "x", "complete": True, "variants": variants, "options": {"seeds": [1, 2], "metrics": None}}
    (tmp_path / "table.json").write_text(json.dumps({**made, "contrasts": [contrast | {"inputs_that_differ": []}]}))
    (tmp_path / "compare.yaml").write_text("metric: x\n")
    assert sftmix("report", str(tmp_path), "--margin", "0.1").code == 0
    page = Text(tmp_path / "report" / "report.html")
    dots, mean = page.plots["contrasts"]["data"]
    assert (dots["x"], mean["x"]) == ([0.25, 0.75], [0.5])
    assert (mean["error_x"]["array"], mean["error_x"]["arrayminus"]) == ([2.0], [2.0])
    assert [shape["x0"] for shape in page.plots["contrasts"]["layout"]["shapes"]] == [0, -0.1]
    assert "<b> − A2 of 2+0.5000" in page.text
    for words, said in (("--margin", "0"), "above 0"), (("--map", "3"), "--map is 3"):
        assert said in sftmix("report", str(tmp_path), *words).err
    assert "is a table: name a run of it" in sftmix("track", str(tmp_path), "--to", "tensorboard").err


def test_the_page_of_a_table_says_what_table_md_says(tmp_path):
    """Runs that diverged, were cut short or taken over come first; what contrasts and figures are is below them."""
    comparison = table_of(tmp_path, "AB", 3, metric="eval_nll_after", metrics=["other"])
    made = {"skipped": 1.0, "steps": 2, "total_steps": 3}
    figures = {c.name: {"eval_nll_after": float(c.seed), "stages": {"train": made}} for c in comparison.cells}
    figures["B/seed-2"] = {}
    (tmp_path / "compare.yaml").write_text("variants: {}\n")
    write_result(tmp_path, build_table(comparison, figures))
    write_report(tmp_path, map_size=0)
    said, page = (tmp_path / "table.md").read_text(), Text(tmp_path / "report" / "report.html").text
    notes = re.findall(r"^(?:\*\*|- |(?=Mean ))(.*?)(?:\*\*)?$", said, re.M)
    assert [note for note in notes if note not in page] == []
    for words in ("diverged", "flatters", "skipped", "was stopped", "not corrected", "nats", "no run has 'other'"):
        assert any(words in note for note in notes), words
    assert page.index("flatters") < page.index("inputs that differ") < page.index("not corrected")
    write_result(tmp_path, build_table(comparison, {"A/seed-1": figures["A/seed-1"]}))
    write_report(tmp_path, map_size=0)
    page = Text(tmp_path / "report" / "report.html").text
    assert page.count("INCOMPLETE: 1 of 6 runs are done.") == 1
    assert "not corrected" not in page
