"""Shared fixtures. Warnings are errors; property tests are derandomised, so CI always runs the same examples."""

import contextlib
import gc
import importlib
import io
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any library counts the cores: each worker of pytest has one

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

from sftmix.cli import main
from tests.forked import PRELOADED
from tests.tiny import Tiny, make_tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("ci")
torch.set_num_threads(1)  # tensors are tiny here: a second thread costs more than it gives, above all on a busy machine


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Leave what is there out of garbage collection, which a run does before each of its models."""
    gc.collect()
    gc.freeze()


SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data, models and tokenizers beside the checkout; a user's clone has none."""
    if not SHARED.is_dir():
        pytest.skip("real data and models (../shared) are not there")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory) -> None:
    """Tokenised rows of the tests stay out of the user's cache, and their key out of the user's state."""
    os.environ["SFTMIX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["SFTMIX_STATE"] = str(tmp_path_factory.mktemp("state"))


@dataclass(frozen=True)
class Finished:
    """A run of the whole recipe with its baseline on the tiny model: its options, its directory, what it printed."""

    tiny: Tiny
    path: Path
    printed: str

    @property
    def words(self) -> list[str]:
        return ["run", *self.tiny.options, "--with_baseline", "--reference.token_nll"]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Tiny:
    """The tiny model and rows; not to be changed."""
    return make_tiny(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Tiny:
    """The same without dropout, whose masks depend on ranks and micro-batches."""
    return make_tiny(tmp_path_factory.mktemp("plain"), dropout=0.0)


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory) -> Finished:
    """Read it, and copy it before you change it."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # this run is the first of many workers, and would go through all of it
    run = Finished(small, tmp_path_factory.mktemp("finished") / "run", "")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*run.words, "--out", str(run.path)]) == 0
    return replace(run, printed=printed.getvalue())


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The finished run in a directory of the test's own, to be changed."""
    return shutil.copytree(finished.path, tmp_path / "run")


@pytest.fixture
def sftmix(capsys) -> Callable[..., SimpleNamespace]:
    """Run a command line in this process: its exit code and what it printed."""

    def call(*words: str) -> SimpleNamespace:
        code = main(list(words))
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def tiny(finished, tmp_path) -> Tiny:
    """The tiny model and rows, to be changed."""
    copy = Tiny(tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "eval.jsonl")
    shutil.copytree(finished.tiny.model, copy.model)
    shutil.copy(finished.tiny.train, copy.train)
    shutil.copy(finished.tiny.eval, copy.eval)
    return copy
