"""Embedding lookup in a packed weight, so that tied embeddings need no second copy."""

import ctypes

import torch
from torch import Tensor

from octavo.kernels.backend import kernels
from octavo.kernels.checks import check, output
from octavo.kernels.cpu.library import Args, address, launch
from octavo.kernels.matmul import PackedWeight


class _Args(Args):
    _fields_ = [
        ("count", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
    ]


def embedding(token_ids: Tensor, weight: PackedWeight, out: Tensor | None = None) -> Tensor:
    """Rows of the weight. token_ids: [tokens] int32, each in [0, weight.n), not checked. Returns [tokens, k]."""
    check(token_ids, "token_ids", (None,), torch.int32)
    if weight.num_parts != 1:
        raise ValueError(f"weight: has {weight.num_parts} parts, expected 1")
    count = token_ids.shape[0]
    out = output(out, (count, weight.k), weight.dtype)
    if kernels() == "torch":
        return out.copy_(weight.data.view(-1, weight.k)[token_ids])
    is_bf16 = weight.dtype == torch.bfloat16
    launch("octavo_embedding", _Args(count, address(out), address(weight.data), address(token_ids), weight.k, is_bf16))
    return out
