"""Weights of 4-bit codes as numbers: all of one, and the tiles that matmul_4bit multiplies.

A table is looked up in shared memory, where its 16 entries lie in banks of their own: that is one load for a code, what
a tree of selections takes fifteen instructions for. Each thread takes whole words of eight codes.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.variant import Variant
from octavo.kernels.matmul_4bit import CodeFormat, Packed4Bit


@triton.jit
def load_scales(
    scales_ptr, offsets_ptr, rows, begin, k, GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Scales, and offsets or zero points, of columns [begin, begin + BLOCK_K): [rows, BLOCK_K / UNIT].

    Without offsets the scales stand in for them.
    """
    groups = ((begin // UNIT + tl.arange(0, BLOCK_K // UNIT)) // (GROUP_SIZE // UNIT))[None, :]
    places = rows[:, None] * (k // GROUP_SIZE) + groups
    mask = groups < k // GROUP_SIZE
    scales = tl.load(scales_ptr + places, mask=mask, other=0.0)
    if offsets_ptr is None:
        return scales, scales
    else:
        return scales, tl.load(offsets_ptr + places, mask=mask, other=0.0)


@triton.jit
def load_weight(
    codes_ptr,
    table,
    scales,
    offsets,
    rows,
    begin,
    code_stride,
    SHIFT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns [begin, begin + BLOCK_K) of the weight, in float32: [BLOCK_N, BLOCK_K]; without meaning past k.

    codes_ptr: int32, eight codes each; code_stride: bytes of a row of codes; scales and offsets: of `load_scales`.
    """
    words = (begin // 8 + tl.arange(0, BLOCK_K // 8))[None, :]
    num_words = code_stride // 4
    codes = tl.load(codes_ptr + rows[:, None] * num_words + words, mask=words < num_words, other=0)
    codes = tl.join(codes, codes >> 16)
    codes = tl.join(codes, codes >> 8)
    codes = tl.join(codes, codes >> 4)
    weight = tl.gather(table, tl.reshape(codes & 15, [BLOCK_N * BLOCK_K]), 0)
    weight = tl.reshape(weight, [BLOCK_N, BLOCK_K // UNIT, UNIT])
    scales = scales.to(tl.float32)[:, :, None]
    if SHIFT is None:
        weight *= scales
    else:
        offsets = offsets.to(tl.float32)[:, :, None]
        if SHIFT == "zero":
            offsets = -(offsets * scales)
        weight = tl.fma(weight, tl.broadcast_to(scales, weight.shape), tl.broadcast_to(offsets, weight.shape))
    return tl.reshape(weight, [BLOCK_N, BLOCK_K])


@triton.jit
def dequantize_4bit_kernel(
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    table_ptr,
    out_ptr,
    n,
    k,
    code_stride,
    SHIFT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows [BLOCK_N] and columns [BLOCK_K] of out [n, k]."""
    num_tiles_k = tl.cdiv(k, BLOCK_K)
    first_row = (tl.program_id(0) // num_tiles_k).to(tl.int64) * BLOCK_N
    begin = tl.program_id(0) % num_tiles_k * BLOCK_K
    codes_ptr += first_row * (code_stride // 4)
    scales_ptr += first_row * (k // GROUP_SIZE)
    if offsets_ptr is not None:
        offsets_ptr += first_row * (k // GROUP_SIZE)
    rows, cols = tl.arange(0, BLOCK_N), begin + tl.arange(0, BLOCK_K)
    present = tl.minimum(rows, n - first_row - 1).to(tl.int32)
    scales, offsets = load_scales(scales_ptr, offsets_ptr, present, begin, k, GROUP_SIZE, UNIT, BLOCK_K)
    table = tl.load(table_ptr + tl.arange(0, 16))
    weight = load_weight(codes_ptr, table, scales, offsets, present, begin, code_stride, SHIFT, UNIT, BLOCK_N, BLOCK_K)
    mask = (rows[:, None] < n - first_row) & (cols[None, :] < k)
    places = rows[:, None] * k + cols[None, :]
    tl.store(out_ptr + first_row * k + places, weight.to(out_ptr.dtype.element_ty), mask=mask)


BLOCK_N, BLOCK_K = 16, 256


def format_options(form: CodeFormat, block_k: int) -> dict[str, Any]:
    """A format's constants. UNIT: the most columns that share a scale wherever a group or a tile begins."""
    return {"SHIFT": form.shift, "GROUP_SIZE": form.group_size, "UNIT": math.gcd(form.group_size, block_k)}


def _options(form: CodeFormat) -> dict[str, Any]:
    return format_options(form, BLOCK_K) | {
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def launch(weight: Packed4Bit, out: Tensor) -> None:
    """out: [n, k]; see `octavo.kernels.matmul_4bit.dequantize_4bit`."""
    n, k = out.shape
    grid = (triton.cdiv(n, BLOCK_N) * triton.cdiv(k, BLOCK_K),)
    dequantize_4bit_kernel[grid](
        weight.codes.view(torch.int32),
        weight.scales,
        weight.offsets,
        weight.table,
        out,
        n,
        k,
        k // 2,
        **_options(weight.format),
    )


def forms() -> Iterator[CodeFormat]:
    """One of each kind: codebooks and symmetric integers; offsets; zero points; groups as large as they may come."""
    table = tuple(float(code) for code in range(16))
    yield CodeFormat(table, 64)
    yield CodeFormat(table, 32, torch.float16, "offset")
    yield CodeFormat(table, 128, torch.bfloat16, "zero")
    yield CodeFormat(table, 4096, torch.float16)


def form_name(form: CodeFormat) -> str:
    """A format in a variant's name."""
    return f"{str(form.scale_dtype).removeprefix('torch.')} {form.shift or 'scale'} of {form.group_size}"


def form_dtypes(form: CodeFormat) -> tuple[torch.dtype | None, ...]:
    """Of codes, scales, offsets and table, as a variant's arguments."""
    return torch.int32, form.scale_dtype, form.scale_dtype if form.shift else None, torch.float32


def variants() -> Iterator[Variant]:
    """Every kind of format, to every dtype."""
    for form in forms():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = f"{form_name(form)}, {str(dtype).removeprefix('torch.')}"
            args = (*form_dtypes(form), dtype, 4096, 4096, 2048)
            yield Variant(name, dequantize_4bit_kernel, args, _options(form))
