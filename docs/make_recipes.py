"""Writes the table of what each recipe takes into docs/performance.md, by what `sftmix estimate` computes.

    python docs/make_recipes.py        some minutes on a CPU

No model and no rows are needed: a model is a Llama of its shape, rows are words of the numbers and lengths in `ROWS`,
and a word is a token. Hours grow with the rows, so a sample of them is read.
"""

import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftmix.cli.parsing import parse, read_arguments
from sftmix.components import All
from sftmix.config import RunConfig
from sftmix.config.read import config_file, read_layers, recipes
from sftmix.options import DataOptions
from sftmix.tools.compare.command import CompareOptions
from sftmix.tools.estimate.run import Machine, estimate

TARGET = Path(__file__).with_name("performance.md")
BEGIN, END = "<!-- recipes, written by docs/make_recipes.py -->\n", "<!-- /recipes -->\n"
SAMPLE = 4_000
GPU = "H100"
SHAPES = {
    "meta-llama/Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "meta-llama/Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "mistralai/Mistral-7B-v0.1": (4096, 14336, 32, 32, 8, 32000, False),
    "Qwen/Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (576, 1536, 30, 9, 3, 49152, True),
}
"""Model -> width, inner width, layers, heads, key heads, vocabulary, tied head."""


class Rows(NamedTuple):
    """So many examples; mean tokens of their prompts and answers."""

    number: int
    prompt: int
    answer: int


ALPACA = Rows(52_002, 20, 50)
ROWS = {
    "smollm2-135m": Rows(320, 20, 50),
    "ideas-smollm2": Rows(320, 20, 50),
    "cleaned": Rows(1_600, 20, 50),
    "table1-ultrachat": Rows(620_000, 500, 300),
    "table1-tulu3": Rows(939_000, 250, 350),
    "table2-medical": Rows(77_000, 60, 90),
    "table7-selection": Rows(1_000, 30, 500),
    "table7-alpagasus": Rows(9_000, 20, 60),
    "pretrain": Rows(2_100_000, 0, 220),
}
"""Beginning of a recipe's name -> its rows; all others have Alpaca's."""


def materials(place: Path, model: str, rows: Rows) -> tuple[str, str]:
    """Write config and tokenizer of a model, and a sample of the rows; their paths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    width, inner, layers, heads, key_heads, vocabulary, tied = SHAPES[model]
    directory = place / model.replace("/", "-")
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(1000))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "max_position_embeddings": 32768}
    made = LlamaConfig(**sizes, tie_word_embeddings=tied, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    made.save_pretrained(directory)
    rng = np.random.default_rng(0)
    file = place / f"{rows.number}.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(min(rows.number, SAMPLE)):
            lengths = np.maximum(1, rng.gamma(1.5, np.array([rows.prompt, rows.answer]) / 1.5)).astype(int)
            prompt, answer = (" ".join(f"w{k}" for k in rng.integers(1000, size=size)) for size in lengths)
            named = {"prompt": prompt, "completion": answer} if rows.prompt else {"text": answer}
            out.write(json.dumps({"id": str(number), **named}) + "\n")
    return str(directory), str(file)


def config_of(recipe: str) -> tuple[RunConfig, int]:
    """The run of a recipe, of a table the one that its variants change, and how often the target is trained."""
    arguments = ["--config", f"recipe:{recipe}", "--out", "o"]
    if not any("variants" in values for _, values in read_layers(config_file(f"recipe:{recipe}"))):
        config, *_ = parse(read_arguments(arguments))
        return config, 1 + config.with_baseline
    config, _, values = parse(read_arguments(arguments, CompareOptions), CompareOptions)
    return config, len(values.variants) * len(values.seeds)


def lasting(hours: float) -> str:
    """Hours as people read them: `3 min`, `0.7 h`, `1,200 h`."""
    if hours < 0.5:
        return f"{60 * hours:.0f} min" if hours > 1 / 60 else "< 1 min"
    return f"{hours:.1f} h" if hours < 10 else f"{hours:,.0f} h"


def card(recipe: str, place: Path, known: dict[str, Any]) -> tuple[str, str]:
    """A recipe with its trainings and hours, and the cells of its line; what was estimated for others is in `known`."""
    config, trainings = config_of(recipe)
    name, data = config.model.path, config.data
    rows = next((found for beginning, found in ROWS.items() if recipe.startswith(beginning)), ALPACA)
    model, file = materials(place, name, rows)
    own = DataOptions(train=[file], format=data.format, max_length=data.max_length, cache_dir=str(place / "cache"))
    config = replace(config, model=replace(config.model, path=model), data=own, selector=All(), with_baseline=False)
    devices = 1 if "SmolLM2" in name else 8
    key = json.dumps(config.as_dict(), default=str)
    needs = known.get(key) or estimate(config, Machine(GPU, devices, mfu=0.4, tflops=None))
    stages = known.setdefault(key, needs)["stages"]
    assert all(found["fits"] for found in stages.values()), recipe
    scale = 1 if config.training.max_steps else max(1, rows.number / SAMPLE)
    hours = {stage: found["device_hours"] * scale / devices for stage, found in stages.items()}
    peak = max(found["memory_bytes"]["peak"] for found in stages.values()) / 2**30
    reference, target = hours.get("reference", 0.0), hours["train"]
    cells = [f"{name.split('/')[1]}, {devices} × {GPU}", f"{rows.number:,} of {rows.prompt + rows.answer}"]
    cells += [f"{peak:.3g}", lasting(reference) if reference else "none", lasting(target)]
    return f"`{recipe}` ({trainings}: {lasting(reference + trainings * target)})", " | ".join(cells)


def table() -> str:
    """The table, in the order of the recipes' names; those that take the same share a line."""
    known: dict[str, Any] = {}
    lines: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        for name in recipes():
            if name not in ("quickstart", "small") and "/" not in name:  # they are laid over others
                recipe, cells = card(name, Path(place), known)
                lines.setdefault(cells, []).append(recipe)
    rows = (f"| {', '.join(names)} | {cells} |" for cells, names in lines.items())
    head = "| recipes (trainings: all) | model, GPUs | rows of tokens | GiB each | reference | training |"
    return "\n".join([head, "|---|---|---:|---:|---:|---:|", *rows, ""])


if __name__ == "__main__":
    before, rest = TARGET.read_text(encoding="utf-8").split(BEGIN)
    TARGET.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1], encoding="utf-8")
    print(f"wrote {TARGET.name}")
