"""Models of a run by their names, and what they are loaded with."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sftmix.config.read import read_yaml
from sftmix.disk.files import read_json, write_json
from sftmix.model.adapters import WEIGHTS
from sftmix.model.load import load_tokenizer
from sftmix.model.paths import ADAPTERS
from sftmix.pipeline.signature import is_own
from sftmix.text.encoder import encoder_for
from sftmix.text.mask import encode_examples
from sftmix.tools.runs.loaded import encoder_of, load_finished, weights_of
from sftmix.tools.runs.models import FinishedModel, finished_models
from sftmix.types import Example, Message
from sftmix.words.errors import ConfigError
from tests.configs import read_config
from tests.tiny import SHORT, in_this_process, sign


def test_names_of_a_run(finished):
    """A model and another run may stand beside them."""
    model, run = finished.path / "train" / "model", finished.path
    found = finished_models(run, ["target", "baseline", "base", str(model)])
    paths = [model, run / "baseline" / "model", finished.tiny.model, model]
    assert [m.path for m in found] == list(map(str, paths))
    assert [m.run for m in found] == [run, run, run, None]
    assert [m.name for m in finished_models(run, ["target", "", "target"])] == ["target"]  # of "target,,target"
    assert [(m.path, m.run) for m in finished_models(finished.tiny.model, [str(run)])] == [(str(model), run)]


def test_what_is_not_there_is_named_with_the_remedy(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished.path / "config.yaml", run)
    for place, name, words in (
        (finished.path, "/nowhere", "is not a directory"),
        (finished.path, str(tmp_path), "neither a run directory"),
        (finished.tiny.model, "baseline", "not a run directory, so it has no baseline"),
        (run, "target", "not trained yet"),
        (run, "baseline", "--with_baseline true"),
        (run, " ", "no model is named in ' '"),
    ):
        with pytest.raises(ConfigError, match=words):
            finished_models(place, [name])


@pytest.mark.long
@pytest.mark.slow
def test_a_relative_run_is_looked_up_here_and_not_where_it_was_started(tiny, tmp_path, monkeypatch):
    """Where it was started another run has that name, and another chat template."""
    template, here = tmp_path / "other.jinja", tmp_path / "here"
    template.write_text("{% for turn in messages %}@{{ turn.content }}{{ eos_token if loop.index0 % 2 }}{% endfor %}")
    words = ("run", *tiny.bare, "--splitter", "RandomSplit", "--training.max_steps", "1")
    for more in (("--out", "here/run"), ("--out", "run", "--data.template", str(template))):
        done = in_this_process(*words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(here)
    relative, absolute, other = (
        encoder_of(*finished_models(place)).chat_template for place in ("run", here / "run", tmp_path / "run")
    )
    assert relative == absolute != other


OWN = """from sftmix.components import Renderer

class Plain(Renderer):
    template = "{% for m in messages %}@{{ m.content }}{{ eos_token }}{% endfor %}@"

    def answer(self, message):
        return [([*self.ids(message.content), self.tokenizer.eos_token_id], message.weight)]
"""
THINKING = """{% for m in messages %}@{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}\
{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}@\
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""


@pytest.mark.slow
def test_an_export_has_the_generation_prompt_of_the_rows(tiny, tmp_path):
    """While the training goes on as well; a renderer that is not imported is stood for by the template it exported."""
    answer = {"role": "assistant", "content": "a", "reasoning_content": "b"}
    rows = [{"messages": [{"role": "user", "content": str(number)}, answer]} for number in range(9)]
    for name, content in (("t.jinja", THINKING), ("own.py", OWN), ("rows.json", json.dumps(rows))):
        (tmp_path / name).write_text(content)
    tiny = replace(tiny, train=tmp_path / "rows.json")
    words = ("run", *tiny.bare, "--splitter", "RandomSplit", *SHORT[:-1], "1")
    for name, choice in (("thought", ("data.template", "t.jinja")), ("own", ("renderer", "own.Plain"))):
        done = in_this_process(*words, f"--{choice[0]}", choice[1], "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    begun = shutil.copytree(tmp_path / "thought", tmp_path / "begun")
    shutil.rmtree(begun / "train" / "model")
    (begun / "train" / "MANIFEST.json").unlink()
    for name, of in (("thought", "thought"), ("begun", "thought"), ("own", "own")):
        done = in_this_process("export", name, "--to", f"{name}-model", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        trained, exported = (tmp_path / of / "train" / "model", tmp_path / f"{name}-model")
        assert (exported / "chat_template.jinja").read_text() == (trained / "chat_template.jinja").read_text(), name
    (model,) = finished_models(tmp_path / "own")
    encoder = encoder_of(model)
    assert encoder.prompt([{"role": "user", "content": "Hi"}]) == encoder.tokenizer("@Hi<|im_end|>@")["input_ids"]


def test_an_adopted_stage_has_its_model(finished, tmp_path):
    """The run that made it may be gone."""
    from sftmix.pipeline.recipe import run
    from sftmix.pipeline.validity import ADOPTED

    first = shutil.copytree(finished.path, tmp_path / "first")
    run(replace(read_config(first / "config.yaml"), out=str(tmp_path / "second")), pool=[first])
    assert (tmp_path / "second" / "train" / ADOPTED).exists()
    shutil.rmtree(first)
    (found,) = finished_models(tmp_path / "second")
    assert found.path == str(tmp_path / "second" / "train" / "model")


@pytest.mark.parametrize("name", ["target", "baseline", "base"])
def test_prompts_are_those_of_training(finished, name):
    """The ids of a prompt are those before the response in a training row, whichever model of the run answers."""
    loaded = load_finished(finished_models(finished.path, [name])[0])
    config = read_config(finished.path / "config.yaml")
    encoder = encoder_for(load_tokenizer(config.model.path), config.data)
    asked = f"Add 2 and 3. {encoder.tokenizer.eos_token} What is it?"  # which stays text
    turns = [Message("user", asked), Message("assistant", "5", True), Message("user", "And 4?")]
    example = Example("x", (*turns, Message("assistant", "9", True)))
    (outcome,) = encode_examples(encoder.renderer, [example], 512)
    (first, _), (second, _) = outcome.spans
    chat = [{"role": m.role, "content": m.content} for m in turns]
    assert loaded.render(chat[:1]) == outcome.ids[:first]
    assert loaded.render(chat) == outcome.ids[:second]
    assert set(encoder.stop_ids) <= set(loaded.stop_ids)
    assert loaded.text_of(outcome.ids[slice(*outcome.spans[0])]) == "5"


@pytest.fixture(scope="module")
def adapted(finished, tmp_path_factory):
    """A run with adapters, and its merged export."""
    from sftmix.cli import main

    folder = tmp_path_factory.mktemp("adapted")
    (folder / "rows.jsonl").write_text('{"prompt": "Add 2 and 3."}\n')
    words = ["--model.lora.r", "4", "--objective", "NTP", "--pairing", "null"]
    assert main(["train", *finished.tiny.options, *SHORT, *words, "--out", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), "--to", str(folder / "merged"), "--merge"]) == 0
    return folder


@pytest.mark.slow
def test_adapters_from_elsewhere_are_those_of_their_base(adapted, finished, tmp_path):
    """The same adapters on other weights are another model."""
    base = shutil.copytree(finished.tiny.model, tmp_path / "base")
    place = shutil.copytree(adapted / "run" / "train" / "model", tmp_path / "adapters")
    config = read_json(place / "adapter_config.json")
    write_json(place / "adapter_config.json", {**config, "base_model_name_or_path": str(base)})
    model = FinishedModel("own", str(place), None)
    before = weights_of(model)
    assert before == weights_of(model)
    weights = load_file(base / "model.safetensors")
    save_file({name: x + 1 for name, x in weights.items()}, base / "model.safetensors")
    assert weights_of(model) != before


def test_adapters_answer_as_their_merged_model(adapted, sftmix, tmp_path):
    """Of the run, of the directory of adapters alone, and without a tokenizer, as PEFT writes them.

    Merging changes logits by rounding only.
    """
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (ADAPTERS, WEIGHTS):
        shutil.copy(adapted / "run" / "train" / "model" / name, bare)
    ids = torch.tensor([[1, 5, 7, 9]])
    merged = load_finished(finished_models(adapted / "merged")[0]).model(ids).logits
    base = load_finished(finished_models(adapted / "run", ["base"])[0]).model(ids).logits
    for place in (adapted / "run", adapted / "run" / "train" / "model", bare):
        loaded = load_finished(finished_models(place)[0])
        logits = loaded.model(ids).logits
        assert float((logits - merged).detach().abs().max()) < 1e-5
        assert float((logits - base).detach().abs().max()) > 1e-3
        words = ("--prompts", str(adapted / "rows.jsonl"), "--to", str(place.with_suffix(".jsonl")))
        assert sftmix("generate", str(place), *words, "--max_new_tokens", "2").code == 0


def test_whole_weights_answer_where_their_base_is_gone(copied, finished, sftmix):
    """As of a quickstart that was renamed, whose base is inside it; what needs the base names its remedy."""
    config = read_yaml(copied / "config.yaml")
    config["model"]["path"] = str(copied.parent / "gone")
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    sign(copied)
    assert is_own(copied)
    asked = [{"role": "user", "content": "Add 2 and 3."}]
    for name in ("target", "baseline"):
        (here,), (there,) = (finished_models(place, [name]) for place in (copied, finished.path))
        assert encoder_of(here).prompt(asked) == encoder_of(there).prompt(asked)
        assert load_finished(here).render(asked) == encoder_of(there).prompt(asked)
    ended = sftmix("export", str(copied), "--to", str(copied.parent / "to"))
    assert ended.code == 2
    assert f"gone) is not the model that {copied} was made from" in ended.err
    assert "name its place: --model.path PLACE" in ended.err
    place = str(finished.tiny.model)
    assert sftmix("export", str(copied), "--to", str(copied.parent / "to"), "--model.path", place).code == 0


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_model_whose_logits_are_not_finite_answers_nothing(tiny, sftmix, tmp_path, dtype):
    """In float16 a weight overflows, and every argmax would be token 0; in float32 the same weights answer."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float16)
    model.model.layers[0].mlp.down_proj.weight.data.fill_(6e4)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(6e4)
    model.save_pretrained(tiny.model)
    words = ["--prompts", str(tiny.eval), "--to", str(tmp_path / "a.jsonl"), "--max_new_tokens", "2", "--dtype", dtype]
    done = sftmix("generate", str(tiny.model), *words)
    assert done.code == (6 if dtype == "auto" else 0), done.err
    assert ("are not finite in torch.float16, so its answers would mean nothing" in done.err) is (dtype == "auto")
    assert ("try --dtype float32" in done.err) is (dtype == "auto")
    assert (tmp_path / "a.jsonl").exists() is (dtype != "auto")
