"""What a rank adds in an all-reduce: the bits of float32 sums in rank order."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.gpu import all_reduce as gpu

Poison = Callable[..., Tensor]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("num_ranks", "size"), [(2, 16), (3, 1023), (4, 1024), (4, 1040), (7, 1040), (8, 32)])
def test_sum_in_rank_order(num_ranks: int, size: int, dtype: torch.dtype, in_poison: Poison) -> None:
    torch.manual_seed(size)
    parts = in_poison((torch.randn(num_ranks, size) * 10.0 ** torch.arange(num_ranks)[:, None].fmod(3)).to(dtype))
    out = in_poison(torch.full((size,), torch.nan, dtype=dtype))
    gpu.launch(parts, out)
    assert torch.equal(out, reference.sum_ranks(parts))
