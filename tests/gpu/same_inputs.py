"""Every op on fixed inputs, so that results on two chips, one of them perhaps executed here, can be compared.

python -m gpu.same_inputs FILE      # on what the compiler emits for $GPU_WITHOUT_GPU_ARCH, executed on the CPU
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from octavo.benchmarks.kernels import Load, Shape, Types, works
from octavo.kernels import backend

SHAPE = Shape(hidden=192, num_heads=6, num_kv_heads=2, head_size=64, intermediate=160, vocab=333)
LOADS = (Load(1, 1, 40), Load(3, 11, 70), Load(1, 130, 130))
TYPES = (
    Types(torch.bfloat16, torch.bfloat16, 16),
    Types(torch.float16, torch.int8, 32),
    Types(torch.float32, torch.float32, 64),
)
# These have neither products by tensor cores nor approximate functions: every bit is the same on every chip.
EXACT = {
    "checksum, of a weight",
    "dequantize_4bit, down",
    "embedding",
    "rotary_kv_write",
    "rms_norm with residual",
    "all_reduce, sum of 2",
    "sample",
}


def is_exact(name: str) -> bool:
    """Whether a result must have the same bits everywhere; products of float32 are chains of fused multiply-adds."""
    op, _, types = name.partition(": ")
    return op in EXACT or (op.startswith("matmul") and "float32" in types)


def results() -> dict[str, list[Tensor]]:
    """What each op writes, by "op: types, load"; all on the CPU."""
    found = {}
    for types in TYPES:
        for load in LOADS:
            for work in works(SHAPE, load, types):
                torch.manual_seed(0)
                written = work.prepare()()
                tensors = written if isinstance(written, tuple) else (written,)
                name = f"{work.op}: {types}, {load.num_sequences} x {load.query_len}"
                found[name] = [torch.as_tensor(x).cpu() for x in tensors if x is not None]
    return found


if __name__ == "__main__":
    backend.select("triton", "cpu")
    torch.save(results(), Path(sys.argv[1]))
