"""Matrix products whose sums run over k in one order, whatever the tile.

A tile's shape depends on the number of rows, but a row's bits do not: an output is one accumulator that takes products
from k = 0 upwards, in every tile by the same instruction (mma.sync, whose sums over 16 values of k are the chip's own;
fma in float32), for k padded with zeros to the same multiple. wgmma and tcgen05 are faster on chips that have them, but
take 64 rows and four warps at least: no tile here has both, so that the compiler does not choose them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.variant import Variant


@triton.jit
def first_of_tile(num_rows, num_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first row and column of this program's tile.

    Programs that run at the same time share rows of x and of the weight in the cache: GROUP_M tiles of rows take turns,
    then comes the next tile of columns.
    """
    num_tiles_m = tl.cdiv(num_rows, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(num_cols, BLOCK_N)
    group, place = tl.program_id(0) // group_size, tl.program_id(0) % group_size
    group_m = tl.minimum(num_tiles_m - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + place % group_m).to(tl.int64) * BLOCK_M, (place // group_m).to(tl.int64) * BLOCK_N


@triton.jit
def store_tile(
    sums,
    up_sums,
    bias_ptr,
    residual_ptr,
    out_ptr,
    first_row,
    first_col,
    num_rows,
    num_cols,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = sums + bias + residual, or silu(gate) * up with the halves of sums + bias."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < num_rows - first_row, cols < num_cols - first_col
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + first_col + cols, mask=col_mask, other=0.0)[None, :]
        if GATED:
            up_sums += tl.load(bias_ptr + num_cols + first_col + cols, mask=col_mask, other=0.0)[None, :]
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * up_sums
    sums += 0.0  # a sum of -0 stays so or becomes 0, as k is padded or not: let it be 0
    first = first_row * num_cols + first_col
    places = rows[:, None] * num_cols + cols[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + first + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + first + places, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    num_cols,
    k,
    x_stride,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_MULTIPLE: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of out = x @ weight.T + bias + residual, or of silu(gate) * up with the halves of x @ weight.T + bias.

    x: [num_rows, k]; weight: [num_cols, k], gated [2 * num_cols, k]; out and residual: [num_rows, num_cols].
    """
    first_row, first_col = first_of_tile(num_rows, num_cols, BLOCK_M, BLOCK_N, GROUP_M)
    rows, cols, offsets = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_mask = rows < num_rows - first_row

    # Registers are short: offsets inside a tile fit 32 bits, and columns that do not exist repeat the last one, which
    # takes no mask. Rows are masked instead: where they are few, their loads would compete with the weight's.
    x_ptr += first_row * x_stride
    weight_ptr += first_col * k
    up_ptr = weight_ptr + tl.cast(num_cols, tl.int64) * k
    x_offsets = rows[:, None] * x_stride + offsets[None, :]
    weight_offsets = tl.minimum(cols, num_cols - first_col - 1).to(tl.int32)[:, None] * k + offsets[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, tl.cdiv(k, K_MULTIPLE) * K_MULTIPLE, BLOCK_K):
        k_mask = offsets[None, :] < k - begin
        x = tl.load(x_ptr + begin + x_offsets, mask=row_mask[:, None] & k_mask, other=0.0)
        weight = tl.load(weight_ptr + begin + weight_offsets, mask=k_mask, other=0.0)
        sums = tl.dot(x, weight.T, sums, input_precision="ieee")
        if GATED:
            up = tl.load(up_ptr + begin + weight_offsets, mask=k_mask, other=0.0)
            up_sums = tl.dot(x, up.T, up_sums, input_precision="ieee")
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
    """A shape of `matmul_kernel`, and the most rows that it is for."""

    max_rows: float
    block_m: int
    block_n: int
    gated_block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Few rows: as many bytes of the weight in flight as may be. Many: the largest tile that two warps' registers hold.
TILES = {
    2: (  # bytes of an element
        Tile(16, block_m=16, block_n=32, gated_block_n=32, block_k=64, num_warps=4, num_stages=6),
        Tile(128, block_m=32, block_n=64, gated_block_n=64, block_k=64, num_warps=4, num_stages=4),
        Tile(float("inf"), block_m=64, block_n=128, gated_block_n=32, block_k=32, num_warps=2, num_stages=4),
    ),
    4: (
        Tile(16, block_m=16, block_n=32, gated_block_n=16, block_k=32, num_warps=4, num_stages=3),
        Tile(float("inf"), block_m=64, block_n=64, gated_block_n=32, block_k=16, num_warps=4, num_stages=3),
    ),
}
K_MULTIPLE = {2: 64, 4: 32}
GROUP_M = 8


def _options(itemsize: int, tile: Tile, gated: bool) -> dict[str, Any]:
    return {
        "GATED": gated,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.gated_block_n if gated else tile.block_n,
        "BLOCK_K": tile.block_k,
        "K_MULTIPLE": K_MULTIPLE[itemsize],
        "GROUP_M": GROUP_M,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, gated: bool = False
) -> None:
    """x: [m, k], rows may be strided; weight: [n, k]; out: [m, n], gated [m, n / 2]; see `octavo.kernels.matmul`."""
    num_rows, num_cols = out.shape
    itemsize = x.dtype.itemsize
    tile = next(tile for tile in TILES[itemsize] if num_rows <= tile.max_rows)
    options = _options(itemsize, tile, gated)
    grid = (triton.cdiv(num_rows, options["BLOCK_M"]) * triton.cdiv(num_cols, options["BLOCK_N"]),)
    matmul_kernel[grid](x, weight, bias, residual, out, num_rows, num_cols, x.shape[1], x.stride(0), **options)


def variants() -> Iterator[Variant]:
    """Every tile in every dtype: with bias and residual, gated, and the output head's with its float32 result."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tile in TILES[dtype.itemsize]:
            for form, gated, bias, residual, out in (
                ("plain", False, torch.float32, dtype, dtype),
                ("gated", True, None, None, dtype),
                ("head", False, None, None, torch.float32),
            ):
                args = (dtype, dtype, bias, residual, out, 1, 4096, 4096, 4096)
                name = f"{form}, {str(dtype).removeprefix('torch.')}, {tile.block_m} rows"
                yield Variant(name, matmul_kernel, args, _options(dtype.itemsize, tile, gated))
