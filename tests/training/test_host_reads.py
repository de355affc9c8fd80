"""A step reads values of the device once, its sums and the gradient norm, and the next step is ready early."""

import os
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot
from sftmix.components import EAFT, IRDRO, NTP, AdamW, CutMix, ManifoldMixup, NEFTune, SFTMix
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.dynamics import OnlineLosses
from sftmix.training.loop import train
from sftmix.training.module import TrainingModule, attention_inputs
from sftmix.training.step import prepare_step, train_step
from tests.fast import some_fast
from tests.model.test_models import SUMS
from tests.model.test_packing import CASES, build, model_of
from tests.toy import FixedOrder, rounding, toy_setup, toy_stage
from tests.training.test_step import DATA, UNITS

READS = {"item", "tolist", "numpy", "cpu", "nonzero", "bincount", "__bool__", "__int__", "__float__", "__index__"}


class Reads(TorchFunctionMode):
    """Counts the reads of values by file; those of the optimizer are of its step, which it keeps on the host."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.Tensor.__getitem__ and any(getattr(x, "dtype", None) == torch.bool for x in args[1:])
        if by_mask or getattr(func, "__name__", "") in READS:
            frame = sys._getframe(1)
            if f"{os.sep}optim{os.sep}" not in frame.f_code.co_filename:
                while f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
                    frame = frame.f_back
                self.places[os.path.basename(frame.f_code.co_filename)] += 1
        return func(*args, **(kwargs or {}))


def llama(attention: str):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    return build(config, attention)


@pytest.mark.parametrize(
    "objective",
    [NTP(), SFTMix(), SFTMix(mean="sequence"), EAFT(mixup=SFTMix()), ManifoldMixup(layers=1), CutMix()],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("attention", some_fast(["sdpa", "eager", "varlen"], every=2))
def test_a_step_reads_its_sums_alone(objective, padding_free, attention):
    """transformers asks whether lines hold padding, or several documents: it is told."""
    model = llama(attention)
    module = TrainingModule(model)
    module.padding_free = padding_free
    about = {"optimizer": torch.optim.AdamW(model.parameters()), "data": DATA, "objective": objective}
    options = TrainingOptions(micro_batch_size=6, length_groups=None if padding_free else 3)
    setup = toy_setup(module, perturbation=NEFTune(), options=options, **about)
    prepared = prepare_step(setup, 3, UNITS, None)
    assert len(prepared.batches) == 2
    with Reads() as reads:
        train_step(setup, prepared)
    assert reads.places == {"step.py": 1}


def test_the_nll_of_all_micro_batches_is_read_at_once(tmp_path):
    """In a step that needs it, and at the end of an epoch: by cpu() and numpy()."""
    model, online = llama("sdpa"), OnlineLosses(DATA.ids, tmp_path, World())
    about = {"optimizer": torch.optim.AdamW(model.parameters()), "data": DATA, "objective": IRDRO()}
    setup = toy_setup(TrainingModule(model), options=TrainingOptions(micro_batch_size=6), **about)
    with Reads() as in_step:  # its objective plans on the host, in other files
        done = train_step(setup, prepare_step(setup, 3, UNITS, None))
    with Reads() as in_record:
        online.record(done.batches, done.nll)
    with Reads() as in_epoch:
        losses = online.gathered()
    assert len(done.batches) == 2
    assert losses["row"].tolist() == sorted(slot.row for unit in UNITS for slot in unit if slot.ntp_weight)
    to_ids = 1  # tolist(), of rows that are on the host then
    assert (in_step.places["scoring.py"] - to_ids, in_record.places, in_epoch.places["scoring.py"]) == (2, {}, 2)


@pytest.mark.parametrize(("family", "attention"), some_fast(CASES, every=2))
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("units", [UNITS, UNITS[-1:]])
def test_what_transformers_is_told_is_what_it_would_read(family, attention, padding_free, units):
    model = model_of(family, attention)
    batch = collate(units, DATA, padding_free=padding_free)
    (segment,) = batch.segments
    assert segment.padded == (segment.attention_mask.min() == 0)
    inputs = attention_inputs(replace(segment, padded=True), attention)  # it reads a mask of ones, too
    out = model.get_decoder()(input_ids=segment.input_ids, **inputs, use_cache=False).last_hidden_state
    expected = out.flatten(0, 1)[segment.index][torch.argsort(segment.order)]
    assert torch.equal(TrainingModule(model).hidden_states(batch), expected)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_without_a_mask_the_real_tokens_have_the_same_states(family, attention):
    """Padding is on the right: on a device that waits for no mask, none is made."""
    model = model_of(family, attention)
    (segment,) = collate(UNITS, DATA).segments
    with torch.no_grad():
        masked, unmasked = (
            model.get_decoder()(input_ids=segment.input_ids, **inputs, use_cache=False)
            for inputs in (attention_inputs(segment, attention, masked=one) for one in (True, False))
        )
    expected, found = (out.last_hidden_state.flatten(0, 1)[segment.index] for out in (masked, unmasked))
    assert segment.attention_mask.min() == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(expected, SUMS))


def test_flash_attention_is_told_where_documents_begin():
    """Without these places it reads the positions in each layer."""
    for units, padding_free in ((UNITS[:2], True), ([(Slot(0),)], True), ([(Slot(0),)], False)):
        (segment,) = collate(units, DATA, padding_free=padding_free).segments
        inputs = attention_inputs(segment, "flash_attention_2")
        lengths = [len(DATA[slot.row].input_ids) for unit in units for slot in unit]
        ends = np.cumsum([0, *lengths]).tolist()
        assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == ends
        assert inputs["cu_seq_lens_q"].dtype == torch.int32
        assert inputs["max_length_q"] == inputs["max_length_k"] == max(lengths)


class Noted(NTP):
    def plan(self, batch, *, step, **given):
        NOTES.append(step)
        return super().plan(batch, step=step, **given)


class NotedUpdates(AdamW):
    def build(self, parameters, *, training):
        optimizer = super().build(parameters, training=training)
        optimizer.register_step_pre_hook(lambda *_: NOTES.append("update"))
        return optimizer


class TwoEpochs(FixedOrder):
    ends = (2, 3)


NOTES: list = []


def test_the_next_step_is_ready_before_the_update_and_is_made_once(tmp_path):
    """Not over the end of an epoch: the split of the next one may need the step."""
    steps = [[(Slot(0), Slot(1))], [(Slot(2), Slot(3))], [(Slot(4),)]]
    stage = toy_stage(tmp_path, steps, data=DATA, order=TwoEpochs(steps), objective=Noted(), optimizer=NotedUpdates())
    train(stage, World())
    assert NOTES == [0, 1, "update", "update", 2, "update"]
