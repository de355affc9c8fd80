"""Files of strangers: a pickle, the code of a model, and adapters that name a program to run or a model to load in
their place, are refused in one line, or never looked at."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from sftmix.disk.files import read_json, write_json
from sftmix.model.adapters import add_adapters, write_adapters
from sftmix.model.load import load_model, load_tokenizer
from sftmix.model.paths import refuse_files
from sftmix.options import LoraOptions
from sftmix.tools.runs.adapters import load_adapters
from sftmix.words.errors import ConfigError
from tests.faults.runs import change, long
from tests.tiny import ROOT, contents
from tests.tools.sharing.hub import Hub


class Evil:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    """The file that an evil one makes; it must not be there at the end."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Evil(path)))  # the bait works
    path.unlink()
    yield path
    assert not path.exists()


def put(canary: Path, *files: Path) -> None:
    for file in files:
        file.write_bytes(pickle.dumps(Evil(canary)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_model_in_a_pickle(name, canary, tiny, tmp_path, sftmix):
    (tiny.model / "model.safetensors").unlink()
    put(canary, tiny.model / name, tiny.model / "a_state.pt")
    done = sftmix("run", *tiny.options, "--out", str(tmp_path / "run"))
    assert done.code == 2
    assert f"there is no safetensors file; found {name}, a pickle" in done.err
    assert "Only safetensors are read" in done.err
    with pytest.raises(ConfigError, match=f"{name}, a pickle"):
        load_model(tiny.model)


def test_a_directory_of_gguf_files(tmp_path):
    (tmp_path / "m-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"has GGUF files alone; name the model that m-Q4_K_M\.gguf was made from"):
        refuse_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse_files(tmp_path)


def test_pickles_beside_safetensors_are_not_read(canary, tiny):
    names = ("pytorch_model.bin", "rng_state.pth", "vocab.pkl", "optimizer.pt")
    put(canary, *(tiny.model / name for name in names))
    load_model(tiny.model)
    load_tokenizer(tiny.model)


def index_of(*files: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {f"weight.{n}": file for n, file in enumerate(files)}})


@pytest.mark.parametrize(
    "named", ["pytorch_model.bin", "../outside/w.safetensors", "/outside/w.safetensors", "shards/w.safetensors"]
)
@pytest.mark.parametrize("by", ["config.json", "model.safetensors.index.json", "x.safetensors.index.json"])
def test_names_of_weights_in_other_files(named, by, canary, tiny):
    """Beside a dummy in safetensors; the first shard and the second are looked at alike."""
    weights = tiny.model / "model.safetensors"
    put(canary, tiny.model / "pytorch_model.bin")
    weights.rename(tiny.model / "a.safetensors")
    config = read_json(tiny.model / "config.json")
    if by == "config.json":
        write_json(tiny.model / by, {**config, "transformers_weights": named})
    else:
        (tiny.model / by).write_text(index_of("a.safetensors", named))
        explicit = {"transformers_weights": by} if by.startswith("x.") else {}
        write_json(tiny.model / "config.json", {**config, **explicit})
    refused = by if by.startswith("x.") else named  # an index of another name is not read
    with pytest.raises(ConfigError, match=f"names {re.escape(refused)} as a file of its weights"):
        load_model(tiny.model)


def test_adapters_in_a_pickle(canary, tiny, tmp_path):
    adapters = tmp_path / "adapters"
    LoraConfig(r=2, base_model_name_or_path="base", target_modules=["q_proj"]).save_pretrained(adapters)
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        put(canary, adapters / name)
        with pytest.raises(ConfigError, match=r"PEFT cannot load it: (FileNotFound|Safetensor)Error"):
            load_adapters(load_model(tiny.model), adapters)
    (adapters / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds adapters, not a model"):
        load_model(adapters)


@long
def test_pickles_in_the_place_of_scores(canary, finished, tmp_path, sftmix):
    """A table that is one, and NumPy's way to hold objects."""
    files = [tmp_path / "scores.parquet", tmp_path / "scores.npy"]
    put(canary, files[0])
    np.save(files[1], np.array([Evil(canary)], dtype=object), allow_pickle=True)
    for file in files:
        words = ("--reference", "FromFile", "--reference.path", str(file), "--out", str(tmp_path / "run"))
        done = sftmix("run", *finished.tiny.bare, *words)
        assert done.code == 3, done.err
        assert f"{file}: cannot be read as Parquet" in done.err


@long
@pytest.mark.filterwarnings("ignore:skipping checkpoint")
def test_pickles_in_a_run_directory(canary, finished, tmp_path, sftmix):
    """What a stage or a checkpoint holds is known by its hashes: another file is not read."""
    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    checkpoints = sorted((run / "train" / "checkpoints").glob("step-*"))
    put(canary, *(file for step in checkpoints for file in step.glob("*.safetensors")))
    put(canary, *(step / name for step in checkpoints for name in (".metadata", "rng_state.pth", "optimizer.pt")))
    assert checkpoints
    assert sftmix("export", str(run), "--to", str(tmp_path / "exported")).code == 4
    (run / "train" / "MANIFEST.json").unlink()
    assert sftmix(*finished.words, "--out", str(run)).code == 4
    assert not (tmp_path / "exported").exists()


# --------------------------------------------------------------------------------------- code of a model


CODE = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}
CONFIGS = {
    "a type of its own": ({"model_type": "evil", "auto_map": CODE}, "needs code of its own"),
    "a class": ({"__class__": "modeling_x.C"}, "cannot load"),
    "a list": ({"hidden_size": [1]}, "cannot load"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_asks_for_code(kind, canary, tiny, tmp_path, monkeypatch, sftmix):
    """The model is in the working directory, where Python would find the code."""
    values, reason = CONFIGS[kind]
    (tiny.model / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')")
    change(tiny.model / "config.json", **values)
    monkeypatch.chdir(tiny.model)
    done = sftmix("run", *tiny.options, "--model.path", ".", "--out", str(tmp_path / "run"))
    assert done.code == 2, done.err
    assert reason in done.err
    assert "trust_remote_code=True" not in done.err
    assert "Traceback" not in done.err


def test_code_beside_a_known_type_is_not_run(canary, tiny, monkeypatch):
    """Transformers has a class of its own for the type, which is taken; kernels of strangers are not fetched."""
    (tiny.model / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')")
    change(tiny.model / "config.json", auto_map=CODE)
    change(tiny.model / "config.json", _attn_implementation_internal="someone/kernel", model_type="llama")
    monkeypatch.chdir(tiny.model)
    assert type(load_model(".")).__module__.startswith("transformers.models.")


def test_a_tokenizer_that_asks_for_code(canary, tiny):
    (tiny.model / "tokenization_x.py").write_text(f"open({str(canary)!r}, 'w')")
    own = {"AutoTokenizer": ["tokenization_x.X"] * 2}
    change(tiny.model / "tokenizer_config.json", tokenizer_class="X", auto_map=own)
    with pytest.raises(ConfigError, match="needs code of its own"):
        load_tokenizer(tiny.model)


CONFIG = "adapter_config.json"
HOSTILE = {
    "a module to import": ({"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}, "megatron_config is {'a'"),
    "a key of a later version": ({"core_module": "megatron.evil"}, "core_module is 'megatron.evil'"),
    "another computation": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1], and such adapters"),
    "another type": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is loaded"),
    "a base that is no name": ({"base_model_name_or_path": {"a": 1}}, "names no base model"),
    "a URL as base": ({"base_model_name_or_path": "https://example.com/x"}, "is not a directory"),
    "a rank of text": ({"r": "a"}, "PEFT "),
    "no such module": ({"target_modules": ["nothing"]}, "Error: Target modules {'nothing'} not found"),
    "another rank": ({"r": 3}, "PEFT cannot load it: RuntimeError: Error(s) in loading"),
    "a branch of the base": ({"revision": "v1"}, "revision is 'v1', and such adapters are not loaded"),
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
    write_json(others / CONFIG, {**read_json(others / CONFIG), **values})
    refused(others, reason, sftmix)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ['{"peft_type": "LORA", "r"', "", "[]", "\ufeff{}", "[" * 100_000, "null"])
def test_a_file_that_is_no_configuration_of_adapters(text, others, sftmix):
    (others / CONFIG).write_text(text, encoding="utf-8")
    refused(others, CONFIG, sftmix)


SCRIPT = """
import json, sys
from sftmix.words.errors import ConfigError
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
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", SCRIPT, *(name for _, name in hub.repositories)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        fetched = [line for line in hub.asked if line.startswith("GET") and line.endswith((".bin", ".safetensors"))]
    assert [said for name, said in found if name == "me/model"] == ["LlamaConfig", "LlamaForCausalLM"]
    for name in ("me/adapters", "me/both"):
        (first, second) = [said for other, said in found if other == name]
        assert first == second
        assert first.startswith(f"model.path: {name} holds adapters, not a model: ")
    assert "cannot load me/pickled" in found[-1][1]
    assert {line.partition("/resolve/")[0] for line in fetched} == {"GET /me/model"}
