"""One pair of real rows against plain transformers: NTP and Mixup written out, in float64."""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sftmix.batches.collate import collate
from sftmix.batches.order import Slot, TokenisedRows
from sftmix.components import SFTMix
from sftmix.data import encode_dataset, prepare
from sftmix.model.load import load_model, load_tokenizer
from sftmix.options import DataOptions
from sftmix.text.encoder import encoder_for
from sftmix.training.module import TrainingModule
from sftmix.training.step import normalise

MU = 0.2
Figures = dict[str, torch.Tensor]


def rows_of(model: Path, rows: Path, template: str | None = None, max_length: int = 96) -> TokenisedRows:
    options = DataOptions(train=[str(rows)], template=template)
    return encode_dataset(
        prepare(options, 0), encoder_for(load_tokenizer(str(model)), options), max_length=max_length
    ).train


def ours(path: Path, data: TokenisedRows, **layout: object) -> tuple[Figures, torch.Tensor]:
    """Return loss, NLLs and gradients of rows 0 and 1 as a pair, and the lambda that was drawn."""
    model = load_model(str(path))
    batch = collate([(Slot(0), Slot(1))], data, **layout)
    plan = SFTMix(mu=MU).plan(batch, step=3, total_steps=9, seed=5)
    scaled = normalise(plan, ntp_count=plan.ntp_count, mixup_count=plan.mixup_count, world_size=1)
    out = TrainingModule(model)(batch, scaled)
    out.loss.backward()
    return {"loss": out.loss.detach(), "nll": out.nll, **gradients(model)}, plan.lam


def theirs(path: Path, data: TokenisedRows, lam: float, *, backward: bool = True) -> Figures:
    """The same in float64 of the model by itself, each row on its own: the n-th response tokens of both are mixed.

    backward  with gradients, which take twice the memory of the weights
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval().requires_grad_(backward)
    states, labels = [], []
    for row in (data[0], data[1]):
        out = model(input_ids=torch.from_numpy(row.input_ids).long()[None], output_hidden_states=True, use_cache=False)
        at = torch.from_numpy(row.target).nonzero()[:, 0]
        states.append(out.hidden_states[-1][0, at - 1])
        labels.append(torch.from_numpy(row.input_ids).long()[at])
        torch.testing.assert_close(model.lm_head(states[-1]), out.logits[0, at - 1], rtol=0, atol=1e-4)
    each = [model.lm_head(state) for state in states]
    nll = torch.cat([cross_entropy(z, y, reduction="none") for z, y in zip(each, labels, strict=True)])
    n = min(map(len, labels))
    mixed = model.lm_head(lam * states[0][:n] + (1 - lam) * states[1][:n])
    mixup = lam * cross_entropy(mixed, labels[0][:n]) + (1 - lam) * cross_entropy(mixed, labels[1][:n])
    loss = nll.mean() + MU * mixup
    if backward:
        loss.backward()
    return {"loss": loss.detach(), "nll": nll.detach(), **gradients(model)}


def gradients(model: torch.nn.Module) -> Figures:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: Figures, expected: Figures, *, rtol: float) -> None:
    """Every figure within a share of its largest entry: what float32 loses through the layers."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        limit = rtol * float(value.abs().max())
        near = found[name].double()
        torch.testing.assert_close(near, value.double(), rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
