"""State of optimizers: what is stored comes back with the same bits, and what would not come back does not train."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Model

from sftmix.batches.order import Slot
from sftmix.components import AdamW, AdamW8bit, Optimizer
from sftmix.disk.files import read_json, write_json
from sftmix.options import CheckpointOptions
from sftmix.ranks.world import World
from sftmix.training.checkpoint import CheckpointStore, full_weights
from sftmix.training.loop import train
from sftmix.training.rehearsal import kept, rehearse
from sftmix.words.errors import ConfigError, Stopped
from tests.faults.fuzz import refit
from tests.forked import on_ranks
from tests.toy import Interrupt, toy_model, toy_stage
from tests.trained import DATA, Trained, assert_exact

BATCHES = [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * 3


class Descent(torch.optim.Optimizer):
    """Gradient descent with numbers in its state, and in its group, and a mean of gradients, of a dtype of its own.

    The mean begins late, or at once.
    """

    begins, dtype = 1, torch.float32

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["slower"] = 0.9 * group["slower"]
            for p in group["params"]:
                state = self.state[p]
                state["flip"] = not state.get("flip", False)
                state["scale"] = 0.75 * state["scale"] if "scale" in state else 1  # an int, then a float
                state["steps"] = state.get("steps", 0) + 1
                rate = -float(group["slower"] * group["lr"] * state["scale"])
                p.add_(p.grad, alpha=rate * (1.0 if state["flip"] else 0.1))
                if state["steps"] >= self.begins:
                    before = state.get("mean", torch.zeros_like(p, dtype=self.dtype))
                    assert before.dtype == self.dtype
                    mean = 0.9 * before + 64 * p.grad
                    state["mean"] = mean.to(self.dtype)
                    p.add_(state["mean"], alpha=-0.1 / 64 * group["lr"])


class Own(Optimizer):
    def __init__(self, *, begins: int = 1, dtype: str = "float32"):
        self.begins, self.dtype = begins, dtype

    def build(self, parameters, *, training):
        made = Descent([{"params": list(parameters.values())}], {"lr": training.learning_rate, "slower": 1.0})
        made.begins, made.dtype = self.begins, getattr(torch, self.dtype)
        return made


def weights_of(place: Path, optimizer: Optimizer, *, stop: int = -1) -> dict[str, torch.Tensor]:
    stage = toy_stage(
        place,
        BATCHES,
        data=DATA,
        model=toy_model(dtype=torch.float32, tied=True),
        options={"learning_rate": 0.01},
        optimizer=optimizer,
        callbacks=[Interrupt(step=stop)],
        checkpoint=CheckpointOptions(every=6),
    )
    return full_weights(train(stage, World()).module)


def goes_on(directory: Path, optimizer: Optimizer, *, stop: int) -> None:
    """A run that was stopped ends with the weights and the checkpoint of one that was not, as large and bit for bit."""
    whole = weights_of(directory / "whole", optimizer)
    with pytest.raises(Stopped):
        weights_of(directory / "parts", optimizer, stop=stop)
    assert_exact(whole, weights_of(directory / "parts", optimizer))
    left, right = (directory / run / "checkpoints" / "step-00000006" for run in ("whole", "parts"))
    assert_exact(*(load_file(one / "shard-00001.safetensors") for one in (left, right)))
    assert json.loads((left / "optimizer.json").read_text()) == json.loads((right / "optimizer.json").read_text())
    assert (left / "shard-00001.safetensors").stat().st_size == (right / "shard-00001.safetensors").stat().st_size


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize(
    "optimizer", [Own(), Own(begins=3), Own(dtype="bfloat16"), Own(dtype="int8")], ids=["", "late", "bf16", "int8"]
)
def test_a_resumed_run_goes_on_with_all_of_it(tmp_path, optimizer, stop):
    """Also with state that begins after the step that was saved, or before; in its own dtype."""
    goes_on(tmp_path, optimizer, stop=stop)


@pytest.mark.parametrize("optimizer", [AdamW(), Own()], ids=["torch's", "own"])
def test_options_of_torchs_optimizers_are_not_those_of_a_file(tmp_path, optimizer):
    """A stranger's `amsgrad: true` would end the first step with an error of torch. An own class may change its own."""
    with pytest.raises(Stopped):
        weights_of(tmp_path / "run", optimizer, stop=2)
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=2, world=World())
    (newest,) = store.steps()
    file = store.path(newest) / "optimizer.json"
    changed = {"amsgrad": True, "capturable": True, "eps": -1e40, "slower": 0.5}
    numbers = read_json(file)
    numbers |= {name: changed.get(name.rpartition(".")[2], value) for name, value in numbers.items()}
    write_json(file, numbers)
    refit(tmp_path, file)
    as_whole = weights_of(tmp_path / "run", optimizer)
    whole = weights_of(tmp_path / "whole", optimizer)
    if isinstance(optimizer, AdamW):
        assert_exact(as_whole, whole)
    else:
        assert any(not torch.equal(as_whole[name], x) for name, x in whole.items())


def test_eight_bits_go_on_with_the_same_bits(tmp_path, monkeypatch):
    """Parameters of 512 numbers and more are stored in eight bits here; all share one table of codes."""
    functional = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes is not installed")
    own = functional.AdamW8bit
    monkeypatch.setattr(functional, "AdamW8bit", lambda *given, **more: own(*given, **more, min_8bit_size=512))
    goes_on(tmp_path, AdamW8bit(), stop=3)
    state = load_file(tmp_path / "whole" / "checkpoints" / "step-00000006" / "shard-00001.safetensors")
    kinds = {x.dtype for name, x in state.items() if name.endswith(".state1")}
    assert kinds == {torch.uint8, torch.float32}
    assert len([name for name in state if name.endswith(".qmap1")]) == 1


# ------------------------------------------------------------------------------- what would not come back is refused


class Keeping(Own):
    """An optimizer whose first step keeps something where no checkpoint looks for it."""

    def __init__(self, *, keep: str | int = "history"):
        super().__init__()
        self.keep = keep

    def build(self, parameters, *, training):
        made, keep = super().build(parameters, training=training), self.keep
        made.param_groups[0]["schedule"] = (0, 1)
        made.param_groups[0]["seen"] = []
        made.count, made.rank, made.counts, made.total = 0, 0, {"steps": 0}, torch.zeros(())
        made.inner = torch.optim.SGD(made.param_groups[0]["params"], momentum=0.9)

        class Step(Descent):
            def step(self, closure=None):
                super().step()
                first = self.param_groups[0]["params"][0]
                if keep == "history":
                    self.state[first]["history"] = [1.0]
                elif keep == "schedule":
                    self.param_groups[0]["schedule"] = (1, 1)
                elif keep == "own":
                    self.count = 1
                elif keep == "seen":
                    self.param_groups[0]["seen"].append(1)
                elif keep == "counts":
                    self.counts["steps"] += 1
                elif keep == "total":
                    self.total += 1
                elif keep == "inner":
                    self.inner.step()
                elif keep in (0, "exp.avg"):
                    self.state[first][keep] = 1
                elif keep == "parts":
                    self.state[first]["whole"] = torch.zeros(4)
                    self.state[first]["half"] = self.state[first]["whole"][:2]
                elif keep == "shared":
                    self.state["shared"] = {"steps": 1}
                else:
                    self.state[first]["sparse"] = torch.zeros(3, 3).to_sparse()

        made.__class__ = Step
        return made


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        ("history", r"state\.model\.transformer\.wte\.weight\.history"),
        ("schedule", r"param_groups\.model\.transformer\.wte\.weight\.schedule"),
        ("seen", r"param_groups\.model\.transformer\.wte\.weight\.seen"),
        ("own", r"self\.count"),
        ("counts", r"self\.counts"),
        ("total", r"self\.total"),
        ("inner", r"self\.inner\.state"),
        (0, r"state\.model\.transformer\.wte\.weight\[0\]"),
        ("exp.avg", r"state\.model\.transformer\.wte\.weight\['exp\.avg'\]"),
        ("parts", r"state\.model\.transformer\.wte\.weight\.half"),
        ("shared", r"state\['shared'\]"),
        ("sparse", r"state\.model\.transformer\.wte\.weight\.sparse"),
    ],
)
def test_an_optimizer_whose_state_would_not_come_back_does_not_train(tmp_path, keep, name):
    with pytest.raises(ConfigError, match=rf"no checkpoint would bring back {name}, so .*tensors and numbers"):
        weights_of(tmp_path, Keeping(keep=keep))
    assert not (tmp_path / "metrics.jsonl").read_text()


class Rows(Own):
    """A number of each row of a matrix: ranks that share the matrix share its rows."""

    def build(self, parameters, *, training):
        made = super().build(parameters, training=training)

        class Step(Descent):
            def step(self, closure=None):
                super().step()
                for p in self.param_groups[0]["params"]:
                    self.state[p]["rows"] = p.detach().flatten(1).sum(1) if p.ndim > 1 else p.detach().clone()

        made.__class__ = Step
        return made


def rows_of(world: World, path: str, parallel: str) -> None:
    it = Trained(toy_model(dtype=torch.float32), steps=0, world=world, parallel=parallel, optimizer=Rows())
    built = kept(it.wrapped, it.optimizer)
    it.step()
    if parallel == "ddp":
        rehearse(it.wrapped, it.optimizer, built, world)
    else:
        with pytest.raises(ConfigError, match=r"no checkpoint would bring back state\..*\.rows, so .* ranks share the"):
            rehearse(it.wrapped, it.optimizer, built, world)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_state_that_ranks_share_in_another_way_than_its_parameter_is_refused_on_every_rank(tmp_path, parallel):
    on_ranks(rows_of, str(tmp_path), parallel)


def test_a_model_whose_first_forward_makes_a_buffer_does_not_train(tmp_path, monkeypatch):
    forward = GPT2Model.forward

    def makes(self, *given, **more):
        self.register_buffer("seen", torch.zeros(3))
        return forward(self, *given, **more)

    monkeypatch.setattr(GPT2Model, "forward", makes)
    with pytest.raises(ConfigError, match=r"no checkpoint would bring back weights/model\.transformer\.seen, so "):
        weights_of(tmp_path, AdamW())


def test_the_rehearsal_leaves_the_optimizer_as_it_is(tmp_path, monkeypatch):
    """Bit for bit, and so does a save before the first step, for which torch's function makes a step."""
    it = Trained(toy_model(dtype=torch.float32, tied=True), steps=0)
    built = kept(it.wrapped, it.optimizer)
    CheckpointStore(tmp_path, keep=1, world=World()).save(1, it.wrapped, it.optimizer, {})
    assert not it.optimizer.state
    it.step()
    before = it.everything()
    rehearse(it.wrapped, it.optimizer, built, World())
    assert_exact(it.everything(), before)
