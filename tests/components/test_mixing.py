"""MeasureMixing against autograd through the whole formula, on the model that a run exported."""

import numpy as np
import pytest
import torch

from sftmix.batches.order import TrainingOrder
from sftmix.common.tables import read_split
from sftmix.common.world import World
from sftmix.components import MeasureMixing, SFTMix, StageState
from sftmix.config.read import read_config
from sftmix.pipeline.rows import read_rows
from sftmix.pipeline.target import pairs_by
from tests.forked import done
from tests.tiny import in_this_process, make_tiny, metrics

pytestmark = pytest.mark.long

NAMES = ("mixing_cosine", "mixing_gradient_share", "mixing_unreached")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps without dropout, measured after the second; its pairs are from both halves of a small set."""
    place = tmp_path_factory.mktemp("mixing")
    tiny = make_tiny(place, dropout=0.0)
    words = ["--training.max_steps", "2", "--objective.mu", "0.7", "--callbacks+", "MeasureMixing"]
    done = in_this_process("run", *tiny.options, *words, "--callbacks.every", "2", "--out", "run", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run"


@pytest.mark.slow
def test_the_figures_are_those_of_autograd(run, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(run.parent)
    config = read_config(run / "config.yaml")
    config, rows = read_rows(config, World())
    data, split = rows.data.train, read_split(run / "split" / "split.parquet")[1]
    scores = rows.table(run / "confidence" / "confidence.parquet")
    pairs_of = pairs_by(lambda epoch: (split, scores), config.resolved_pairing(), config.seed)
    order = TrainingOrder(len(data), pairs_of, options=config.training, seed=config.seed)
    model = AutoModelForCausalLM.from_pretrained(run / "train" / "model", dtype=torch.float32).eval()
    weight = model.get_output_embeddings().weight.detach().double()

    hidden, labels, at, reached = [], [], [], 0
    for unit in order.batch(1):
        for slot in unit:
            example = data[slot.row]
            places = np.flatnonzero(example.target)
            with torch.no_grad():
                states = model.get_decoder()(torch.from_numpy(example.input_ids)[None]).last_hidden_state[0]
            at.append(range(sum(map(len, labels)), sum(map(len, labels)) + len(places)))
            hidden.append(states[places - 1])
            labels.append(torch.from_numpy(example.input_ids[places]))
    leaf = torch.cat(hidden).double().requires_grad_()
    y = torch.cat(labels)
    z = leaf @ weight.T
    ntp = torch.nn.functional.cross_entropy(z, y)

    losses, larger, slot = [], [], 0
    for unit in order.batch(1):
        if len(unit) == 2:
            lam = lambda_of(config, data, unit, split, order)
            first, second = at[slot], at[slot + 1]
            reached += 2 * min(len(first), len(second))
            for i, j in zip(first, second, strict=False):
                mixed = (lam * z[i] + (1 - lam) * z[j]).log_softmax(dim=-1)
                losses.append(-lam * mixed[y[i]] - (1 - lam) * mixed[y[j]])
                larger.append(max(lam, 1 - lam))
        slot += len(unit)
    (g_ntp,) = torch.autograd.grad(ntp, leaf, retain_graph=True)
    (g_mix,) = torch.autograd.grad(0.7 * torch.stack(losses).mean(), leaf)
    cosine = float((g_ntp * g_mix).sum() / (g_ntp.norm() * g_mix.norm()))
    share = float(g_mix.norm() / (g_ntp.norm() + g_mix.norm()))

    before, line = metrics(run)
    assert not set(NAMES) & set(before)
    assert [line[name] for name in NAMES] == pytest.approx([cosine, share, 1 - reached / len(y)], rel=1e-4)
    assert 0.05 < share < 0.95
    assert abs(cosine) < 0.999
    assert line["mixing_seconds"] > 0
    values, larger = torch.stack(losses).detach().numpy(), np.array(larger)
    for low in (50, 60, 70, 80, 90):
        inside = (larger >= low / 100) & (larger < (low + 10) / 100 if low < 90 else True)
        if inside.any():
            assert line[f"mixing_loss_{low}"] == pytest.approx(values[inside].mean(), rel=1e-5)
        else:
            assert f"mixing_loss_{low}" not in line


def lambda_of(config, data, unit, split, order):
    """Lambda of a pair, drawn for this pair alone."""
    from sftmix.batches.collate import collate

    plan = config.objective.plan(
        collate([unit], data, split=split), step=1, total_steps=order.total_steps, seed=config.seed
    )
    return float(plan.lam[0])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_together_have_the_figures_of_one(run, tmp_path, parallel):
    words = [
        "run",
        "--config",
        str(run / "config.yaml"),
        "--training.parallel",
        parallel,
        "--out",
        str(tmp_path / "run"),
    ]
    done(words, cwd=run.parent, ranks=2)
    ours, one = metrics(tmp_path / "run")[1], metrics(run)[1]
    names = [name for name in one if name.startswith("mixing_") and name != "mixing_seconds"]
    assert len(names) >= 4
    assert [ours[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)


def test_nothing_is_measured_where_nothing_is_mixed(run):
    assert all("mixing_cosine" not in line for line in metrics(run, "reference"))


def test_a_batch_of_repeats_alone_has_no_token_that_is_not_reached():
    """A sampler may put all repeats into one global batch; NTP and the share leave them out."""
    part = {"mix": 4.0, "mix_count": 2.0}
    state = StageState("train", 1, 1, 0, {"mixup_tokens": 1}, read=lambda function: [part], objective=SFTMix())
    assert MeasureMixing(every=1).on_step_end(state).metrics["mixing_unreached"] == 0
