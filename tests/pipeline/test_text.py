"""Plain text through the whole recipe and the command line: NTP, SFTMix, what is exported, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.common.files import read_json
from sftmix.config.read import read_config
from sftmix.data import encode, encoder_for, prepare
from sftmix.tools.quickstart import write_rows
from tests.tiny import groups, table

LENGTH = 24


@pytest.fixture
def words(tiny, rows, tmp_path) -> list[str]:
    """Options of a run on 30 documents of rows that the tiny tokenizer knows."""
    texts = [{"text": f"{row['instruction']} {row.get('input', '')} {row['output']}"} for row in rows]
    path = tmp_path / "texts.jsonl"
    write_rows(path, texts)
    return [
        *("--model.path", str(tiny.model), "--data.train", str(path), "--data.max_length", str(LENGTH)),
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
    prepared = prepare(config.data, config.seed, progress=False)
    data = encode(prepared, encoder_for(AutoTokenizer.from_pretrained(tiny.model), config.data), max_length=LENGTH)
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


def test_another_length_of_the_reference_is_refused(words, refused):
    told = refused("run", *words, "--reference.model.max_length", "16")
    assert "a reference reads the windows of the target" in told


def test_responses_without_instructions_are_refused_where_there_are_none(words, refused):
    """Where documents are packed, the cuts between them would lie elsewhere."""
    assert "data.format text has no instructions" in refused("reference", *words, "--reference.response_alone")
