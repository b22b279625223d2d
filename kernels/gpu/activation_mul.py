"""The gate of an MLP: an activation of one half of a row times the other half."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.variant import Variant


@triton.jit
def activation_mul_kernel(x_ptr, out_ptr, size, x_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """out = act(x[:, :size]) * x[:, size:], one row and BLOCK columns; act is SiLU or the tanh-approximated GELU."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + cols, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # tanh(t) = 2 * sigmoid(2 t) - 1, so (1 + tanh(t)) / 2 is a sigmoid
        gate_log_odds = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    else:
        gate_log_odds = gate
    tl.store(
        out_ptr + row * size + cols, (gate / (1.0 + tl.exp(-gate_log_odds)) * up).to(out_ptr.dtype.element_ty), mask
    )


def _options(gelu: bool) -> dict[str, Any]:
    return {"GELU": gelu, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}


def launch(x: Tensor, out: Tensor, gelu: bool) -> None:
    """x: [rows, 2 * size], rows may be strided; out: [rows, size]. See `octavo.kernels.activation_mul`."""
    rows, size = out.shape
    options = _options(gelu)
    activation_mul_kernel[(rows, triton.cdiv(size, options["BLOCK"]))](x, out, size, x.stride(0), **options)


def variants() -> Iterator[Variant]:
    """Both activations in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for gelu in (False, True):
            name = f"{'gelu' if gelu else 'silu'}, {str(dtype).removeprefix('torch.')}"
            yield Variant(name, activation_mul_kernel, (dtype, dtype, 4096, 8192), _options(gelu))
