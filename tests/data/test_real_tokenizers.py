"""Section 5.1 with real tokenizers: a Qwen 2 reference says how confident it is, a Mistral target is trained.

Two families, two tokenizers, two chat templates, two lengths; joined by example id alone. The models are random and
tiny, which is all that the joining needs.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.tiny import groups, table, weights

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def mistral(shared, tmp_path_factory) -> Path:
    return small_model(shared, tmp_path_factory, "mistral-7b-v0.3", LlamaForCausalLM, LlamaConfig)


@pytest.fixture(scope="module")
def qwen(shared, tmp_path_factory) -> Path:
    return small_model(shared, tmp_path_factory, "qwen2", Qwen2ForCausalLM, Qwen2Config)


def small_model(shared: Path, tmp_path_factory, name: str, model, config) -> Path:
    path = tmp_path_factory.mktemp(name)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    torch.manual_seed(0)
    model(config(vocab_size=len(tokenizer), **SMALL)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def rows(shared, tmp_path) -> Path:
    """Forty Alpaca rows whose responses are not empty."""
    found = [r for r in json.loads((shared / "data/alpaca/alpaca_8k.json").read_text()) if r["output"].strip()][:40]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(found))
    return path


def words(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--training.global_batch_size", "8", "--training.micro_batch_size", "8", "--training.max_steps", "3"]
    rate = ["--training.learning_rate", "1e-3", "--reference.checkpoints", "2", "--checkpoint.every", "0"]
    return ["run", "--model.path", str(model), "--data.train", str(rows), "--out", str(out), *sizes, *rate, *more]


@pytest.mark.slow
def test_confidence_of_another_family_is_joined_by_id(mistral, qwen, rows, tmp_path, sftmix):
    run = tmp_path / "run"
    reference = ["--reference.model.path", str(qwen), "--reference.model.max_length", "400"]
    done = sftmix(*words(mistral, rows, run, "--data.max_length", "300", *reference))
    assert done.code == 0, done.err

    dynamics = table(run / "confidence" / "dynamics.parquet")
    theirs = dict(zip(dynamics["id"], dynamics["n_tokens"], strict=True))
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    responses = [row["output"] for row in json.loads(rows.read_text())]
    counted = [len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in responses]  # and <|im_end|>
    assert [theirs[i] for i in dict.fromkeys(dynamics["id"])] == counted

    confidence = table(run / "confidence" / "confidence.parquet")
    ranked = [confidence["id"][i] for i in np.argsort(-np.array(confidence["confidence"]))]
    assert [groups(run)[i] for i in ranked] == ["confident"] * 20 + ["unconfident"] * 20
    assert weights(run)["model.embed_tokens.weight"].shape[0] == len(AutoTokenizer.from_pretrained(mistral))

    # The same dynamics from the file alone, as they would come from another machine: the same split, the same model.
    file = tmp_path / "from-elsewhere.parquet"
    shutil.copy(run / "confidence" / "dynamics.parquet", file)
    again = words(mistral, rows, tmp_path / "again", "--data.max_length", "300")
    at = again.index("--reference.checkpoints")
    del again[at : at + 2]
    done = sftmix(*again, "--reference", "FromFile", "--reference.path", str(file))
    assert done.code == 0, done.err
    assert groups(tmp_path / "again") == groups(run)
    ours, before = weights(tmp_path / "again"), weights(run)
    assert all(torch.equal(ours[k], before[k]) for k in before)
