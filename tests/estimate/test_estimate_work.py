"""What a run will do: its stages, steps, readings and largest micro-batch, against the run's own components."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sftmix.batches.collate import token_slots
from sftmix.batches.deal import deal
from sftmix.batches.order import TrainingOrder
from sftmix.components.callbacks import Evaluate
from sftmix.components.objectives import NTP
from sftmix.components.reference import FromCheckpoints, TrainedReference
from sftmix.components.reweighting import IRDRO
from sftmix.components.splitters import QualityLabel, RandomSplit
from sftmix.estimate import estimate, make_machine
from sftmix.estimate.batches import is_padding_free, step_batches
from sftmix.estimate.model import FakeModel
from sftmix.estimate.trace import Segment
from sftmix.options import LoraOptions, ModelOptions, TrainingOptions
from tests.estimate.configs import config
from tests.toy import toy_rows

CPU, GPUS = make_machine("cpu", 1, mfu=0.5, tflops=0.1), make_machine("H100", 4, mfu=0.4, tflops=None)


# ------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize(("checkpoints", "share"), [([0.5], 0.5), ([0, 0.25], 0.25), (2, 1.0), ("online", 1.0)])
def test_the_reference_stops_at_its_last_checkpoint(tiny, checkpoints, share):
    """29 rows of 8 a step, three epochs: 12 steps."""
    found = estimate(config(tiny, reference=TrainedReference(checkpoints=checkpoints)), CPU)
    reference = found.stages[0]
    assert reference.work.steps == 12 * share
    assert reference.work.trained.all == pytest.approx(3 * share * found.tokens)


def test_a_reference_that_is_scored_before_training_alone_trains_nothing(tiny):
    found = estimate(config(tiny, reference=TrainedReference(checkpoints=[0])), CPU)
    reference = found.stages[0]
    assert (reference.work.steps, reference.training_flops, reference.memory.optimizer) == (0, 0.0, 0.0)
    assert reference.work.read.all == found.tokens


def test_models_that_only_score_are_sharded_as_the_run_is(tiny):
    found = estimate(config(tiny, reference=FromCheckpoints(paths=[str(tiny.model)] * 2)), GPUS)
    reference = found.stages[0]
    assert reference.memory.weights == reference.numbers
    assert reference.work.read.all == 2 * found.tokens


# ---------------------------------------------------------------------------------------------- target


def test_an_objective_that_reads_each_batch_first_pays_for_it(tiny):
    ways = {"objective": NTP(), "splitter": RandomSplit(), "with_baseline": True}
    plain = estimate(config(tiny, **ways), CPU).stages[0].work
    train, baseline, _ = (one.work for one in estimate(config(tiny, **ways | {"objective": IRDRO()}), CPU).stages)
    assert train.read.all - plain.read.all == pytest.approx(train.trained.all)
    assert baseline.read == plain.read


def labelled(tiny) -> None:
    """Of 28 rows three in four are high; one has another label."""
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["quality"] = "other" if number == 28 else "low" if number % 4 == 0 else "high"
    Path(tiny.train).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_unequal_groups_take_the_steps_of_the_run(tiny):
    """21 rows against 7, each of which is in three pairs, and one row alone: 43 slots of each epoch, 6 steps of 8."""
    labelled(tiny)
    splitter = QualityLabel(high="high", low="low")
    found = estimate(config(tiny, splitter=splitter, data={"label_field": "quality"}), CPU)
    assert [stage.work.steps for stage in found.stages] == [3 * 6, 0]
    equal = estimate(config(tiny, splitter=RandomSplit()), CPU)
    assert equal.stages[0].work.steps == 3 * 4


@pytest.mark.parametrize(
    ("callbacks", "evaluations"),
    [([Evaluate()], 3), ([], 0), ([Evaluate(every=5)], 2), ([Evaluate(), Evaluate(every=1)], 15)],
)
def test_evaluations_are_those_of_the_callbacks(tiny, callbacks, evaluations):
    """12 steps in three epochs; one evaluation after them, and one of the base model."""
    ways = {"objective": NTP(), "splitter": RandomSplit()}

    def read(**changes) -> list[float]:
        return [stage.work.read.all for stage in estimate(config(tiny, **ways, **changes), CPU).stages]

    sample, same_sample = read(data={"eval": None}, callbacks=[])
    train, base = read(callbacks=callbacks)
    assert sample == same_sample > 0
    held_out = base - sample
    assert held_out > 0
    assert train - sample == pytest.approx(held_out * (1 + evaluations))


# ----------------------------------------------------------------------------------------- micro-batch


class Rows:
    """Rows of 2 to 40 tokens with the attributes of an EncodedDataset that laying out needs."""

    def __init__(self, packed: bool = False) -> None:
        lengths = np.random.default_rng(0).integers(1, 20, size=(30, 2)).tolist()
        made = toy_rows([tuple(pair) for pair in lengths])
        self.lengths, self.packed = made.lengths, packed
        self.n_targets = np.array([response for _, response in lengths])


@pytest.mark.parametrize("groups", [1, 2, None])
def test_the_largest_micro_batch_is_the_one_with_the_most_slots(groups):
    rows, options = Rows(), TrainingOptions(global_batch_size=8, micro_batch_size=4, length_groups=groups, epochs=1)
    order = TrainingOrder(30, lambda epoch: None, options=options, seed=1)
    slots = []
    for step in range(order.total_steps):
        one_step = deal(order.batch(step), rows.lengths, options, ranks=1, device=CPU.device, padding_free=False)
        for micro in one_step:
            lengths = [int(rows.lengths[slot.row]) for unit in micro.ranks[0] for slot in unit]
            slots.append(token_slots(lengths, micro.n_segments))
    batch = step_batches(rows, order, options, CPU, None).largest  # type: ignore[arg-type]
    assert batch.slots == max(slots) > min(slots)
    assert batch.accumulated
    assert sum(one.rows for one in batch.segments) == 4


def test_what_is_in_a_segment_is_said():
    options = TrainingOptions(global_batch_size=4, micro_batch_size=4, length_groups=1, epochs=1)
    order = TrainingOrder(30, lambda epoch: None, options=options, seed=1)

    def content(rows: Rows, **changes) -> list[str]:
        own = replace(options, **changes)
        batch = step_batches(rows, order, own, CPU, None).largest  # type: ignore[arg-type]
        return [one.content for one in batch.segments]

    assert content(Rows()) == ["padded"]
    assert content(Rows(packed=True)) == ["packed"]
    assert content(Rows(), length_groups=None, padding_free=True) == ["packed"]
    even = Rows()
    even.lengths[:] = 16
    assert content(even) == ["full"]


def test_auto_is_padding_free_where_a_run_is():
    auto = TrainingOptions()
    assert is_padding_free(auto, GPUS, "flash_attention_2")
    assert is_padding_free(auto, GPUS, "flex_attention")
    assert not is_padding_free(auto, GPUS, "sdpa")
    assert not is_padding_free(auto, GPUS, None)
    assert not is_padding_free(auto, CPU, "flex_attention")
    assert not is_padding_free(replace(auto, length_groups=2), GPUS, "flash_attention_2")
    assert not is_padding_free(replace(auto, padding_free=False), GPUS, "flash_attention_2")


def test_flash_attention_has_one_row(tiny):
    model = ModelOptions(path=str(tiny.model), attention="flash_attention_2")
    found = estimate(config(tiny, model=model, splitter=RandomSplit()), GPUS)
    (segment,) = found.stages[0].work.batches.largest.segments
    assert (segment.rows, segment.content) == (1, "packed")


# -------------------------------------------------------------------------------------------- matrices


def test_experts_count_as_many_as_a_token_meets_and_embeddings_not(tmp_path):
    from transformers import GPT2Config, MixtralConfig

    MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(tmp_path / "mixtral")
    router, attention = 8 * 16, 4 * 16 * 16
    expected = 2 * (attention + router + 2 * 3 * 16 * 24)
    assert FakeModel(tmp_path / "mixtral", None, LoraOptions()).per_token() == expected
    GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=512).save_pretrained(tmp_path / "gpt2")
    gpt2 = FakeModel(tmp_path / "gpt2", None, LoraOptions())
    assert gpt2.per_token() == 2 * 12 * 16 * 16  # 512 learned positions are looked up, not multiplied with
    assert gpt2.saved([Segment(2, 9, "padded")], "autocast", recompute=False) > 0
