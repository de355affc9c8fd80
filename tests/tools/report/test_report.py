"""`sftmix report` on a finished run: the table against the run's own files and transformers, the page in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from sftmix.common.errors import ConfigError
from sftmix.common.tables import read_dynamics
from tests.tiny import groups, in_this_process, make_tiny, metrics, sftmix, table
from tests.tools.report.pages import Text

pytestmark = pytest.mark.long

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
write_report = pytest.importorskip("sftmix.tools.report.write").write_report

NASTY = "</script><script>window.broken=1</script><img src=x onerror=window.broken=2> <b>bold</b> &amp;"
"""A response that would run, if it were not escaped."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of rows with labels, scores and a hostile response, with its report."""
    place = tmp_path_factory.mktemp("report")
    tiny = make_tiny(place, dropout=0.0)
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"quality": "high" if number % 2 else "low", "score": number / 4, "group": f"g{number % 3}"}
        row |= {"x": number, "row_x": -number}
    held_out = [json.loads(line) for line in tiny.eval.read_text().splitlines()]
    tiny.eval.write_text("".join(json.dumps({**row, "group": "own", "confidence": "high"}) + "\n" for row in held_out))
    rows[3]["output"] = NASTY
    tiny.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["run", *tiny.options, "--data.label_field", "quality", "--with_baseline", "--out", "run"]
    done = in_this_process(*words, cwd=place)
    assert done.returncode == 0, done.stderr
    done = in_this_process("report", "run", "--score", "--map", "20", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["run/report/report.html", "run/report/examples.parquet"]
    return place / "run"


@pytest.fixture(scope="module")
def examples(run):
    return pd.read_parquet(run / "report" / "examples.parquet").set_index("id")


# ------------------------------------------------------------------------------------------ the table


def test_the_table_has_every_example_with_its_text_and_columns(run, examples):
    rows = [json.loads(line) for line in (run.parent / "train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (run.parent / "eval.jsonl").read_text().splitlines()]
    assert examples.held_out.tolist() == [False] * len(rows) + [True] * len(held_out)
    train = examples[~examples.held_out]
    assert train.response.tolist() == [row["output"] for row in rows]
    assert train.label.tolist() == [row["quality"] for row in rows]
    assert train.score.tolist() == [row["score"] for row in rows]
    assert train.row_group.tolist() == [row["group"] for row in rows]  # the split has a column of that name
    assert train.group.to_dict() == groups(run)
    assert train.row_x.tolist() == [row["row_x"] for row in rows]
    assert train.row_row_x.tolist() == [row["x"] for row in rows]
    held = examples[examples.held_out]
    assert held.response.tolist() == [row["output"] for row in held_out]
    assert (held.row_group == "own").all()
    assert (held.row_confidence == "high").all()
    assert held.group.isna().all()


def test_the_table_has_what_the_reference_saw(run, examples):
    found = pd.DataFrame(table(run / "confidence" / "dynamics.parquet"))
    assert sorted(found.step.unique()) == [6, 12]
    for step, part in found.groupby("step"):
        expected = np.exp(part.nll_sum / part.n_tokens).to_numpy()
        assert examples.loc[part.id, f"perplexity_step_{step}"].to_numpy() == pytest.approx(expected, rel=1e-12)
    share = found.groupby("id", sort=False).apply(lambda part: (part.n_correct / part.n_tokens).mean())
    assert examples.loc[share.index, "correctness"].to_numpy() == pytest.approx(share.to_numpy(), rel=1e-12)
    confidence = pd.DataFrame(table(run / "confidence" / "confidence.parquet")).set_index("id")
    for name in ("confidence", "variability"):
        assert examples.loc[confidence.index, name].tolist() == confidence[name].tolist()
    assert examples[examples.held_out].confidence.isna().all()


def loss_of(model, tokenizer, instruction: str, response: str) -> float:
    """Mean NLL of the response tokens, by transformers' own loss."""
    turns = [{"role": "user", "content": instruction}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
    ids = tokenizer(whole.rstrip("\n"), add_special_tokens=False, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt, add_special_tokens=False).input_ids)] = -100
    return float(model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize(
    ("column", "model"),
    [("loss_before", "../model"), ("loss_after", "train/model"), ("loss_after_baseline", "baseline/model")],
)
@torch.no_grad()
def test_losses_are_those_of_transformers(run, examples, column, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(run / model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "train" / "model")
    assert examples[~examples.held_out][column].notna().all()
    some = [*examples[~examples.held_out].index[[0, 3, 17]], *examples[examples.held_out].index[:2]]
    for name in some:
        row = examples.loc[name]
        assert row[column] == pytest.approx(loss_of(loaded, tokenizer, row.instruction, row.response), rel=2e-5)


def test_both_ends_have_a_place_on_the_map(examples):
    placed = examples[examples.x.notna()]
    ordered = examples[~examples.held_out].confidence.sort_values(kind="stable").index
    assert set(placed.index) == {*ordered[:10], *ordered[-10:]}
    assert placed.y.notna().all()
    assert len(placed[["x", "y"]].drop_duplicates()) == 20


def test_a_later_report_without_scores_keeps_them(run, examples, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.chdir(run.parent)
    write_report([tmp_path / "run"], map_size=0)
    again = pd.read_parquet(tmp_path / "run" / "report" / "examples.parquet").set_index("id")
    assert again.loss_after.tolist() == examples.loss_after.tolist()
    assert again.x.isna().all()


def test_losses_of_a_model_that_was_trained_anew_are_not_kept(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    file, manifest = tmp_path / "run" / "report" / "examples.parquet", tmp_path / "run" / "train" / "MANIFEST.json"
    made = pq.read_table(file)
    for name in ("loss_before", "loss_after"):
        made = made.set_column(made.column_names.index(name), name, pc.add(made[name], 100.0))
    pq.write_table(made, file)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "other": "training"}))
    monkeypatch.chdir(run.parent)
    write_report([tmp_path / "run"], map_size=0)
    again = pd.read_parquet(file).set_index("id")
    again = again[~again.held_out]
    sample = read_dynamics(run / "train" / "sample.parquet")
    assert again.loss_after.to_dict() == dict(zip(sample.ids, sample.nll_sum[:, -1] / sample.n_tokens, strict=True))
    assert (again.loss_before > 100).all()  # of the model before training, which is the same


@pytest.mark.parametrize(("name", "side"), [("train.jsonl", "training"), ("eval.jsonl", "held-out")])
def test_a_run_whose_rows_have_changed_is_not_reported(run, tmp_path, monkeypatch, name, side):
    for file in ("train.jsonl", "eval.jsonl"):
        shutil.copy(run.parent / file, tmp_path)
    shutil.copytree(run.parent / "model", tmp_path / "model")
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "model"))
    config = (tmp_path / "run" / "config.yaml").read_text().replace(str(run.parent), str(tmp_path))
    (tmp_path / "run" / "config.yaml").write_text(config)
    inputs = tmp_path / "run" / "reference" / "inputs.json"  # of an earlier try, which the target does not use
    inputs.write_text(inputs.read_text().replace('"fingerprint": "', '"fingerprint": "other'))
    monkeypatch.chdir(tmp_path)
    write_report([Path("run")], map_size=0)
    first, *others = (tmp_path / name).read_text().splitlines()
    row = json.loads(first)
    (tmp_path / name).write_text("\n".join([json.dumps({**row, "output": row["output"] + " more"}), *others]) + "\n")
    with pytest.raises(ConfigError, match=f"run was made from other rows: the {side} rows are others"):
        write_report([Path("run")], map_size=0)


# ------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(run) -> Text:
    return Text(run / "report" / "report.html")


PLOTS = {
    "losses",
    "difference",
    "mixup",
    "mu",
    "rates",
    "data-map",
    "histogram-groups",
    "histogram-labels",
    "hidden-map",
    "topics",
}
PLOTS |= {"reliability", "before-after"}


def test_plots_and_rows_are_those_of_the_run(run, page, examples):
    assert set(page.plots) == PLOTS
    curves = {trace["name"]: trace for trace in page.plots["losses"]["data"]}
    lines = metrics(run)
    assert curves["target, step"]["y"] == [line["ntp"] for line in lines]
    assert curves["NTP baseline, step"]["y"] == [line["ntp"] for line in metrics(run, "baseline")]
    assert curves["target, held out"]["y"] == [line["eval_nll"] for line in lines if "eval_nll" in line]
    counts = page.plots["histogram-labels"]["data"]
    assert {trace["name"]: sum(trace["y"]) for trace in counts} == {"low": 15, "high": 14}
    html = (run / "report" / "report.html").read_text(encoding="utf-8")
    ranked = examples[~examples.held_out].sort_values("confidence", kind="stable").source
    shown = re.findall(r'<td class="id">(.*?)</td>.*<td title="(.*?)">', html)
    assert shown == list(ranked.drop(ranked.index[14]).items())  # of 29: the one in the middle is at no end


def test_a_hostile_response_is_shown_and_not_part_of_the_page(page):
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert sum(tag == "script" for tag, _ in page.tags) == len(PLOTS) + 2
    assert NASTY in page.text


def test_the_page_needs_no_network(page):
    for tag, attributes in page.tags:
        assert not {"src", "href"} & set(attributes) or attributes.get("href", "").startswith("#"), (tag, attributes)


def test_the_sentences_have_the_figures_of_the_summary(run, page):
    summary = json.loads((run / "summary.json").read_text())
    for value in (summary["eval_nll_after"], summary["eval_nll_before"], summary["baseline"]["eval_nll_after"]):
        assert f"{value:.4f}" in page.text
    assert "29 examples with" in page.text
    assert "11 are held out" in page.text
    assert "This is one seed" in page.text
    assert "`" not in page.text.partition("Training")[0].partition("What happened")[2]


def test_planned_pairs_are_those_that_the_first_step_mixed(run, monkeypatch):
    """All pairs of the step give its number of token pairs and, by the formula on the base model, its Mixup loss."""
    from transformers import AutoModelForCausalLM

    from sftmix.tools.report import tokens
    from sftmix.tools.report.run import read_run

    monkeypatch.setattr(tokens, "PAIRS", 1000)
    monkeypatch.chdir(run.parent)
    view = read_run(Path("run"))
    planned = tokens.planned_pairs(view)
    first = metrics(run)[0]
    assert sum(len(pair.lam) for pair in planned) == first["mixup_tokens"]
    model = AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype=torch.float32).eval()
    total = 0.0
    for pair in planned:
        sides = []
        for row in pair.rows:
            example = view.rows.data.train[row]
            at = np.flatnonzero(example.target)
            with torch.no_grad():
                logits = model(torch.from_numpy(example.input_ids)[None]).logits[0, at - 1].double()
            sides.append((logits, example.input_ids[at]))
        for n, lam in enumerate(pair.lam):
            mixed = (lam * sides[0][0][n] + (1 - lam) * sides[1][0][n]).log_softmax(dim=-1)
            total -= float(lam * mixed[sides[0][1][n]] + (1 - lam) * mixed[sides[1][1][n]])
    assert total / first["mixup_tokens"] == pytest.approx(first["mixup"], rel=1e-5)


def test_tokens_are_those_of_the_response_with_their_nll_before_and_after(run, monkeypatch):
    from sftmix.tools.report.look import Look
    from sftmix.tools.report.run import read_run
    from sftmix.tools.report.tokens import Responses

    monkeypatch.chdir(run.parent)
    view, rows = read_run(Path("run")), np.array([5])
    count = int(view.rows.data.train[5].target.sum())
    before, after = np.arange(count) + 1.0, np.arange(count) / 2
    shown = Responses(view, *(Look(rows, np.zeros((1, 2)), [nll]) for nll in (before, after))).of(5)
    end = view.rows.encoder.tokenizer.decode([view.rows.encoder.end_of_turn_id])
    assert "".join(token.text for token in shown.tokens) == view.texts[5][1] + end
    assert [(token.before, token.after) for token in shown.tokens] == list(zip(before, after, strict=True))


# ---------------------------------------------------------------------------------------- in a browser


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
def test_the_page_works_in_a_browser(run, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((run / "report" / "report.html").as_uri())
    everywhere = {plot.get_attribute("id"): plot for plot in browser.find_elements(By.CSS_SELECTOR, ".plot")}
    assert set(everywhere) == PLOTS
    assert browser.find_elements(By.CSS_SELECTOR, "#before-after .main-svg") == []  # far below: not drawn yet
    for name, plot in everywhere.items():
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
        drawn = (By.CSS_SELECTOR, f"#{name} .main-svg")
        WebDriverWait(browser, 60).until(lambda b, drawn=drawn: b.find_elements(*drawn))
    assert browser.execute_script("return window.broken") is None
    # a hover shows the example of a point
    point = browser.find_element(By.CSS_SELECTOR, "#data-map .point")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser).move_to_element(point).perform()
    hover = WebDriverWait(browser, 20).until(
        lambda b: b.find_element(By.CSS_SELECTOR, "#data-map .hoverlayer .hovertext")
    )
    assert "confidence" in hover.text
    assert "answer:" in hover.text
    # search filters, and a heading sorts
    rows = "#example-table tbody tr:not([hidden])"
    everything = len(browser.find_elements(By.CSS_SELECTOR, rows))
    browser.find_element(By.ID, "search").send_keys("onerror")
    (only,) = browser.find_elements(By.CSS_SELECTOR, rows)
    assert "window.broken=2" in only.text
    browser.find_element(By.ID, "search").clear()
    browser.find_element(By.ID, "search").send_keys(" ")
    assert len(browser.find_elements(By.CSS_SELECTOR, rows)) == everything == 28
    browser.find_element(By.XPATH, "//th/button[text()='confidence']").click()
    cells = browser.find_elements(By.CSS_SELECTOR, f"{rows} td:nth-child(3)")
    values = [float(cell.get_attribute("data-value")) for cell in cells]
    assert values == sorted(values)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


# ------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_reported_is_refused(run, tmp_path):
    done = in_this_process("report", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not a run directory" in done.stderr
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "begun")
    with pytest.raises(ConfigError, match=r"has no summary\.json"):
        write_report([tmp_path / "begun"], map_size=0)
    done = in_this_process("report", str(run), str(run), "--map", "5", cwd=tmp_path)
    assert (done.returncode, "only the report of one run has a map" in done.stderr) == (2, True)
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(ConfigError, match="is no report of sftmix"):
        write_report([run], tmp_path / "mine.html", map_size=0)
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_several_runs_stand_side_by_side(run, tmp_path):
    assert write_report([run, run], tmp_path / "both.html", map_size=0) == [tmp_path / "both.html"]
    page = Text(tmp_path / "both.html")
    assert set(page.plots) == {"curves-eval_nll", "curves-ntp", "curves-mixup", "curves-grad_norm"}
    assert page.plots["curves-ntp"]["data"][0]["y"] == [line["ntp"] for line in metrics(run)]


@pytest.mark.slow
def test_adapters_and_a_single_checkpoint_are_reported(run, monkeypatch):
    """The loss after training is that of the merged model; without variability, the data map has a plain axis."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["--config", str(run / "config.yaml"), "--model.lora.r", "2", "--reference.checkpoints", "1"]
    done = sftmix(
        "run", *words, "--with_baseline", "false", "--training.max_steps", "3", "--out", "lora", cwd=run.parent
    )
    assert done.returncode == 0, done.stderr
    done = sftmix("export", "lora", "--merge", "--to", "merged", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(run.parent)
    write_report([Path("lora")], map_size=20, score_all=True)
    examples = pd.read_parquet("lora/report/examples.parquet").set_index("id")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    for name in examples[~examples.held_out].index[[0, 3]]:
        row = examples.loc[name]
        with torch.no_grad():
            expected = loss_of(model, tokenizer, row.instruction, row.response)
        assert row.loss_after == pytest.approx(expected, rel=2e-5)
        assert row.loss_after != pytest.approx(row.loss_before, rel=1e-4)
    page = Text(Path("lora/report/report.html"))
    (points,) = page.plots["data-map"]["data"]
    packed = points["x"]  # as plotly writes arrays
    assert set(np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"]).tolist()) == {0.0}
    assert page.plots["data-map"]["layout"]["xaxis"].get("type") != "log"
