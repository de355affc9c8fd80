"""What a run will do: its stages, steps, readings and largest micro-batch, against the run's own components."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sftmix.batches.collate import token_slots
from sftmix.batches.deal import deal
from sftmix.batches.order import TrainingOrder
from sftmix.components.base import Reference
from sftmix.components.callbacks import Evaluate
from sftmix.components.objectives import NTP
from sftmix.components.others.places import CutMix, EmbeddingMixup, ManifoldMixup
from sftmix.components.others.reweighting import IRDRO
from sftmix.components.others.tokens import ASFT, ProFit
from sftmix.components.reference import FromCheckpoints, FromFile, Online, TrainedReference
from sftmix.components.splitters import RandomSplit
from sftmix.config import RunConfig
from sftmix.options import LoraOptions, ModelOptions, ReferenceModel, TrainingOptions
from sftmix.options.training import DEFAULT_MICRO_BATCH
from sftmix.pipeline.rows import RunRows, read_rows
from sftmix.ranks.world import World
from sftmix.tools.estimate.work import Machine, Work, plan
from sftmix.tools.quickstart import write_jsonl
from tests.fast import some_fast
from tests.tools.estimate.configs import CPU, TRAINING, config, machine, small_llama

ALONE: dict[str, Any] = {"objective": NTP(), "splitter": RandomSplit()}


def rows_of(tiny, **changes) -> tuple[RunConfig, RunRows]:
    return read_rows(config(tiny, **changes), World())


def planned(tiny, machine: Machine = CPU, **changes) -> dict[str, Work]:
    return {work.name: work for work in plan(*rows_of(tiny, **changes), machine)}


def tokens_of(tiny) -> float:
    """Of all rows: those that a base model reads where no sample is smaller."""
    return float(rows_of(tiny)[1].data.train.lengths.sum())


@pytest.mark.parametrize(
    ("checkpoints", "share", "passes"),
    some_fast([([0.5], 0.5, 1), ([0, 0.25], 0.25, 2), (2, 1.0, 2), ("online", 1.0, 0), ([0], 0.0, 1)], every=3),
)
def test_the_reference_stops_at_its_last_checkpoint(tiny, checkpoints, share, passes):
    """29 rows of 8 a step, three epochs: 12 steps."""
    stages = planned(tiny, reference=TrainedReference(checkpoints=checkpoints))
    reference, tokens = stages["reference"], tokens_of(tiny)
    assert list(stages) == ["reference", "train", "base"]
    assert (reference.steps, stages["train"].steps) == (12 * share, 12)
    assert reference.trained[0] == pytest.approx(3 * share * tokens)
    assert reference.read[0] == passes * tokens
    assert (reference.memory is None) == (share == 0)


@pytest.mark.slow
def test_references_that_train_nothing_and_those_of_other_models(finished):
    tiny = finished.tiny
    read = planned(tiny, reference=FromCheckpoints(paths=[str(tiny.model)] * 2))["reference"]
    assert (read.read[0], read.steps) == (2 * tokens_of(tiny), 0)
    ready = finished.path / "confidence" / "dynamics.parquet"
    more = planned(tiny, reference=FromCheckpoints(paths=[str(tiny.model)] * 40))["reference"]
    assert more.read[0] == 20 * read.read[0], "more models than steps"
    for reference in (Online(), FromFile(path=str(ready))):
        assert list(planned(tiny, reference=reference)) == ["train", "base"]
    model = ReferenceModel(path=str(tiny.model), lora=LoraOptions(r=4))
    assert planned(tiny, reference=TrainedReference(model=model))["reference"].model.lora.r == 4


class Mine(Reference):
    rows = paths = "rows.jsonl"

    def collect(self, context):
        raise NotImplementedError


def test_a_reference_of_ones_own_calls_anything_rows_or_paths(tiny):
    assert planned(tiny, reference=Mine())["reference"].read[0] == tokens_of(tiny)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [IRDRO(), ASFT()], ids=str)
def test_an_objective_that_reads_each_batch_once_more_pays_for_it(objective, tiny):
    """The model before its step, or the model before training in the step."""
    plain = planned(tiny, **ALONE)["train"]
    stages = planned(tiny, **ALONE | {"objective": objective}, with_baseline=True)
    train, baseline = stages["train"], stages["baseline"]
    assert (train.read - plain.read).tolist() == pytest.approx(train.trained.tolist())
    assert baseline.read.tolist() == plain.read.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("objective", [CutMix(), ManifoldMixup(layers=1), ProFit(mixup=EmbeddingMixup())], ids=str)
def test_mixup_at_other_places_trains_the_batch_twice(objective, tiny):
    given = {"splitter": RandomSplit(), "with_baseline": True}
    stages, mixed = planned(tiny, **given, objective=objective), planned(tiny, **given)["train"]
    twice, baseline = stages["train"], stages["baseline"]
    assert (twice.computed / mixed.computed).tolist() == [2, 2, 2]
    assert baseline.computed.tolist() == mixed.computed.tolist()
    assert (twice.trained.tolist(), twice.slots) == (mixed.trained.tolist(), mixed.slots)


@pytest.mark.parametrize(
    ("callbacks", "evaluations"),
    some_fast([([Evaluate()], 3), ([], 0), ([Evaluate(every=5)], 2), ([Evaluate(), Evaluate(every=1)], 15)], every=2),
)
def test_evaluations_are_those_of_the_callbacks(tiny, callbacks, evaluations):
    """12 steps in three epochs; one evaluation after them, and one of the base model."""
    sample = planned(tiny, **ALONE, data={"eval": None}, callbacks=[])["train"].read[0]
    stages = planned(tiny, **ALONE, callbacks=callbacks)
    held_out = stages["base"].read[0] - sample
    assert min(sample, held_out) > 0
    assert stages["train"].read[0] - sample == pytest.approx(held_out * (1 + evaluations))


def test_steps_are_of_the_run_s_micro_batches(tiny):
    """29 rows, 8 a step: 3 steps of full batches and one of five rows in each epoch; on one rank, 4 at a time."""
    for count, groups, micro_batches in ((1, None, 2), (2, None, 1), (1, 2, 2)):
        options = replace(TRAINING, length_groups=groups)
        train = planned(tiny, machine(gpus=count), **ALONE, training=options)["train"]
        assert train.micro_batches == micro_batches


@pytest.mark.parametrize("groups", [1, 2, None])
def test_the_largest_micro_batch_is_the_one_with_the_most_slots(tiny, groups):
    changes = ALONE | {"training": replace(TRAINING, length_groups=groups)}
    work, (given, rows) = planned(tiny, **changes)["train"], rows_of(tiny, **changes)
    data, slots = rows.data.train, []
    order = TrainingOrder(len(data), lambda epoch: None, options=given.training, seed=given.seed)
    for step in range(order.total_steps):
        dealing = {"ranks": 1, "device": CPU.device, "padding_free": False}
        for micro in deal(order.batch(step), data.lengths, given.training, **dealing):
            lengths = [int(data.lengths[slot.row]) for unit in micro.ranks[0] for slot in unit]
            slots.append(token_slots(lengths, micro.n_segments))
    assert work.slots == max(slots) > min(slots)
    assert work.computed[0] / work.trained[0] == pytest.approx(sum(slots) / (3 * data.lengths.sum()))


@pytest.mark.slow
def test_the_largest_micro_batch_has_the_longest_row_wherever_it_is_drawn(tiny):
    """One of 601 rows, of which four a step make 151 steps: two in three of them are dealt."""
    rows = [{"instruction": f"{number}", "output": "one"} for number in range(600)]
    write_jsonl(tiny.train, [*rows, {"instruction": "all", "output": "one two three four five six seven"}])
    changes = ALONE | {"training": replace(TRAINING, global_batch_size=4, epochs=1), "data": {"eval": None}}
    other, longest = np.sort(rows_of(tiny, **changes)[1].data.train.lengths)[-2:]
    for seed in range(4):
        train = planned(tiny, **changes, seed=seed)["train"]
        assert train.steps == 151
        assert train.slots > longest + 2 * other  # beside three others, of which one is in its length group


@pytest.mark.slow
def test_micro_batches_are_without_padding_where_a_run_s_are(tiny):
    gpu = machine(gpus=1)

    def is_one_row(device: Machine = CPU, attention: str | None = None, **options) -> bool:
        model = ModelOptions(path=str(tiny.model), attention=attention)
        train = planned(tiny, device, **ALONE, model=model, training=replace(TRAINING, **options))["train"]
        return train.computed[0] == pytest.approx(train.trained[0])

    assert is_one_row(gpu, "flash_attention_2")
    assert not is_one_row(gpu, "sdpa")
    assert is_one_row(padding_free=True)
    assert not is_one_row(CPU, "flex_attention")
    assert not is_one_row(gpu, "flash_attention_2", length_groups=2)


def test_on_a_cpu_auto_is_the_number_of_tokens_that_fits(tiny):
    """Of a CPU in name, of which no memory is known, that of so many rows as are the default."""
    options = replace(TRAINING, micro_batch_size=None, micro_batch_tokens="auto")
    work, lengths = planned(tiny, **ALONE, training=options)["train"], rows_of(tiny, **ALONE)[1].data.train.lengths
    assert work.options.micro_batch_tokens == DEFAULT_MICRO_BATCH * lengths.max()


def test_by_default_a_step_of_short_rows_is_one_pass_and_one_of_long_rows_several(tiny):
    """On one GPU of 80 GB: 32 rows, of a Llama of 0.9 billion weights."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 32}
    small_llama(tiny.model, empty=True, vocab_size=32_000, max_position_embeddings=2048, **sizes)
    (tiny.model / "model.safetensors").unlink()
    found = {}
    for words in (60, 2000):
        write_jsonl(tiny.train, [{"instruction": "all", "output": "one " * (words - number)} for number in range(32)])
        options = TrainingOptions(global_batch_size=32)
        train = planned(tiny, machine(gpus=1), **ALONE, training=options, data={"eval": None})["train"]
        assert train.slots / train.computed[0] * train.steps == pytest.approx(1 / train.micro_batches, rel=0.2)
        found[words] = train.micro_batches
    assert found[60] == 1
    assert 2 <= found[2000] <= 16


def test_each_rank_waits_for_the_slowest(tiny):
    """Of eight rows of a step each of eight GPUs has one, and all take as long as the longest."""
    options = replace(TRAINING, global_batch_size=8, epochs=1)
    work, (given, rows) = planned(tiny, machine(gpus=8), **ALONE, training=options)["train"], rows_of(tiny, **ALONE)
    lengths = rows.data.train.lengths
    order = TrainingOrder(len(lengths), lambda epoch: None, options=options, seed=given.seed)
    slowest = [max(int(lengths[slot.row]) for (slot,) in order.batch(step)) for step in range(order.total_steps)]
    assert work.computed[0] == pytest.approx(8 * sum(slowest))
    assert work.computed[1] == work.trained[1]
