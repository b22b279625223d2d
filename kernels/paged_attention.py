"""Causal attention over a paged KV cache for a mixed batch of prefill chunks and decodes."""

import ctypes

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import COMPUTE_DTYPES, check, output
from octavo.kernels.cpu.library import Args, address, launch

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
) -> Tensor:
    """softmax(q k^T * scale) v over each sequence's cached tokens, causal; a query's bits depend on its sequence alone.

    qkv: [tokens, width], the rotated queries in its first num_heads * head_size columns; kv_cache: [num_blocks, 2,
    num_kv_heads, block_size, head_size], tiles as `rotary_kv_write` leaves them; block_tables: [sequences, max_blocks]
    int32; token_begins: [sequences + 1] int32, where each sequence's tokens begin, and last their number; context_lens:
    [sequences] int32, cached tokens, the new ones (the last ones) included; window: a token sees itself and window - 1
    before it, 0 for all. Returns [tokens, num_heads * head_size], in `out` if given. Block ids and lengths are not
    checked against their ranges. Raises ValueError on a wrong argument. Online softmax: Milakov and Gimelshein, arXiv
    1805.02867.
    """
    check(kv_cache, "kv_cache", (None, 2, None, None, None), COMPUTE_DTYPES)
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    check(qkv, "qkv", (None, None), kv_cache.dtype)
    check(block_tables, "block_tables", (None, None), torch.int32)
    sequences = block_tables.shape[0]
    check(token_begins, "token_begins", (sequences + 1,), torch.int32)
    check(context_lens, "context_lens", (sequences,), torch.int32)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"kv_cache: block size is {block_size}, expected one of {BLOCK_SIZES}")
    if head_size % 16 or head_size > MAX_HEAD_SIZE:
        raise ValueError(f"kv_cache: head size is {head_size}, expected a multiple of 16, at most {MAX_HEAD_SIZE}")
    if num_heads % num_kv_heads or num_heads * head_size > qkv.shape[1]:
        raise ValueError(f"num_heads: is {num_heads}, with {num_kv_heads} KV heads and a width of {qkv.shape[1]}")
    tokens = qkv.shape[0]
    out = output(out, (tokens, num_heads * head_size), qkv.dtype)
    if kernels() == "torch":
        return out.copy_(
            reference.paged_attention(qkv, kv_cache, block_tables, token_begins, context_lens, num_heads, scale, window)
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
        scale,
        qkv.dtype == torch.bfloat16,
    )
    launch("octavo_paged_attention", args)
    return out
