"""Rotary embedding of queries and keys, fused with writing keys and values to the paged cache."""

import ctypes

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import device, kernels
from octavo.kernels.checks import check, compute_dtypes
from octavo.kernels.cpu.library import Args, address, launch

QUANTISED = (torch.int8, torch.float8_e4m3fn)


class _Args(Args):
    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("qkv", ctypes.c_void_p),
        ("cos_sin", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("rotary_size", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
    ]


def check_cache(kv_cache: Tensor, kv_scales: Tensor | None) -> tuple[torch.dtype, ...]:
    """The types of queries, keys and values that go with a layer's cache.

    Raises ValueError unless the kernels in use can read the cache, scales included.
    """
    dtypes = compute_dtypes() if kernels() == "native" else (*compute_dtypes(), *QUANTISED)
    check(kv_cache, "kv_cache", (None, 2, None, None, None), dtypes)
    if (kv_cache.dtype in QUANTISED) != (kv_scales is not None):
        raise ValueError(
            f"kv_scales: {'missing' if kv_scales is None else 'given'}, with a cache of {kv_cache.dtype}; "
            f"expected with {' and '.join(map(str, QUANTISED))} alone"
        )
    if kv_scales is not None:
        check(kv_scales, "kv_scales", kv_cache.shape[:4], torch.float32)
    if kv_cache.dtype == torch.float8_e4m3fn and kernels() == "triton":
        from octavo.kernels.gpu.device import has_float8

        if not has_float8(device()):
            raise ValueError("kv_cache: dtype is torch.float8_e4m3fn, which this chip lacks; use torch.int8")
    if kv_scales is None:
        return (kv_cache.dtype,)
    return tuple(dtype for dtype in compute_dtypes() if dtype != torch.float32)


def rotary_kv_write(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv_cache: Tensor,
    num_heads: int,
    kv_scales: Tensor | None = None,
) -> None:
    """Rotate queries and keys; write keys and values to their slots.

    qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_size], whose queries and keys are rotated in place; cos_sin:
    [max_positions, rotary_size] float32, cosines then sines of the first rotary_size / 2 pairs; positions: [tokens]
    int32; slots: [tokens] int64, block * block_size + offset; kv_cache: [num_blocks, 2, num_kv_heads, block_size,
    head_size], dtype of qkv, inside a tile in the order of `reference.tiles`. Positions and slots are not checked
    against their ranges. Raises ValueError on a wrong argument.
    Su et al., arXiv 2104.09864; the halves of a head are rotated, as Llama checkpoints expect.

    Of Triton's kernels and plain torch alone: a negative slot, whose row is padding and is left alone; and, for qkv of
    16 bits, a cache of int8 or float8_e4m3fn, whose kv_scales [num_blocks, 2, num_kv_heads, block_size] float32 get
    what the stored row of a head is to be multiplied with: its greatest magnitude / 127, or / 448.
    """
    dtypes = check_cache(kv_cache, kv_scales)
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    tokens = qkv.shape[0]
    check(qkv, "qkv", (None, (num_heads + 2 * num_kv_heads) * head_size), dtypes)
    check(cos_sin, "cos_sin", (None, None), torch.float32)
    check(positions, "positions", (tokens,), torch.int32)
    check(slots, "slots", (tokens,), torch.int64)
    if cos_sin.shape[1] > head_size or cos_sin.shape[1] % 2:
        raise ValueError(f"cos_sin: rotary size is {cos_sin.shape[1]}, expected even and at most {head_size}")
    if kernels() == "triton":
        from octavo.kernels.gpu import rotary_kv_write as gpu

        gpu.launch(qkv, cos_sin, positions, slots, kv_cache, num_heads, kv_scales)
        return
    if kernels() == "torch":
        reference.rotary_kv_write(qkv, cos_sin, positions, slots, kv_cache, num_heads, kv_scales)
        return
    args = _Args(
        tokens,
        address(qkv),
        address(cos_sin),
        address(positions),
        address(slots),
        address(kv_cache),
        qkv.stride(0),
        num_heads,
        num_kv_heads,
        head_size,
        cos_sin.shape[1],
        block_size,
        qkv.dtype == torch.bfloat16,
    )
    launch("octavo_rotary_kv_write", args)
