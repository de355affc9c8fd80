"""A tokenizer splits text as its tokenizer.json says, whatever class of transformers is named beside it."""

import json

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, CanineTokenizer

from sftmix.model.load import load_tokenizer

TEXT = "12 is 1 and 2"
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL])


@pytest.fixture
def directory(tmp_path):
    """Write the config of a family and a tokenizer with the token 12, by this pre-tokenizer and options of its BPE."""

    def make(family: str, split: pre_tokenizers.PreTokenizer, **options) -> Tokenizer:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = {word: number for number, word in enumerate([*letters, "12", "<end>"])}
        tokenizer = Tokenizer(BPE(words, [("1", "2")], **options))
        tokenizer.pre_tokenizer = split
        tokenizer.add_special_tokens(["<end>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        named = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>", "bos_token": "<end>", "unk_token": "<end>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
        AutoConfig.for_model(family).save_pretrained(tmp_path)
        return tokenizer

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("split", [DIGITS, LEVEL], ids=["digits", "gpt2"])
def test_ids_are_those_of_the_file(directory, tmp_path, family, split):
    expected = directory(family, split).encode(TEXT).ids
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json")).encode(TEXT).ids == expected


def test_the_file_counts_where_a_class_reads_another(directory, tmp_path, monkeypatch):
    """As mistral-common's, which reads tekken.json if it is installed."""
    expected = directory("mistral", DIGITS).encode(TEXT).ids
    monkeypatch.setattr("sftmix.model.load.AutoTokenizer.from_pretrained", lambda *_, **__: CanineTokenizer())
    assert load_tokenizer(tmp_path)(TEXT, add_special_tokens=False)["input_ids"] == expected


def test_merges_are_those_of_the_file(directory, tmp_path, capsys):
    unknown = directory("llama", LEVEL, ignore_merges=True, unk_token="<end>")
    assert load_tokenizer(tmp_path)._tokenizer.model.ignore_merges == unknown.model.ignore_merges
    assert "GPT2Tokenizer of transformers splits text otherwise than tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "split", "otherwise"),
    [("llama", LEVEL, False), ("llama", DIGITS, True), ("qwen2", LEVEL, True), ("gpt_neox", LEVEL, False)],
    ids=["llama", "llama-digits", "qwen2", "gpt_neox"],
)
def test_dropout_of_the_file_is_left_out_with_one_line(directory, tmp_path, capsys, family, split, otherwise):
    """Else a text has other ids each time, in a stage, in its resume and in what others read from the export."""
    directory(family, split, dropout=0.5)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert stored["model"]["dropout"] == 0.5
    expected = (
        Tokenizer.from_str(json.dumps({**stored, "model": {**stored["model"], "dropout": None}})).encode(TEXT).ids
    )
    tokenizer = load_tokenizer(tmp_path)
    assert {tuple(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) for _ in range(50)} == {tuple(expected)}
    tokenizer.save_pretrained(tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "tokenizer.json").read_text())["model"].get("dropout")
    lines = capsys.readouterr().err.splitlines()
    assert sum("dropout of tokenizer.json is left out" in line for line in lines) <= 1
    assert any("splits text otherwise" in line for line in lines) is otherwise
