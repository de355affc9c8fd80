"""A finished run and its models, loaded once, and `generate` as it is called."""

import copy
from collections.abc import Callable

import pytest
import torch

from sftmix.tools.answers import generate as command
from sftmix.tools.runs.arguments import read_words
from sftmix.tools.runs.loaded import LoadedModel, load_finished
from sftmix.tools.runs.models import finished_models


@pytest.fixture(scope="session")
def target(finished) -> LoadedModel:
    return load_finished(finished_models(finished.path)[0])


@pytest.fixture(scope="session")
def lively(target) -> LoadedModel:
    """The same model with large random weights: a small model trained for seconds answers everything alike."""
    model = copy.deepcopy(target.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.4)
    return target._replace(model=model)


@pytest.fixture(scope="session")
def generate() -> Callable[..., None]:
    """Function: answer the prompts of a run or a model, by the words of the command."""

    def answer(place, to, *words) -> None:
        command.main(read_words("generate", command, [str(place), "--to", str(to), *map(str, words)]))

    return answer
