"""The embedded example: rows with a known truth, a tokenizer and a model that load like any other."""

import collections
import json
import shlex

import pytest
import torch
from transformers import AutoTokenizer

from sftmix.tools import quickstart
from sftmix.tools.quickstart import DETERMINISTIC, KINDS, OPPOSITES, make_rows

ROWS = make_rows(n=2000, seed=0)
ANTONYMS = [tuple(pair.split("-")) for pair in OPPOSITES.split()]

TRUTH = {
    "repeat": lambda words: words,
    "reverse": lambda words: list(reversed(words)),
    "capitals": lambda words: " ".join(words).upper().split(),
    "opposites": lambda words: [next((set(pair) - {w}).pop() for pair in ANTONYMS if w in pair) for w in words],
    "kinds": lambda words: [next(kind for kind, members in KINDS.items() if w in members) for w in words],
    "initials": lambda words: [w[:1] for w in words],
    "successors": lambda words: [f"{int(w) + 1}" for w in words],
    "count": lambda words: ["There", "are", {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}[len(words)] + "."],
}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return quickstart.materialise(tmp_path_factory.mktemp("quickstart"), seed=0)


@pytest.fixture(scope="module")
def tokenizer(materials):
    return AutoTokenizer.from_pretrained(materials.model)


def prompt_of(row):
    return row["instruction"] + ("\n" + row["input"] if row["input"] else "")


def test_deterministic_rows_are_right():
    assert set(TRUTH) == set(DETERMINISTIC)
    for row in ROWS:
        if row["kind"] == "deterministic":
            words = row["input"].removeprefix("Words: ").split()
            assert row["output"].split() == TRUTH[row["family"]](words), row


def test_open_rows_have_many_answers_and_deterministic_prompts_occur_once():
    prompts = {
        kind: collections.Counter(prompt_of(row) for row in ROWS if row["kind"] == kind)
        for kind in ("deterministic", "open")
    }
    assert max(prompts["deterministic"].values()) == 1
    assert max(prompts["open"].values()) >= 50
    assert len({(prompt_of(row), row["output"]) for row in ROWS}) == len(ROWS)


def test_what_is_written(materials):
    train, held_out = (
        [json.loads(line) for line in p.read_text().splitlines()] for p in (materials.train, materials.eval)
    )
    assert (len(train), len(held_out)) == (quickstart.N_TRAIN, quickstart.N_EVAL)
    assert set(train[0]) == {"instruction", "input", "output", "family", "kind"}
    seen = {prompt_of(row) for row in train}
    assert not any(prompt_of(row) in seen for row in held_out if row["kind"] == "deterministic")


def test_the_same_seed_writes_the_same_bytes(materials, tmp_path):
    torch.rand(3)  # the state of torch's own generator must not matter, and stays
    before = torch.get_rng_state()
    again = quickstart.materialise(tmp_path, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    files = {p.relative_to(again.model): p for p in again.model.rglob("*") if p.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.as_posix() for p in files}
    for name, path in files.items():
        assert path.read_bytes() == (materials.model / name).read_bytes(), name
    assert again.train.read_bytes() == materials.train.read_bytes()


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Grüße\n\t 你好 \x00 \U0001f600 <|begin|"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_prompt_is_a_prefix_of_the_conversation_and_a_turn_ends_with_eos(tokenizer):
    for row in ROWS[:100]:
        user, answer = {"role": "user", "content": prompt_of(row)}, {"role": "assistant", "content": row["output"]}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([user, answer], return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert whole[-1] == tokenizer.eos_token_id
        assert whole.count(tokenizer.bos_token_id) == 1
        assert whole[0] == tokenizer.bos_token_id
        response = whole[len(prompt) : -1]
        assert len(response) == len(row["output"].replace(".", " .").split())  # a token for each word


@pytest.mark.slow
def test_the_command_leaves_cards_and_commands_that_can_be_copied(tmp_path, monkeypatch, sftmix):
    monkeypatch.setattr(quickstart, "N_TRAIN", 16)
    monkeypatch.setattr(quickstart, "N_EVAL", 4)
    out = tmp_path / "a [run]"
    done = sftmix("quickstart", "--out", str(out))
    assert done.code == 0, done.err
    assert [(out / stage / "model" / "README.md").exists() for stage in ("train", "baseline")] == [True, True]
    (command,) = (shlex.split(line) for line in done.out.splitlines() if line.startswith("  sftmix status "))
    assert command == ["sftmix", "status", str(out)]


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_does_not_take_is_refused(sftmix, tmp_path, seed):
    done = sftmix("quickstart", "--out", str(tmp_path / "out"), "--seed", str(seed))
    assert (done.code, done.err) == (2, f"error: --seed is {seed}; allowed: -2^63 to 2^64 - 1, which torch takes\n")
    assert not (tmp_path / "out").exists()
