"""A step, scoring and a backward through recomputed layers on a device that is not the CPU."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sftmix.components import (
    DFT,
    EAFT,
    IRDRO,
    NTP,
    ConfidencePenalty,
    CutMix,
    DecomposedMixup,
    EmbeddingMixup,
    LabelSmoothing,
    ManifoldMixup,
    MixtureDivergence,
    NEFTune,
    SFTMix,
    SoftLabels,
)
from sftmix.components.base import Objective, Perturbation
from sftmix.model.layers import recompute_activations
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.dynamics import OnlineLosses
from sftmix.training.loop import TrainingLoop
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import wrap
from sftmix.training.scoring import Scorer
from sftmix.training.step import prepare_step, train_step
from tests.device.sim import HostTensor, OrderOfThreads, Sim, begin
from tests.forked import on_ranks
from tests.toy import metrics_of, toy_setup, toy_stage
from tests.training.test_step import DATA, UNITS

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "NTP": NTP,
    "SFTMix": SFTMix,
    "sequence": lambda: SFTMix(mean="sequence"),
    "EAFT": lambda: EAFT(mixup=SFTMix()),
    "DFT": DFT,
    "LabelSmoothing": LabelSmoothing,
    "ConfidencePenalty": ConfidencePenalty,
    "IRDRO": IRDRO,
    "DecomposedMixup": DecomposedMixup,
    "EmbeddingMixup": EmbeddingMixup,
    "ManifoldMixup": lambda: ManifoldMixup(layers=1),
    "CutMix": CutMix,
    "MixtureDivergence": MixtureDivergence,
    "SoftLabels": SoftLabels,
}
CPU, SIM = torch.device("cpu"), "sim:0"


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(attention: str = "sdpa", dropout: float = 0.1) -> LlamaForCausalLM:
    more: dict[str, Any] = {"attention_dropout": dropout, "attn_implementation": attention}
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, **more))


def stepped(
    device,
    objective,
    *,
    perturbation=None,
    padding_free=False,
    attention="sdpa",
    dropout=0.1,
    recompute=False,
    seen=None,
):
    """Make two steps, whose losses are recorded.

    Return what they say, all weights after them, and the reads and uploads that `seen` counted.
    """
    torch.manual_seed(0)
    model, world = llama(attention, dropout), World(device=torch.device(device))
    if recompute:
        recompute_activations(model)
    module = wrap(TrainingModule(model, chunk_size=16), parallel="none", precision="fp32", world=world)
    module.padding_free = padding_free
    about = {"optimizer": torch.optim.AdamW(model.parameters(), lr=0.01), "data": DATA, "objective": objective}
    options = TrainingOptions(micro_batch_size=6, length_groups=None if padding_free else 3)
    setup = toy_setup(module, perturbation=perturbation, options=options, world=world, **about)
    seen = seen or Sim()
    seen.reads.clear()
    seen.sent.clear()
    online, results = OnlineLosses(DATA.ids, Path(), world), []
    for number in range(2):
        results.append(train_step(setup, prepare_step(setup, number, UNITS, None)))
        online.record(results[-1].batches, results[-1].nll)
    reads, sent = dict(seen.reads), set(seen.sent)  # before the weights are read
    numbers = [(one.loss, one.ntp, one.mixup, one.grad_norm) for one in results]
    return numbers, {name: p.detach().cpu() for name, p in model.named_parameters()}, reads, sent


def assert_as_on_the_cpu(seen: Sim, objective: Objective, reads: dict[str, int], **given: Any) -> None:
    """Compare two steps; on `sim` padded examples get no mask, and tied gradients are added in another order."""
    numbers, weights, _, _ = stepped(CPU, objective, **given)
    found, moved, counted, sent = stepped(SIM, objective, seen=seen, **given)
    np.testing.assert_allclose(found, numbers, rtol=1e-6)
    for name, one in weights.items():
        torch.testing.assert_close(moved[name], one, rtol=0, atol=1e-8 if given["padding_free"] else 1e-6)
    assert counted == reads
    assert sent == {"transfer.py"}  # which pins what it sends


def check(world: World, name: str, way: dict[str, Any]) -> None:
    """Two steps of two micro-batches, each of one row or of three segments."""
    seen, reads = begin(), {"step.py": 2} | ({"scoring.py": 2} if name == "IRDRO" else {})
    for padding_free in (True, False):
        assert_as_on_the_cpu(seen, OBJECTIVES[name](), reads, padding_free=padding_free, **way)


@pytest.mark.parametrize(
    "name", [name if name == "SFTMix" else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
def test_a_step_of_each_objective(name):
    """The same numbers as on the CPU, no tensor left there, and no read of the device but those of `reads`."""
    on_ranks(check, name, {}, ranks=1)


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(
    ("name", "device"), [("SFTMix", "cpu"), *(pytest.param(name, "cuda:0", marks=ON_GPU) for name in OBJECTIVES)]
)
def test_a_step_of_each_objective_on_a_gpu(name, device, padding_free):
    """Losses and gradient norms; where a gradient is nearly 0, AdamW makes much of its sign."""
    about = {"padding_free": padding_free, "dropout": 0.0}
    expected, found = (stepped(one, OBJECTIVES[name](), **about)[0] for one in (CPU, device))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-2, atol=1e-5)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("way", [{"perturbation": NEFTune()}, {"attention": "eager"}, {"recompute": True}])
def test_a_step_with_noise_or_eager_attention_or_recomputed_layers(way):
    on_ranks(check, "SFTMix", way, ranks=1)


def check_scoring(world: World) -> None:
    begin()
    tables = []
    for device in (CPU, SIM):
        torch.manual_seed(0)
        here = World(device=torch.device(device))
        module = wrap(TrainingModule(llama(), chunk_size=16), parallel="none", precision="fp32", world=here)
        tables.append(Scorer(world=here, keep=["token_nll"])(module, DATA))
    cpu, sim = tables
    assert sim.n_tokens.tolist() == cpu.n_tokens.tolist()
    assert sim.n_correct.tolist() == cpu.n_correct.tolist()
    np.testing.assert_allclose(sim.nll_sum, cpu.nll_sum, rtol=1e-6)
    np.testing.assert_allclose(*(np.concatenate(table.kept["token_nll"]) for table in (sim, cpu)), rtol=1e-5)


def test_scores():
    on_ranks(check_scoring, ranks=1)


class NoiseOfTheHost(Perturbation):
    def embeddings(self, e, mask, *, ids, step, seed):
        return e + torch.ones(e.shape[-1])


class LambdaOfTheHost(SFTMix):
    def loss(self, view, batch, plan):
        return super().loss(view, batch, replace(plan, lam=plan.lam.cpu()))


class WeightsReadInTheLoss(SFTMix):
    def loss(self, view, batch, plan):
        assert bool((plan.row_weight >= 0).all())
        return super().loss(view, batch, plan)


class SumsInNoOrder(NTP):
    def loss(self, view, batch, plan):
        out = super().loss(view, batch, plan)
        sums = out.nll.new_zeros(len(batch.ids)).index_add(0, batch.slot, out.nll)
        return out._replace(ntp=out.ntp + 0 * sums.sum())


def check_faults(world: World) -> None:
    seen = begin()
    for error, objective, perturbation in (
        (HostTensor, SFTMix(), NoiseOfTheHost()),
        (HostTensor, LambdaOfTheHost(), None),
        (OrderOfThreads, SumsInNoOrder(), None),
    ):
        with pytest.raises(error):
            stepped(SIM, objective, perturbation=perturbation)
    reads = stepped(SIM, WeightsReadInTheLoss(), seen=seen)[2]
    assert reads["test_step.py"] == 4


def test_what_is_left_on_the_host_or_read_from_the_device_or_added_in_no_order_is_found():
    on_ranks(check_faults, ranks=1)


def check_default(world: World, directory: str) -> None:
    """On a device without a figure for its memory: as many tokens as 8 of the longest rows have, in 3 length groups."""
    begin()
    for device in ("cpu", "sim:0"):
        torch.manual_seed(0)
        stage = toy_stage(
            Path(directory, device[:3]),
            [UNITS],
            data=DATA,
            options={"micro_batch_size": None, "length_groups": 3},
            model=llama(dropout=0.0),
        )
        found = TrainingLoop(stage, World(device=torch.device(device)))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            found.run()
        tokens = found.stage.options.micro_batch_tokens
        assert tokens is None if device == "cpu" else tokens == 8 * max(DATA.lengths)
        assert out.getvalue().count("training.micro_batch_tokens auto is ") == (device != "cpu")
    cpu, sim = ([one["loss"] for one in metrics_of(Path(directory, name))] for name in ("cpu", "sim"))
    assert sim == pytest.approx(cpu, rel=1e-6)


def test_the_default_of_a_gpu_is_auto(tmp_path):
    on_ranks(check_default, str(tmp_path), ranks=1)
