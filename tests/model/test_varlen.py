"""Attention varlen: each document by itself, its gradients, and what it refuses by name."""

import inspect
import re
from unittest.mock import patch

import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import CONFIG_MAPPING, LlamaConfig

from sftmix.model.load import load_model
from sftmix.model.packing import attention_of
from sftmix.model.varlen import FAMILIES, _kernel, _stand_in, attend, missing
from sftmix.options import TrainingOptions
from sftmix.ranks.world import World
from sftmix.training.parallel import training_module
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.model.test_models import SUMS, TINY
from tests.model.test_models import random_model as build
from tests.toy import rounding

LENGTHS = (5, 1, 9, 3)


def tokens(heads: int, seed: int) -> torch.Tensor:
    made = torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def starts() -> torch.Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_states_and_gradients_are_those_of_each_document_by_sdpa(heads, window, scale):
    """Of the body on a CPU, in float64; at most 9 numbers of size 1 are summed twice."""
    q, k, v = tokens(4, 0), tokens(heads, 1), tokens(heads, 2)
    found = _stand_in(q, k, v, starts(), 9, scale, window)
    parts = []
    for one in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):
        one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in one)
        at = torch.arange(one_q.shape[2])
        mask = (at[:, None] >= at) & (at[:, None] - at < (window or 100))
        out = F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    weights = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    gradients = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_queries_in_float32_under_autocast_are_computed_in_half_precision(values, monkeypatch):
    """As rotary embeddings in float32 leave them; the kernel casts nothing itself."""
    dtypes = set()

    def noted(q, k, v, *more):
        dtypes.update(x.dtype for x in (q, k, v))
        return _stand_in(q, k, v, *more)

    monkeypatch.setattr("sftmix.model.varlen._stand_in", noted)
    q, k, v = (x.detach().float().transpose(0, 1)[None] for x in (tokens(4, 0), tokens(2, 1), tokens(2, 2)))
    given = {"cu_seq_lens_q": starts(), "max_length_q": 9}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(torch.nn.Module(), q, k, v.to(values), None, **given)[0]
    expected = attend(torch.nn.Module(), *(x.bfloat16() for x in (q, k, v)), None, **given)[0]
    assert dtypes == {torch.bfloat16}
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("window", "sides"), [(None, (-1, 0)), (4, (3, 0))])
def test_the_kernel_gets_causal_windows(window, sides, monkeypatch):
    """A window counts the token itself, and the kernel those before it."""
    seen = {}

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **given):
        seen.update(given, longest=(max_q, max_k), ends=cu_seq_q is cu_seq_k)

    assert "enable_gqa" in inspect.signature(varlen_attn).parameters
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    _kernel(tokens(4, 0), tokens(2, 1), tokens(2, 2), starts(), 9, 0.5, window)
    assert seen == {"scale": 0.5, "window_size": sides, "longest": (9, 9), "ends": True, "enable_gqa": True}


# ------------------------------------------------------------------------------------------------- refusals


UNFIT = {
    "soft caps": ("Gemma2", {}, "a soft cap of 50 in its attention"),
    "another family": ("Gemma2", {"attn_logit_softcapping": None}, "the type gemma2"),
    "dropout": ("Llama", {"attention_dropout": 0.1}, "an attention dropout of 0.1"),
    "wide": ("Llama", {"head_dim": 264}, r"heads of width 264"),
    "odd": ("Llama", {"head_dim": 12}, r"heads of width 12 \(allowed: a multiple of 8, at most 256\)"),
}


def fed(model, attention=None, **options):
    about = {"precision": "fp32", "world": World(), "attention": attention, "trains": True}
    return training_module(model, TrainingOptions(**options), **about)


AS_ON_CUDA = patch("sftmix.model.packing.DEVICES", ("cpu",))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNFIT)
def test_what_it_cannot_compute_is_refused_by_name_and_padded_under_auto(kind, capsys):
    family, more, name = UNFIT[kind]
    model = build(getattr(transformers, f"{family}Config")(**TINY | more))
    own = attention_of(model)
    with AS_ON_CUDA:
        assert not fed(model).padding_free
    assert (attention_of(model), model.training) == (own, False)
    why = f": model.path: .* has {name}" if own == "sdpa" else ""
    line = rf"micro-batches are padded, with attention {own} \(training.padding_free auto\)"
    assert re.search(line + why, capsys.readouterr().out)
    model.config._attn_implementation = "varlen"
    for asked in ("auto", True, False):
        with pytest.raises(ConfigError, match=rf"{name}(.|\n)*Set another model.attention \(sdpa, eager\) or none"):
            fed(model, "varlen", padding_free=asked)
        assert (attention_of(model), model.training) == ("varlen", False)


@pytest.mark.parametrize("family", some_fast(FAMILIES.split(), every=3))
def test_each_family_has_the_states_of_its_own_attention_within_its_window(family):
    """Documents of the probe have up to 10 tokens, the windows 4; without a window each attention is whole."""
    config = CONFIG_MAPPING[family](**TINY)
    if hasattr(config, "sliding_window"):
        kinds = {"layer_types": ["sliding_attention"] * 2} if hasattr(config, "layer_types") else {}
        config = CONFIG_MAPPING[family](**TINY | kinds | {"sliding_window": 4, "use_sliding_window": True})
    assert fed(build(config, "varlen"), "varlen", padding_free=True).padding_free


def test_numbers_that_the_kernel_does_not_have_are_not_given_to_it():
    """The tensors are on a GPU that is not there."""
    with FakeTensorMode(), torch.device("cuda"):
        for dtype, body in ((torch.float32, "_stand_in"), (torch.bfloat16, "_kernel")):
            q, k, v = torch.empty(3, 1, 4, 9, 8, dtype=dtype)
            with patch(f"sftmix.model.varlen.{body}", lambda q, *more: q):
                assert attend(torch.nn.Module(), q, k, v, None)[0].shape == (1, 9, 4, 8)


def test_a_model_that_fails_with_it_means_padding_under_auto(capsys):
    def broken(*args):
        raise RuntimeError("no kernel image is available")

    model = build(LlamaConfig(**TINY))
    with AS_ON_CUDA, patch("sftmix.model.varlen._stand_in", broken):
        assert not fed(model).padding_free
    assert (attention_of(model), model.training) == ("sdpa", False)
    assert "does not take packed documents: no kernel image is available." in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("attention", "options", "chosen"),
    [
        (None, {}, ("varlen", True)),
        (None, {"padding_free": True}, ("varlen", True)),
        (None, {"padding_free": False}, ("sdpa", False)),
        (None, {"length_groups": 2}, ("sdpa", False)),
        ("sdpa", {}, ("sdpa", False)),
        ("sdpa", {"padding_free": True}, ("sdpa", True)),
        ("eager", {}, ("eager", False)),
        ("varlen", {}, ("varlen", True)),
        ("varlen", {"padding_free": False}, ("varlen", False)),
    ],
    ids=str,
)
def test_what_the_user_named_is_kept(attention, options, chosen, capsys):
    model = build(LlamaConfig(**TINY), attention)
    with AS_ON_CUDA:
        one_row = fed(model, attention, **options).padding_free
    assert (attention_of(model), one_row) == chosen
    line = f"micro-batches are {'not ' * one_row}padded, with attention {chosen[0]} (training.padding_free "
    assert line in capsys.readouterr().out


def test_a_model_that_was_built_with_another_attention_keeps_it():
    model = build(LlamaConfig(**TINY), "eager")
    with AS_ON_CUDA:
        assert not fed(model).padding_free
    assert attention_of(model) == "eager"


def test_padding_free_true_takes_the_own_attention_if_varlen_does_not_fit(capsys):
    model = build(LlamaConfig(**TINY | {"attention_dropout": 0.1}))
    with AS_ON_CUDA:
        assert fed(model, padding_free=True).padding_free
    assert attention_of(model) == "sdpa"
    assert "with attention sdpa (training.padding_free true): model.path: Llama" in capsys.readouterr().out


def test_on_a_cpu_nothing_is_chosen():
    model = build(LlamaConfig(**TINY))
    assert not fed(model).padding_free
    assert fed(model, padding_free=True).padding_free
    assert attention_of(model) == "sdpa"


def test_the_name_is_known_where_models_are_loaded_and_is_not_exported(tmp_path):
    build(LlamaConfig(**TINY)).save_pretrained(tmp_path / "a")
    model = load_model(tmp_path / "a", attention="varlen")
    assert attention_of(model) == "varlen"
    model.save_pretrained(tmp_path / "b")
    assert "varlen" not in (tmp_path / "b/config.json").read_text()


def test_answers_of_prompts_padded_on_the_left_are_those_of_sdpa():
    """With a mask, or a cache, sdpa computes."""
    ids = torch.arange(3, 19).view(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    answers = []
    for attention in ("sdpa", "varlen"):
        model = build(transformers.MistralConfig(**TINY | {"sliding_window": 4}), attention)
        given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
        found = model.generate(ids, **given, return_dict_in_generate=True)
        answers.append(torch.stack(found.logits))
    torch.testing.assert_close(*answers, rtol=0, atol=rounding(answers[0], SUMS + TINY["hidden_size"]))


def test_a_device_without_the_kernel_is_named():
    """As a CPU is, and GPUs for whose generation torch has none: micro-batches are then padded."""
    assert "CPU" in (missing(torch.device("cpu")) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_is_found():
    assert missing(torch.device("cuda")) is None
