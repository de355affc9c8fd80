"""Examples in one row without padding are the examples one by one: losses, scores and gradients, in several families
(T12); pairs that share the row are mixed as ever; and what cannot keep them apart is refused."""

from unittest.mock import patch

import pytest
import torch
import transformers

from sftmix.batches.collate import collate, to_device
from sftmix.batches.order import Slot, Unit
from sftmix.components import NTP, SFTMix
from sftmix.model.packing import attention_of, packing_problem
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.module import TrainingModule
from sftmix.training.parallel import gradient_sync, training_module, unwrap
from sftmix.training.scoring import Scorer, scoring_plan, split_by_slot
from sftmix.training.step import micro_batches, normalise
from sftmix.words.errors import ConfigError
from tests.forked import on_ranks
from tests.model.test_models import SUMS, TINY
from tests.model.test_packing import CASES, LEAKY, build, model_of
from tests.toy import rounding, toy_model, toy_rows

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4), (9, 1), (2, 6), (5, 3)])
UNITS: list[Unit] = [(Slot(0), Slot(1)), (Slot(2), Slot(3)), (Slot(4), Slot(2, 0.0)), (Slot(5),), (Slot(6),)]


def losses(model, **layout):
    """Loss, NLL and Mixup of each token (pair), and gradients of one micro-batch."""
    batch = collate(UNITS, DATA, **layout)
    plan = SFTMix(mu=0.75).plan(batch, step=3, total_steps=9, seed=5)
    model.zero_grad()
    scaled = normalise(plan, ntp_count=plan.ntp_count, mixup_count=plan.mixup_count, world_size=1)
    out = TrainingModule(model)(batch, scaled)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "nll": out.nll, "mixup": out.mixup} | grads


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_one_row_is_one_by_one(family, attention):
    """A segment for each slot is one by one; float32, since some norms compute in it whatever the weights are."""
    model = model_of(family, attention)
    found = losses(model, padding_free=True)
    expected = losses(model_of(family, "eager") if attention == "varlen" else model, n_segments=8)
    assert found.keys() == expected.keys()
    assert len(found["mixup"]) == 2 + 4 + 1
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_scores_without_padding_are_those_with_it(family, attention):
    module = TrainingModule(model_of(family, attention))
    own = TrainingModule(model_of(family, "eager")) if attention == "varlen" else module
    padded = Scorer(world=World(), keep=["token_nll"])(own, DATA)
    module.padding_free = True
    found = Scorer(world=World(), keep=["token_nll"])(module, DATA)
    assert found.nll_sum == pytest.approx(padded.nll_sum, rel=1e-6)
    assert (found.n_correct == padded.n_correct).all()
    for one, other in zip(found.kept["token_nll"], padded.kept["token_nll"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def fed(model, **options) -> TrainingModule:
    module = training_module(model, TrainingOptions(**options), precision="fp32", world=World(), trains=True)
    assert isinstance(module, TrainingModule)
    return module


def test_auto_pads_on_a_cpu():
    model = toy_model()
    assert not fed(model).padding_free
    assert fed(model, padding_free=True).padding_free


def leaky(family: str = "opt"):
    return build(transformers.AutoConfig.for_model(family, **LEAKY[family]), "eager")


@pytest.mark.parametrize("family", LEAKY)
def test_a_model_that_does_not_keep_examples_apart_is_refused(family):
    with pytest.raises(ConfigError, match=rf"\({family}, (.|\n)*training.padding_free to false"):
        fed(leaky(family), padding_free=True)
    assert not fed(leaky(family)).padding_free


def test_a_model_that_fails_in_the_probe_is_refused():
    def refuse(layer, args, kwargs):
        if (kwargs["position_ids"].diff() < 0).any():
            raise ValueError("no such positions")

    model = model_of("llama", "sdpa")
    model.model.layers[0].register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(ConfigError, match=r"no such positions(.|\n)*training.padding_free to false"):
        fed(model, padding_free=True)


def test_auto_pads_where_examples_would_not_be_kept_apart(capsys, monkeypatch):
    """On a CPU there is no attention for which auto means padding-free: the probe is asked as on a GPU."""
    monkeypatch.setattr("sftmix.training.parallel.is_skipping", lambda attention, device: True)
    assert not fed(leaky()).padding_free
    line = "micro-batches are padded, with attention eager (training.padding_free auto): model.path: OPT"
    assert line in capsys.readouterr().out


def test_flex_attention_does_not_train_on_a_cpu():
    model = build(transformers.LlamaConfig(**TINY), "flex_attention")
    with pytest.raises(ConfigError, match=r"model.attention flex_attention does not train on a CPU; use sdpa or eager"):
        fed(model)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of transformers and torch, on what they call and on the missing compiler
def test_flex_attention_keeps_examples_apart():
    """Its mask of blocks, from the positions; without the compiler, which takes minutes on a CPU."""
    model = build(transformers.LlamaConfig(**TINY), "flex_attention")
    plain = build(transformers.LlamaConfig(**TINY), "sdpa")
    batch = collate(UNITS, DATA, padding_free=True)
    with torch.compiler.set_stance("force_eager"):
        found = TrainingModule(model).hidden_states(batch)
        assert packing_problem(model, padding_free=True) is None
    expected = TrainingModule(plain).hidden_states(collate(UNITS, DATA, n_segments=8))
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(expected, SUMS))


def gradients_of_a_rank(module, rank, **layout) -> dict[str, torch.Tensor]:
    """Of every second unit, as they are after the backward: averaged over ranks by DDP and FSDP."""
    batch = collate(UNITS[rank::2], DATA, **layout)
    plan = normalise(NTP().plan(batch, step=0, total_steps=1, seed=0), ntp_count=9, mixup_count=9, world_size=1)
    with gradient_sync(module, enabled=True):
        module(batch, plan).loss.backward()
    parameters = unwrap(module).named_parameters()
    return {name: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for name, p in parameters}


def varlen_on_ranks(world: World) -> None:
    plain = TrainingModule(model_of("mistral, sliding", "eager"))
    for rank in range(world.size):
        expected = gradients_of_a_rank(plain, rank, n_segments=4)  # they add up
    about = {"precision": "fp32", "world": world, "trains": True}
    with patch("sftmix.model.packing.DEVICES", ("cpu",)):
        for parallel in ("ddp", "fsdp"):
            model = model_of("mistral, sliding", None)
            module = training_module(model, TrainingOptions(parallel=parallel), **about)
            assert (unwrap(module).padding_free, attention_of(model)) == (True, "varlen")
            found = gradients_of_a_rank(module, world.rank, padding_free=True)
            for name, one in expected.items():
                torch.testing.assert_close(found[name] * world.size, one, rtol=1e-5, atol=3e-6)
        # A rank of which the probe says otherwise would pad alone, and pass the model another number of times.
        found = "of rank 1" if world.rank else None
        with patch("sftmix.training.parallel.packing_problem", lambda *_, **given: found):
            model = model_of("llama", None)
            module = training_module(model, TrainingOptions(), **about)
        assert (unwrap(module).padding_free, attention_of(model)) == (False, "sdpa")


@pytest.mark.slow
def test_ranks_have_the_gradients_of_padded_examples_and_pad_together():
    on_ranks(varlen_on_ranks)


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("attention", [None, "varlen", "sdpa", "flash_attention_2"])
def test_each_example_has_its_nll_on_a_gpu(attention, device, monkeypatch):
    """bf16 under autocast; the probe is part of what is tested, and auto finds what needs no mask."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    monkeypatch.setattr("sftmix.model.packing.DEVICES", (device,))
    config = transformers.LlamaConfig(**TINY | {"hidden_size": 128, "head_dim": 64})
    world, options = World(device=torch.device(device)), TrainingOptions(micro_batch_size=16)
    about = {"precision": "bf16", "world": world, "attention": attention}
    module = training_module(build(config, attention), options, trains=True, **about)
    assert module.padding_free == (attention != "sdpa")
    (one,) = micro_batches(UNITS, DATA, options, world, module, split=None, pad_id=0)
    batch, plan = (to_device(given, world.device) for given in (one, NTP().plan(one, step=0, total_steps=1, seed=0)))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = module(batch, plan)
    out.loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in module.parameters() if p.grad is not None)
    plain = collate([*reversed(UNITS)], DATA, n_segments=8)  # the units of a step are dealt in another order
    expected = TrainingModule(build(config, "eager"))(plain, scoring_plan(plain)).nll.detach()
    found = dict(zip(one.ids, split_by_slot(out.nll.detach().float(), one), strict=True))
    for name, nll in zip(plain.ids, split_by_slot(expected, plain), strict=True):
        torch.testing.assert_close(found[name], nll, rtol=0.05, atol=0.05)
