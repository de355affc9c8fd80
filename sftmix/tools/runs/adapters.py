"""Adapters that are stored, of a run or of others: read, put onto their base model, and merged into its weights."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from sftmix.disk.regular import regular
from sftmix.disk.texts import read_text
from sftmix.model.adapters import WEIGHTS, add_layers, in_peft_format
from sftmix.model.compared import apart
from sftmix.model.head import ADAPTER, active
from sftmix.model.layers import freeze_unused
from sftmix.model.load import untie
from sftmix.model.paths import ADAPTERS
from sftmix.model.probes import probe_logits
from sftmix.words.errors import ConfigError

TAKEN = """auto_mapping base_model_name_or_path inference_mode peft_type peft_version task_type
exclude_modules layer_replication layers_pattern layers_to_transform modules_to_save target_modules
target_parameters trainable_token_indices
alpha_pattern bias ensure_weight_tying eva_config fan_in_fan_out init_lora_weights loftq_config lora_alpha
lora_bias lora_dropout r rank_pattern use_dora use_rslora"""
"""The keys of adapter_config.json that may have any value. Every other one must have PEFT's default: `megatron_config`
imports a module that the file names, and others change what the adapters compute. `revision` may be a commit of the
base model, and no branch or tag, which move."""
COMMIT = re.compile("[0-9a-f]{40}")


def stored_config(directory: Path) -> Any:
    """Return the configuration of the LoRA adapters in a directory, which names their base model.

    Raises ConfigError if the file cannot be read, is of adapters other than LoRA, sets a key outside TAKEN, or names no
    base model.
    """
    from peft import LoraConfig

    file, default = directory / ADAPTERS, LoraConfig().to_dict()
    try:
        stored = json.loads(read_text(file))
        if stored["peft_type"] != "LORA":
            raise ConfigError(f"{file}: peft_type is {stored['peft_type']!r:.80}; only LORA is loaded")
        taken = TAKEN.split()
        if COMMIT.fullmatch(str(stored.get("revision"))):
            taken.append("revision")
        for key in sorted(stored.keys() - taken):
            if stored[key] and stored[key] != default.get(key):  # null, false: another version's "velora_config": null
                raise ConfigError(
                    f"{file}: {key} is {stored[key]!r:.80}, and such adapters are not loaded: it may name a module to "
                    "import, another base, or a computation. Take it out of the file if they work without it, else "
                    "merge them into their base model with PEFT (merge_and_unload), and name the merged model"
                )
        config = LoraConfig(**{key: value for key, value in stored.items() if key in default})
    except ConfigError:
        raise
    except Exception as error:  # a stranger's file may make json, the look-ups and PEFT raise anything
        raise ConfigError(f"{file} cannot be read as PEFT writes it: {type(error).__name__}: {error}") from error
    base = config.base_model_name_or_path
    if not isinstance(base, str):
        raise ConfigError(f"{file} names no base model (base_model_name_or_path is {base!r:.80})")
    return config


def load_adapters(model: PreTrainedModel, directory: Path) -> None:
    """Put the adapters that `write_adapters` or PEFT itself wrote into a directory onto their base model, in place.

    Raises ConfigError if adapter_config.json is refused, or if the weights are not those that it describes.
    """
    from peft import set_peft_model_state_dict

    config = stored_config(directory)
    config.inference_mode = False  # else PEFT freezes them, and what is missing is looked for among trained weights
    try:
        add_layers(model, config, seed=0)
        if config.bias == "all" and config.exclude_modules:  # `add_adapters` trained biases of the text model alone
            freeze_unused(model)
        # PEFT writes base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: its wrapper is not here.
        file = regular(directory / WEIGHTS)
        stored = {name.removeprefix("base_model.model."): x for name, x in load_file(file).items()}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names: Any = {name: name for name in trained}  # in the place of the tensors
        own: Any = {} if config.ensure_weight_tying else in_peft_format(model, names)
        if {f"base_model.model.{name}" for name in stored} == own.keys():
            # Not by PEFT, which renames some as it reads them: Laguna's mlp.shared_experts.
            model.load_state_dict({own[f"base_model.model.{name}"]: x for name, x in stored.items()}, strict=False)
            return
        missing, unexpected = set_peft_model_state_dict(model, stored, ADAPTER)  # type: ignore[attr-defined]
        # Frozen weights are the base model's, and the file need not have them.
        if wrong := trained.keys() & {*missing} | {*unexpected}:
            raise ValueError(f"its configuration and its weights differ in {min(wrong)}")
    except Exception as error:  # for values in a stranger's file PEFT may raise anything
        raise ConfigError(
            f"{directory}: PEFT cannot load it: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Turn an adapted model into a plain one with the same function, in place.

    A tied model is untied if its input embeddings or its LM head were adapted, since they may now differ. Raises
    ConfigError if a probe has other logits afterwards, as where layers share the weights into which each is merged.
    """
    adapted_logits = probe_logits(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    # base_layer: by LoRA; modules_to_save: trained in full.
    adapted = any(hasattr(end, "base_layer") or hasattr(end, "modules_to_save") for end in ends)
    if adapted and model.config.get_text_config().tie_word_embeddings:
        # a weight of its own, so that merging into one end leaves the other as it is
        head = active(ends[1])
        layer = getattr(head, "base_layer", head)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        untie(model)
    # The innermost first: if two tensors of experts are adapted, one's PEFT layer is inside the other's.
    for name, module in reversed(list(model.named_modules())):
        if hasattr(module, "modules_to_save"):
            model.set_submodule(name, module.modules_to_save[ADAPTER])  # the trained copy in place of the original
        elif hasattr(module, "base_layer"):
            module.merge(safe_merge=True)  # PEFT merges a copy, and raises an error for NaN
            model.set_submodule(name, module.base_layer)
    del model.peft_config
    model._hf_peft_config_loaded = False  # else save_pretrained writes adapters alone
    if difference := apart(probe_logits(model), adapted_logits):
        raise ConfigError(
            f"model.lora: merged into the weights of {type(model).__name__} these adapters give other logits, "
            f"{difference}, as where layers share weights. Keep them as adapters: export without --merge"
        )
