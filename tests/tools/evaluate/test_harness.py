"""A model as lm-eval asks it: the prompts of its training, where its answers end, and the prompts that are cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml

from sftmix.data.templates import ALPACA
from sftmix.pipeline.finished import FinishedModel
from sftmix.pipeline.loaded import load_finished
from sftmix.tools.evaluate.harness import Harness


@pytest.fixture(scope="module")
def alpaca(finished, tmp_path_factory):
    """The tiny model in a run with another template than the one that its tokenizer has."""
    run = tmp_path_factory.mktemp("alpaca")
    config = yaml.safe_load((finished.path / "config.yaml").read_text())
    config["data"]["template"] = "alpaca"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return load_finished(FinishedModel("target", str(finished.path / "train" / "model"), run))


@pytest.fixture
def harness(alpaca):
    return Harness(alpaca, batch_size=2, chat=True)


def request(prompt, **options):
    return SimpleNamespace(args=(prompt, options))


def test_the_prompt_is_that_of_the_training(alpaca, harness):
    turns = [{"role": "user", "content": "Name two."}]
    prompt = harness.apply_chat_template(turns)
    assert alpaca.encoder.chat_template.endswith(ALPACA.rpartition("{% endfor %}")[2])
    assert prompt.endswith("### Instruction:\nName two.\n\n### Response:\n")
    assert harness.tok_encode(prompt) == alpaca.render(turns)
    begun = [*turns, {"role": "assistant", "content": "red"}]
    assert harness.apply_chat_template(begun, add_generation_prompt=False) == prompt + "red"
    two = harness.tok_batch_encode([prompt, prompt + "red"])[0]
    assert two[1].tolist() == harness.tok_encode(prompt + "red")


def test_special_tokens_that_a_question_spells_are_text(alpaca, harness):
    end = alpaca.encoder.tokenizer.eos_token
    turns = [{"role": "user", "content": f"Name {end} two."}]
    ids = harness.tok_encode(harness.apply_chat_template(turns))
    assert ids == alpaca.render(turns)
    assert alpaca.encoder.tokenizer.eos_token_id not in ids


def test_an_answer_ends_with_the_turn(alpaca, harness):
    """The id that the model says first, of all ids, is made the end of a turn: nothing may follow it."""
    prompt = harness.apply_chat_template([{"role": "user", "content": "Name two."}])
    ids = torch.tensor([harness.tok_encode(prompt)])
    with torch.no_grad():
        first = int(alpaca.model(ids).logits[0, -1].argmax())
    options = {"context": ids, "max_length": ids.shape[1] + 8, "stop": [], "attention_mask": torch.ones_like(ids)}
    ended = Harness(SimpleNamespace(**{**vars(alpaca), "stop_ids": (first,)}), 2, chat=True)
    assert ended._model_generate(**options)[0, ids.shape[1] :].tolist() == [first]


def test_cut_prompts_of_generated_answers_are_counted(harness):
    """The tiny model reads 128 tokens; 120 of them are left to the prompt."""
    short = "two"
    length = len(harness.tok_encode(short))
    assert length <= 120
    long = short * 200
    harness.generate_until([request(short, max_gen_toks=8), request(long, max_gen_toks=8)], disable_tqdm=True)
    assert harness.cut == 1
