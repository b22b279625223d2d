"""Ordinary launches of small Triton kernels, through the compiler and the execution of its PTX."""

import pytest
import torch
import triton
import triton.language as tl

import gpu_without_gpu
from gpu_without_gpu.errors import OutOfBounds


@pytest.fixture(autouse=True, params=[80, 90])
def arch(request: pytest.FixtureRequest) -> None:
    gpu_without_gpu.install(request.param)


@triton.jit
def add(x_ptr, y_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64])
@pytest.mark.parametrize("num_elements", [1, 63, 64, 65, 200])
def test_addition(dtype: torch.dtype, num_elements: int) -> None:
    x, y = ((torch.randn(num_elements) * 9).to(dtype) for _ in range(2))
    out = torch.full_like(x, 77)
    add[(triton.cdiv(num_elements, 64),)](x, y, out, num_elements, BLOCK=64, num_warps=1)
    assert torch.equal(out, x + y)


def test_out_of_bounds() -> None:
    x = torch.zeros(64)
    with pytest.raises(OutOfBounds, match="byte 256 of the 256 of x_ptr"):
        add[(2,)](x, x, x, 65, BLOCK=64, num_warps=1)
