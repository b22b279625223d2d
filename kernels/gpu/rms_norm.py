"""Root mean square norm, after a residual is added or not."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.variant import Variant


@triton.jit
def rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, eps, size, stride, BLOCK: tl.constexpr):
    """out = x / sqrt(mean(x^2) + eps) * weight for one vector, x being rounded(residual + x) where there is a residual.

    Vectors: `size` apart in a row, rows `stride` apart, the same in x, residual and out. All of a vector is one block,
    so that the order of its sum depends on its size alone. Zhang and Sennrich, arXiv 1910.07467.
    """
    begin = tl.program_id(0).to(tl.int64) * stride + tl.program_id(1) * size
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    x = tl.load(x_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total = x + tl.load(residual_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + begin + cols, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, axis=0), size.to(tl.float32)) + eps))
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    tl.store(out_ptr + begin + cols, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def _options(size: int) -> dict[str, Any]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16), "enable_fp_fusion": False}


def launch(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: int,
    vectors: int,
    stride: int,
    size: int,
    eps: float,
) -> None:
    """Norm `vectors` vectors of `size` in each of `rows` rows. See `octavo.kernels.rms_norm`."""
    rms_norm_kernel[(rows, vectors)](x, residual, weight, out, eps, size, stride, **_options(size))


def variants() -> Iterator[Variant]:
    """Every block with and without a residual, in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (16 << i for i in range(11)):
            for residual in (None, dtype):
                form = "plain" if residual is None else "residual"
                name = f"{form}, {str(dtype).removeprefix('torch.')}, up to {size}"
                args = (dtype, residual, torch.float32, dtype, 1e-5, size, size)
                yield Variant(name, rms_norm_kernel, args, _options(size))
