"""The arithmetic of an all-reduce: the sum of what the ranks sent."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.variant import Variant


@triton.jit
def sum_ranks_kernel(parts_ptr, out_ptr, size, NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ... in float32 in this order, rounded once; BLOCK elements."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    total = tl.load(parts_ptr + places, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, NUM_RANKS):
        parts_ptr += size
        total += tl.load(parts_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=mask)


def _options(num_ranks: int) -> dict[str, Any]:
    return {"NUM_RANKS": num_ranks, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}


def launch(parts: Tensor, out: Tensor) -> None:
    """parts: [ranks, size]; out: [size]. See `octavo.kernels.all_reduce`."""
    num_ranks, size = parts.shape
    options = _options(num_ranks)
    sum_ranks_kernel[(triton.cdiv(size, options["BLOCK"]),)](parts, out, size, **options)


def variants() -> Iterator[Variant]:
    """2 to 8 ranks in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_ranks in range(2, 9):
            name = f"{num_ranks} ranks, {str(dtype).removeprefix('torch.')}"
            yield Variant(name, sum_ranks_kernel, (dtype, dtype, 4096), _options(num_ranks))
