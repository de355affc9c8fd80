"""No field of a file of a model or of a run ends a command in a traceback, or makes it hang."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sftmix.disk.files import read_json, verify_directory, write_json
from sftmix.model.load import load_tokenizer
from sftmix.options.data import DataOptions
from sftmix.pipeline.validity import differences
from sftmix.text.encoder import encoder_for
from sftmix.tools.runs.adapters import stored_config
from sftmix.tools.runs.read import as_started, read_finished
from sftmix.tools.status.command import look_at, shown
from sftmix.tools.verify.window import window_of
from sftmix.words.errors import SFTMixError
from tests.faults.fuzz import VALUES, cases, read, refit, write
from tests.faults.runs import long
from tests.tiny import ROOT


@long
@pytest.mark.parametrize(("every", "only"), [(40, "config"), (20, "json")])
def test_a_sample_of_all_cases(every, only):
    """In a process that has run nothing before: its forks would wait for threads that they do not have."""
    words = [sys.executable, "-m", "tests.faults.fuzz", str(every), only]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_field_has_each_value_once():
    found = cases({"a": 1, "b": [{"c": "x"}]})
    assert len(found) == 4 * len(VALUES)
    kept = [case.content for case in found if case.field == "b.0.c"]
    assert [content["b"] for content in kept] == [[{"c": value}] for value in VALUES.values()]
    assert {content["a"] for content in kept} == {1}


# ------------------------------------------------------------------------------------------- readers in this process


def start(run: Path) -> None:
    with as_started(run):
        pass


def inputs(stage: str) -> Callable[[Path], object]:
    return lambda run: differences(read_json(run / stage / "inputs.json"), {"seed": 1, "training": {"epochs": 3}})


def encoder(model: Path) -> None:
    encoder_for(load_tokenizer(model), DataOptions()).renderer.tokenizer("Name a colour.")


READERS: dict[str, Callable[[Path], object]] = {
    "config.yaml": read_finished,
    "started.json": start,
    "STATUS.json": lambda run: shown(look_at(run)),
    "summary.json": lambda run: shown(look_at(run)),
    "train/metrics.jsonl": lambda run: shown(look_at(run)),
    "train/inputs.json": inputs("train"),
    "reference/inputs.json": inputs("reference"),
    "train/MANIFEST.json": lambda run: verify_directory(run / "train", within=run),
    "train/figures.json": lambda run: window_of(run, start=0, steps=1).machines,
    "tokenizer.json": encoder,
    "tokenizer_config.json": encoder,
    "special_tokens_map.json": encoder,
    "adapter_config.json": stored_config,
}


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.long])])
@pytest.mark.parametrize("name", READERS)
def test_readers_raise_only_errors_of_ours(name, every, copied, tiny):
    """Every n-th case; what commands make of the values that are read: `python -m tests.faults.fuzz`."""
    place = copied if (copied / name).exists() else tiny.model
    if name == "special_tokens_map.json":
        tokens = read_json(place / "tokenizer_config.json")
        write_json(place / name, {key: value for key, value in tokens.items() if key.endswith("_token")})
    if name == "adapter_config.json":
        from peft import LoraConfig

        LoraConfig(target_modules=["q_proj"], base_model_name_or_path="base").save_pretrained(place)
    ends = Counter[str]()
    for case in cases(read(place / name))[::every]:
        write(place / name, case.content)
        refit(place, place / name)
        try:
            READERS[name](place)
            ends["read"] += 1
        except SFTMixError:
            ends["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{case.field} {case.kind}") from error
    print(name, dict(ends))
