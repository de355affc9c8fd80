"""A second set of weights, in the loop: an average of the trained ones, or those before training."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sftmix.batches.order import Slot, Unit
from sftmix.components import ASFT, NTP, AdamW, Callback, LossView, Need, Objective, ProFit
from sftmix.components.view import Taught
from sftmix.model.adapters import add_adapters
from sftmix.options import CheckpointOptions, LoraOptions, TrainingOptions
from sftmix.ranks.world import World
from sftmix.testing import check_objective
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.loop import train
from sftmix.training.module import TrainingModule
from sftmix.training.numbers import teacher_bytes
from sftmix.training.teacher import give_teacher
from sftmix.words.errors import ConfigError, Stopped
from tests.forked import on_ranks
from tests.toy import metrics_of, own_logits, toy_model, toy_rows, toy_setup, toy_stage

DATA = toy_rows([(3, 5), (7, 2), (1, 11), (4, 4)])
BATCHES: list[list[Unit]] = [[(Slot(0),), (Slot(1),), (Slot(2),), (Slot(3),)]] * 4
DECAY = 0.75


def divergence(own, teacher, of):
    return F.kl_div(own.log_softmax(-1), of(teacher).log_softmax(-1), reduction="none", log_target=True).sum(-1)


class Distil(NTP):
    """NTP plus `weight` times KL(teacher || model)."""

    needs = frozenset({Need.TEACHER})

    def __init__(self, *, weight: float = 1.0, decay: float | None = DECAY):
        self.weight, self.teacher_decay = weight, decay
        self._seen: list[torch.Tensor] = []

    def loss(self, view, batch, plan):
        ntp, taught = view.sft_loss(batch, plan), view.teacher
        nll = taught.figures(lambda z, y: F.cross_entropy(z, y, reduction="none"), batch.labels)
        for row in range(len(batch.ids)):
            self._seen.append((batch.ids[row], nll[batch.slot == row]))
        columns = (view.hidden, taught.hidden)
        loss, _ = view.chunked_loss(
            columns[0], lambda z, t: divergence(z, t, taught.logits), columns[1], row_weight=plan.row_weight
        )
        return ntp._replace(loss=ntp.loss + self.weight * loss)


class Weights(Callback):
    """The trained weights after each step, and a signal after one."""

    gives = frozenset()

    def __init__(self, *, model: object, stop: int = -1):
        self._model, self._stop, self._after = model, stop, []

    def on_step_end(self, state):
        self._after.append({n: p.detach().clone() for n, p in self._model.named_parameters() if p.requires_grad})
        if state.step == self._stop:
            raise Stopped("here")


def taught(place: Path, objective: Objective, *, model=None, stop: int = -1, every: int = 0):
    model = model or toy_model()
    watch = Weights(model=model, stop=stop)
    options, checkpoint = {"learning_rate": 0.01}, CheckpointOptions(every=every)
    given = {"data": DATA, "model": model, "objective": objective, "callbacks": [watch], "checkpoint": checkpoint}
    done = train(toy_stage(place, BATCHES, options=options, **given), World())
    return full_weights(done.module), watch._after


def nll_by(weights: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """The NLL of each example's tokens, one example at a time, of a model with these weights."""
    model.load_state_dict(weights, strict=False)
    found = own_logits(model, DATA)
    return {
        e.id: F.cross_entropy(*map(torch.from_numpy, of), reduction="none") for e, of in zip(DATA, found, strict=True)
    }


@pytest.mark.parametrize("decay", [DECAY, None])
def test_each_step_is_taught_by_the_average_of_those_before_or_by_the_start(tmp_path, decay):
    objective = Distil(decay=decay)
    _, after = taught(tmp_path, objective)
    average = {name: p.detach().clone() for name, p in toy_model().named_parameters()}
    for step in range(4):
        expected = nll_by(average, toy_model())
        for name, nll in objective._seen[4 * step : 4 * step + 4]:
            torch.testing.assert_close(nll, expected[name], rtol=0, atol=1e-10)
        if decay is not None:
            average = {name: decay * t + (1 - decay) * after[step][name] for name, t in average.items()}
    assert (after[0]["transformer.wte.weight"] - after[3]["transformer.wte.weight"]).abs().max() > 1e-3


def test_its_passes_leave_the_training_as_it_is(tmp_path):
    plain, _ = taught(tmp_path / "plain", NTP(), model=toy_model(dtype=torch.float32, dropout=0.2))
    for decay in (DECAY, None):
        beside = Distil(weight=0.0, decay=decay)
        found, _ = taught(tmp_path / str(decay), beside, model=toy_model(dtype=torch.float32, dropout=0.2))
        assert all(torch.equal(found[name], weight) for name, weight in plain.items())


@pytest.mark.parametrize("decay", [DECAY, None])
def test_a_resumed_training_has_the_same_teacher(tmp_path, decay):
    whole, _ = taught(tmp_path / "whole", Distil(decay=decay))
    with pytest.raises(Stopped):
        taught(tmp_path / "cut", Distil(decay=decay), stop=3, every=1)
    resumed, after = taught(tmp_path / "cut", Distil(decay=decay), every=1)
    assert len(after) == 2
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_the_base_of_adapters_is_the_model_without_them(tmp_path):
    model, objective = toy_model(), Distil(decay=None)
    add_adapters(model, LoraOptions(r=2, target_modules=["c_attn", "lm_head"]), seed=0)
    _, after = taught(tmp_path, objective, model=model)
    expected = nll_by({}, toy_model())
    for name, nll in objective._seen:
        torch.testing.assert_close(nll, expected[name], rtol=0, atol=1e-10)
    moved = {name for name in after[0] if not torch.equal(after[0][name], after[3][name])}
    assert moved == set(after[0]), "the adapters are trained and on"


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_adapters_train_are_those_before_training(tmp_path, bias):
    model, objective = toy_model(), Distil(decay=None)
    add_adapters(model, LoraOptions(r=2, target_modules=["c_attn"], bias=bias), seed=0)
    _, after = taught(tmp_path, objective, model=model)
    expected = nll_by({}, toy_model())
    for name, nll in objective._seen:
        torch.testing.assert_close(nll, expected[name], rtol=0, atol=1e-10)
    assert any(name.endswith("bias") and not torch.equal(after[0][name], after[3][name]) for name in after[0])


def test_an_objective_that_weighs_another_ones_tokens_has_its_teacher(tmp_path):
    bare, inner = Distil(), Distil()
    whole, _ = taught(tmp_path / "bare", bare)
    weighed, _ = taught(tmp_path / "weighed", ProFit(threshold=0.0, mixup=inner))  # a threshold of 0 weighs none
    assert len(bare._seen) == len(inner._seen) == 16
    for (name, expected), (again, found) in zip(bare._seen, inner._seen, strict=True):
        assert name == again
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weighed, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kl", [0.0, 0.4])
def test_asft_is_dft_and_the_whole_divergence_from_the_start(tmp_path, kl):
    """By autograd of the formula, example by example, in the second step: in the first both models are one."""
    _, after = taught(tmp_path, ASFT(kl=kl))
    model, base = toy_model(), own_logits(toy_model(), DATA)
    model.load_state_dict(after[0])
    terms = []
    for row, (expected, labels) in zip(DATA, base, strict=True):
        log_p = model(torch.as_tensor(row.input_ids)[None]).logits[0, :-1][row.target[1:]].log_softmax(-1)
        nll = -log_p.gather(1, torch.from_numpy(labels)[:, None])[:, 0]
        log_q = torch.from_numpy(expected).log_softmax(-1)
        terms.append((-nll).exp().detach() * nll + kl * (log_q.exp() * (log_q - log_p)).sum(-1))
    loss, line = torch.cat(terms).mean(), metrics_of(tmp_path)[1]
    loss.backward()
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-12)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-9)


def test_its_logits_are_finite_where_a_bias_masks_a_token():
    hidden, weight = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    bias = torch.tensor([0.5, -torch.inf, 0.0], dtype=torch.float64)
    found = Taught(hidden, weight, bias, None, 2.0).logits(hidden)
    assert (found[:, 1] == -1e30).all()
    torch.testing.assert_close(found[:, [0, 2]], 2.0 * (hidden @ weight.T + bias)[:, [0, 2]], rtol=0, atol=1e-14)


def test_two_teachers_exclude_each_other():
    assert ASFT(mixup=Distil(decay=None)).teacher_decay is None
    with pytest.raises(ConfigError, match=r"ASFT and objective\.mixup .*Distil.* exclude each other"):
        ASFT(mixup=Distil())


def check_shared(world: World, directory: str) -> None:
    objective, alone = Distil(), Distil()
    given = {"data": DATA, "checkpoint": CheckpointOptions(every=0)}
    options = {"learning_rate": 0.01, "micro_batch_size": 1}
    if world.is_main:
        train(toy_stage(Path(directory) / "one", BATCHES, options=options, objective=alone, **given), World())
    options["parallel"] = directory.rpartition("-")[2]
    train(toy_stage(Path(directory) / "two", BATCHES, options=options, objective=objective, **given), world)
    found = [dict(part) for part in world.gather([(name, nll) for name, nll in objective._seen[-2:]])]
    if world.is_main:
        expected = dict(alone._seen[-4:])
        for name, nll in {**found[0], **found[1]}.items():
            torch.testing.assert_close(nll, expected[name], rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_share_the_teacher_of_one(tmp_path, parallel):
    on_ranks(check_shared, str(tmp_path / f"of-{parallel}"))


def test_a_view_without_a_teacher_says_what_is_missing(tmp_path):
    undeclared = Distil()
    undeclared.needs = frozenset()
    with pytest.raises(ConfigError, match=r"Need\.TEACHER in `needs`"):
        taught(tmp_path, undeclared)


class Counts(NTP):
    """A loss whose weight is the number of micro-batches so far."""

    def __init__(self) -> None:
        self.calls = 0

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def loss(self, view, batch, plan):
        self.calls += 1
        out = view.sft_loss(batch, plan)
        return out._replace(loss=self.calls * out.loss)


def test_what_an_objective_says_it_keeps_comes_back(tmp_path):
    whole, _ = taught(tmp_path / "whole", Counts())
    with pytest.raises(Stopped):
        taught(tmp_path / "cut", Counts(), stop=3, every=1)
    objective = Counts()
    resumed, _ = taught(tmp_path / "cut", objective, every=1)
    assert objective.calls == 8
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_so_does_what_an_objective_within_it_keeps(tmp_path):
    whole, _ = taught(tmp_path / "whole", ProFit(threshold=0.0, mixup=Counts()))
    with pytest.raises(Stopped):
        taught(tmp_path / "cut", ProFit(threshold=0.0, mixup=Counts()), stop=3, every=1)
    resumed, _ = taught(tmp_path / "cut", ProFit(threshold=0.0, mixup=Counts()), every=1)
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


class Reads(Callback):
    """Calls the loss of the step once more."""

    gives = frozenset()

    def on_step_end(self, state):
        state.read(lambda hidden, head, batch, plan: state.objective.loss(LossView(head, lambda: hidden), batch, plan))


def test_passes_that_measure_leave_it(tmp_path):
    objective = Counts()
    options = {"micro_batch_tokens": "auto", "micro_batch_size": None}
    given = {"data": DATA, "objective": objective, "callbacks": [Reads()], "options": options}
    train(toy_stage(tmp_path, BATCHES, **given), World())
    assert objective.calls == 4  # a step has one micro-batch


class CountsPlans(Counts):
    def plan(self, batch, **at):
        self.calls += 1
        return super().plan(batch, **at)


def test_a_plan_that_changes_it_is_refused(tmp_path):
    """The plan of the next step would be in the checkpoint of this one."""
    with pytest.raises(ConfigError, match=r"CountsPlans.*: plan\(\) changes its state"):
        taught(tmp_path, CountsPlans())
    with pytest.raises(ConfigError, match=r"plan\(\) changes its state"):
        check_objective(CountsPlans(), finite_differences=False)


def test_the_second_weights_are_counted(tmp_path):
    """4 bytes a trained number in memory; in a checkpoint only an average, beside weights and optimizer."""
    model = toy_model(dtype=torch.float32)
    adapted = toy_model(dtype=torch.float32)
    add_adapters(adapted, LoraOptions(r=2, target_modules=["c_attn"]), seed=0)
    assert [teacher_bytes(one, model) for one in (NTP(), Distil(), Distil(decay=None))] == [0, 4, 4]
    assert [teacher_bytes(one, adapted) for one in (Distil(), Distil(decay=None))] == [4, 0]
    numbers, needed = sum(p.numel() for p in model.parameters()), []
    for decay in (None, DECAY):
        setup = toy_setup(TrainingModule(model), data=DATA, objective=Distil(decay=decay), options=TrainingOptions())
        setup.stage.optimizer, setup.stage.name = AdamW(), "train"
        store = CheckpointStore(tmp_path, keep=1, world=World(), second=give_teacher(setup))
        needed.append(store.bytes_to_come(setup.module, state_bytes=8, saves=1))
    assert needed[1] - needed[0] == pytest.approx(1.2 * 4 * numbers, rel=1e-3)  # with air of a fifth


def test_what_does_not_fit_is_refused_before_it_is_taken(monkeypatch):
    setup = toy_setup(TrainingModule(toy_model(dtype=torch.float32)), data=DATA, objective=Distil())
    setup.stage.options, setup.stage.optimizer, setup.stage.name = TrainingOptions(), AdamW(), "train"
    numbers = sum(p.numel() for p in setup.module.parameters())
    monkeypatch.setattr("sftmix.training.memory.free_memory", lambda device: 16 * numbers - 1)
    with pytest.raises(ConfigError, match="gradients and optimizer take"):
        give_teacher(setup)
    monkeypatch.setattr("sftmix.training.memory.free_memory", lambda device: 16 * numbers)
    give_teacher(setup)
