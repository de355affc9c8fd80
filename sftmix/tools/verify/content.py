"""What a run wrote, as values by name that can be compared: tables, figures, models and the files beside them."""

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file

from sftmix.disk.files import read_json
from sftmix.disk.hashes import sha256_file, sha256_json
from sftmix.disk.regular import regular
from sftmix.disk.tables import read_table
from sftmix.model.paths import ADAPTERS


def content_of(place: Path) -> Any:
    """Return the values of a JSON file, a table or a directory of weights, by name."""
    if place.suffix == ".json":
        return figures_by_name(read_json(place))
    if place.suffix == ".parquet":
        return pd.DataFrame(read_table(place, ["id"]).to_pydict())
    return ChainMap(*map(load_file, map(regular, place.glob("*.safetensors"))))  # a file or shards: name -> tensor


OF_BASE = {ADAPTERS: {"base_model_name_or_path"}, "tokenizer_config.json": {"is_local", "local_files_only"}}
"""File of a model -> its keys that say where the base model was, and how it was read: `inputs` compare its files."""


def files_beside(model: Path) -> dict[str, str]:
    """Return file -> hash, of the files of an exported model but its weights and its card."""
    hashes = {}
    for file in filter(Path.is_file, model.rglob("*")):
        if file.suffix != ".safetensors" and file.name != "README.md":
            left_out = OF_BASE.get(file.name)
            hashes[str(file.relative_to(model))] = (
                sha256_json({key: value for key, value in read_json(file).items() if key not in left_out})
                if left_out
                else sha256_file(regular(file))
            )
    return hashes


def figures_by_name(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures within figures by one name each, such as confounds.auc_length_confident."""
    return pd.json_normalize(dict(figures)).iloc[0].to_dict() if figures else {}
