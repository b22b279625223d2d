"""Products with weights of 4-bit codes: in every bit those of matmul with the dequantised weight.

A tile of the weight is dequantised in registers, rounded to x's dtype, and goes through shared memory to the very
instructions that matmul would use, in the same order over k. That order is why the codes are words of 32 bits here and
why the table is looked up by `tl.gather`: seeing narrow loads behind a product's operand, the compiler would deal out
k in another order, to read them faster.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.dequantize_4bit import (
    form_dtypes,
    form_name,
    format_options,
    forms,
    load_scales,
    load_weight,
)
from octavo.kernels.gpu.matmul import GROUP_M, first_of_tile, store_tile
from octavo.kernels.gpu.variant import Variant
from octavo.kernels.matmul_4bit import CodeFormat, Packed4Bit


@triton.jit(do_not_specialize=["num_rows"])
def matmul_4bit_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    table_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    num_cols,
    k,
    x_stride,
    code_stride,
    GATED: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`matmul_kernel` of a weight [num_cols, k], gated [2 * num_cols, k], as `load_weight` reads it."""
    first_row, first_col = first_of_tile(num_rows, num_cols, BLOCK_M, BLOCK_N, GROUP_M)
    rows, cols, columns_of_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_mask = rows < num_rows - first_row
    num_groups = k // GROUP_SIZE
    x_ptr += first_row * x_stride
    codes_ptr += first_col * (code_stride // 4)
    scales_ptr += first_col * num_groups
    up_codes_ptr = codes_ptr + tl.cast(num_cols, tl.int64) * (code_stride // 4)
    up_scales_ptr = scales_ptr + tl.cast(num_cols, tl.int64) * num_groups
    up_offsets_ptr = offsets_ptr
    if offsets_ptr is not None:
        offsets_ptr += first_col * num_groups
        up_offsets_ptr = offsets_ptr + tl.cast(num_cols, tl.int64) * num_groups
    x_offsets = rows[:, None] * x_stride + columns_of_k[None, :]
    present = tl.minimum(cols, num_cols - first_col - 1).to(tl.int32)
    table = tl.load(table_ptr + tl.arange(0, 16))
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Scales come a turn ahead: too narrow for an asynchronous copy, they would be waited for.
    scales, offsets = load_scales(scales_ptr, offsets_ptr, present, 0, k, GROUP_SIZE, UNIT, BLOCK_K)
    if GATED:
        up_scales, up_offsets = load_scales(up_scales_ptr, up_offsets_ptr, present, 0, k, GROUP_SIZE, UNIT, BLOCK_K)
    for begin in range(0, k, BLOCK_K):
        weight = load_weight(
            codes_ptr, table, scales, offsets, present, begin, code_stride, SHIFT, UNIT, BLOCK_N, BLOCK_K
        )
        scales, offsets = load_scales(scales_ptr, offsets_ptr, present, begin + BLOCK_K, k, GROUP_SIZE, UNIT, BLOCK_K)
        mask = row_mask[:, None] & (columns_of_k[None, :] < k - begin)
        x = tl.load(x_ptr + begin + x_offsets, mask=mask, other=0.0)
        sums = tl.dot(x, weight.to(x.dtype).T, sums, input_precision="ieee")
        if GATED:
            up = load_weight(
                up_codes_ptr, table, up_scales, up_offsets, present, begin, code_stride, SHIFT, UNIT, BLOCK_N, BLOCK_K
            )
            up_scales, up_offsets = load_scales(
                up_scales_ptr, up_offsets_ptr, present, begin + BLOCK_K, k, GROUP_SIZE, UNIT, BLOCK_K
            )
            up_sums = tl.dot(x, up.to(x.dtype).T, up_sums, input_precision="ieee")
    store_tile(
        sums,
        up_sums,
        bias_ptr,
        residual_ptr,
        out_ptr,
        first_row,
        first_col,
        num_rows,
        num_cols,
        GATED,
        BLOCK_M,
        BLOCK_N,
    )


@dataclass(frozen=True, slots=True)
class Tile:
    """A shape of `matmul_4bit_kernel`, and the most rows that it is for."""

    max_rows: float
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# As in matmul: few rows, then many; never 64 rows with four warps. Few: two blocks on a processor, one of which
# dequantises while the other multiplies, even where a weight has 4096 rows.
TILES = {  # by bytes of an element and whether gated
    (2, False): (Tile(16, 16, 16, 256, 4, 4), Tile(128, 32, 64, 64, 4, 4), Tile(float("inf"), 128, 64, 32, 2, 3)),
    (2, True): (Tile(16, 16, 32, 128, 4, 4), Tile(128, 32, 64, 64, 4, 3), Tile(float("inf"), 64, 32, 64, 2, 3)),
    (4, False): (Tile(16, 16, 32, 32, 4, 3), Tile(float("inf"), 64, 64, 16, 4, 3)),
    (4, True): (Tile(16, 16, 16, 32, 4, 3), Tile(float("inf"), 64, 32, 16, 4, 3)),
}


def _options(form: CodeFormat, tile: Tile, gated: bool) -> dict[str, Any]:
    return format_options(form, tile.block_k) | {
        "GATED": gated,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }


def launch(
    x: Tensor, weight: Packed4Bit, bias: Tensor | None, residual: Tensor | None, out: Tensor, gated: bool = False
) -> None:
    """x: [m, k], rows may be strided; out: [m, n], gated [m, n / 2]; see `octavo.kernels.matmul_4bit`."""
    num_rows, num_cols = out.shape
    tile = next(tile for tile in TILES[x.dtype.itemsize, gated] if num_rows <= tile.max_rows)
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(num_cols, tile.block_n),)
    matmul_4bit_kernel[grid](
        x,
        weight.codes.view(torch.int32),
        weight.scales,
        weight.offsets,
        weight.table,
        bias,
        residual,
        out,
        num_rows,
        num_cols,
        weight.k,
        x.stride(0),
        weight.k // 2,
        **_options(weight.format, tile, gated),
    )


def variants() -> Iterator[Variant]:
    """Every tile in every dtype with every kind of format: with bias and residual, gated, and the output head's."""
    for form in forms():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for what, gated, bias, residual, out in (
                ("plain", False, torch.float32, dtype, dtype),
                ("gated", True, None, None, dtype),
                ("head", False, None, None, torch.float32),
            ):
                for tile in TILES[dtype.itemsize, gated]:
                    args = (dtype, *form_dtypes(form), bias, residual, out, 1, 4096, 4096, 4096, 2048)
                    name = f"{what}, {str(dtype).removeprefix('torch.')}, {form_name(form)}, {tile.block_m} rows"
                    yield Variant(name, matmul_4bit_kernel, args, _options(form, tile, gated))
