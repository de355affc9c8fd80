"""Real models, which benchmarks/real_models.py has built; tests build none. A test of these is marked real and slow."""

import json
from pathlib import Path

import pytest

from benchmarks.real_models import MODELS, PLACE  # the place before the tests get a cache of their own

QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Name two primary colours.": "Red and blue.",
    "How many legs has a spider?": "A spider has eight legs.",
    "Write a short sentence about rain.": "Rain fell softly on the old roof all night.",
    "Give the opposite of 'early'.": "Late.",
    "What do bees make?": "Bees make honey from the nectar of flowers.",
    "Which planet is the largest?": "Jupiter is the largest planet of our solar system.",
    "Finish: the sky is": "The sky is blue on a clear day.",
    "What is 7 plus 5?": "7 plus 5 is 12.",
    "Name an animal that hibernates.": "Bears hibernate during the winter.",
    "What is ice made of?": "Ice is frozen water.",
}
"""Eleven rows, an odd number: one of the unconfident half stays without a partner."""


def built(name: str) -> Path:
    assert name in MODELS
    if not (PLACE / name).is_dir():
        pytest.skip(f"{name} is not there: python benchmarks/real_models.py {name}")
    return PLACE / name


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return built("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return built("gemma3-270m")


@pytest.fixture(scope="session")
def qwen() -> Path:
    return built("qwen2.5-coder-0.5b")


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A file of the questions and their answers."""
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"instruction": asked, "output": answer} for asked, answer in QUESTIONS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def held_out(questions) -> Path:
    """The same under another name: a run refuses a file that it trains on."""
    file = questions.with_name("held-out.jsonl")
    file.write_text(questions.read_text())
    return file
