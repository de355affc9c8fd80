"""Instructions and registers of the loss's Triton kernels, compiled for GPUs that need not be there.

    python benchmarks/compiled_kernels.py
    python benchmarks/compiled_kernels.py --target "hip gfx942 64"          backend, architecture, threads of a warp

Logits are bf16, pointers and the vocabulary divisible by 16. Prints one JSON object a kernel:

loads, stores  of whole blocks of logits, in the source; a block is 4,096 logits of a row
registers      of a thread (NVIDIA)
loops          instructions and barriers of each loop, for a thread's share of a block of each row (NVIDIA)
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sftmix.functional import kernels  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = ["cuda 80 32", "cuda 90 32"]
NUMBERS = {"x": "*bf16", "label": "*i64", "weight": "*fp32", "nll": "*fp32", "V": "i32", "softcap": "constexpr"}
ROWS = {**NUMBERS, "correct": "*i1", "trains": "constexpr"}
PAIRS = {**NUMBERS, "lam": "*fp32", "pair_weight": "*fp32", "mixup": "*fp32", "M": "i32"}
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (kernels._rows, ROWS, {"softcap": 0.0, "trains": True}),
    (kernels._rows, ROWS, {"softcap": 0.0, "trains": False}),
    (kernels._rows, ROWS, {"softcap": 30.0, "trains": True}),
    (kernels._pairs, PAIRS, {"softcap": 0.0}),
    (kernels._pairs, PAIRS, {"softcap": 30.0}),
    (kernels._scaled, {"x": "*bf16", "factor": "*fp32", "size": "i32"}, {}),
]


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget) -> Any:
    """Return Triton's compiled kernel; the number of pairs alone may be any."""
    even = [name for name, kind in types.items() if kind != "constexpr" and name != "M"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, types, constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": kernels.WARPS})


def counted(code: str) -> dict[str, int]:
    """Count the loads and stores of blocks in Triton's own language."""
    block = rf"[^\n]*tensor<{kernels.BLOCK.value}x!tt\.ptr<bf16>"
    return {name: len(re.findall(rf"tt\.{name[:-1]} {block}", code)) for name in ("loads", "stores")}


def disassembled(binary: bytes) -> dict[str, Any]:
    """Return the registers of NVIDIA's machine code, and instructions and barriers of its loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        words = [["cuobjdump", "-res-usage", file.name], ["nvdisasm", "-c", file.name]]
        usage, code = (
            subprocess.run([TOOLS / tool, *rest], capture_output=True, text=True, check=True).stdout
            for tool, *rest in words
        )
    places, instructions, loops = dict[str, int](), list[str](), []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            places[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*\((\.L\w+)\)", instruction[1])
            if back and places.get(back[1], len(instructions)) < len(instructions) - 8:  # one on itself ends the code
                loop = instructions[places[back[1]] :]
                loops.append({"instructions": len(loop), "barriers": sum("BAR" in word for word in loop)})
    registers = {name.lower(): int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": registers["reg"], "spilled_bytes": registers["stack"] + registers["local"], "loops": loops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", help=f"several times: several of them; {TARGETS}")
    for words in parser.parse_args().target or TARGETS:
        backend, architecture, warp = words.split()
        target = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp))
        for kernel, types, constants in KERNELS:
            code = compiled(kernel, types, constants, target).asm
            figures = {"target": words, "kernel": kernel.__name__, **constants, **counted(code["ttir"])}
            print(json.dumps(figures | (disassembled(code["cubin"]) if "cubin" in code else {})))


if __name__ == "__main__":
    main()
