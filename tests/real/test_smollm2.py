"""SmolLM2-135M-Instruct (Llama, tied head, ChatML) in memory: losses and gradients, layouts, templates."""

import pytest
from transformers import AutoTokenizer

from tests.real.conftest import QUESTIONS
from tests.real.formulas import assert_near, ours, rows_of, theirs

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_a_pair_is_that_of_the_formula_on_plain_transformers(smollm2, questions):
    data = rows_of(smollm2, questions)
    found, lam = ours(smollm2, data)
    assert 0 < float(lam[0]) < 1
    assert_near(found, theirs(smollm2, data, float(lam[0])), rtol=1e-4)


def test_without_padding_it_is_the_same(smollm2, questions):
    data = rows_of(smollm2, questions)
    (found, lam), (expected, same) = ours(smollm2, data, padding_free=True), ours(smollm2, data, n_segments=2)
    assert float(lam[0]) == float(same[0])
    assert_near(found, expected, rtol=1e-4)


@pytest.mark.parametrize("template", [None, "alpaca"], ids=["its own", "alpaca"])
def test_prompts_and_responses_of_both_templates(template, smollm2, questions):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    data = rows_of(smollm2, questions, template)
    for row, (asked, answer) in zip(data, QUESTIONS.items(), strict=True):
        prompt = tokenizer.decode(row.input_ids[~row.target])
        if template is None:
            chat = [{"role": "user", "content": asked}]
            assert prompt == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            assert f"### Instruction:\n{asked}\n\n### Response:" in prompt
            assert "<|im_start|>user" not in prompt
        end = tokenizer.decode(row.input_ids[-1:])
        assert tokenizer.decode(row.input_ids[row.target]).strip() == f"{answer}{end}"
        assert end == tokenizer.eos_token
