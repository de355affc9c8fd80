"""A trained model as a Hugging Face directory."""

import copy
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sftmix.disk.files import fresh_directory, let_others_read, naming_full_disk, sync_path, write_text
from sftmix.disk.regular import regular
from sftmix.disk.texts import read_text
from sftmix.model.adapters import write_adapters
from sftmix.model.admitted import CONFIG, PROCESSORS, find_model
from sftmix.model.compared import say_once
from sftmix.model.head import adapter_config
from sftmix.model.load import model_config, own_ends
from sftmix.model.probes import export_problems
from sftmix.model.shards import write_shards

SENTENCEPIECE = "tokenizer.model"
"""The vocabulary of some tokenizers as sentencepiece has it: llama.cpp converts Gemma 1 and 2 by it."""


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    base: str = "",
    stop_ids: Iterable[int] = (),
    chat_template: str | None = None,
) -> Path:
    """Write a directory that AutoModelForCausalLM and AutoTokenizer load, whole or not at all, and return it.

    weights        name and value of each weight, in the order of the model, which are taken one by one and may be
                   gathered then; None: the model's own. Tied weights are stored once
    dtype          dtype of the files and of the config
    base           the base model, whose files for images are copied; of a model with adapters, only these are written,
                   in PEFT's format, and name it
    stop_ids       end-of-turn ids, in addition to the eos ids of the tokenizer and of the model's generation_config
    chat_template  the Jinja template the model was trained with; None: the tokenizer's own
    """
    weights = model.state_dict().items() if weights is None else weights
    adapted = adapter_config(model) is not None
    with naming_full_disk(path, model.num_parameters(only_trainable=adapted) * dtype.itemsize):
        temporary = fresh_directory(path)
        try:
            generation = _generation_config(model, tokenizer, stop_ids)
            if adapted:
                write_adapters(model, dict(weights), temporary, base=base, dtype=dtype)
            else:
                write_shards(model, temporary, weights, dtype)
                _write_config(model, temporary, dtype)
                if base:
                    _copy_beside(model, base, temporary)
            generation.save_pretrained(temporary)
            _write_tokenizer(tokenizer, temporary, chat_template)
            for problem in export_problems(model, tokenizer, temporary):
                say_once(f"{path}: {problem}")
            for file in filter(Path.is_file, temporary.rglob("*")):  # some chat templates have a directory of their own
                let_others_read(file)
                sync_path(file)
            old = path.with_name(f"{temporary.name}.old")
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)  # the old one is removed only when the new one is there
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def _copy_beside(model: PreTrainedModel, base: str, path: Path) -> None:
    """Copy the files for images, unless the model is the part for text of its base, and sentencepiece's vocabulary."""
    images = PROCESSORS if model_config(base).model_type == model.config.model_type else ()
    directory = find_model(base).directory
    for name in (*images, SENTENCEPIECE):
        file = directory / name
        # tiktoken's file has the name of sentencepiece's, and begins as "IQ== 0"
        if regular(file).is_file() and not (name == SENTENCEPIECE and file.read_bytes()[:1] != b"\n"):
            shutil.copy(file, path)


def _write_config(model: PreTrainedModel, path: Path, dtype: torch.dtype) -> None:
    """Write the config, with the class of the model and what releases before read."""
    saved = copy.deepcopy(model.config)
    saved.architectures = [type(model).__name__.removeprefix("FSDP")]
    vars(saved).pop("auto_map", None)  # names files of code, which are not written
    parts = (getattr(saved, name, None) for name in saved.sub_configs)  # Gemma 3: text_config, ...
    for config in (saved, *filter(None, parts)):
        config.dtype = dtype
        rope = getattr(config, "rope_parameters", None) or {}
        if config.model_type in ("gemma3_text", "gemma3n_text", "olmo3"):
            config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]  # a base and a scaling for each kind of layer, where others have one
        if "rope_theta" in rope:  # transformers 4 would take it for 10,000
            base, part = rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
            scaling = None if rope["rope_type"] == "default" else rope | {"type": rope["rope_type"]}
            vars(config).update(rope_theta=base, partial_rotary_factor=part, rope_scaling=scaling)
            if "gpt_neox" in config.model_type:  # also gpt_neox_japanese
                vars(config).update(rotary_emb_base=base, rotary_pct=part)
    saved.save_pretrained(path)
    file = path / CONFIG  # {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", ...}, ...}
    # transformers before 4.56 knows the old name alone, as servers of its time, which then take float32
    write_text(file, re.sub(r'( *)"dtype": ("\w+")', r'\1"dtype": \2,\n\1"torch_dtype": \2', read_text(file)))


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path, chat_template: str | None) -> None:
    """Write the tokenizer with this template, under names that transformers 4 knows as well."""
    exported, named = copy.deepcopy(tokenizer), tokenizer.chat_template
    if not (isinstance(named, dict) and named.get("default") == chat_template):  # others belong to the default
        exported.chat_template = chat_template or named
    split = getattr(getattr(exported, "backend_tokenizer", None), "pre_tokenizer", None)
    if getattr(split, "add_prefix_space", False):  # transformers 4 takes it for false unless the config has it
        exported.init_kwargs["add_prefix_space"] = exported.add_prefix_space = True
    exported.save_pretrained(path)
    config = path / "tokenizer_config.json"  # {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": [...]}
    text = read_text(config).replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    write_text(config, text.replace('"extra_special_tokens": [', '"additional_special_tokens": ['))


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]
) -> GenerationConfig:
    """Return the model's options of generation that transformers accepts, with all stop ids.

    No training may end for the sake of options that contradict each other, as sampling ones without do_sample.
    """
    config = copy.deepcopy(model.generation_config or GenerationConfig())
    ids = [tokenizer.eos_token_id, *own_ends(model), *stop_ids]
    unique = list(dict.fromkeys(int(i) for i in ids if i is not None))
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": unique[0] if len(unique) == 1 else unique or None,
        # -1 is in LLaMA 1's config.json, and no token
        "pad_token_id": tokenizer.pad_token_id if config.pad_token_id in (None, -1) else config.pad_token_id,
    }
    config.update(**tokens)
    try:
        config.validate(strict=True)
    except Exception as error:  # values of strangers make transformers raise anything
        # one line for each: "- `temperature`: `do_sample` is not set to `True`. However, `temperature` is set to ..."
        refused = re.findall(r"^- `(\w+)`: ", str(error), re.MULTILINE)
        if not refused:  # a single value that is never allowed, which hides the others
            return GenerationConfig(**tokens)
        config.update(**dict.fromkeys(refused))
    return config
