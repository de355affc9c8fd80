"""Low-rank adapters by PEFT inside a transformers model: adding and saving.

The model stays the transformers model it was (`get_decoder()`, `get_output_embeddings()` and `model(...)` work): PEFT
puts its layers in the place of the targeted ones, and everything else is frozen.
"""

import copy
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from sftmix.model.admitted import find_model
from sftmix.model.compared import say_once, some
from sftmix.model.head import ADAPTER, FEWER, adapter_config
from sftmix.model.layers import freeze_unused, unused_modules
from sftmix.options.model import LoraOptions
from sftmix.words.errors import ConfigError

UNTIES = Version("5.18")
"""The first transformers that reads adapters beside one of two tied weights that was trained in full."""
WEIGHTS = "adapter_model.safetensors"

ALL_LINEAR = "all-linear"
"""PEFT's word for experts, routers and every linear layer but the LM head; here a list may hold it as well."""
_KINDS = {
    "shared experts": "shared",  # mlp.shared_experts.up_proj, shared_mlp.input_linear, mlp.shared_expert_gate
    "routers": r"\.(router|gate)\.",  # mlp.gate.weight, feed_forward.router.weight, mlp.router.gate.weight
    "routed experts": "expert|moe",
    "attention": "att",
    "dense": "mlp|feed_forward|ffn|fc",
    "other": "",
}
"""Kinds of weights, and how their names tell: the first that fits."""


# --------------------------------------------------------------------------------------------------- adding


def add_adapters(model: PreTrainedModel, lora: LoraOptions, *, seed: int) -> None:
    """Put adapters into `model`, in place, and freeze all weights that are not trained.

    The initial values are a function of the seed alone, so they are the same on every rank. Raises ConfigError if PEFT
    cannot follow the options; `sftmix.model.head.check_head` refuses an LM head that the loss cannot follow.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    options, targets, unused = asdict(lora), lora.target_modules, unused_modules(model)
    del options["quantize"]
    target_names = [] if isinstance(targets, str) else [name for name in targets if name != ALL_LINEAR]
    outside = tuple(f"{name}." for name in unused)  # Gemma 3: "model.vision_tower.", "model.multi_modal_projector."
    modules = {name: part for name, part in model.named_modules() if not f"{name}.".startswith(outside)}
    _refuse_unknown(model, modules, "target_modules", target_names)
    _refuse_unknown(model, modules, "modules_to_save", lora.modules_to_save or [])
    if ALL_LINEAR in targets:
        options["target_modules"] = ALL_LINEAR
    if unused:
        options["exclude_modules"] = rf"({'|'.join(map(re.escape, unused))})(\..*)?"  # PEFT matches whole names
    try:
        config = LoraConfig(**options, task_type="CAUSAL_LM")
        if config.target_modules == ALL_LINEAR and target_names:
            # PEFT does not take all-linear beside names, so its own functions make names of it here: first the
            # experts and routers, which are no linear layers (Mixtral: gate_up_proj, down_proj, gate.weight).
            convert_peft_config_for_transformers(config, model=model, conversions=None)
            _maybe_include_all_linear_layers(config, model)
            config.target_modules = sorted({*(config.target_modules or ()), *target_names})
        add_layers(model, config, seed=seed)
    except (ValueError, TypeError, NotImplementedError) as error:
        refused = f"model.lora: PEFT refuses these options for {type(model).__name__}: {str(error).removesuffix('.')}"
        raise ConfigError(f"{refused}. {FEWER}" if ALL_LINEAR in targets else refused) from error
    _refuse_reading_as_tied(model)
    freeze_unused(model)  # with `bias: all` PEFT trains every bias of the model
    if target_names and ALL_LINEAR not in targets:
        _check_named(model, modules, target_names)


def _refuse_unknown(model: nn.Module, modules: Mapping[str, nn.Module], option: str, names: Sequence[str]) -> None:
    """Raise ConfigError for a name that fits no module, of which PEFT says nothing if another one fits."""
    if unknown := [name for name in names if not any(_fits(name, module) for module in modules)]:
        choices = dict.fromkeys(name.rpartition(".")[2] for name, part in modules.items() if part._parameters)
        raise ConfigError(
            f"model.lora.{option}: {type(model).__name__} has no module {', '.join(unknown)}; "
            f"there are {', '.join(choices)}"
        )


def _fits(name: str, module: str) -> bool:
    """Return True as PEFT does: q_proj and self_attn.q_proj fit model.layers.0.self_attn.q_proj, proj does not."""
    return f".{module}".endswith(f".{name}")


def _check_named(model: nn.Module, modules: Collection[str], names: Sequence[str]) -> None:
    """Compare the modules that fit the names with those that have adapters, and say which of them have none.

    In many families with experts PEFT takes a name that ends as one of the experts' tensors for these alone. Raises
    ConfigError for a name of which nothing has adapters.
    """
    adapted = {name.removesuffix(".weight") for name in _adapted(model)}  # mlp.experts.gate_up_proj, self_attn.q_proj
    fused = {name: re.sub(r"\b(gate|up)_proj$", "gate_up_proj", name) for name in names}
    lost = [name for name in names if not any(_fits(name, m) or _fits(fused[name], m) for m in adapted)]
    if lost:
        raise ConfigError(
            f"model.lora.target_modules: {', '.join(lost)} would get no adapters: PEFT takes such names of "
            f"{type(model).__name__} for its routed experts and routers, in all layers. Leave them out"
        )
    if left := [module for module in modules if module not in adapted and any(_fits(name, module) for name in names)]:
        say_once(f"model.lora.target_modules: PEFT gives no adapters to {some(left, 'modules')} that these names fit")


def _adapted(model: nn.Module) -> dict[str, Tensor]:
    """Return the frozen tensors that have adapters, by their names without PEFT's layers."""
    found = {}
    for name, part in model.named_modules():
        if hasattr(part, "lora_A"):
            # of two tensors one's layer is around the other's: mlp.experts (down_proj), mlp.experts.base_layer
            tensor = getattr(part, "parameter_name", "weight")
            found[f"{name.replace('.base_layer', '')}.{tensor}"] = getattr(part.get_base_layer(), tensor)
    return found


def adapted_kinds(model: PreTrainedModel) -> str:
    """Return a line: which part of the decoder's matrices of each kind has adapters, by their numbers."""
    adapted, looked_up = {*map(id, _adapted(model).values())}, model.get_input_embeddings().weight
    sizes = {kind: [0, 0] for kind in _KINDS}  # without and with adapters
    for name, x in model.get_decoder().named_parameters():
        if x.dim() > 1 and not x.requires_grad and x is not looked_up:
            kind = next(kind for kind, words in _KINDS.items() if re.search(words, f".{name}"))
            sizes[kind][id(x) in adapted] += x.numel()
    shares = [
        f"{kind} {having / (without + having):.1%}" for kind, (without, having) in sizes.items() if without + having
    ]
    return f"model.lora: adapters on, of the decoder's weights by kind: {', '.join(shares)}"


def _refuse_reading_as_tied(model: PreTrainedModel) -> None:
    """Raise ConfigError if one of two tied weights is trained in full, which this transformers would read as tied."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    in_full = any(hasattr(end, "modules_to_save") for end in ends)  # PEFT's wrapper around the module and its copy
    if in_full and model.config.get_text_config().tie_word_embeddings and Version(transformers.__version__) < UNTIES:
        raise ConfigError(
            "model.lora.modules_to_save names one of two tied weights, and transformers "
            f"{transformers.__version__} reads such adapters as other weights; leave it out, or install transformers "
            f"{UNTIES} or newer"
        )


def add_layers(model: PreTrainedModel, config: Any, seed: int) -> None:
    """Have PEFT add its layers, without three of its warnings.

    Two warn of intended effects: Conv1D is transposed, and adapters untie a tied head (docs/lora.md). The third one is
    wrong: the rank that PEFT itself gives to fused tensors of experts is not ignored.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        for message in (
            "fan_in_fan_out is set to",
            "Model has `tie_word_embeddings=True`",
            r"The following (rank|alpha)_pattern keys .*gate_up_proj'\]",
        ):
            warnings.filterwarnings("ignore", message=message)
        torch.manual_seed(seed)
        model.add_adapter(config, ADAPTER)


# -------------------------------------------------------------------------------------------- quantised base


def quantization_config(lora: LoraOptions, *, compute: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the transformers config that loads the base model as NF4 (QLoRA, arXiv 2305.14314); None without quantize.

    compute  dtype of the matmuls with dequantised weights
    """
    if lora.quantize is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # the scales of the blocks are quantised as well
        bnb_4bit_compute_dtype=compute,
    )


# ------------------------------------------------------------------------------------------------------ saving


def write_adapters(
    model: PreTrainedModel, weights: Mapping[str, Tensor], directory: Path, *, base: str, dtype: torch.dtype
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, PEFT's format, into an existing directory.

    weights  the full (gathered) weights, by their names in `model`; those that are not trained may be left out
    base     hub id or directory of the base model; a directory is written as its absolute path, a hub id with the
             commit that was loaded
    Raises ConfigError if the file would lack a trained weight.
    """
    state = {name: x.detach().to(dtype).contiguous() for name, x in all_in_peft_format(model, weights).items()}
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(adapter_config(model))
    config.inference_mode = True  # as PEFT saves it: whoever loads the adapters does not train them
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the order of a set differs from process to process
    found = find_model(base)
    config.base_model_name_or_path = os.path.abspath(found.name) if found.local else found.name
    config.revision = None if found.local else found.directory.name  # else PEFT takes the newest commit
    config.save_pretrained(str(directory))


def all_in_peft_format(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `in_peft_format` does; ConfigError if a weight that is trained is not among them."""
    state = in_peft_format(model, weights)
    trained, held = model.num_parameters(only_trainable=True), sum(x.numel() for x in state.values())
    if held != trained:
        # PEFT before 0.21 leaves these biases out.
        lost = adapter_config(model).bias == "lora_only"
        remedy = ". Set model.lora.bias to none or all, or install peft 0.21 or newer" if lost else ""
        raise ConfigError(f"model.lora: of {trained} numbers that are trained PEFT's format would hold {held}{remedy}")
    return state


def in_peft_format(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trained weights, by their names in PEFT's format."""
    from peft import get_peft_model_state_dict

    trained = {name: weights[name] for name, p in model.named_parameters() if p.requires_grad and name in weights}
    # With its default "auto" PEFT adds frozen embeddings that have adapters, and may ask the hub for the base model.
    state = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    renamed = {}
    for name, x in state.items():
        # DoRA's magnitudes get their full name, which PEFT also reads: with the short one transformers 5.23 loses them.
        end = ".weight" if name.endswith("lora_magnitude_vector") else ""
        renamed[f"base_model.model.{name}{end}"] = x  # base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    return renamed
