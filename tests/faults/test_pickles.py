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


def of_run(finished, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of a finished run and the words that made it."""
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    return run, [*finished.words, "--out", str(run)]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_model_in_a_pickle(name, canary, tiny, tmp_path, sftmix, record_property):
    (tiny.model / "model.safetensors").unlink()
    put(canary, tiny.model / name, tiny.model / "a_state.pt")
    done = sftmix("run", *tiny.options, "--out", str(tmp_path / "run"))
    assert done.code == 2
    assert f"there is no safetensors file; found {name}, a pickle" in done.err
    assert "Only safetensors are read" in done.err
    with pytest.raises(ConfigError, match=f"{name}, a pickle"):
        load_model(tiny.model)
    record_property("F14", f"a model in {name}: 0 pickles read, exit 2")


def test_pickles_beside_safetensors_are_not_read(canary, tiny, record_property):
    names = ("pytorch_model.bin", "rng_state.pth", "vocab.pkl", "optimizer.pt")
    put(canary, *(tiny.model / name for name in names))
    load_model(tiny.model)
    load_tokenizer(tiny.model)
    record_property("F14", f"{len(names)} pickles beside safetensors: 0 read")


def test_adapters_in_a_pickle(canary, tiny, tmp_path, record_property):
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
    record_property("F14", "adapters in adapter_model.bin, and a pickle named safetensors: 0 read, refused")


@pytest.mark.slow
@pytest.mark.long
def test_pickles_in_the_place_of_scores(canary, finished, tmp_path, sftmix, record_property):
    """The file of another's confidence, a stage of a run, and NumPy's way to hold objects."""
    run, words = of_run(finished, tmp_path)
    files = [tmp_path / "scores.parquet", tmp_path / "scores.npy", run / "confidence" / "dynamics.parquet"]
    put(canary, files[0], files[2])
    np.save(files[1], np.array([Evil(canary)], dtype=object), allow_pickle=True)
    more = ["--out", str(tmp_path / "other"), "--reference", "FromFile", "--reference.path"]
    basic = [*words[: words.index("--with_baseline")], *more]
    at = basic.index("--reference.checkpoints")
    del basic[at : at + 2]
    for file in files:
        done = sftmix(*basic, str(file))
        assert done.code == 3, done.err
        assert f"{file}: cannot be read as Parquet" in done.err
    record_property("F14", f"{len(files)} pickles in the place of scores: 0 read, exit 3")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:skipping checkpoint")
def test_pickles_in_a_run_directory(canary, finished, tmp_path, sftmix, record_property):
    """What a stage or a checkpoint holds is known by its hashes: another file is not read."""
    run, words = of_run(finished, tmp_path)
    checkpoints = sorted((run / "train" / "checkpoints").glob("step-*"))
    put(canary, *(file for step in checkpoints for file in step.glob("*.safetensors")))
    put(canary, *(step / name for step in checkpoints for name in (".metadata", "rng_state.pth", "optimizer.pt")))
    assert checkpoints
    done = sftmix("export", str(run), "--to", str(tmp_path / "exported"))
    assert done.code == 4, done.err
    (run / "train" / "MANIFEST.json").unlink()
    assert sftmix(*words).code == 4
    assert not (tmp_path / "exported").exists()
    record_property("F14", f"pickles in {len(checkpoints)} checkpoints: 0 read, exit 4")


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
def test_a_config_that_asks_for_code(kind, canary, tiny, tmp_path, monkeypatch, sftmix, record_property):
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
    record_property("F18", f"a model in the working directory, its config with {kind}: 0 modules imported, exit 2")


def test_code_beside_a_known_type_is_not_run(canary, tiny, monkeypatch, record_property):
    """Transformers has a class of its own for the type, which is taken; kernels of strangers are not fetched."""
    (tiny.model / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')")
    change(tiny.model / "config.json", auto_map=CODE, quantization_config={"quant_method": "modeling_x"})
    change(tiny.model / "config.json", _attn_implementation_internal="someone/kernel", model_type="llama")
    monkeypatch.chdir(tiny.model)
    assert type(load_model(".")).__module__.startswith("transformers.models.")
    record_property("F18", "code beside a known type: 0 modules imported, the class is that of transformers")


def test_a_tokenizer_that_asks_for_code(canary, tiny, record_property):
    (tiny.model / "tokenization_x.py").write_text(f"open({str(canary)!r}, 'w')")
    change(
        tiny.model / "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["tokenization_x.X"] * 2}
    )
    with pytest.raises(ConfigError, match="needs code of its own"):
        load_tokenizer(tiny.model)
    record_property("F18", "a tokenizer with code of its own: 0 modules imported, refused")


def test_no_source_trusts_remote_code(record_property):
    sources = sorted((ROOT / "sftmix").rglob("*.py"))
    given = [
        (source.name, value)
        for source in sources
        for value in re.findall(r"""trust_remote_code["']?\s*[=:]\s*(\w+)""", source.read_text(encoding="utf-8"))
    ]
    assert given == [("load.py", "False")]
    record_property("F18", f"{len(sources)} files of source: trust_remote_code is False wherever it stands")
