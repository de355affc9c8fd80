"""Gemma 3 270M base: sliding windows, a vocabulary of 262,144, no template, and a token without an embedding."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.model.load import model_config
from tests.forked import done
from tests.real.formulas import assert_near, ours, rows_of, theirs
from tests.real.test_smollm2_runs import words_of

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.long]


def test_a_pair_is_that_of_the_formula_on_plain_transformers(gemma3, questions):
    data = rows_of(gemma3, questions, "alpaca")
    found, lam = ours(gemma3, data)
    assert_near(found, theirs(gemma3, data, float(lam[0])), rtol=1e-4)


def test_a_run_with_a_spare_token_in_its_tokenizer(gemma3, questions, held_out, tmp_path):
    """The published tokenizer has one token more than the embedding, for images, which the GGUF file leaves out."""
    model = tmp_path / "gemma3"
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(model)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (model / name).symlink_to(gemma3 / name)
    assert len(tokenizer) == model_config(str(model)).get_text_config().vocab_size + 1
    more = ("--data.eval", str(held_out), "--data.template", "alpaca")
    done(words_of(model, questions, *more), cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_nll_after"] < summary["eval_nll_before"]
    exported = tmp_path / "run" / "train" / "model"
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    assert model.get_input_embeddings().weight.shape[0] == 262_144
    ids = torch.tensor([AutoTokenizer.from_pretrained(exported)("The sky is")["input_ids"]])
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
