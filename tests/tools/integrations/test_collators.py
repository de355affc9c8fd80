"""A collator makes line k of row k: one that does not would have other rows mixed than the split pairs."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as CollatorOfTRL

from sftmix.tools.integrations import SFTMixTrainer, _collate
from tests.tools.integrations.test_settings import of_transformers
from tests.tools.integrations.test_trainers import rows_of, trainer_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


def tokenizer_of(tiny, **words):
    return AutoTokenizer.from_pretrained(tiny.model, **words)


def features_of(tiny, *more):
    """Return the rows as a Trainer gives them to a collator, with the number of each."""
    rows = [(e.input_ids.tolist(), np.where(e.target, e.input_ids, -100).tolist()) for e in rows_of(tiny)]
    return [
        {"input_ids": ids, "labels": labels, "sftmix_row": number}
        for number, (ids, labels) in enumerate([*rows, *more])
    ]


def held_out(features):
    """Return rows without a number."""
    return [{name: row[name] for name in ("input_ids", "labels")} for row in features]


def sorted_by_length(collator):
    return lambda features: collator(sorted(features, key=lambda row: len(row["input_ids"])))


def cut(collator, part):
    return lambda features: collator([{key: row[key][part] for key in row} for row in features])


def without_labels(collator):
    return lambda features: collator([{"input_ids": row["input_ids"]} for row in features])


def last_turn_alone(collator):
    """Mask all labels but the last three."""

    def collate(features):
        return collator([row | {"labels": [-100] * (len(row["labels"]) - 3) + row["labels"][-3:]} for row in features])

    return collate


def longer(collator):
    """Add a token to the end of each row, which is trained."""
    return lambda features: collator([{key: [*row[key], 7] for key in row} for row in features])


HONEST = {
    "right": lambda tiny: DataCollatorForSeq2Seq(tokenizer_of(tiny)),
    "left": lambda tiny: DataCollatorForSeq2Seq(tokenizer_of(tiny, padding_side="left"), pad_to_multiple_of=64),
    "all tokens": lambda tiny: without_labels(DataCollatorForLanguageModeling(tokenizer_of(tiny), mlm=False)),
    "trl": lambda tiny: CollatorOfTRL(0),
    "trl, all tokens": lambda tiny: without_labels(CollatorOfTRL(0)),
    "last turn": lambda tiny: last_turn_alone(CollatorOfTRL(0)),
    "cut": lambda tiny: cut(CollatorOfTRL(0), slice(12)),
    "cut on the left": lambda tiny: cut(DataCollatorForSeq2Seq(tokenizer_of(tiny)), slice(-12, None)),
    "longer": lambda tiny: longer(CollatorOfTRL(0)),
}


@pytest.mark.parametrize("kind", HONEST)
def test_a_collator_may_pad_cut_mask_and_add(small, kind):
    """Also if a row is the beginning of another one, as the turns of a chat are, or empty."""
    first = rows_of(small)[0].input_ids.tolist()
    features = features_of(small, (first[:9], first[:9]), ([], []), (first, [-100] * len(first)))
    right = HONEST[kind](small)(held_out(features))
    found = _collate(HONEST[kind](small), features)
    assert torch.equal(found["input_ids"], right["input_ids"])
    assert found["sftmix_row"].tolist() == list(range(len(right["labels"])))


def padded(features):
    """A batch of rows that are tensors, as those of a data set in torch's format."""
    columns = {"input_ids": 0, "labels": -100}
    return {name: pad_sequence([row[name] for row in features], True, value) for name, value in columns.items()}


def test_rows_may_be_tensors(small):
    features = [{name: torch.tensor(value) for name, value in row.items()} for row in features_of(small)]
    assert _collate(padded, [dict(row) for row in features])["sftmix_row"].tolist() == list(range(29))
    with pytest.raises(ValueError, match="another order"):
        _collate(lambda features: padded(features[::-1]), features)


WRONG = {
    "sorted": lambda tiny: sorted_by_length(DataCollatorForSeq2Seq(tokenizer_of(tiny))),
    "sorted, left": lambda tiny: sorted_by_length(DataCollatorForSeq2Seq(tokenizer_of(tiny, padding_side="left"))),
    "sorted, all tokens": lambda tiny: sorted_by_length(without_labels(CollatorOfTRL(0))),
    "backwards": lambda tiny: lambda features: CollatorOfTRL(0)(features[::-1]),
    "in place": lambda tiny: lambda features: features.reverse() or CollatorOfTRL(0)(features),
    "short rows left out": lambda tiny: (
        lambda features: CollatorOfTRL(0)(
            [row for row in features if len(row["input_ids"]) > min(len(row["input_ids"]) for row in features)]
        )
    ),
    "one line": lambda tiny: DataCollatorWithFlattening(),
    "one line of trl": lambda tiny: CollatorOfTRL(0, padding_free=True),
}


@pytest.mark.parametrize("kind", WRONG)
def test_lines_that_are_not_the_rows_are_refused(small, kind):
    collator = WRONG[kind](small)
    with pytest.raises(
        ValueError, match=r"the collator made \d+ lines of 29 rows, or another order of them, and SFTMix"
    ):
        _collate(collator, features_of(small))
    assert "sftmix_row" not in _collate(collator, held_out(features_of(small)))


def test_a_trainer_says_it_at_the_first_batch(plain, tmp_path):
    words = of_transformers(plain) | {"given": {"data_collator": WRONG["sorted"](plain)}}
    trainer = trainer_of(SFTMixTrainer, plain, tmp_path, **words)
    with pytest.raises(ValueError, match="the collator made 4 lines of 4 rows, or another order"):
        trainer.train()
