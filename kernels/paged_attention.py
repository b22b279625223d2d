"""Causal attention over a paged KV cache for a mixed batch of prefill chunks and decodes."""

import ctypes
import math

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import check, output
from octavo.kernels.cpu.library import Args, address, launch
from octavo.kernels.rotary_kv_write import check_cache

BLOCK_SIZES = (16, 32, 64)
MAX_HEAD_SIZE = 256


class _Args(Args):
    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("token_begins", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("q_stride", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("first_head", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
    ]


def paged_attention(
    qkv: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    token_begins: Tensor,
    context_lens: Tensor,
    num_heads: int,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
    *,
    group_size: int | None = None,
    first_head: int = 0,
    kv_scales: Tensor | None = None,
    soft_cap: float = 0.0,
    lse: Tensor | None = None,
    max_query_len: int | None = None,
    max_context_len: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v over each sequence's cached tokens, causal; a query's bits depend on its sequence alone.

    qkv: [tokens, width], the rotated queries in its first num_heads * head_size columns; kv_cache: [num_blocks, 2,
    num_kv_heads, block_size, head_size], tiles as `rotary_kv_write` leaves them; block_tables: [sequences, max_blocks]
    int32; token_begins: [sequences + 1] int32, where each sequence's tokens begin, and last their number; context_lens:
    [sequences] int32, cached tokens, the new ones (the last ones) included; window: a token sees itself and window - 1
    before it, 0 for all. Returns [tokens, num_heads * head_size], in `out` if given. Block ids and lengths are not
    checked against their ranges. Raises ValueError on a wrong argument. Online softmax: Milakov and Gimelshein, arXiv
    1805.02867.

    group_size: query heads of a KV head, by default num_heads / num_kv_heads. Where ranks divide the heads, the first
    and the last group may be cut: first_head is then the place of the first query head in its group.

    Of Triton's kernels and plain torch alone: a cache of int8 or float8_e4m3fn with `kv_scales`, as `rotary_kv_write`
    leaves them, for queries of 16 bits; soft_cap: scores become soft_cap * tanh(score / soft_cap), 0 for off; lse:
    [tokens, num_heads] float32, is filled with the natural logarithm of each softmax's denominator. Sequences without
    new tokens may be among the others, and tokens past token_begins' last are left alone.

    max_query_len and max_context_len bound the new and the cached tokens of any sequence; by default the tokens of the
    call and the width of the tables do. Triton's kernels derive their launch from these and the shapes, never from
    what the tensors hold, and keep float32 partial results where few programs share long contexts.
    """
    check(qkv, "qkv", (None, None), check_cache(kv_cache, kv_scales))
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    check(block_tables, "block_tables", (None, None), torch.int32)
    sequences = block_tables.shape[0]
    check(token_begins, "token_begins", (sequences + 1,), torch.int32)
    check(context_lens, "context_lens", (sequences,), torch.int32)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"kv_cache: block size is {block_size}, expected one of {BLOCK_SIZES}")
    if head_size % 16 or head_size > MAX_HEAD_SIZE:
        raise ValueError(f"kv_cache: head size is {head_size}, expected a multiple of 16, at most {MAX_HEAD_SIZE}")
    group_size = group_size or max(num_heads // num_kv_heads, 1)
    if -(-(first_head + num_heads) // group_size) != num_kv_heads or num_heads * head_size > qkv.shape[1]:
        raise ValueError(f"num_heads: is {num_heads}, with {num_kv_heads} KV heads and a width of {qkv.shape[1]}")
    if not 0 <= first_head < group_size:
        raise ValueError(f"first_head: is {first_head}, expected a place in a group of {group_size}")
    tokens = qkv.shape[0]
    out = output(out, (tokens, num_heads * head_size), qkv.dtype)
    if lse is not None:
        check(lse, "lse", (tokens, num_heads), torch.float32)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: is {scale}, expected a positive number")
    if window < 0:
        raise ValueError(f"window: is {window}, expected a number of tokens, or 0 for all")
    if not 0 <= soft_cap < math.inf:
        raise ValueError(f"soft_cap: is {soft_cap}, expected a positive number, or 0 for off")
    if kernels() == "native" and (soft_cap or lse is not None):
        raise ValueError("soft_cap and lse: the native kernels have neither")
    if kernels() == "triton":
        from octavo.kernels.gpu import paged_attention as gpu

        gpu.launch(
            out,
            lse,
            qkv,
            kv_cache,
            kv_scales,
            block_tables,
            token_begins,
            context_lens,
            num_heads,
            group_size,
            first_head,
            scale,
            window,
            soft_cap,
            tokens if max_query_len is None else max_query_len,
            block_tables.shape[1] * block_size if max_context_len is None else max_context_len,
        )
        return out
    if kernels() == "torch":
        return out.copy_(
            reference.paged_attention(
                qkv,
                kv_cache,
                block_tables,
                token_begins,
                context_lens,
                num_heads,
                scale,
                window,
                group_size=group_size,
                first_head=first_head,
                kv_scales=kv_scales,
                soft_cap=soft_cap,
                lse=lse,
            )
        )
    args = _Args(
        tokens,
        address(out),
        address(qkv),
        address(kv_cache),
        address(block_tables),
        address(token_begins),
        address(context_lens),
        block_tables.stride(0),
        qkv.stride(0),
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        window,
        group_size,
        first_head,
        scale,
        qkv.dtype == torch.bfloat16,
    )
    launch("octavo_paged_attention", args)
    return out
