"""Files that run a program when they are read: a pickle or the code of a model is refused, or never looked at."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from sftmix.common.errors import ConfigError
from sftmix.model.adapters import add_adapters, read_adapters
from sftmix.model.load import load_model, load_tokenizer
from sftmix.options import LoraOptions
from tests.faults.runs import long
from tests.tiny import ROOT


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


def test_pickles_beside_safetensors_are_not_read(canary, tiny):
    names = ("pytorch_model.bin", "rng_state.pth", "vocab.pkl", "optimizer.pt")
    put(canary, *(tiny.model / name for name in names))
    load_model(tiny.model)
    load_tokenizer(tiny.model)


def test_adapters_in_a_pickle(canary, tiny, tmp_path):
    model = load_model(tiny.model)
    add_adapters(model, LoraOptions(r=2), seed=0)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    put(canary, adapters / "adapter_model.bin")
    with pytest.raises(ConfigError, match="does not hold the adapters of this run"):
        read_adapters(model, adapters)
    put(canary, adapters / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapters(model, adapters)
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


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


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
    change(tiny.model / "config.json", auto_map=CODE, quantization_config={"quant_method": "modeling_x"})
    change(tiny.model / "config.json", _attn_implementation_internal="someone/kernel", model_type="llama")
    monkeypatch.chdir(tiny.model)
    assert type(load_model(".")).__module__.startswith("transformers.models.")


def test_a_tokenizer_that_asks_for_code(canary, tiny):
    (tiny.model / "tokenization_x.py").write_text(f"open({str(canary)!r}, 'w')")
    own = {"AutoTokenizer": ["tokenization_x.X"] * 2}
    change(tiny.model / "tokenizer_config.json", tokenizer_class="X", auto_map=own)
    with pytest.raises(ConfigError, match="needs code of its own"):
        load_tokenizer(tiny.model)


def test_no_source_trusts_remote_code():
    sources = "".join(source.read_text(encoding="utf-8") for source in (ROOT / "sftmix").rglob("*.py"))
    assert re.findall(r"""trust_remote_code["']?\s*[=:]\s*(\w+)""", sources) == ["False"]
