"""The rows of a reference: the template and the length of the run where its tokenizer is the target's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.common.files import read_json, write_json
from sftmix.tools.quickstart import write_rows
from sftmix.tools.quickstart.model import make_tokenizer
from tests.data.small_tokenizers import THINKING
from tests.tiny import SHORT, Tiny, table

LENGTH = 56
"""Of the alpaca template it leaves a response token in each row, and cuts many responses short."""
RUN = ("--data.template", "alpaca", "--data.max_length", str(LENGTH))


def copied(tiny: Tiny, name: str, **changed: object) -> Path:
    """Copy the model, with other values in its config."""
    path = shutil.copytree(tiny.model, tiny.model.parent / name)
    write_json(path / "config.json", {**read_json(path / "config.json"), **changed})
    return path


def padded(tiny: Tiny) -> Path:
    """Copy the model as a Trainer saves it: with the end token for padding, and a chat template of its own."""
    path = copied(tiny, "padded")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + '>' + m.content + eos_token }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
    tokenizer.save_pretrained(path)
    return path


def letters(tiny: Tiny) -> Path:
    """Make a model whose tokenizer knows letters only, with a longer context."""
    tokenizer = make_tokenizer(["x"], vocab_size=262)
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    model.config.vocab_size, model.config.max_position_embeddings = len(tokenizer), 512
    path = tiny.model.parent / "letters"
    torch.manual_seed(3)
    type(model)(model.config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def by_hand(path: Path, tiny: Tiny, length: int, *, alpaca: bool = True) -> list[tuple[float, int]]:
    """Score each turn of each row by the model's own logits: NLL and number of its tokens, of the first `length`.

    Conversations are written in the alpaca template, or rows of one turn in the chat template of the model.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    turns_scored = []
    for row in map(json.loads, tiny.train.read_text().splitlines()):
        asked = row.get("instruction", "") + (f"\n{row['input']}" if row.get("input") else "")
        contents = [turn["content"] for turn in row.get("messages", [])] or [asked, row["output"]]
        text = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
        for asked, said in zip(contents[::2], contents[1::2], strict=True):
            text += f"### Instruction:\n{asked}\n\n### Response:\n"
            if not alpaca:
                chat = [{"role": "user", "content": asked}]
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            before = len(text)
            text += said + tokenizer.eos_token
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, starts = encoded.input_ids[:length], [start for start, _ in encoded.offset_mapping][:length]
            with torch.no_grad():
                logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            nll = [-float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if starts[t] >= before]
            turns_scored.append((sum(nll), len(nll)))
            text += "\n\n"
    return turns_scored


def assert_same(run: Path, expected: list[tuple[float, int]]) -> None:
    found = table(run / "confidence" / "dynamics.parquet")
    nll, counts = map(list, zip(*expected, strict=True))
    assert found["n_tokens"] == counts
    assert found["nll_sum"] == pytest.approx(nll, rel=1e-5)


def on_disk(tiny: Tiny, path: Path, *words: str) -> list[str]:
    kind = ("--reference", "FromCheckpoints", "--reference.paths", f"[{path}]")
    return ["reference", *tiny.bare, *SHORT, *kind, *words]


def trained(tiny: Tiny, *words: str) -> list[str]:
    """The words of a reference that is scored before its training."""
    return ["reference", *tiny.bare, *SHORT, "--reference.checkpoints", "[0]", *words]


def other(tiny: Tiny, kind: str, path: Path) -> list[str]:
    """The words of a reference with a model of its own, on disk or trained."""
    return on_disk(tiny, path, *RUN) if kind == "on disk" else trained(tiny, "--reference.model.path", str(path), *RUN)


# ------------------------------------------------------------------------------------- the same tokenizer


@pytest.mark.parametrize("kind", ["on disk", "trained"])
@pytest.mark.parametrize("make", [lambda tiny: copied(tiny, "copy"), padded], ids=["copy", "padded"])
def test_a_reference_with_the_targets_tokenizer_reads_what_the_target_reads(kind, make, tiny, made):
    """A template and a length that are not set are those of the run, also where a Trainer chose another padding."""
    path = make(tiny)
    assert_same(made(*other(tiny, kind, path)), by_hand(path, tiny, LENGTH))
    assert f"reference ({path}): template alpaca, max_length {LENGTH}\n" in made.printed


@pytest.mark.parametrize("alone", ["template", "length", "context"])
def test_what_is_not_set_is_the_runs_and_a_shorter_context_ends_its_length(alone, tiny, made):
    path = copied(tiny, "copy", **({"max_position_embeddings": LENGTH} if alone == "context" else {}))
    words = {
        "template": trained(tiny, "--reference.model.template", "alpaca", "--data.max_length", str(LENGTH)),
        "length": on_disk(tiny, path, "--data.template", "alpaca", "--reference.max_length", str(LENGTH)),
        "context": on_disk(tiny, path, "--data.template", "alpaca"),
    }[alone]
    assert_same(made(*words), by_hand(path, tiny, LENGTH))


# ---------------------------------------------------------------------------------------- another tokenizer


@pytest.mark.parametrize("kind", ["on disk", "trained"])
def test_another_tokenizer_has_a_template_and_a_length_of_its_own_and_they_are_told(kind, tiny, made):
    path = letters(tiny)
    assert_same(made(*other(tiny, kind, path)), by_hand(path, tiny, 512, alpaca=False))
    assert f"reference ({path}): template tokenizer, max_length 512\n" in made.printed


# --------------------------------------------------------------------------------- conversations of several turns


def two_templates(tiny: Tiny, rows: list[dict], target: str, reference: str) -> list[str]:
    """Make the training rows conversations, the first four of two turns, and return the words of a reference with a
    template of its own."""
    turns = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in rows
    ]
    chats = [turn + (turns[-1 - i] if i < 4 else []) for i, turn in enumerate(turns)]
    write_rows(tiny.train, [{"id": f"c{i}", "messages": messages} for i, messages in enumerate(chats)])
    template = tiny.model.parent / "thinking.jinja"
    template.write_text(THINKING)
    names = {"alpaca": "alpaca", "thinking": str(template)}
    own = ("--data.template", names[target], "--reference.template", names[reference])
    return on_disk(tiny, tiny.model, "--data.multi_turn", "whole", *own)


def test_a_reference_reads_as_turns_what_the_target_splits(tiny, rows, made):
    """Its own template would keep the conversation whole, whose one score belongs to no turn."""
    run = made(*two_templates(tiny, rows, "thinking", "alpaca"))
    found = table(run / "confidence" / "dynamics.parquet")["id"]
    assert found[:3] == ["c0@turn0", "c0@turn1", "c1@turn0"]
    assert_same(run, by_hand(tiny.model, tiny, 512))


def test_a_reference_that_splits_what_the_target_reads_whole_is_refused(tiny, rows, refused):
    """Its scores of turns are none of the conversation."""
    told = refused(*two_templates(tiny, rows, "alpaca", "thinking"), code=3)
    assert "cannot encode 4 of 29 training examples" in told
    assert "4 conversations not scored: split by this template, not by the target's" in told
    assert "max_length" not in told
