"""Embedding lookup in a packed weight, so that tied embeddings need no second copy."""

import ctypes

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import check, output
from octavo.kernels.cpu.library import Args, address, launch
from octavo.kernels.matmul import CompressedArgs, PackedWeight, compressed_args


class _Args(Args):
    _fields_ = [
        ("count", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("first_id", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
    ]


class _CompressedArgs(Args):
    _fields_ = [
        ("count", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("first_id", ctypes.c_int64),
        ("weight", CompressedArgs),
    ]


def embedding(token_ids: Tensor, weight: PackedWeight, out: Tensor | None = None, first_id: int = 0) -> Tensor:
    """Rows of the weight, which holds those of the ids from `first_id` on; zeros for an id that is not among them.

    token_ids: [tokens] int32. Returns [tokens, k], in `out` if given; where ranks hold shards of the vocabulary, the
    sum of theirs is the whole. Raises ValueError on a wrong argument.
    """
    check(token_ids, "token_ids", (None,), torch.int32)
    if weight.num_parts != 1:
        raise ValueError(f"weight: has {weight.num_parts} parts, expected 1")
    count = token_ids.shape[0]
    out = output(out, (count, weight.k), weight.dtype)
    if kernels() == "torch":
        return out.copy_(reference.embedding(token_ids, weight.data.view(-1, weight.k), first_id))
    if kernels() == "triton":
        from octavo.kernels.gpu import embedding as gpu  # here, since importing Triton takes its time

        gpu.launch(token_ids, weight.data.view(-1, weight.k), first_id, out)
        return out
    if (compressed := compressed_args(weight)) is not None:
        compressed_rows = _CompressedArgs(count, address(out), address(token_ids), first_id, compressed)
        launch("octavo_embedding_compressed", compressed_rows)
        return out
    args = _Args(
        count,
        address(out),
        address(weight.data),
        address(token_ids),
        first_id,
        weight.n,
        weight.k,
        weight.dtype == torch.bfloat16,
    )
    launch("octavo_embedding", args)
    return out
