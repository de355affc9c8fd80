"""MeasureMixing against autograd through the whole formula, one example at a time."""

from pathlib import Path

import pytest
import torch

from sftmix.batches.collate import collate
from sftmix.components import MeasureMixing, SFTMix, StageState
from sftmix.components.objectives import MixupMean
from sftmix.ranks.world import World
from sftmix.training.checkpoint import full_weights
from sftmix.training.loop import train
from tests.forked import on_ranks
from tests.toy import metrics_of, toy_model, toy_stage
from tests.training.test_step import DATA, UNITS, nll, response


def check_figures(world: World, directory: str, parallel: str = "none", mixup_mean: MixupMean = "own") -> None:
    """Those of the second of two steps, under the weights after it."""
    objective, steps = SFTMix(mu=0.7, mixup_mean=mixup_mean), [UNITS] * 2
    options = {"learning_rate": 0.03, "parallel": parallel}
    given = {"data": DATA, "objective": objective, "callbacks": [MeasureMixing(every=2)], "options": options}
    done = train(toy_stage(Path(directory), steps, **given), world)
    model, weights = toy_model(), full_weights(done.module)
    if not world.is_main:
        return
    model.load_state_dict(weights)
    head = model.get_output_embeddings().weight.detach()

    mixed, larger, trained, leaves, reached = [], [], [], [], 0
    for unit in UNITS:
        hidden, labels = zip(*(response(model, DATA[slot.row])[:2] for slot in unit), strict=True)
        hidden = [states.detach().requires_grad_() for states in hidden]
        leaves += hidden
        trained += [nll(h @ head.T, y) for h, y, slot in zip(hidden, labels, unit, strict=True) if slot.ntp_weight]
        if len(unit) == 2:
            lam = float(objective.plan(collate([unit], DATA), step=1, total_steps=2, seed=0).lam[0])
            n = min(map(len, labels))
            logits = (lam * hidden[0][:n] + (1 - lam) * hidden[1][:n]) @ head.T
            mixed.append(lam * nll(logits, labels[0][:n]) + (1 - lam) * nll(logits, labels[1][:n]))
            larger += [max(lam, 1 - lam)] * n
            reached += n * sum(slot.ntp_weight for slot in unit)
    ntp, mixup = torch.cat(trained), torch.cat(mixed)
    of_ntp, of_mixup = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)])
        for loss in (ntp.mean(), 0.7 * mixup.sum() / len(mixup if mixup_mean == "own" else ntp))
    )
    share = float(of_mixup.norm() / (of_ntp.norm() + of_mixup.norm()))
    expected = {
        "mixing_cosine": float(of_ntp @ of_mixup / (of_ntp.norm() * of_mixup.norm())),
        "mixing_gradient_share": share,
        "mixing_unreached": 1 - reached / len(ntp),
    }
    for low in (50, 60, 70, 80, 90):
        inside = torch.tensor([low / 100 <= x and (low == 90 or x < (low + 10) / 100) for x in larger])
        if inside.any():
            expected[f"mixing_loss_{low}"] = float(mixup.detach()[inside].mean())
    before, line = metrics_of(Path(directory))
    assert not any(name.startswith("mixing") for name in before)
    assert line.pop("mixing_seconds") > 0
    assert {name: value for name, value in line.items() if name.startswith("mixing")} == pytest.approx(
        expected, rel=1e-6
    )
    assert 0.05 < share < 0.95


@pytest.mark.parametrize("mixup_mean", ["own", "ntp"])
def test_the_figures_are_those_of_autograd(mixup_mean, tmp_path):
    check_figures(World(), str(tmp_path), mixup_mean=mixup_mean)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_together_have_the_same_figures(tmp_path, parallel):
    on_ranks(check_figures, str(tmp_path), parallel)


class OfLogits(SFTMix):
    """Its loss reads the logits of the head, as a loss of one's own may."""

    def loss(self, view, batch, plan):
        assert view.head.logits(view.hidden).shape == (len(batch.labels), len(view.head.weight))
        return super().loss(view, batch, plan)


def test_a_loss_that_reads_logits_is_measured(tmp_path):
    given = {"data": DATA, "objective": OfLogits(), "callbacks": [MeasureMixing(every=1)]}
    train(toy_stage(tmp_path, [UNITS], **given), World())
    assert 0 < metrics_of(tmp_path)[0]["mixing_gradient_share"] < 1


def test_nothing_is_measured_where_nothing_is_mixed(tmp_path):
    train(toy_stage(tmp_path, [UNITS], data=DATA, callbacks=[MeasureMixing(every=1)]), World())
    assert "mixing_cosine" not in metrics_of(tmp_path)[0]


def test_a_batch_of_repeats_alone_has_no_token_that_is_not_reached():
    """A sampler may put all repeats into one global batch; NTP and the share leave them out."""
    part = {"mix": 4.0, "mix_count": 2.0}
    state = StageState("train", 1, 1, 0, {"mixup_tokens": 1}, read=lambda function: [part], objective=SFTMix())
    assert MeasureMixing(every=1).on_step_end(state).metrics["mixing_unreached"] == 0
