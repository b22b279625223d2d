"""The arithmetic of an all-reduce: the sum of what the ranks sent."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.variant import Variant


@triton.jit
def _tree(parts_ptr, part_stride, places, mask, COUNT: tl.constexpr):
    """COUNT parts added in float32 in a balanced tree."""
    HALF: tl.constexpr = COUNT // 2
    if COUNT == 1:
        return tl.load(parts_ptr + places, mask=mask, other=0.0).to(tl.float32)
    else:
        first = _tree(parts_ptr, part_stride, places, mask, HALF)
        second = _tree(parts_ptr + HALF * part_stride, part_stride, places, mask, COUNT - HALF)
        return first + second


@triton.jit(do_not_specialize=["begin"])
def sum_parts_kernel(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    part_stride,
    size,
    begin,
    width,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] = sum of parts[:, i] + bias[(begin + i) % width] + residual[i], rounded once; BLOCK elements."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    total = _tree(parts_ptr, part_stride, places, mask, NUM_PARTS)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + (begin + places) % width, mask=mask, other=0.0)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=mask)


def _options(num_parts: int) -> dict[str, Any]:
    return {"NUM_PARTS": num_parts, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}


def launch(parts: Tensor, out: Tensor, begin: int, width: int, bias: Tensor | None, residual: Tensor | None) -> None:
    """parts: [parts, size], may be strided; out and residual: [size]. See `octavo.kernels.all_reduce`."""
    num_parts, size = parts.shape
    if not size:
        return
    options = _options(num_parts)
    grid = (triton.cdiv(size, options["BLOCK"]),)
    sum_parts_kernel[grid](parts, bias, residual, out, parts.stride(0), size, begin, width, **options)


def variants() -> Iterator[Variant]:
    """2 to 8 float32 parts with bias and residual to every dtype, and two of the dtype itself alone."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_parts in range(2, 9):
            name = f"{num_parts} parts, {str(dtype).removeprefix('torch.')}"
            args = (torch.float32, torch.float32, dtype, dtype, 4096, 4096, 1, 4096)
            yield Variant(name, sum_parts_kernel, args, _options(num_parts))
        name = f"2 parts, {str(dtype).removeprefix('torch.')}, nothing added"
        yield Variant(name, sum_parts_kernel, (dtype, None, None, dtype, 4096, 4096, 1, 4096), _options(2))
