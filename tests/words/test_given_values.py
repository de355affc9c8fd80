"""Values of a notebook in a configuration: paths are text, and what is not plain, as numbers of numpy, is refused."""

import copy
import inspect
import os
import pickle
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sftmix import RunConfig
from sftmix.components import FromCheckpoints, Linear, SFTMix, Splitter, TrainedReference
from sftmix.components.component import files_of
from sftmix.config.checks import validate
from sftmix.config.read import from_dict
from sftmix.options import DataOptions, LoraOptions, ModelOptions, TrainingOptions
from sftmix.pipeline.recipe import run
from sftmix.words.errors import ConfigError


def kept(value: object) -> tuple[type, object]:
    """A value with its type, and those inside it with theirs."""
    if isinstance(value, list):
        return list, [kept(inner) for inner in value]
    return type(value), {k: kept(v) for k, v in value.items()} if isinstance(value, dict) else value


class Folder(Splitter):
    """A class of a user, which works with a path."""

    def __init__(self, *, path: Path, share: float = 0.5):
        self.path, self.share = path, share

    def files(self):
        return [self.path / "split.csv"]

    def split(self, scores, *, seed):
        raise AssertionError


class Untyped(Folder):
    def __init__(self, *, share):
        super().__init__(path=Path("rows"), share=share)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Path("rows") / "a.json", os.path.join("rows", "a.json")),
        ([Path("a.json"), "b.json"], ["a.json", "b.json"]),
    ],
)
def test_an_option_keeps_a_plain_value_however_it_is_set(value, plain):
    made, changed = DataOptions(cache_dir=value), DataOptions()
    changed.cache_dir = value
    for found in (made.cache_dir, changed.cache_dir, replace(changed).cache_dir):
        assert kept(found) == kept(plain)


def test_a_name_that_is_no_option_is_refused():
    with pytest.raises(ConfigError, match=r"TrainingOptions has no option 'lerning_rate', .* 1\. Did you mean learn"):
        TrainingOptions().lerning_rate = 1
    with pytest.raises(ConfigError, match=r"RunConfig has no option 'objectiv', .* Did you mean objective\?"):
        RunConfig().objectiv = SFTMix()


def test_what_is_plain_stays_the_same_object():
    names, lora = ["a.json"], LoraOptions()
    assert DataOptions(train=names).train is names
    assert ModelOptions(lora=lora).lora is lora
    assert FromCheckpoints(paths=names)._init_args["paths"] is names


@dataclass(kw_only=True, frozen=True)
class Frozen(Splitter):
    """A class of a user that nothing changes."""

    share: float = 0.3

    def split(self, scores, *, seed):
        raise AssertionError


class Doubled(SFTMix):
    """A class of a user that makes its options anew in its constructor, and counts in a run."""

    def __init__(self, *, mu: float = 0.2):
        super().__init__(mu=mu)
        self.mu = 2 * mu
        self.calls = 0


def test_an_option_of_a_component_is_set_by_its_constructor_alone():
    """What a run records is what the constructor got; copies and pickles are made without it."""
    config = RunConfig(objective=Doubled(mu=0.1), reference=TrainedReference(checkpoints=[0.5]))
    for made in (config.objective, copy.deepcopy(config.objective), pickle.loads(pickle.dumps(config.objective))):
        made.calls += 1
        with pytest.raises(ConfigError, match=r"objective.mu is set by the constructor: make a new Doubled\(mu=...\)"):
            made.mu = 1.0
        assert (made.mu, made.spec()["init_args"]) == (0.2, {"mu": 0.1})
    with pytest.raises(ConfigError, match=r"reference.checkpoints is .* TrainedReference\(checkpoints="):
        config.reference.checkpoints = 2
    assert Frozen(share=0.1).spec()["init_args"] == {"share": 0.1}
    assert str(inspect.signature(Doubled)) == "(*, mu: float = 0.2)"


def test_a_component_gets_its_paths_as_they_are_given():
    """A class may ask for a Path; what is stored is text, of default values, too."""
    made = Folder(path=Path("rows"))
    assert kept(made.path) == kept(Path("rows"))
    assert made.spec()["init_args"] == {"path": "rows", "share": 0.5}
    assert type(made.spec()["init_args"]["share"]) is float
    assert files_of(made) == [os.path.join("rows", "split.csv")]


def configuration(*, paths: bool) -> RunConfig:
    """A configuration as a notebook makes it, or the same with its paths as text."""
    path = Path if paths else str
    return RunConfig(
        out=path("runs/a"),
        model=ModelOptions(path=path("m")),
        data=DataOptions(train=[path("a.json")], eval=path("b.json")),
    )


def test_a_configuration_of_paths_is_that_of_the_plain_ones():
    """To the last byte, so that a run of the one is read back by the other."""
    given, plain = (configuration(paths=paths) for paths in (True, False))
    validate(given)
    assert given.yaml() == plain.yaml()
    assert from_dict(given.as_dict()) == plain


def changed(**options: object) -> RunConfig:
    config = RunConfig(out="runs/a", model=ModelOptions(path="m"), data=DataOptions(train="a.json"))
    for name, value in options.items():
        group, _, name = name.rpartition("__")
        setattr(getattr(config, group) if group else config, name, value)
    return config


REFUSED = [
    (
        {"objective": SFTMix(alpha=Linear(start=0.1, end=torch.tensor(0.5)))},
        "objective.alpha.end",
        "tensor(0.5000)",
        "Tensor",
    ),
    ({"objective": SFTMix(mu=np.float64(0.1))}, "objective.mu", "np.float64(0.1)", "float64"),
    ({"seed": np.int64(3)}, "seed", "np.int64(3)", "int64"),
    ({"training__betas": np.array([0.5, 0.9])}, "training.betas", "array([0.5, 0.9])", "ndarray"),
    ({"training__epochs": np.longdouble(2)}, "training.epochs", "np.longdouble('2.0')", "longdouble"),
    ({"data__template": np.str_("alpaca")}, "data.template", "np.str_('alpaca')", "str_"),
    ({"splitter": Untyped(share=[np.float64(1)])}, "splitter.share", "np.float64(1.0)", "float64"),
]


@pytest.mark.parametrize(("options", "key", "shown", "kind"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_cannot_be_plain_is_refused_before_anything_is_written(options, key, shown, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = changed(**options)
    with pytest.raises(ConfigError) as told:
        run(config)
    given = f"{key} is {shown}, a {kind}; give float(), int(), str() or list() of it; allowed: "
    assert str(told.value).startswith(given)
    assert list(tmp_path.iterdir()) == []


def test_what_json_can_hold_is_plain():
    columns = OrderedDict(prompt="question", response="answer")
    validate(changed(data__columns=columns, training__betas=(0.9, 0.99)))
    validate(changed(splitter=Folder(path=Path("rows"))))
    assert from_dict(changed(data__columns=columns).as_dict()).data.columns == dict(columns)
