"""Cards: what comes from data is text and not markup, and paths of the machine stay out."""

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from sftmix import __version__
from sftmix.config.read import read_yaml
from sftmix.disk.files import read_json, write_json
from sftmix.disk.tables import read_dynamics, write_dynamics
from sftmix.tools.sharing.cards import model_card, without_directories, write_scores
from sftmix.tools.sharing.command import write_run_cards
from sftmix.words.errors import DifferenceError
from tests.tiny import ROOT, table
from tests.tools.evaluate.bench import write_result


def recipe_of(card):
    text = card.partition("## Recipe\n")[2].partition("## Citation")[0]
    return yaml.safe_load(textwrap.dedent(text.partition(":\n\n")[2]))


def benchmarked(run):
    write_result(run, "a|<b>", [0.0, 1.0])


def test_the_card_of_a_model(copied, finished):
    summary = read_json(copied / "summary.json")
    summary["data"]["counts"] = {"empty_response": 4}
    write_json(copied / "summary.json", summary)
    card = model_card(copied, "train")
    left, right = summary["eval_nll_after"], summary["baseline"]["eval_nll_after"]
    assert f"| NLL, nats per response token | {left:.4f} | {right:.4f} |" in card
    assert {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results}["eval_nll_after"] == left
    for name, value in [("files", "train.jsonl"), ("train", 29), (r"empty\_response", 4)]:
        assert f"| {name} | {value} |" in card
    assert str(finished.tiny.train.parent) not in card
    recipe = recipe_of(card)
    assert recipe["objective"]["init_args"]["mu"] == 0.2
    assert recipe["data"]["eval"] == [finished.tiny.eval.name]
    baseline = model_card(copied, "baseline")
    assert ("objective NTP" in baseline, "NTP baseline, same rows" in baseline) == (True, False)
    assert ("\n# run: SFTMix target\n" in card, "\n# run: NTP baseline\n" in baseline) == (True, True)
    plain = read_yaml(copied / "config.yaml")
    write_json(copied / "config.yaml", {**plain, "objective": "NTP"})
    assert "\n# run: NTP target\n" in model_card(copied, "train")


def test_shared_scores_are_the_runs_without_the_nll_of_single_tokens_and_their_card_says_how_they_are_read(copied):
    file = copied / "confidence" / "dynamics.parquet"
    dynamics = read_dynamics(file)
    of_tokens = ("token_nll", "alone_token_nll", "token_entropy", "token_margin")
    private = dict.fromkeys(of_tokens, dynamics.token_nll) | {"states": np.ones((len(dynamics.ids), 4), np.float16)}
    write_dynamics(file, replace(dynamics, alone_nll_sum=dynamics.nll_sum + 1, **private))
    kept = table(file)
    assert all(kept.pop(name) for name in (*of_tokens, "state"))
    write_scores(copied, copied / "scores")
    assert table(copied / "scores" / "dynamics.parquet") == kept
    card = (copied / "scores" / "README.md").read_text()
    # | dynamics.parquet | id, nll_sum (nats, over the response) | -> id, nll_sum
    listed = re.findall(r"^\| (\w+\.parquet) \| (.*) \|$", card, re.MULTILINE)
    columns = {name: re.sub(r" \(.*?\)", "", text).split(", ") for name, text in listed}
    assert columns == {path.name: [*table(path)] for path in (copied / "scores").glob("*.parquet")}
    assert "--reference.path hub:OWNER/NAME" in card
    assert "Perplexity: The paper's confidence: minus the perplexity of the response" in card
    assert recipe_of(card)["reference"]["init_args"]["checkpoints"] == 2


def test_benchmarks_are_told_of_the_models_that_they_measured(copied):
    benchmarked(copied)
    write_result(copied, "a|<b>", [0.0, 0.0], model="base")
    assert "- benchmarks" in model_card(copied, "baseline")  # the table has no column of it
    card = model_card(copied, "train")
    assert re.search(r"\| a\\\|&lt;b&gt; \|.*\| 0.5000 \|", card)
    assert "- a\\|&lt;b&gt;: target - base = \\+0.5000" in card
    assert "- benchmarks" not in card


def test_benchmarks_of_a_model_that_was_trained_again_are_left_out(copied):
    benchmarked(copied)
    write_result(copied, "pubmedqa", [1.0, 1.0], model="base")
    (copied / "train" / "model" / "config.json").write_text("{}")
    card = model_card(copied, "train")
    assert "0.5000" not in card
    assert "- benchmarks" in card


def test_the_card_of_a_checkpoint_has_no_figures_of_the_run(copied):
    benchmarked(copied)
    card = ModelCard(model_card(copied, "train", step=3))
    last = read_json(copied / "summary.json")["eval_nll_after"]
    assert card.data.eval_results is None
    assert f"{last:.4f}" not in card.text
    assert "a\\|&lt;b&gt;" not in card.text
    assert "Nothing was measured for these weights" in card.text
    assert "the weights at step 3" in card.text


def test_directories_that_are_gone_stay_out_and_hub_ids_stay(copied, finished):
    there = f"train:\n  - {finished.tiny.train}\n"
    text = (copied / "config.yaml").read_text()
    assert there in text
    gone = ["/scratch/secret/a.jsonl", "~/secret/b.json", "secret/c.JSONL", "some/secret/place", "owner/name@train"]
    (copied / "config.yaml").write_text(text.replace(there, f"train: {gone}\n"))
    card = model_card(copied, "train")
    assert "secret" not in card
    assert "a.jsonl, b.json, c.JSONL, place, owner/name@train" in card
    options = {"path": "hub:me/scores@refs/pr/1", "columns": {"response": "/"}}
    options["train"] = ["openai/gsm8k:main@train[:10%]", "openai/gsm8k:main"]
    assert without_directories(options) == options
    for place in ("C:/secret/place", "/secret data/place", "~/secret data/place", "../secret data/place"):
        assert without_directories(place) == "place"
    assert without_directories("secret data/rows.json") == "rows.json"


def test_texts_that_are_no_paths_stay_whole():
    texts = ["Answer yes/no.", "One line.\nYes / no", "</s>", "<|a|>/", "{{ a }}/{{ b }}"]
    assert without_directories({"texts": texts, "response": "and/or"}) == {"texts": texts, "response": "and/or"}


def test_a_directory_with_a_subset_is_cut_to_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "rows").mkdir(parents=True)
    assert without_directories("secret/rows:main@train") == "rows:main@train"


def test_names_from_data_are_escaped(copied):
    config = (copied / "config.yaml").read_text().replace("train.jsonl", "[x](javascript:y)|<script>.jsonl")
    (copied / "config.yaml").write_text(config)
    prose, _, recipe = model_card(copied, "train").partition("## Recipe\n")
    assert "\\[x\\]\\(javascript:y\\)\\|&lt;script&gt;.jsonl |" in prose
    assert "<script>" not in prose
    assert all(line.startswith("    ") for line in recipe.splitlines() if "<script>" in line)


@pytest.mark.parametrize("data", [{"train": [1]}, {"counts": True}, {"rows": 10**400, "train": "x"}, 3])
def test_a_summary_of_another_form_is_named(copied, data):
    summary = copied / "summary.json"
    write_json(summary, read_json(summary) | {"data": data})
    with pytest.raises(DifferenceError, match=rf"{re.escape(str(summary))} is not as a run writes it"):
        model_card(copied, "train")


def test_the_citation_file_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__


def test_cards_that_nobody_edited_follow_the_run(copied):
    target, baseline = (copied / stage / "model" / "README.md" for stage in ("train", "baseline"))
    baseline.write_bytes("à moi".encode("cp1252"))
    benchmarked(copied)
    write_run_cards(copied)
    assert re.search(r"\| a\\\|&lt;b&gt; \|.*\| 0.5000 \|", target.read_text())
    assert baseline.read_text("cp1252") == "à moi"


def test_an_export_takes_away_what_killed_ones_left_of_this_name_alone(finished, sftmix, tmp_path):
    """Another may be at work beside it, to a name that begins alike or to the same."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        dead = child.pid
    left = {f".tmp-mm.{dead}", f".tmp-.tmp-mm.{dead}.{dead}"}
    others = {f".tmp-mm.bf16.{dead}", f".tmp-mm.{os.getppid()}", ".tmp-mm.txt"}
    for name in left | others:
        (tmp_path / name / "weights").mkdir(parents=True)
    ended = sftmix("export", str(finished.path), "--to", str(tmp_path / "mm"))
    assert ended.code == 0, ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"mm", *others}
