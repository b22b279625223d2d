"""Rotary embedding fused with the write to the paged cache: see `launch`."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.variant import Variant
from octavo.kernels.reference import QUANTISED_MAX


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _stored(x, scale, dtype: tl.constexpr):
    """x / scale to nearest even. Adding and taking away 1.5 * 2^23 leaves an integer's bits alone.

    It is never out of range: of int8's 127 at most 127.1, of float8's 448 at most 448.9, in rows of bfloat16's least
    numbers, of whose scale float32 holds 8 bits. An infinite row's infinities become NaN, in int8 0.
    """
    scale = tl.where(scale == 0.0, 1.0, scale)
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if dtype == tl.int8:
        x = (x + 12582912.0) - 12582912.0
    return x.to(dtype)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def rotary_kv_write_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    scales_ptr,
    qkv_stride,
    num_heads,
    num_kv_heads,
    HEAD_SIZE: tl.constexpr,
    ROTARY_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GREATEST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """BLOCK_HEADS of a token's heads: (a, b) becomes (a cos - b sin, b cos + a sin) for the pairs of queries and keys,
    a of a head's first half, b of its second. A thread has both of a pair, and none reads what is rotated already.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head_mask = heads < num_heads + 2 * num_kv_heads
    is_rotated = heads < num_heads + num_kv_heads
    half: tl.constexpr = ROTARY_SIZE // 2
    pairs, rest = tl.arange(0, BLOCK_HALF), ROTARY_SIZE + tl.arange(0, BLOCK_REST)
    pair_mask = head_mask[:, None] & (pairs < half)[None, :]
    rest_mask = head_mask[:, None] & (rest < HEAD_SIZE)[None, :]

    pair_ptrs = qkv_ptr + token * qkv_stride + heads[:, None] * HEAD_SIZE + pairs[None, :]
    rest_ptrs = qkv_ptr + token * qkv_stride + heads[:, None] * HEAD_SIZE + rest[None, :]
    a = tl.load(pair_ptrs, mask=pair_mask, other=0.0)
    b = tl.load(pair_ptrs + half, mask=pair_mask, other=0.0)
    table_ptrs = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * ROTARY_SIZE + pairs
    cos = tl.broadcast_to(tl.load(table_ptrs, mask=pairs < half, other=0.0)[None, :], a.shape)
    sin = tl.broadcast_to(tl.load(table_ptrs + half, mask=pairs < half, other=0.0)[None, :], a.shape)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    a = tl.where(is_rotated[:, None], tl.fma(wide_a, cos, -(wide_b * sin)).to(a.dtype), a)
    b = tl.where(is_rotated[:, None], tl.fma(wide_b, cos, wide_a * sin).to(b.dtype), b)
    tl.debug_barrier()  # where there are fewer pairs than threads, several read one, which one of them writes
    tl.store(pair_ptrs, a, mask=pair_mask & is_rotated[:, None])
    tl.store(pair_ptrs + half, b, mask=pair_mask & is_rotated[:, None])

    kv_head = heads - num_heads  # keys' heads, then values'
    write_mask = head_mask & (kv_head >= 0)
    places = (slot // BLOCK_SIZE * (2 * num_kv_heads) + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    if scales_ptr is not None:
        a, b = a.to(tl.float32), b.to(tl.float32)
        greatest = _greater(tl.reduce(tl.abs(a), 1, _greater), tl.reduce(tl.abs(b), 1, _greater))
        if ROTARY_SIZE < HEAD_SIZE:
            tail = tl.load(rest_ptrs, mask=rest_mask, other=0.0).to(tl.float32)
            greatest = _greater(greatest, tl.reduce(tl.abs(tail), 1, _greater))
        scale = tl.div_rn(greatest, tl.full(greatest.shape, GREATEST, tl.float32))
        tl.store(scales_ptr + places, scale, mask=write_mask)
        a = _stored(a, scale, cache_ptr.dtype.element_ty)
        b = _stored(b, scale, cache_ptr.dtype.element_ty)
    cache_ptrs = cache_ptr + (places * HEAD_SIZE)[:, None]
    tl.store(cache_ptrs + pairs[None, :], a, mask=pair_mask & write_mask[:, None])
    tl.store(cache_ptrs + half + pairs[None, :], b, mask=pair_mask & write_mask[:, None])
    if ROTARY_SIZE < HEAD_SIZE:
        if scales_ptr is not None:
            tail = _stored(tail, scale, cache_ptr.dtype.element_ty)
        else:
            tail = tl.load(rest_ptrs, mask=rest_mask, other=0.0)
        tl.store(cache_ptrs + rest[None, :], tail, mask=rest_mask & write_mask[:, None])


def _options(
    all_heads: int, head_size: int, rotary_size: int, block_size: int, cache_dtype: torch.dtype
) -> dict[str, Any]:
    block_half = triton.next_power_of_2(rotary_size // 2)
    return {
        "HEAD_SIZE": head_size,
        "ROTARY_SIZE": rotary_size,
        "BLOCK_SIZE": block_size,
        "GREATEST": QUANTISED_MAX.get(cache_dtype, 0.0),
        "BLOCK_HEADS": min(triton.next_power_of_2(all_heads), max(1, 1024 // block_half)),
        "BLOCK_HALF": block_half,
        "BLOCK_REST": triton.next_power_of_2(max(head_size - rotary_size, 1)),
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def variants() -> Iterator[Variant]:
    """Every pair of types; head sizes, partial rotation and block sizes take turns."""
    sizes = ((64, 64), (128, 128), (80, 80), (96, 48), (256, 64), (16, 16), (80, 32))
    turn = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for cache_dtype in (dtype, *(QUANTISED_MAX if dtype != torch.float32 else ())):
            for heads in (3, 48):
                (head_size, rotary_size), block_size = sizes[turn % 7], (16, 32, 64)[turn % 3]
                turn += 1
                types = "-".join(str(x).removeprefix("torch.") for x in dict.fromkeys((dtype, cache_dtype)))
                name = f"{types}, {heads} heads of {head_size}, {rotary_size} rotated, block {block_size}"
                scales = None if cache_dtype == dtype else torch.float32
                args = (dtype, torch.float32, torch.int32, torch.int64, cache_dtype, scales, 4096, heads - 2, 1)
                options = _options(heads, head_size, rotary_size, block_size, cache_dtype)
                yield Variant(name, rotary_kv_write_kernel, args, options)


def launch(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv_cache: Tensor,
    num_heads: int,
    kv_scales: Tensor | None,
) -> None:
    """Checked arguments of the op. The grid depends on shapes alone, so it may be captured."""
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    if not qkv.shape[0]:
        return
    all_heads = num_heads + 2 * num_kv_heads
    options = _options(all_heads, head_size, cos_sin.shape[1], block_size, kv_cache.dtype)
    rotary_kv_write_kernel[qkv.shape[0], triton.cdiv(all_heads, options["BLOCK_HEADS"])](
        qkv,
        cos_sin,
        positions,
        slots,
        kv_cache,
        kv_scales,
        qkv.stride(0),
        num_heads,
        num_kv_heads,
        **options,
    )
