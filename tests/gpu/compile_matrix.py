"""What the compilers make of every kernel, for chips that need not be there: the snapshot compile_matrix.txt.

    make compile-matrix     # renews the snapshot, and with it docs/kernels.md

Each line is one variant of an op on one target. Its difference is read like code: registers that grow, spills, tensor
core instructions that vanish, loads that become narrow.
"""

import importlib
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_without_gpu import compile_only
from triton.compiler.errors import CompilationError

from octavo.kernels import gpu
from octavo.kernels.gpu.variant import Variant

SNAPSHOT = Path(__file__).parent / "compile_matrix.txt"
RENEW = "make compile-matrix"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MANY = 24  # an op with more variants than this is thinned out
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SM_SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KiB of a multiprocessor
HEADER = f"""\
# Made by `{RENEW}`. Columns: op, variant, target; registers and bytes spilled of a thread; warps and bytes of shared
# memory of a block; occupancy; tensor core instructions; loads from global memory, as bytes x number.
"""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A line of the snapshot."""

    op: str
    variant: str
    target: str
    refused: str = ""  # why the target's compiler does not take it; then nothing else is known
    registers: int = 0
    spilled: int = 0
    warps: int = 0
    shared: int = 0
    occupancy: float = 0.0
    tensor_core: str = ""
    loads: str = ""  # "16 x 8, 4 x 1": eight loads of 16 bytes a thread, one of 4
    has_narrow_dot: bool = False  # a product of 8 or 16 bit operands; not in the snapshot
    k_width: int = 0  # most neighbours of k that a thread holds of a product's operands; not in the snapshot

    def __str__(self) -> str:
        begin = f"{self.op:<16} {self.variant:<80} {self.target:<6}"
        if self.refused:
            return f"{begin} refused: {self.refused}"
        sizes = f"{self.registers:>3} {self.spilled:>4} {self.warps:>3} {self.shared:>7} {self.occupancy:>5.0%}"
        return f"{begin} {sizes}   {self.tensor_core or '-':<26} {self.loads}"


def ops() -> dict[str, Any]:
    """The modules of all ops, by name."""
    names = [module.name for module in pkgutil.iter_modules(gpu.__path__)]
    modules = {name: importlib.import_module(f"{gpu.__name__}.{name}") for name in names}
    return {name: module for name, module in sorted(modules.items()) if hasattr(module, "launch")}


def thinned(variants: Iterable[Variant]) -> list[Variant]:
    """As few of them as have every pair of dtypes and constants that any has, chosen greedily."""
    left = list(variants)
    if len(left) <= MANY:
        return left

    def pairs(variant: Variant) -> set[tuple[object, ...]]:
        first, *others = (arg for arg in variant.args if arg is None or isinstance(arg, torch.dtype))
        dtypes = [str(first), *("as the first" if arg == first else str(arg) for arg in others)]
        traits = [*enumerate(dtypes), *sorted(variant.options.items())]
        return {(variant.kernel.__name__, *pair) for pair in itertools.combinations(traits, 2)}

    wanted: set[tuple[object, ...]] = set().union(*map(pairs, left))
    chosen: list[Variant] = []
    while wanted:
        best = max(left, key=lambda variant: len(pairs(variant) & wanted))
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


def _count(matches: Iterable[str]) -> str:
    return ", ".join(f"{name} x {number}" for name, number in sorted(Counter(matches).items()))


def _loads(widths: Iterable[int]) -> str:
    return ", ".join(f"{width} x {number}" for width, number in sorted(Counter(widths).items(), reverse=True))


def _nvidia(kernel: Any, target: str) -> dict[str, Any]:
    """From the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-ndf"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found
    registers, spilled = map(int, found.groups())
    # A vector of 4 words in one load; without a width it is one word, or what its type says.
    widths = [_width(modifiers) for modifiers in re.findall(r"\bLDG(?:STS)?\.(\S+)", code)]
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256 * warps)
    by_shared = SM_SHARED[target] * 1024 // (math.ceil(shared / 128) * 128 + 1024)
    blocks = min(by_registers, by_shared, 64 // warps, 32)
    return {
        "registers": registers,
        "spilled": spilled,
        "occupancy": blocks * warps / 64,
        "tensor_core": _count(re.findall(r"\b((?:[HIQ]|HG|QG|IG|UTC\w)MMA(?:\.[\dx]+)?)\b", code)),
        "loads": _loads(widths),
    }


def _width(modifiers: str) -> int:
    for name in modifiers.split("."):
        if name in ("256", "128", "64"):
            return int(name) // 8
        if name in ("U16", "S16", "U8", "S8"):
            return int(name[1:]) // 8
    return 4


def _amd(kernel: Any) -> dict[str, Any]:
    """From the assembly's text."""
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(name + r":\s+(\d+)", text)
        assert found, name
        return int(found[1])

    widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
    loads = re.findall(r"\b(?:global|buffer|flat)_load_([a-z]+)(?:_d16\w*)?(?:x(\d))?\b", text)
    waves_of_memory = 65536 // max(kernel.metadata.shared, 1) * kernel.metadata.num_warps / 4  # 4 SIMDs share it
    return {
        "registers": number(r"\.vgpr_count"),
        "spilled": 4 * number(r"\.vgpr_spill_count"),
        "occupancy": min(number("; Occupancy"), waves_of_memory) / 8,  # 0: more memory than there is
        "tensor_core": _count(re.findall(r"\bv_(mfma_f32_\d+x\d+x\d+)", text)),
        "loads": _loads(widths[name] * int(times or 1) for name, times in loads),
    }


def compile_variant(op: str, name: str, target: str) -> Compiled:
    """One cell of the matrix. What is found out about machine code is kept with it in Triton's cache."""
    variant = next(variant for variant in ops()[op].variants() if variant.name == name)
    # A bound on registers is something that NVIDIA's assembler alone is told.
    options = {key: value for key, value in variant.options.items() if key != "maxnreg" or target.startswith("sm_")}
    try:
        kernel = compile_only(variant.kernel, *variant.args, target=target, **options)
    except CompilationError as error:
        words = re.search(r"\w+ not supported in this architecture", str(error))
        return Compiled(op, name, target, refused=words[0] if words else str(error))
    key = sha256(kernel.hash.encode() + Path(__file__).read_bytes()).hexdigest()
    cache = triton.runtime.cache.get_cache_manager(key)
    if path := cache.get_file("found.json"):
        found = json.loads(Path(path).read_text())
    else:
        found = _nvidia(kernel, target) if target.startswith("sm_") else _amd(kernel)
        found |= {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
        dots = re.findall(r"tt\.dot .*: tensor<(?:\d+x)+(\w+)> \*", kernel.asm["ttir"])
        found["has_narrow_dot"] = any(dtype != "f32" for dtype in dots)
        found["k_width"] = max(map(int, re.findall(r"kWidth = (\d+)", kernel.asm["ttgir"])), default=0)
        cache.put(json.dumps(found), "found.json", binary=False)
    return Compiled(op, name, target, **found)


def matrix() -> list[Compiled]:
    """All of it, compiled by as many processes as there are cores."""
    cells = [
        (op, variant.name, target)
        for op, module in ops().items()
        for variant in thinned(module.variants())
        for target in TARGETS
    ]
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        lines = list(pool.map(compile_variant, *zip(*cells, strict=True), chunksize=4))
    return sorted(lines, key=lambda line: (line.op, line.variant, TARGETS.index(line.target)))


def text(lines: Iterable[Compiled]) -> str:
    """The snapshot."""
    return HEADER + "".join(f"{line}\n" for line in lines)


def main() -> None:
    """Renews the snapshot, and the page that is made of it."""
    from gpu.kernels_page import PAGE, page

    lines = matrix()
    SNAPSHOT.write_text(text(lines))
    PAGE.write_text(page(lines))


if __name__ == "__main__":
    main()
