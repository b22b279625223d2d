"""Embedding lookup in one rank's part of the vocabulary."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.variant import Variant


@triton.jit(do_not_specialize=["first_id", "num_ids"])
def embedding_kernel(token_ids_ptr, weight_ptr, out_ptr, first_id, num_ids, k, BLOCK: tl.constexpr):
    """BLOCK columns of one token's row: weight[id - first_id], or zeros where that is not one of the num_ids rows."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids_ptr + token).to(tl.int64) - first_id
    inside = (row >= 0) & (row < num_ids)
    values = tl.load(weight_ptr + row * k + cols, mask=inside & (cols < k), other=0.0)
    tl.store(out_ptr + token * k + cols, values, mask=cols < k)


_OPTIONS: dict[str, Any] = {"BLOCK": 1024, "num_warps": 4}


def launch(token_ids: Tensor, weight: Tensor, first_id: int, out: Tensor) -> None:
    """token_ids: [tokens] int32; weight: [n, k]; out: [tokens, k]. See `octavo.kernels.embedding`."""
    num_ids, k = weight.shape
    grid = (token_ids.shape[0], triton.cdiv(k, _OPTIONS["BLOCK"]))
    embedding_kernel[grid](token_ids, weight, out, first_id, num_ids, k, **_OPTIONS)


def variants() -> Iterator[Variant]:
    """Every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield Variant(name, embedding_kernel, (torch.int32, dtype, dtype, 0, 4096, 4096), _OPTIONS)
