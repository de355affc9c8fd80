"""What a base model has beside its text weights goes along, or is named."""

import json

import torch
import transformers
from transformers import AutoTokenizer

from sftmix.data import encoder_for
from sftmix.model.export import export_model
from sftmix.model.load import load_model, load_tokenizer
from sftmix.options import DataOptions
from tests.model.test_models import TINY, random_model
from tests.tiny import SHORT


def test_a_config_names_no_code_that_is_not_there(small, tmp_path):
    random_model(transformers.LlamaConfig(**TINY)).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    code = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    base, tokenizer = load_model(tmp_path / "base"), load_tokenizer(small.model)
    out = export_model(base, tokenizer, tmp_path / "out", dtype=torch.float32)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert load_model(tmp_path / "base").config.auto_map == code


def test_named_templates_stay_beside_the_default_one(small, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    plain = tokenizer.chat_template
    tokenizer.chat_template = named = {"default": plain, "rag": plain + "{# rag #}"}
    model, encoder = random_model(transformers.LlamaConfig(**TINY)), encoder_for(tokenizer, DataOptions())
    for trained, kept in ((encoder.chat_template, named), (None, named), ("{{ messages }}", "{{ messages }}")):
        out = export_model(model, tokenizer, tmp_path / "out", dtype=torch.float32, chat_template=trained)
        assert AutoTokenizer.from_pretrained(out).chat_template == kept


def test_files_of_an_image_processor_go_along(tiny, tmp_path, sftmix):
    content = '{"image_processor_type": "Gemma3ImageProcessor"}'
    (tiny.model / "preprocessor_config.json").write_text(content)
    assert sftmix("run", *tiny.options, *SHORT, "--out", str(tmp_path / "run")).code == 0
    assert (tmp_path / "run" / "train" / "model" / "preprocessor_config.json").read_text() == content
