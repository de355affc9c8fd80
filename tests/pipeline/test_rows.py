"""Which rows are trained on, by components of a user's own, which are held out and how their NLL is told, scores of
one's own for them, and plain text through the whole recipe."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from sftmix.components import Selector
from sftmix.data import encode_dataset, prepare
from sftmix.disk.files import read_json
from sftmix.options import DataOptions, ReferenceModel
from sftmix.pipeline.recipe import run
from sftmix.pipeline.rows import read_rows, rows_of_reference
from sftmix.ranks.world import World
from sftmix.text.encoder import encoder_for
from sftmix.tools.quickstart import write_jsonl
from sftmix.words.errors import ConfigError
from tests.configs import read_config
from tests.fast import some_fast
from tests.model.test_packing import LEAKY
from tests.pipeline.test_identity import config
from tests.text.small_tokenizers import QWEN3
from tests.tiny import groups, metrics, table


class LongResponses(Selector):
    """The k longest responses, in an order that is not the file's."""

    def __init__(self, *, k: int = 12):
        self.k = k

    def select(self, scores, *, seed):
        assert np.isnan(scores.confidence).all()
        assert set(scores.columns) >= {"kind"}
        return np.argsort(-scores.n_tokens, kind="stable")[: self.k].astype(np.int64)


def test_only_the_selected_are_scored_split_and_trained_on(finished, tiny, tmp_path, capsys):
    run(config(tiny, tmp_path / "run", selector=LongResponses()))
    everything = table(finished.path / "confidence" / "dynamics.parquet")
    lengths = dict(zip(everything["id"], everything["n_tokens"], strict=True))
    chosen = table(tmp_path / "run" / "selection" / "selected.parquet")["id"]
    assert sorted(lengths[i] for i in chosen) == sorted(lengths.values())[-12:]
    assert chosen == [i for i in lengths if i in set(chosen)]
    for name in ("confidence/dynamics", "confidence/confidence", "split/split"):
        assert set(table(tmp_path / "run" / f"{name}.parquet")["id"]) == set(chosen)
    assert "12 of 29 examples selected by LongResponses" in capsys.readouterr().out


@pytest.mark.slow
def test_another_selection_is_another_run(tiny, tmp_path):
    run(config(tiny, tmp_path / "run", selector=LongResponses()))
    with pytest.raises(ConfigError, match=r"selector\.k: 12 -> 10"):
        run(config(tiny, tmp_path / "run", selector=LongResponses(k=10)))
    others = [{"instruction": f"Say {i}.", "output": f"{i}", "kind": "x"} for i in range(20)]
    write_jsonl(tmp_path / "others.jsonl", others)
    changed = config(tiny, tmp_path / "run", selector=LongResponses())
    changed = replace(changed, data=replace(changed.data, train=str(tmp_path / "others.jsonl")))
    with pytest.raises(ConfigError, match="the training rows are others"):
        run(changed)


@pytest.mark.parametrize("thinks", [False, True])
def test_the_prompt_of_thinking_is_for_rows_that_think(thinks, small, tmp_path):
    """For the target and for a reference with a template of its own: Qwen3's other prompt has an empty thought."""
    thought = {"reasoning_content": "2+2"} if thinks else {}
    question, answer = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Four.", **thought}
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": [question, answer]}])
    (tmp_path / "qwen3.jinja").write_text(QWEN3)
    made, template = config(small, tmp_path / "run"), str(tmp_path / "qwen3.jinja")
    made.data = DataOptions(train=str(tmp_path / "rows.jsonl"), template=template, max_length=128)
    made, rows = read_rows(made, World())
    encoder, _ = rows_of_reference(made, rows, ReferenceModel(template=template), World())
    for one in (rows.encoder, encoder):
        prompt = one.decode(one.prompt([question]))
        assert prompt.endswith("assistant\n" if thinks else "<think>\n\n</think>\n\n")


def written(path: Path, ids: list[str]) -> dict[str, float]:
    """Write a score for each id, and return them; those of ids in the list's order rise and fall."""
    scores = {name: float((7 * place) % len(ids)) for place, name in enumerate(ids)}
    frame = pd.DataFrame({"id": list(scores), "score": list(scores.values())})
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return scores


@pytest.mark.parametrize("name", some_fast(["scores.csv", "scores.parquet"], every=2))
def test_scores_of_ones_own_divide_the_rows(name, tiny, finished, tmp_path, made):
    ids = list(groups(finished.path))
    scores = written(tmp_path / name, [*ids, "another"])
    run = made("run", *tiny.bare, "--confidence", "FromFile", "--confidence.path", str(tmp_path / name))
    assert not (run / "reference").exists()
    stored = table(run / "confidence" / "confidence.parquet")
    assert dict(zip(stored["id"], stored["confidence"], strict=True)) == {name: scores[name] for name in ids}
    ranked, found = sorted(ids, key=lambda name: -scores[name]), groups(run)
    assert {found[name] for name in ranked[:14]} == {"confident"}
    assert {found[name] for name in ranked[-14:]} == {"unconfident"}
    assert metrics(run)[0]["mixup_tokens"] > 0


def test_scores_of_other_rows_are_not_taken_over(tiny, finished, rows, tmp_path, made, refused):
    """The same rows in another order have the same ids, and other places."""
    written(tmp_path / "scores.csv", list(groups(finished.path)))
    words = [*tiny.bare, "--confidence", "FromFile", "--confidence.path", str(tmp_path / "scores.csv")]
    made("confidence", *words)
    write_jsonl(tiny.train, rows[::-1])
    assert "confidence: was made with other inputs: the training rows are others" in refused("run", *words)


def test_a_missing_score_is_named(tiny, finished, tmp_path, refused):
    ids = list(groups(finished.path))
    written(tmp_path / "scores.csv", ids[1:])
    words = ("confidence", *tiny.options, "--confidence", "FromFile", "--confidence.path")
    told = refused(*words, str(tmp_path / "scores.csv"), code=3)
    assert f"no score of 1 of {len(ids)} examples, first {ids[0]}" in told
    assert "confidence.path: nowhere.csv: there is no such file" in refused(*words, "nowhere.csv", code=3)


LENGTH = 24


@pytest.fixture
def words(tiny, rows, tmp_path) -> list[str]:
    """Options of a run on 30 documents of rows that the tiny tokenizer knows."""
    texts = [{"text": f"{row['instruction']} {row.get('input', '')} {row['output']}"} for row in rows]
    path = tmp_path / "texts.jsonl"
    write_jsonl(path, texts)
    return [
        *("--model.path", str(tiny.model), "--data.train", str(path), "--data.max_length", str(LENGTH)),
        *("--data.format", "text"),
        *("--data.eval_fraction", "0.2", "--training.learning_rate", "0.01", "--training.epochs", "2"),
        *("--training.global_batch_size", "4", "--training.micro_batch_size", "4", "--reference.checkpoints", "2"),
    ]


def alone(model, tokens: list[list[int]]) -> tuple[float, int]:
    """Sum of the NLL of every token that has one before it in its document, and their number."""
    total, count = 0.0, 0
    for ids in tokens:
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
        total -= float(torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())
        count += len(ids) - 1
    return total, count


def documents_of(window) -> list[list[int]]:
    return [part.tolist() for part in np.split(window.input_ids, window.starts[1:])]


@pytest.mark.slow
def test_sftmix_on_text_from_end_to_end(made, sftmix, words, tiny):
    out = made("run", *words, "--with_baseline")
    assert "29 documents read" in made.printed
    summary = read_json(out / "summary.json")
    config = read_config(out / "config.yaml")
    assert config.data.format == "text"

    # Every window is scored, split and paired by its id; each of two mixed tokens is one NTP token.
    split = groups(out)
    assert table(out / "confidence" / "confidence.parquet")["id"] == list(split)
    assert list(split.values()).count("confident") == len(split) // 2
    assert 0.4 * summary["ntp_tokens"] < summary["mixup_tokens"] <= 0.5 * summary["ntp_tokens"]

    # The held-out NLL before training is that of each document of each window alone under the base model.
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    prepared = prepare(config.data, config.seed)
    data = encode_dataset(
        prepared, encoder_for(AutoTokenizer.from_pretrained(tiny.model), config.data), max_length=LENGTH
    )
    assert data.eval is not None
    assert data.train.packed
    with torch.no_grad():
        total, count = alone(model, [d for window in data.eval for d in documents_of(window)])
    assert summary["eval_nll_before"] == pytest.approx(total / count, rel=1e-5)
    assert summary["eval_nll_after"] < summary["eval_nll_before"]

    # The base's tokenizer is exported as it was, and the same command changes nothing.
    own, exported = (AutoTokenizer.from_pretrained(path) for path in (tiny.model, out / "train" / "model"))
    assert exported.chat_template == own.chat_template
    resolved = sftmix("run", "--config", str(out / "config.yaml"))
    assert resolved.code == 0, resolved.err


@pytest.mark.parametrize("stage", ["train", "reference", "scoring"])
def test_a_model_that_lets_documents_see_each_other_is_refused(stage, words, tiny, tmp_path, refused):
    path, tokenizer = tmp_path / "opt", AutoTokenizer.from_pretrained(tiny.model)
    config = OPTConfig(vocab_size=len(tokenizer), **{k: v for k, v in LEAKY["opt"].items() if k != "vocab_size"})
    OPTForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    words = [str(path) if word == str(tiny.model) else word for word in words]
    if stage != "reference":
        del words[-2:]  # reference.checkpoints, which a trained reference alone has
    words += {
        "train": ["--objective", "NTP"],
        "reference": [],
        "scoring": ["--reference", "FromCheckpoints", "--reference.paths", f"[{path}]"],
    }[stage]
    told = refused("run" if stage == "train" else "reference", *words)
    assert "does not keep packed documents apart" in told
    assert not list(tmp_path.glob("run/*/metrics.jsonl")), "before the first step"


def test_another_length_of_the_reference_is_refused(words, refused):
    told = refused("run", *words, "--reference.model.max_length", "16")
    assert "a reference reads the windows of the target" in told


def test_responses_without_instructions_are_refused_where_there_are_none(words, refused):
    """Where documents are packed, the cuts between them would lie elsewhere."""
    told = refused("reference", *words, "--reference.response_alone")
    assert "windows (of plain text, or of your renderer) have no instructions" in told


def test_a_renderer_is_refused_where_there_are_no_turns(words, tiny, tmp_path, refused):
    """Also where `auto` finds out that a file holds documents."""
    (tmp_path / "a.txt").write_text("Once upon a time.")
    own = ("--renderer", "sftmix.text.ChatTemplate")
    said = "renderer ChatTemplate and data.format text exclude each other: set renderer to null"
    assert said in refused("reference", *words, *own)
    texts = ("--data.train", str(tmp_path / "a.txt"))
    assert said in refused("reference", "--model.path", str(tiny.model), *texts, *own)
