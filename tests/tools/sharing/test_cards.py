"""Cards: what comes from data is text and not markup, paths of the machine stay out, and spread is told where it is."""

from __future__ import annotations

import importlib.metadata
import json
import shutil

import pytest
import yaml

from sftmix import __version__
from sftmix.tools.sharing.cards import model_card, scores_card
from sftmix.tools.sharing.facts import _without_directories, facts_of
from sftmix.tools.sharing.text import escaped, fenced, table
from tests.tiny import ROOT


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    return tmp_path / "run"


def test_the_card_of_a_model(run, finished):
    card = str(model_card(facts_of(run), "train"))
    summary = json.loads((run / "summary.json").read_text())
    assert f"| {summary['eval_nll_after']:.4f} | one seed |" in card
    assert "they say nothing of how much another seed would change" in card
    assert "| files | train.jsonl |" in card
    assert "| training examples | 29 |" in card
    fingerprint = json.loads((run / "train" / "inputs.json").read_text())["data"]["fingerprint"]
    assert f"| fingerprint of the training examples | {fingerprint} |" in card
    assert str(finished.tiny.train.parent) not in card
    assert "- benchmarks" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])
    assert recipe["objective"]["init_args"]["mu"] == 0.2
    assert recipe["training"]["learning_rate"] == 0.01
    assert "2410.05248" in card


def test_a_card_needs_no_installed_sftmix(run, monkeypatch):
    """A checkout on PYTHONPATH has no metadata."""

    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    of_others = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution", lambda n: (distribution if n == "sftmix" else of_others)(n))
    assert f"| sftmix | {__version__} |" in str(model_card(facts_of(run), "train"))


def test_what_chose_and_dropped_the_rows_is_told_in_words(run, finished):
    """A stranger with the same file must come to the same rows."""
    config = (run / "config.yaml").read_text().replace("take: null", "take: [40]").replace("  seed: null", "  seed: 7")
    (run / "config.yaml").write_text(config)
    summary = json.loads((run / "summary.json").read_text())
    summary["data"]["counts"] = {"empty_response": 4}
    (run / "summary.json").write_text(json.dumps(summary))
    card = str(model_card(facts_of(run), "train"))
    assert "| rows taken \\(data.take\\) | 40 |" in card
    assert "| empty responses dropped | 4 |" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])
    assert (recipe["data"]["take"], recipe["data"]["seed"]) == ([40], 7)
    assert recipe["data"]["eval"] == [finished.tiny.eval.name]


def test_the_target_stands_beside_the_baseline_of_its_run(run):
    facts = facts_of(run)
    told = f"with the same seed: {facts.summary['baseline']['eval_nll_after']:.4f}."
    assert told in str(model_card(facts, "train"))
    assert told not in str(model_card(facts, "baseline"))


def test_the_card_of_scores_says_what_the_confidence_is(run):
    card = scores_card(facts_of(run), rows=3, columns=["id"], name="me/scores").text
    assert "--reference.path hub:me/scores" in card
    assert "`Perplexity`. The paper's confidence: minus the perplexity of the response" in card
    config = (run / "config.yaml").read_text()
    assert "    model: null\n" in config
    (run / "config.yaml").write_text(config.replace("    model: null\n", "    model: {path: google/gemma-2b}\n"))
    card = scores_card(facts_of(run), rows=3, columns=["id"]).text
    assert "Where they name no model, it is that of the run" in card
    assert "path: google/gemma-2b" in card


def test_the_card_of_the_baseline_has_no_mixup(run):
    card = str(model_card(facts_of(run), "baseline"))
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])
    assert "objective NTP" in card
    assert not {"objective", "reference", "splitter"} & recipe.keys()


def test_spread_over_seeds_and_benchmarks_are_told_where_they_are(run):
    metrics = {"eval_nll_after": {"seeds": 3, "mean": 1.25, "sd": 0.5}}
    variants = {"SFTMix": {"metrics": metrics, "runs": [{"run": "run", "seed": 1}]}}
    (run.parent / "table.json").write_text(json.dumps({"variants": variants}))
    (run / "evaluation").mkdir()
    told = {"table": [["task", "target"], ["a|b", "0.5"]], "sentences": ["a: <b> the same."]}
    (run / "evaluation" / "table.json").write_text(json.dumps(told))
    card = str(model_card(facts_of(run), "train"))
    assert "- benchmarks" in str(model_card(facts_of(run), "baseline"))  # the table has no column of it
    assert "| 1.2500, sd 0.5000, 3 seeds |" in card
    assert "one seed: they" not in card
    assert "| a\\|b | 0.5 |" in card
    assert "- a: &lt;b&gt; the same." in card
    assert "- benchmarks" not in card


@pytest.mark.parametrize("measured", [True, False])
def test_the_card_of_another_checkpoint_has_none_of_the_figures_of_the_last(run, measured):
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    first = {key: value for key, value in lines[0].items() if not key.startswith("eval")}
    first |= {"eval_nll": 7.125} if measured else {}
    (run / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, *lines[1:])))
    (run / "train" / "MANIFEST.json").unlink()  # a finished stage with another log is refused
    (run / "evaluation").mkdir()
    told = {"table": [["task", "target"], ["arc", "0.5"]], "sentences": []}
    (run / "evaluation" / "table.json").write_text(json.dumps(told))
    facts = facts_of(run)
    card = model_card(facts, "train", step=lines[0]["step"])
    assert (facts.is_last("train", lines[0]["step"]), facts.is_last("train", lines[-1]["step"])) == (False, True)
    del facts.summary["stages"]["train"]  # as a split leaves summary.json, before the target has trained to its end
    assert not facts.is_last("train", lines[-1]["step"])
    assert [r.metric_value for r in card.data.eval_results or []] == ([7.125] if measured else [])
    assert f"{facts.summary['eval_nll_after']:.4f}" not in card.text
    assert "| arc |" not in card.text
    assert ("7.1250" in card.text, "Nothing was measured for these weights" in card.text) == (measured, not measured)
    assert "- benchmarks" in card.text
    assert ("- held-out rows" in card.text) is not measured
    assert f"the weights at step {lines[0]['step']}" in card.text


def test_directories_that_are_gone_stay_out_and_hub_ids_stay(run, finished):
    there = f"train:\n  - {finished.tiny.train}\n"
    text = (run / "config.yaml").read_text()
    assert there in text
    gone = ["/scratch/secret/a.jsonl", "~/secret/b.json", "secret/c.JSONL", "some/secret/place", "owner/name@train"]
    (run / "config.yaml").write_text(text.replace(there, "train:\n" + "".join(f"  - {name}\n" for name in gone)))
    for card in (str(model_card(facts_of(run), "train")), str(scores_card(facts_of(run), rows=3, columns=["id"]))):
        assert "secret" not in card
        assert "a.jsonl, b.json, c.JSONL, place, owner/name@train" in card
    options = {"path": "hub:me/scores@refs/pr/1", "high": ["good/ok/bad"], "columns": {"response": "/"}}
    assert _without_directories(options) == options


def test_names_from_data_are_escaped(run):
    config = (run / "config.yaml").read_text().replace("train.jsonl", "[x](javascript:y)|<script>.jsonl")
    (run / "config.yaml").write_text(config)
    for card in (model_card(facts_of(run), "train"), scores_card(facts_of(run), rows=3, columns=["id"])):
        body = card.text
        assert "<script>" not in body
        assert "](javascript" not in body
        assert "\\|&lt;script&gt;" in body


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b*c", r"a\_b\*c"),
        ("line\n# head", r"line \# head"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("[a](b)", r"\[a\]\(b\)"),
        ("`x`|$y$", r"\`x\`\|\$y\$"),
    ],
)
def test_markup_becomes_text(text, shown):
    assert escaped(text) == shown
    assert table([["head"], [text]]).splitlines()[2] == f"| {shown} |"


def test_no_line_closes_a_block():
    assert fenced("a: '```'\n````") == "`````yaml\na: '```'\n````\n`````"


def test_the_citation_file_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
