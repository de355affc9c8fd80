"""Adapters that PEFT itself wrote: each kind loads as PEFT loads it, and a file that lacks some of them is refused."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sftmix.model.adapters import WEIGHTS
from sftmix.model.load import load_model
from sftmix.model.paths import ADAPTERS
from sftmix.tools.runs.adapters import load_adapters
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.model.test_adapters import change, experts, logits
from tests.model.test_models import build
from tests.tiny import ROOT, contents
from tests.tools.sharing.hub import Hub

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules were found"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

ALL = {"target_modules": "all-linear"}
KINDS = {
    "plain": ALL,
    "dora": ALL | {"use_dora": True},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora on both ends": {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
    "both ends in full": ALL | {"modules_to_save": ["lm_head", "embed_tokens"]},
    "both ends in full and tied": ALL | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "all biases": ALL | {"bias": "all"},
    "some tokens": ALL | {"trainable_token_indices": [5, 6, 7]},
    "layers twice": ALL | {"layer_replication": [[0, 2], [1, 2]]},
    "other base weights": ALL | {"init_lora_weights": "pissa"},
    "ranks": ALL | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 32}},
}
OF_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def written(directory, model, **options):
    """Have PEFT write a base model and adapters that do something; the logits of both, as PEFT reads them back."""
    model.save_pretrained(directory / "base")
    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, **options))
    change(made)
    made.save_pretrained(directory / "adapters")
    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, directory / "adapters"))
    assert float((expected - logits(model)).abs().max()) > 0.01
    return expected


def loaded(directory):
    model = load_model(directory / "base")
    load_adapters(model, directory / "adapters")
    return logits(model)


def assert_as_peft(directory, model, **options):
    expected = written(directory, model, **options)
    assert float((loaded(directory) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "llama tied"])
@pytest.mark.parametrize("kind", some_fast(KINDS, every=2))
def test_adapters_of_peft_load_as_peft_loads_them(family, kind, tmp_path):
    assert_as_peft(tmp_path, build(family), **KINDS[kind])


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_adapters_of_experts_load_as_peft_loads_them(family, tmp_path):
    assert_as_peft(tmp_path, experts(family), **OF_EXPERTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_lacks_or_has_besides_is_named(kind, tmp_path):
    """The base model's own weights, which PEFT writes beside adapters on its ends, may be missing."""
    written(tmp_path, build("llama tied"), **KINDS[kind])
    file = tmp_path / "adapters" / WEIGHTS
    whole = load_file(file)
    ours = [name for name in whole if not name.endswith("base_layer.weight")]
    ends = {name for name in ours if "layers" not in name}
    for name in (ours[0], *ends):
        save_file({other: x for other, x in whole.items() if other != name}, file)
        part = name.removeprefix("base_model.model.").split(".lora_")[0]
        with pytest.raises(ConfigError, match=rf"adapters: PEFT cannot load it: .*{part}"):
            loaded(tmp_path)
    save_file(whole | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 2)}, file)
    with pytest.raises(ConfigError, match=r"its configuration and its weights differ in model\.layers\.7\.mlp"):
        loaded(tmp_path)


@pytest.mark.parametrize("revision", ["v1", "main", "a" * 39, "a" * 41, "A" * 40, ["a" * 40]])
def test_a_revision_that_is_no_commit_is_refused(revision, tmp_path):
    """A branch or a tag moves, and is another base then without a word."""
    written(tmp_path, build("llama"), **ALL)
    file = tmp_path / "adapters" / ADAPTERS
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": revision}))
    problem = re.escape(f"revision is {revision!r:.80}")
    with pytest.raises(ConfigError, match=problem + ", .* another base, .* merge them into their base model"):
        loaded(tmp_path)


SCRIPT = """
import sys
from pathlib import Path
import torch
from peft import AutoPeftModelForCausalLM
from sftmix.model.adapters import add_adapters, write_adapters
from sftmix.model.load import load_model, load_tokenizer
from sftmix.options import LoraOptions
from sftmix.tools.runs.loaded import load_finished, weights_of
from sftmix.tools.runs.models import FinishedModel

kind, place = sys.argv[1:]
if kind == "write":
    model = load_model("me/model")
    add_adapters(model, LoraOptions(r=2), seed=0)
    write_adapters(model, model.state_dict(), Path(place), base="me/model", dtype=torch.float32)
    load_tokenizer("me/model").save_pretrained(place)
elif kind == "peft":
    AutoPeftModelForCausalLM.from_pretrained(place)
elif kind == "answer":
    load_finished(FinishedModel("own", place, None))
else:
    print(weights_of(FinishedModel("own", place, None)))
"""


@pytest.mark.long
@pytest.mark.slow
def test_adapters_name_the_commit_of_their_base_and_are_loaded_onto_it(tiny, tmp_path):
    """PEFT asks for it, and so do the commands, once the repository has a newer one."""
    place = tmp_path / "adapters"
    place.mkdir()

    def asked_by(kind):
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / kind), "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **own, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        hub.asked.clear()
        words = [sys.executable, "-c", SCRIPT, kind, str(place)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with Hub() as hub:
        hub.repositories["models", "me/model"] = contents(tiny.model)
        first = hub.sha(("models", "me/model"))
        asked_by("write")
        assert json.loads((place / ADAPTERS).read_text())["revision"] == first
        identity = asked_by("identity")
        hub.repositories["models", "me/model"]["README.md"] = b"another commit"
        assert hub.sha(("models", "me/model")) != first
        for kind in ("peft", "answer"):
            asked_by(kind)
            weights = [line for line in hub.asked if line.endswith("/model.safetensors")]
            assert {line.partition("/resolve/")[2] for line in weights} == {f"{first}/model.safetensors"}
        assert asked_by("other") == identity
