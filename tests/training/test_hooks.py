"""What callbacks return and read in the loop: the same in a resumed run, on every rank, in any order of theirs."""

from pathlib import Path

import numpy as np
import pytest

from sftmix.batches.order import Slot, Unit
from sftmix.components import Callback, EarlyStopping, Evaluate, Need
from sftmix.components.base import CallbackResult
from sftmix.components.contracts import OWN_OF_STAGE, OWN_OF_STEP
from sftmix.options import CheckpointOptions
from sftmix.ranks.world import World
from sftmix.training.loop import StageResult, train
from sftmix.training.scoring import Scorer
from sftmix.words.errors import ContractError, Stopped
from tests.forked import on_ranks
from tests.toy import Interrupt, metrics_of, toy_rows, toy_stage

DATA = toy_rows([(3, 5), (7, 2), (1, 6), (4, 4)])
BATCHES: list[list[Unit]] = [[(Slot(0),), (Slot(1),)], [(Slot(2),), (Slot(3),)]] * 3


class AtTheEnds(Callback):
    """Says at the end of the stage what its last step was, and keeps what it saw at the start."""

    gives = frozenset()

    def on_stage_start(self, state):
        self.seen = dict(state.metrics)

    def on_stage_end(self, state):
        return CallbackResult({"last_loss": state.metrics["loss"], "last_at": state.metrics["step"]})


class EvaluateAtStart(Callback):
    gives = frozenset({Need.EVALUATIONS})

    def on_stage_start(self, state):
        return CallbackResult(state.evaluate())


def train_with(
    place: Path, callbacks: list[Callback], *, world: World | None = None, best: bool = False
) -> StageResult:
    world = world or World()
    more = {"scorer": Scorer(world=world), "eval_data": DATA, "callbacks": callbacks}
    checkpoint = CheckpointOptions(every=100, keep_best=best)
    return train(toy_stage(place, BATCHES, data=DATA, checkpoint=checkpoint, **more), world)


def test_the_end_of_a_stage_has_the_metrics_of_its_last_step_after_a_resume(tmp_path):
    with pytest.raises(Stopped):
        train_with(tmp_path, [Interrupt(step=6)])
    for _ in range(2):
        watch = AtTheEnds()
        figures = train_with(tmp_path, [watch]).figures
        last = metrics_of(tmp_path)[-1]
        assert (figures["last_loss"], figures["last_at"]) == (last["loss"], 6)
        assert watch.seen == {name: value for name, value in last.items() if name != "rows"}


def test_an_evaluation_before_the_first_step_counts_once(tmp_path):
    """The NLL stays as it is: a further evaluation would end the training earlier, and one forgotten later."""

    def all_of_them(*more: Callback) -> list[Callback]:
        return [EvaluateAtStart(), Evaluate(every=2), EarlyStopping(patience=2, min_delta=0.01), *more]

    def evaluations(place: Path) -> list[tuple[int, float]]:
        first, *_ = lines = metrics_of(place)
        found = [(line["step"], line["eval_nll"]) for line in lines if "eval_nll" in line]
        return [(0, first["start_eval_nll"]), *found]

    whole = train_with(tmp_path / "whole", all_of_them()).figures
    with pytest.raises(Stopped):
        train_with(tmp_path / "parts", all_of_them(Interrupt(step=1)))
    parts = train_with(tmp_path / "parts", all_of_them()).figures
    assert [step for step, _ in evaluations(tmp_path / "whole")] == [0, 2, 4]
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    for figures in (whole, parts):
        assert (figures["steps"], figures["stopped_by"]) == (4, "EarlyStopping")


class Says(Callback):
    def __init__(self, *, value: float):
        self.value = value

    def on_step_end(self, state):
        return CallbackResult({"mine": self.value})


def test_no_metric_takes_the_place_of_another_callback_s(tmp_path):
    with pytest.raises(ContractError, match=r"Says returned the metric mine from on_step_end\(\); .* as my_mine"):
        train_with(tmp_path, [Says(value=1.0), Says(value=2.0)])
    train_with(tmp_path / "twice", [Evaluate(every=2), Evaluate(every=1)])


@pytest.mark.parametrize("first", [False, True])
def test_early_stopping_stops_wherever_it_stands(tmp_path, first):
    """The NLL stays as it is. Before the callback that evaluates, it hears of an evaluation a step later."""
    both = [Evaluate(every=2), EarlyStopping(patience=1, min_delta=0.01)]
    figures = train_with(tmp_path, both[::-1] if first else both).figures
    assert (figures["steps"], figures["stopped_by"]) == (5 if first else 4, "EarlyStopping")


class OfAnotherProgram(Callback):
    """Tells on one rank alone the NLL that another program has measured."""

    gives = frozenset({Need.EVALUATIONS})

    def __init__(self, *, rank: int, of: World):
        self.tells = rank == of.rank

    def on_step_end(self, state):
        return CallbackResult({"eval_nll": abs(state.step - 4.0)}) if self.tells else None


def check_best(world: World, directory: str) -> None:
    """What rank 0 logs decides which weights are the best, and where none is told, the last ones are evaluated."""
    for rank, step in ((0, 4), (1, 6)):
        place = Path(directory, f"{rank}")
        train_with(place, [OfAnotherProgram(rank=rank, of=world)], world=world, best=True)
        assert [path.name for path in (place / "best").iterdir()] == [f"step-{step:08d}"]


@pytest.mark.slow
def test_ranks_agree_on_the_best_weights_where_one_of_them_tells_the_nll(tmp_path):
    on_ranks(check_best, str(tmp_path))


def evaluate_first(world: World, directory: str) -> None:
    """FSDP, whose root stays gathered after a forward alone."""
    stage = {"scorer": Scorer(world=world), "eval_data": DATA, "callbacks": [Evaluate(every=1)], "data": DATA}
    train(toy_stage(Path(directory), BATCHES, options={"parallel": "fsdp"}, **stage), world)
    assert [line["step"] for line in metrics_of(Path(directory)) if "eval_nll" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_an_evaluation_after_the_first_step_leaves_the_shards_where_the_optimizer_knows_them(tmp_path):
    on_ranks(evaluate_first, str(tmp_path))


def test_weights_that_were_not_kept_are_not_replaced_by_worse_ones(tmp_path, capsys):
    """keep_best may be set when a run goes on; its best evaluation was before."""
    nearest_to_4 = OfAnotherProgram(rank=0, of=World())
    with pytest.raises(Stopped):
        train_with(tmp_path, [nearest_to_4, Interrupt(step=4)])
    train_with(tmp_path, [nearest_to_4], best=True)
    assert not any((tmp_path / "best").glob("step-*"))
    assert "the best evaluation so far, " in capsys.readouterr().out


def test_weights_that_a_part_without_keep_best_has_bettered_are_no_longer_the_best(tmp_path, capsys):
    nearest_to_4 = OfAnotherProgram(rank=0, of=World())
    for step, best in ((2, True), (4, False)):
        with pytest.raises(Stopped):
            train_with(tmp_path, [nearest_to_4, Interrupt(step=step)], best=best)
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-00000002"]
    train_with(tmp_path, [nearest_to_4], best=True)
    assert not any((tmp_path / "best").glob("step-*"))
    assert "the best evaluation so far, 0.0000, has no weights kept" in capsys.readouterr().out


class OfAList(Callback):
    """Tells the NLL that a list has for each step."""

    gives = frozenset({Need.EVALUATIONS})

    def __init__(self, *, nll: list[float]):
        self.nll = nll

    def on_step_end(self, state):
        return CallbackResult({"eval_nll": self.nll[state.step - 1]})


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("nll", "kept"),
    [
        ([NAN, 2.0, 3.0, 3.0, 3.0, 3.0], [2]),
        ([NAN, 2.0, NAN, 3.0, 1.0, 3.0], [5]),
        ([2.0, NAN, INF, 3.0, NAN, 3.0], [1]),
        ([INF, 3.0, 3.0, 2.0, 3.0, NAN], [4]),
        ([NAN, INF, NAN, NAN, 4.0, NAN], [5]),
        ([NAN] * 6, []),
        ([INF] * 6, []),
    ],
)
def test_an_evaluation_that_is_no_number_counts_as_none(tmp_path, capsys, nll, kept):
    """Without an end and with one, the same weights are the best."""
    train_with(tmp_path / "whole", [OfAList(nll=nll)], best=True)
    with pytest.raises(Stopped):
        train_with(tmp_path / "parts", [OfAList(nll=nll), Interrupt(step=4)], best=True)
    train_with(tmp_path / "parts", [OfAList(nll=nll)], best=True)
    for place in ("whole", "parts"):
        assert [path.name for path in (tmp_path / place / "best").glob("step-*")] == [f"step-{n:08d}" for n in kept]
    assert "no weights kept" not in capsys.readouterr().out


class Telling(Callback):
    gives = frozenset()

    def __init__(self, *, hook: str, name: str):
        setattr(self, hook, lambda state: CallbackResult({name: 0.5}))


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        ("on_stage_start", "loss"),
        ("on_step_end", "step"),
        ("on_epoch_end", "rows"),
        ("on_stage_end", "steps"),
        ("on_stage_end", "eval_nll"),
    ],
)
def test_a_callback_cannot_take_a_name_of_the_loop(tmp_path, hook, name):
    told = rf"callbacks Telling returned the metric {name} from {hook}\(\); allowed: .*; rename it, as my_{name}$"
    with pytest.raises(ContractError, match=told):
        train_with(tmp_path, [Telling(hook=hook, name=name)])


def test_the_names_of_the_loop_are_all_that_it_tells(tmp_path):
    done = train_with(tmp_path, [])
    assert metrics_of(tmp_path)[0].keys() == OWN_OF_STEP
    assert done.figures.keys() == OWN_OF_STAGE


class ScoresSome(Callback):
    gives = frozenset()

    def on_step_end(self, state):
        self.found = [state.score(rows).n_tokens for rows in ([], np.empty(0, np.int64), [2, 0])]


def test_rows_are_scored_by_any_list_of_them_an_empty_one_too(tmp_path):
    callback = ScoresSome()
    train_with(tmp_path, [callback])
    expected = [int(DATA[row].target.sum()) for row in (2, 0)]
    assert [(n_tokens.dtype, n_tokens.tolist()) for n_tokens in callback.found] == [
        (np.int64, tokens) for tokens in ([], [], expected)
    ]
