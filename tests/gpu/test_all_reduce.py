"""What a rank adds in an all-reduce: the bits of float32 sums in a balanced tree, with what is added once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.gpu import all_reduce as gpu

Poison = Callable[..., Tensor]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("num_parts", "size"), [(1, 32), (2, 16), (3, 1023), (4, 1040), (5, 48), (7, 1040), (8, 32)])
def test_sum_in_a_tree(num_parts: int, size: int, dtype: torch.dtype, in_poison: Poison) -> None:
    torch.manual_seed(size)
    parts = in_poison(torch.randn(num_parts, size) * 10.0 ** torch.arange(num_parts)[:, None].fmod(3))
    bias, residual = in_poison(torch.randn(48)), in_poison(torch.randn(size).to(dtype))
    out = in_poison(torch.full((size,), torch.nan, dtype=dtype))
    gpu.launch(parts, out, 37, 48, bias, residual)
    columns = torch.arange(37, 37 + size, device=parts.device) % 48
    assert torch.equal(out, reference.sum_parts(parts, bias[columns], residual, dtype))
    narrow = in_poison(parts.to(dtype))
    gpu.launch(narrow, out, 0, 1, None, None)
    assert torch.equal(out, reference.sum_parts(narrow, None, None, dtype))
