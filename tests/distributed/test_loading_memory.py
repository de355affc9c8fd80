"""What loading and an export take on ranks that share the weights: shards and a few tensors, beside pages of the files;
and what goes back before it."""

import contextlib
import ctypes
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from sftmix.config import RunConfig
from sftmix.options import LoraOptions, ModelOptions
from sftmix.pipeline.loaded import export_weights, load_for_run
from sftmix.ranks.world import World
from tests.distributed.test_loading import LLAMA, sharded
from tests.forked import on_ranks
from tests.text.small_tokenizers import chatml_tokenizer, make_encoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by /proc"),
]
MB = 10**6
M_MMAP_THRESHOLD = -3  # malloc.h
LARGE: dict[str, Any] = LLAMA | {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 2300}
LARGE |= {"num_hidden_layers": 20}


def anonymous() -> int:
    """Bytes that this process holds and that are in no file."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def peak_of_anonymous() -> Iterator[list[int]]:
    """The list that is given has the most that was held within, over what was held before."""
    most, over, before = [0], threading.Event(), anonymous()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()
        most[0] = max(most[0], anonymous() - before)


def loaded(world: World, root: str) -> None:
    """With the values mapped on every rank, also in another dtype than theirs, and beside adapters."""
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(M_MMAP_THRESHOLD, 2**18), "or what is freed stays with the process"
    cases = [("", LoraOptions()), ("", LoraOptions(r=2)), ("_half", LoraOptions(r=2))]
    for stored, lora in cases:
        sharded(world, Path(root) / f"small{stored}", lora, "fsdp")  # imports, and what the first collectives take
        with peak_of_anonymous() as peak:
            module = sharded(world, Path(root) / f"large{stored}", lora, "fsdp")
        whole = sum(p.numel() * p.element_size() for p in module.model.parameters())
        own = sum(p.to_local().nbytes for p in module.model.parameters())
        assert own < 0.51 * whole
        assert own < peak[0] < own + 60 * MB < 0.9 * whole, f"{peak[0] / MB:.0f} MB of {whole / MB:.0f}"


def test_a_rank_never_holds_the_model(tmp_path):
    """158 MB in float32, of which a layer has 8; a few of those are gathered while the head is checked."""
    for name, options in (("small", LLAMA), ("large", LARGE)):
        model = LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=True))
        model.save_pretrained(tmp_path / name)
        model.bfloat16().save_pretrained(tmp_path / f"{name}_half")
    on_ranks(loaded, str(tmp_path))


def exported(world: World, root: str) -> None:
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(M_MMAP_THRESHOLD, 2**18)
    for kind in ("", "_experts"):
        for size in ("small", "large"):  # first imports, and what the first collectives take
            path = Path(root) / f"{size}{kind}"
            module = sharded(world, path, LoraOptions(), "fsdp")
            config, to = RunConfig(model=ModelOptions(path=str(path))), Path(root) / "out"
            with peak_of_anonymous() as peak:
                export_weights(config, make_encoder(chatml_tokenizer()), module, to, torch.bfloat16, world)
        half = sum(2 * p.numel() for p in module.model.parameters())
        assert half < sum(file.stat().st_size for file in to.glob("*.safetensors")) < half + 10**6
        assert peak[0] < 35 * MB < 0.5 * half, f"{peak[0] / MB:.0f} MB of {half / MB:.0f}"


def test_no_rank_holds_the_model_that_is_exported(tmp_path):
    """79 and 140 MB in the files, of which a layer has 4 and 7; its merged experts are cut apart for them."""
    for name, options in (("small", LLAMA), ("large", LARGE)):
        LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=False)).save_pretrained(tmp_path / name)
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": options["hidden_size"] * 4}
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**options | sizes)).save_pretrained(tmp_path / f"{name}_experts")
    on_ranks(exported, str(tmp_path))


def loads_after_a_stage(world: World, path: str) -> None:
    """Behind each block of 100,000 bytes that is freed is one that stays."""
    blocks = [b"." * size for _ in range(2000) for size in (100_000, 1000)]
    kept = blocks[1::2]
    del blocks
    before = anonymous()
    load_for_run(RunConfig(model=ModelOptions(path=path)), world)
    assert before - anonymous() > 150 * MB
    assert len(kept) == 2000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_a_stage_has_freed_goes_back_to_the_system(tmp_path):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    on_ranks(loads_after_a_stage, str(tmp_path), ranks=1)
