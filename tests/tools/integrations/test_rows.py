"""Rows of a Trainer and of a file are joined by their ids: all of them, or none is trained."""

import importlib
import json
import re
import shutil
import sys

import datasets
import numpy as np
import pytest
from datasets import Dataset
from tokenizers.processors import Sequence, TemplateProcessing
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from sftmix.data import encode_dataset, prepare
from sftmix.disk.tables import write_split
from sftmix.options import DataOptions
from sftmix.tools.integrations import DynamicsCallback, groups_of
from sftmix.tools.integrations.dynamics import TrainerRows, row_ids
from sftmix.types import UNPAIRED, Split
from tests.forked import on_ranks
from tests.text.small_tokenizers import make_encoder
from tests.tiny import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

sys.path.insert(0, str(ROOT / "docs" / "examples"))
example = importlib.import_module("trl_sftmix")
sys.path.pop(0)


def test_a_row_that_the_file_lacks_is_no_unpaired_row(tmp_path):
    """Rows that the file has as unpaired are; rows of the file that are not trained do not matter."""
    path = tmp_path / "split.parquet"
    write_split(path, [*"abcd"], Split(np.array([0, UNPAIRED, 1, 0], np.int8), ("confident", "unconfident")))
    assert groups_of(path, ["c", "b", "a"]).tolist() == [1, UNPAIRED, 0]
    with pytest.raises(ValueError, match=r"split\.parquet lacks 2 of the 3 training rows \(first: x\)"):
        groups_of(path, ["a", "x", "y"])


def test_rows_that_are_cut_at_another_length_are_other_rows(tmp_path):
    """Without a column id."""
    rows = [[1, 2, 3, 4, 5], [1, 2], [3, 4]]
    cut = row_ids(Dataset.from_dict({"input_ids": [tokens[:4] for tokens in rows]}))
    path = tmp_path / "split.parquet"
    write_split(path, cut, Split(np.array([0, 1, 0], np.int8), ("confident", "unconfident")))
    with pytest.raises(ValueError, match=r"lacks 1 of the 3 training rows .* cut at the same length"):
        groups_of(path, row_ids(Dataset.from_dict({"input_ids": rows})))


def test_the_examples_rows_have_the_ids_of_sftmix(small, tmp_path, monkeypatch):
    """Behind SFTTrainer's tokenisation; a repeated row has a number, and a row without an answer is none."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.loads(line) for line in small.train.read_text(encoding="utf-8").splitlines()]
    bare = next(number for number, row in enumerate(rows) if not row["input"])
    rows += [rows[3], rows[bare] | {"input": " "}, rows[0] | {"output": " "}]
    file = tmp_path / "rows" / "train.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ours = prepare(DataOptions(train=[str(file)]), 0).train.values("id")
    trainer = SFTTrainer(
        str(small.model),
        example.SFTMixConfig(str(tmp_path / "out"), report_to=[], bf16=False, use_cpu=True, max_length=128),
        train_dataset=example.prompts(str(file.parent)),
        processing_class=AutoTokenizer.from_pretrained(small.model),
    )
    assert row_ids(trainer.train_dataset) == ours
    assert ours[29:] == [f"{ours[3]}#1", f"{ours[bare]}#1"]


@pytest.mark.parametrize("before", [True, False])
def test_the_template_of_the_page_writes_what_the_script_trains(small, tmp_path, monkeypatch, before):
    """With `bos_token` for a tokenizer that puts one before plain text, without for others, which add none here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(small.train.parent, tmp_path / "rows", ignore=lambda _, names: {*names} - {small.train.name})
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    plain = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = plain if before else Sequence([])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id) is before
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    (template,) = re.findall(r"^`(.*bos_token.*)`$", page, re.MULTILINE)
    jinja = tmp_path / "prompts.jinja"
    jinja.write_text(template if before else template.replace("{{ bos_token }}", ""), encoding="utf-8")
    encoder = make_encoder(tokenizer, str(jinja))
    ours = encode_dataset(prepare(DataOptions(train=[str(tmp_path / "rows")]), 0), encoder, max_length=128).train
    trainer = SFTTrainer(
        str(small.model),
        example.SFTMixConfig(str(tmp_path / "out"), report_to=[], bf16=False, use_cpu=True, max_length=128),
        train_dataset=example.prompts(str(tmp_path / "rows")),
        processing_class=tokenizer,
    )
    theirs = [(list(row["input_ids"]), [y != -100 for y in row["labels"]]) for row in trainer.train_dataset]
    assert theirs == [(list(one.input_ids), list(one.target)) for one in ours]


@pytest.mark.parametrize(
    ("name", "as_tokens_alone", "apart"),
    [
        ("attention_mask", [[1, 1, 1, 1], [1, 1, 0, 0]], [0, 0, 1, 1]),  # nothing, and padding on the right
        ("attention_mask", [[True] * 4, [True, True, True, False]], [False, True, True, True]),
        ("attention_mask", [[1, 1, 1, 1], [1, 0, 0, 0]], [1, 1, 2, 2]),  # a bin, as axolotl's
        ("position_ids", [[0, 1, 2, 3], [0, 1, 2, 3]], [0, 1, 0, 1]),
        ("seq_lengths", [[4], [4]], [2, 2]),
    ],
)
@pytest.mark.parametrize("kind", [None, "torch"])
def test_rows_that_are_not_their_tokens_alone_are_refused(name, as_tokens_alone, apart, kind):
    """They would be scored with the padding before them, or as a document with the one before it."""
    rows = {"id": [*"ab"], "input_ids": [[5, 6, 7, 8]] * 2, "labels": [[-100, -100, 7, 8]] * 2}
    given = Dataset.from_dict({**rows, name: as_tokens_alone}).with_format(kind)
    assert TrainerRows(given).lengths.tolist() == [4, 4]
    given = Dataset.from_dict({**rows, name: [as_tokens_alone[0], apart]}).with_format(kind)
    with pytest.raises(ValueError, match=f"by its {name}, row b has padding before tokens, or several documents"):
        DynamicsCallback(given, "dynamics.parquet")


def refuse_sharded(world, path):
    model = fully_shard(AutoModelForCausalLM.from_pretrained(path))
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    with pytest.raises(ValueError, match="sharded weights: leave it out, keep checkpoints with whole weights"):
        DynamicsCallback(rows, "dynamics.parquet").on_train_begin(None, None, None, model=model)


def test_sharded_weights_are_refused(small):
    on_ranks(refuse_sharded, small.model)
