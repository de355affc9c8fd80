"""Adapters of strangers: none names a program to run or a model to load in its place; each ends in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sftmix.model.adapters import add_adapters, write_adapters
from sftmix.model.load import load_model, load_tokenizer
from sftmix.options import LoraOptions
from tests.tiny import ROOT, contents
from tests.tools.sharing.hub import Hub

CONFIG = "adapter_config.json"
HOSTILE = {
    "a module to import": ({"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}, "megatron_config is {'a'"),
    "a key of a later version": ({"core_module": "megatron.evil"}, "core_module is 'megatron.evil'"),
    "another computation": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1], and such adapters"),
    "another type": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is loaded"),
    "a base that is no name": ({"base_model_name_or_path": {"a": 1}}, "names no base model"),
    "a URL as base": ({"base_model_name_or_path": "https://example.com/x"}, "is not a directory"),
    "a rank of text": ({"r": "a"}, "PEFT "),
    "no such module": ({"target_modules": ["nothing"]}, "PEFT cannot follow it in LlamaForCausalLM"),
    "another rank": ({"r": 3}, "does not hold the adapters"),
}


@pytest.fixture(scope="module")
def adapters(finished, tmp_path_factory) -> Path:
    """A directory as PEFT writes it, not to be changed."""
    made = tmp_path_factory.mktemp("adapters")
    model = load_model(finished.tiny.model)
    add_adapters(model, LoraOptions(r=2, target_modules=["q_proj"]), seed=0)
    write_adapters(model, model.state_dict(), made, base=str(finished.tiny.model), dtype=torch.float32)
    load_tokenizer(finished.tiny.model).save_pretrained(made)
    return made


@pytest.fixture
def others(adapters, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(adapters, tmp_path / "adapters"))


def refused(place: Path, reason: str, sftmix) -> None:
    done = sftmix("chat", str(place))
    assert done.code == 2, done.err
    assert reason in done.err
    assert str(place) in done.err or "https://" in done.err
    assert done.err.count("\n") < 4


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_configuration_of_adapters_is_refused_in_one_line(kind, others, tmp_path, monkeypatch, sftmix):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    values, reason = HOSTILE[kind]
    (others / CONFIG).write_text(json.dumps({**json.loads((others / CONFIG).read_text()), **values}))
    refused(others, reason, sftmix)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ['{"peft_type": "LORA", "r"', "", "[]", "\ufeff{}", "[" * 100_000, "null"])
def test_a_file_that_is_no_configuration_of_adapters(text, others, sftmix):
    (others / CONFIG).write_text(text, encoding="utf-8")
    refused(others, CONFIG, sftmix)


SCRIPT = """
import json, sys
from sftmix.common.errors import ConfigError
from sftmix.model.load import load_model, model_config
for name in sys.argv[1:]:
    for load in (model_config, load_model):
        try:
            print(json.dumps([name, type(load(name)).__name__]))
        except ConfigError as error:
            print(json.dumps([name, str(error)]))
"""


@pytest.mark.slow
def test_repositories_of_the_hub(adapters, finished, tmp_path):
    """Of adapters, of a model with adapters beside it, and of a model in a pickle."""
    model, own = contents(finished.tiny.model), contents(adapters)
    own[CONFIG] = json.dumps({**json.loads(own[CONFIG]), "base_model_name_or_path": "me/model"}).encode()
    pickled = {name: data for name, data in model.items() if name != "model.safetensors"} | {"pytorch_model.bin": b"x"}
    with Hub() as hub:
        for name, files in {"model": model, "adapters": own, "both": model | own, "pickled": pickled}.items():
            hub.repositories[("models", f"me/{name}")] = files
        found = _loaded(hub.url, tmp_path, "me/model", "me/adapters", "me/both", "me/pickled")
        fetched = [line for line in hub.asked if line.startswith("GET") and line.endswith((".bin", ".safetensors"))]
    assert [said for name, said in found if name == "me/model"] == ["LlamaConfig", "LlamaForCausalLM"]
    for name in ("me/adapters", "me/both"):
        (first, second) = [said for other, said in found if other == name]
        assert first == second
        assert first.startswith(f"model.path: {name} holds adapters, not a model: ")
    assert "cannot load me/pickled" in found[-1][1]
    assert {line.partition("/resolve/")[0] for line in fetched} == {"GET /me/model"}


def _loaded(url: str, home: Path, *names: str) -> list[list[str]]:
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
