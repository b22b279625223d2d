"""Embedding lookup in a packed weight, so that tied embeddings need no second copy."""

import torch
from torch import Tensor

from octavo.kernels.checks import check
from octavo.kernels.cpu.library import address, i64, library
from octavo.kernels.matmul import PackedWeight


def embedding(token_ids: Tensor, weight: PackedWeight) -> Tensor:
    """Rows of the weight. token_ids: [tokens] int32, each in [0, weight.n) (not checked); returns [tokens, k]."""
    check(token_ids, "token_ids", (None,), torch.int32)
    lib = library()
    if lib is None:
        return weight.data.view(-1, weight.k)[token_ids]
    out = torch.empty((token_ids.shape[0], weight.k), dtype=weight.dtype)
    lib.octavo_embedding(
        address(out),
        address(weight.data),
        address(token_ids),
        i64(token_ids.shape[0]),
        i64(weight.k),
        weight.dtype == torch.bfloat16,
    )
    return out
