"""embedding: the very rows of a shard, zeros for ids of other shards, so that shards add up to the whole."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.kernels import backend
from octavo.kernels.embedding import embedding
from octavo.kernels.matmul import PackedWeight

Poison = Callable[..., Tensor]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("k", [2, 48, 1024, 1040])
def test_shards_add_up(k: int, dtype: torch.dtype, in_poison: Poison) -> None:
    torch.manual_seed(k)
    whole, edges = torch.randn(23, k).to(dtype), [0, 1, 9, 23]
    ids = torch.tensor([0, 22, 1, 8, 9, 0, 22], dtype=torch.int32)
    total = torch.zeros(len(ids), k, dtype=dtype)
    for begin, end in zip(edges, edges[1:], strict=False):
        weight = in_poison(whole[begin:end].contiguous())
        shard = PackedWeight(weight.view(-1), end - begin, k)
        out = in_poison(torch.full((len(ids), k), torch.nan, dtype=dtype))
        assert embedding(ids.to(out.device), shard, out, begin) is out
        inside = ((ids >= begin) & (ids < end))[:, None]
        assert torch.equal(out.cpu(), torch.where(inside, whole[ids], torch.zeros((), dtype=dtype)))
        total += out.cpu()
    assert torch.equal(total, whole[ids])


def test_row_behind_2_to_the_31_elements() -> None:
    n, k = (1 << 16) + 2, 1 << 15
    weight = torch.empty(n * k, dtype=torch.bfloat16, device=backend.device())  # most of it is never touched
    row = weight[-k:].copy_(torch.arange(k))
    ids = torch.tensor([n - 1], dtype=torch.int32, device=weight.device)
    assert torch.equal(embedding(ids, PackedWeight(weight, n, k))[0], row)
