"""The adapter_config.json of adapters, whose author may be anyone: it is checked before PEFT sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.common.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig

FILE = "adapter_config.json"

_ABOUT = "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type"
_PLACES = """exclude_modules layer_replication layers_pattern layers_to_transform modules_to_save target_modules
target_parameters trainable_token_indices"""
_NUMBERS = """alpha_pattern bias ensure_weight_tying eva_config fan_in_fan_out init_lora_weights loftq_config lora_alpha
lora_bias lora_dropout r rank_pattern use_dora use_rslora"""
TAKEN = frozenset(f"{_ABOUT} {_PLACES} {_NUMBERS}".split())
"""The keys that may have any value. Every other one must have PEFT's default: `megatron_config` imports a module that
the file names, and others compute what a plain load of the adapters does not."""


def stored_config(directory: Path) -> LoraConfig:
    """Return the configuration of the LoRA adapters in a directory.

    Raises ConfigError if the file cannot be read, is of other adapters than LoRA, or has a key that is not taken.
    """
    from peft import LoraConfig

    file = directory / FILE
    stored = _read(file)
    if stored.get("peft_type") != "LORA":
        raise ConfigError(f"{file}: peft_type is {_short(stored.get('peft_type'))}; only LORA is loaded")
    default = LoraConfig().to_dict()
    for key in sorted(stored.keys() - TAKEN):
        if stored[key] and stored[key] != default.get(key):
            raise ConfigError(
                f"{file}: {key} is {_short(stored[key])}, and such adapters are not loaded: it may name a module to "
                "import, or change how they are computed. If they work without it, take it out of the file; else "
                "merge them into their base model by PEFT (merge_and_unload), and name the merged one"
            )
    try:
        return LoraConfig(**{key: value for key, value in stored.items() if key in default})
    except Exception as error:  # values of strangers make PEFT raise anything
        raise ConfigError(f"{file}: PEFT refuses it: {type(error).__name__}: {error}") from error


def base_of_adapters(directory: Path) -> str:
    """Return the hub id or directory of the base model; raise ConfigError as `stored_config`, and if there is none."""
    base = stored_config(directory).base_model_name_or_path
    if not base or not isinstance(base, str):
        raise ConfigError(f"{directory / FILE} names no base model (base_model_name_or_path is {_short(base)})")
    return base


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{file} holds no JSON object, as PEFT writes it, but {_short(stored)}")
    return stored


def _short(value: object) -> str:
    return f"{value!r:.80}"
