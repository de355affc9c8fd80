"""A model as lm-eval asks it: the prompts of its training, where its answers end, and what its scores say."""

from dataclasses import replace

import pytest
import torch
import yaml

from sftmix.data.templates import ALPACA
from sftmix.pipeline.finished import FinishedModel
from sftmix.pipeline.loaded import load_finished
from sftmix.tools.evaluate.harness import harness_of, scores_of


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
    return harness_of(alpaca, batch_size=2, chat=True)


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


def test_an_answer_ends_with_the_turn(alpaca, harness):
    """The id that the model says first, of all ids, is made the end of a turn: nothing may follow it."""
    prompt = harness.apply_chat_template([{"role": "user", "content": "Name two."}])
    ids = torch.tensor([harness.tok_encode(prompt)])
    with torch.no_grad():
        first = int(alpaca.model(ids).logits[0, -1].argmax())
    options = {"context": ids, "max_length": ids.shape[1] + 8, "stop": [], "attention_mask": torch.ones_like(ids)}
    ended = harness_of(replace(alpaca, stop_ids=(first,)), 2, chat=True)
    assert ended._model_generate(**options)[0, ids.shape[1] :].tolist() == [first]


def test_a_metric_under_a_filter_has_its_name():
    """As gsm8k's exact_match, strict and flexible: the two differ by much."""
    samples = [{"doc_id": n, "doc_hash": str(n), "filter": "strict", "acc": float(n)} for n in (1, 0)]
    samples += [{**sample, "filter": "flexible", "acc": 1.0} for sample in samples]
    results = {"alias": "task", "acc,strict": 0.5, "acc_stderr,strict": 0.1, "acc,flexible": 1.0, "sample_len": 2}
    (found,) = scores_of("task", {"results": {"task": results}, "samples": {"task": samples}}).values()
    assert (found["metric"], found["value"], found["stderr"], found["n"]) == ("acc (strict)", 0.5, 0.1, 2)
    assert (found["questions"], found["values"]) == (["0", "1"], [0.0, 1.0])
